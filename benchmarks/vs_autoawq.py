"""Cost and quality against AutoAWQ 0.2.9 on one machine, in one run, on the same calibration tokens.

    python benchmarks/vs_autoawq.py --python AUTOAWQ_VENV/bin/python --model SmolLM2.gguf --text wiki.txt --out r.json

Every quantization is a process of its own (start of Python, imports, loading the float checkpoint,
compilation, search, rounding, saving an AutoAWQ GEMM checkpoint), one after the other; its CPU seconds
(user + system, all threads), wall seconds and peak RSS come from the kernel's accounting of that process.
All results, AutoAWQ's too, are then loaded and scored by `awq_jax.evaluate`, in float32.
AutoAWQ computes in bfloat16 unless told otherwise: the cheapest choice for it on a CPU that has bfloat16
instructions (float16, its default, is several times slower there). awq_jax computes in float32.

AutoAWQ needs an environment of its own (it wants transformers 4.x, awq_jax wants 5.x):

    python3.11 -m venv AUTOAWQ_VENV
    AUTOAWQ_VENV/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    AUTOAWQ_VENV/bin/pip install transformers==4.51.3 accelerate safetensors zstandard "datasets<4" numpy
    AUTOAWQ_VENV/bin/pip install --no-deps autoawq==0.2.9
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Nothing heavy is imported at the top: the kernel counts the memory of the process that starts a child
# into the child's peak, so the process that starts and measures has to stay small.

OURS = {"awq_jax rtn": "rtn", "awq_jax awq": "awq", "awq_jax default": "awq+gptq"}


def measured(command: list[str]) -> dict[str, Any]:
    """Run a command to its end; what the kernel says it cost."""
    print("+", " ".join(command), file=sys.stderr, flush=True)
    # A persistent compilation cache would hide what the first run costs.
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    # By default torch's threads spin while they wait: on a busy machine two took 7x the CPU seconds of one.
    env["OMP_WAIT_POLICY"] = "PASSIVE"
    load = os.getloadavg()[0]
    start = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=sys.stderr)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit status {process.returncode}: {' '.join(command)}")
    return {
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "user_seconds": round(used.ru_utime, 1),
        "system_seconds": round(used.ru_stime, 1),
        "wall_seconds": round(wall, 1),
        "peak_rss_mb": used.ru_maxrss // 1024,  # KiB on Linux
        "load_average_before": round(load, 2),
    }


def prepare(args: argparse.Namespace) -> None:
    """Write the float checkpoint, the calibration tokens and the scored tokens under ``args.work``."""
    import awq_jax

    model = awq_jax.load(args.model)
    model.save(args.work / "float", format="float")
    ids = [int(i) for i in model.tokenizer(Path(args.text).read_text())["input_ids"]]
    used = args.samples * args.seq_len
    if len(ids) < used + args.eval_tokens:
        raise SystemExit(f"{args.text} has {len(ids)} tokens: calibration and scored text would overlap")
    rows = [ids[i : i + args.seq_len] for i in range(0, used, args.seq_len)]
    (args.work / "calibration.json").write_text(json.dumps(rows))
    (args.work / "scored.json").write_text(json.dumps(ids[-args.eval_tokens :]))


def ours(args: argparse.Namespace) -> None:
    """Quantize with awq_jax, as ``awq_jax.load(...).quantize(...)`` and ``save`` do it for a user."""
    import numpy as np

    import awq_jax

    tokens = np.asarray(json.loads((args.work / "calibration.json").read_text()), np.int32)
    model = awq_jax.load(args.work / "float")
    model.quantize(
        tokens,
        samples=len(tokens),
        seq_len=tokens.shape[1],
        bits=4,
        group_size=args.group_size,
        method=args.method,
        progress=False,
    )
    model.save(args.result, format="gemm")


def score(args: argparse.Namespace) -> None:
    """Perplexity of the float checkpoint and of every quantized one; into ``args.work/scores.json``."""
    import jax
    import numpy as np

    import awq_jax
    from awq_jax import evaluate

    tokens = np.asarray(json.loads((args.work / "scored.json").read_text()), np.int32)
    base = evaluate.perplexity(awq_jax.load(args.work / "float", dtype="float32"), tokens, context=args.context)
    rows = {}
    for name in args.names:
        model = awq_jax.load(args.work / name.replace(" ", "-"), dtype="float32")
        after = evaluate.perplexity(model, tokens, context=args.context)
        # Both models read the same windows: the error of the difference is that of the paired means.
        delta = (after.window_nll - base.window_nll) / base.window_tokens
        rows[name] = {
            "ppl": after.ppl,
            "delta_nll": after.nll - base.nll,
            "delta_nll_standard_error": float(delta.std(ddof=1) / np.sqrt(len(delta))),
        }
        print(name, rows[name], file=sys.stderr, flush=True)
    result = {
        "float_ppl": base.ppl,
        "scored_tokens": base.tokens,
        "versions": {"awq_jax": awq_jax.__version__, "jax": jax.__version__, "device": str(jax.devices()[0])},
        "rows": rows,
    }
    (args.work / "scores.json").write_text(json.dumps(result))


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The whole comparison; the result as JSON data."""
    here = Path(__file__).resolve()
    me = [sys.executable, str(here)]
    common = ["--work", str(work), "--group-size", str(args.group_size)]
    source = ["--model", args.model, "--text", args.text]
    sizes = ["--samples", str(args.samples), "--seq-len", str(args.seq_len), "--eval-tokens", str(args.eval_tokens)]
    measured([*me, "--step", "prepare", *common, *source, *sizes])
    driver = [args.python, str(here.with_name("autoawq_driver.py")), str(work / "float")]
    driver += [str(work / "calibration.json"), str(work / "autoawq")]
    costs = {"autoawq": measured([*driver, "--group-size", str(args.group_size), "--dtype", args.dtype])}
    for name, method in OURS.items():
        result = str(work / name.replace(" ", "-"))
        costs[name] = measured([*me, "--step", "ours", *common, "--method", method, "--result", result])
    measured([*me, "--step", "score", *common, "--context", str(args.context), "--names", *costs])
    scores = json.loads((work / "scores.json").read_text())
    reference = costs["autoawq"]["cpu_seconds"]
    code = "import awq, torch, transformers as t; print(awq.__version__, torch.__version__, t.__version__)"
    versions = subprocess.check_output([args.python, "-W", "ignore", "-c", code], text=True).split()[-3:]
    return {
        "model": Path(args.model).name,
        "text": Path(args.text).name,
        "bits": 4,
        "group_size": args.group_size,
        "calibration_tokens": [args.samples, args.seq_len],
        "scored_tokens": scores["scored_tokens"],
        "context": args.context,
        "float_ppl": scores["float_ppl"],
        "rows": [
            {"name": name, **cost, "autoawq_cpu_over_this": round(reference / cost["cpu_seconds"], 1)}
            | scores["rows"][name]
            for name, cost in costs.items()
        ],
        "autoawq": dict(zip(["autoawq", "torch", "transformers"], versions, strict=True))
        | {
            "dtype": args.dtype,
            "clip": "stock",
            "omp_wait_policy": "PASSIVE",
            "patch": "backup of the weights is copied (autoawq_driver.py)",
        },
        "awq_jax": scores["versions"],
        "machine": {"arch": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="the Python of an environment that has AutoAWQ 0.2.9")
    parser.add_argument("--model", help="a float checkpoint: directory, .gguf file or hub id")
    parser.add_argument("--text", help="its first tokens calibrate, its last are scored")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=10240)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", help="what AutoAWQ computes in")
    # The steps that the comparison starts as processes of their own:
    parser.add_argument("--step", choices=["prepare", "ours", "score"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--names", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        {"prepare": prepare, "ours": ours, "score": score}[args.step](args)
        return
    missing = [f"--{name}" for name in ("python", "model", "text") if getattr(args, name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} required")
    with tempfile.TemporaryDirectory() as work:
        result = run(args, Path(work))
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
