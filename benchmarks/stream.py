"""Memory and resumption of `awq_jax.quantize_checkpoint`, on synthetic checkpoints with planted outliers.

    python benchmarks/stream.py make DIR --layers 116
    python benchmarks/stream.py memory DIR OUT --samples 16
    python benchmarks/stream.py peer DIR OUT --python AUTOAWQ_VENV/bin/python --seconds 600
    python benchmarks/stream.py kills DIR OUT --kills 25
    python benchmarks/stream.py make DEEP --layers 1000 --hidden 64 --inner 128 --vocab 256
    python benchmarks/stream.py deep DEEP OUT --options "group_size=32"

`make` writes a Llama-shaped checkpoint of random weights in which a few channels are large. `memory` runs
``awq-jax quantize`` in a process of its own and compares its peak with ``2.5 blocks + hidden states + 700
MB``. `peer` begins to do the same with AutoAWQ 0.2.9 (`autoawq_driver.py`; its environment: `vs_autoawq.py`), for
some time. `kills` sends SIGKILL at random moments, continues each time, and compares the files with those of a
run that nothing interrupted (`stream_faults`). `deep` counts compilations and watches memory from block to
block (`stream_deep`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import stream_faults

from awq_jax.convert.files.shards import ShardWriter, write_json

BASE = 700e6  # bytes


def make(directory: Path, layers: int, hidden: int, inner: int, vocab: int, dtype: str) -> None:
    """A checkpoint of ``layers`` blocks; every hundredth channel of the norms is ten times the others."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    kind = np.dtype(np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    writer = ShardWriter(directory, 512 << 20)

    made: dict[tuple[int, ...], list[np.ndarray]] = {}

    def add(name: str, *shape: int) -> None:
        """Three different tensors of a shape, in turn: random numbers take longer than all the rest."""
        values = made.setdefault(shape, [])
        if len(values) < 3:
            value = rng.standard_normal(shape, np.float32)
            if len(shape) == 1:
                value = 1 + 0.1 * value
                value[::100] *= 10
            else:
                value *= shape[1] ** -0.5
            values.append(value.astype(kind))
        values.append(values.pop(0))
        writer.add({name: values[-1]})

    add("model.embed_tokens.weight", vocab, hidden)
    for i in range(layers):
        for name, rows, columns in (
            *((f"self_attn.{p}_proj", hidden, hidden) for p in "qkvo"),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            add(f"model.layers.{i}.{name}.weight", rows, columns)
        add(f"model.layers.{i}.input_layernorm.weight", hidden)
        add(f"model.layers.{i}.post_attention_layernorm.weight", hidden)
    add("model.norm.weight", hidden)
    add("lm_head.weight", vocab, hidden)
    writer.close()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }
    write_json(directory / "config.json", config)


def tokens(directory: Path, where: Path, samples: int, length: int) -> Path:
    """Random calibration tokens as a file."""
    config = json.loads((directory / "config.json").read_text())
    shape = (samples, min(length, config["max_position_embeddings"]))
    path = where / f"tokens-{shape[0]}x{shape[1]}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.random.default_rng(1).integers(0, config["vocab_size"], shape).astype(np.int32))
    return path


def command(args: argparse.Namespace, out: Path, calib: Path, hidden: str = "") -> list[str]:
    quantize = [sys.executable, "-m", "awq_jax.cli", "quantize", str(args.directory), str(out)]
    return [*quantize, "--calib", str(calib), "--json", "--hidden", hidden or args.hidden, *args.options.split()]


def watched(argv: list[str], log: Path, limit: float = float("inf")) -> tuple[int, list[tuple[float, int]]]:
    """Exit code and resident bytes (seconds since the start, bytes) of a process, ten times a second.

    It is killed after ``limit`` seconds. The last of the samples is the kernel's own figure of the peak.
    """
    start, samples = time.perf_counter(), []
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            try:
                text = Path(f"/proc/{process.pid}/status").read_text()
                samples.append((time.perf_counter() - start, _field(text, "VmRSS")))
                peak = _field(text, "VmHWM")
            except (OSError, StopIteration):  # it has just ended
                break
            if samples[-1][0] > limit:
                process.kill()
            time.sleep(0.1)
        code = process.wait()
    return code, [*samples, (time.perf_counter() - start, peak)]


