"""Convert an AutoAWQ GEMM checkpoint with compressed-tensors' own converter, for ``convert.py``.

    python compressed_tensors_convert.py SRC OUT_DIR

Runs in an environment that has compressed-tensors and imports nothing of awq_jax. The last line it prints is
JSON: seconds on one thread without the imports, megabytes of the tensor files written, peak memory of the process.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from compressed_tensors import __version__
from compressed_tensors.entrypoints.convert import AutoAWQConverter, convert_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("src", type=Path)
    parser.add_argument("out", type=Path, help="directory to create")
    args = parser.parse_args()

    torch.set_num_threads(1)
    settings = json.loads((args.src / "config.json").read_text())["quantization_config"]
    start, cpu = time.perf_counter(), time.process_time()
    converter = AutoAWQConverter.from_autoawq_config(settings)
    convert_checkpoint(args.src, args.out, converter, max_workers=1, device="cpu")
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    written = sum(file.stat().st_size for file in args.out.glob("*.safetensors")) / 1e6
    status = Path("/proc/self/status").read_text()  # getrusage would give the parent's peak, kept across exec
    row = {
        "to": "compressed-tensors", "version": __version__, "threads": 1, "workers": 1,
        "output_mb": round(written, 3), "seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3),
        "mb_per_second": round(written / seconds), "mb_per_cpu_second": round(written / cpu),
        "peak_rss_mb": int(status.split("VmHWM:")[1].split()[0]) // 1024,
    }  # fmt: skip
    print(json.dumps(row))


if __name__ == "__main__":
    main()