def peer(args: argparse.Namespace) -> dict[str, Any]:
    """Memory of AutoAWQ at the same work, for ``args.seconds`` or until it is done."""
    calib = tokens(args.directory, args.out.parent, args.samples, args.seq_len)
    rows = calib.with_suffix(".json")
    rows.write_text(json.dumps(np.load(calib).tolist()))
    driver = Path(__file__).with_name("autoawq_driver.py")
    argv = [args.python, str(driver), str(args.directory), str(rows), str(args.out), "--group-size", "128"]
    argv += ["--no-search"] if args.no_search else []
    log = args.out.with_suffix(".log")
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    code, samples = watched(argv, log, args.seconds)
    text = log.read_text()
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"failed: {text[-2000:]}")
    size = sum(f.stat().st_size for f in args.directory.glob("*.safetensors"))
    peak = max(b for _, b in samples)
    layers = re.findall(r"AWQ:[^\r]*?(\d+)/(\d+)", text)
    return {
        "peer": "AutoAWQ 0.2.9",
        "checkpoint_bytes": size,
        "blocks_done": [int(n) for n in layers[-1]] if layers else None,
        "finished": code == 0,
        "seconds": samples[-1][0],
        "peak_bytes": peak,
        "peak_over_checkpoint": peak / size,
        "resident_bytes_each_minute": [
            b for i, (t, b) in enumerate(samples) if not i or t // 60 > samples[i - 1][0] // 60
        ],
    }


def _field(status: str, name: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(name))


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak resident memory of one run against what is allowed."""
    config = json.loads((args.directory / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    itemsize = 4 if config["torch_dtype"] == "float32" else 2
    layer = (4 * hidden**2 + 3 * hidden * inner) * itemsize
    block = max(layer, config["vocab_size"] * hidden * itemsize)  # the embedding and the head are blocks too
    states = args.samples * args.seq_len * hidden * itemsize if args.hidden == "memory" else 0
    calib = tokens(args.directory, args.out.parent, args.samples, args.seq_len)
    log = args.out.with_suffix(".log")
    code, samples = watched(command(args, args.out, calib), log)
    if code:
        raise SystemExit(f"failed: {log.read_text()[-2000:]}")
    peak = max(b for _, b in samples)
    allowed = 2.5 * block + states + BASE
    return {
        "checkpoint_bytes": sum(f.stat().st_size for f in args.directory.glob("*.safetensors")),
        "layers": config["num_hidden_layers"],
        "layer_bytes": layer,
        "largest_block_bytes": block,
        "hidden_bytes": states,
        "peak_bytes": peak,
        "highest_seen_in_each_tenth_bytes": _by_tenths(samples[:-1]),
        "allowed_bytes": allowed,
        "within": peak <= allowed,
        "seconds": samples[-1][0],
    }


def _by_tenths(samples: list[tuple[float, int]]) -> list[int]:
    """Highest resident bytes of ten equal stretches of time (looked at ten times a second, unlike the peak)."""
    end = samples[-1][0]
    return [max((b for t, b in samples if i <= 10 * t / end <= i + 1), default=0) for i in range(10)]


def kills(args: argparse.Namespace) -> dict[str, Any]:
    """See `stream_faults.kills`."""
    args.out.mkdir(parents=True, exist_ok=True)
    calib = tokens(args.directory, args.out.parent, args.samples, args.seq_len)
    return stream_faults.kills(args, lambda out, hidden: command(args, out, calib, hidden))


def deep(args: argparse.Namespace) -> dict[str, Any]:
    """See `stream_deep.deep`."""
    import stream_deep  # with JAX, which would add to the memory of processes that this one starts

    return stream_deep.deep(args, tokens(args.directory, args.out.parent, args.samples, args.seq_len))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(required=True)
    p = sub.add_parser("make")
    p.add_argument("directory", type=Path)
    p.add_argument("--layers", type=int, default=116)
    p.add_argument("--hidden", type=int, default=1024)
    p.add_argument("--inner", type=int, default=2816)
    p.add_argument("--vocab", type=int, default=32000)
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    p.set_defaults(run=lambda a: make(a.directory, a.layers, a.hidden, a.inner, a.vocab, a.dtype))
    for name, run in (("memory", memory), ("kills", kills)):
        p = sub.add_parser(name)
        p.add_argument("directory", type=Path)
        p.add_argument("out", type=Path)
        p.add_argument("--samples", type=int, default=16)
        p.add_argument("--seq-len", type=int, default=512)
        p.add_argument("--hidden", choices=("memory", "disk"), default="memory")
        p.add_argument("--options", default="", help="further options of awq-jax quantize, in quotes")
        p.add_argument("--kills", type=int, default=25)
        p.add_argument("--seed", type=int, default=0)
        p.set_defaults(run=run)
    p = sub.add_parser("peer")
    p.add_argument("directory", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--python", required=True, help="of an environment with AutoAWQ 0.2.9")
    p.add_argument("--seconds", type=float, default=600)
    p.add_argument("--no-search", action="store_true", help="see autoawq_driver.py: gets to the end sooner")
    p.add_argument("--samples", type=int, default=16)
    p.add_argument("--seq-len", type=int, default=512)
    p.set_defaults(run=peer)
    p = sub.add_parser("deep")
    p.add_argument("directory", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--samples", type=int, default=8)
    p.add_argument("--seq-len", type=int, default=64)
    p.add_argument("--options", default="", help="settings, e.g. 'group_size=32 clip=False'")
    p.set_defaults(run=deep)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    result = args.run(args)
    if result is not None:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
