"""Cost and quality of quantizing against other programs: one machine, one run, the same calibration tokens.

    tests/interop/make_envs.sh ENVS autoawq
    python benchmarks/vs_peers.py --envs ENVS --model SmolLM2.gguf --text wiki.txt --out r.json

Every quantization is a process of its own (start of Python, imports, loading the float checkpoint,
compilation, search, rounding, saving an AutoAWQ GEMM checkpoint), one after the other; its CPU seconds
(user + system, all threads), wall seconds and peak memory come from the kernel's accounting of that process.
All results are then loaded and scored by `awq_jax.evaluate`, in float32. Each program has a driver in ``peers/``, and
what belongs to it (a defect worked around, the dtype it computes in) is said there. A program without an environment is
listed as skipped.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from shared import checkpoints, peers, running

import awq_jax
from awq_jax import evaluate
from awq_jax.config import METHOD_NAMES, AwqConfig

# Method -> what its row is called.
OURS = {method: "default" if method == AwqConfig().method else method for method in METHOD_NAMES}


def prepare(args: argparse.Namespace, work: Path) -> Path:
    """Write the float checkpoint, the calibration tokens and the scored tokens; returns the first."""
    model = awq_jax.load(args.model)
    model.save(work / "float", format="float")
    calibration, scored = checkpoints.split(model, args.text, args.samples, args.seq_len, args.eval_tokens)
    np.save(work / "calibration.npy", calibration)
    np.save(work / "scored.npy", scored)
    return work / "float"


def score(base: Path, results: Mapping[str, Path], tokens: np.ndarray, context: int) -> tuple[running.Row, ...]:
    """Perplexity of the float checkpoint, then of each quantized one with what it loses."""

    def perplexity(path: Path) -> evaluate.Perplexity:
        return evaluate.perplexity(awq_jax.load(path, dtype="float32"), tokens, context=context)

    before = perplexity(base)
    rows: list[running.Row] = [{"name": "float", "ppl": before.ppl, "scored_tokens": before.tokens}]
    for name, path in results.items():
        after = perplexity(path)
        # Both models read the same windows: the error of the difference is that of the paired means.
        delta, error = evaluate.difference(after, before)
        rows.append({"name": name, "ppl": after.ppl, "delta_nll": delta, "delta_nll_standard_error": error})
        print(rows[-1], flush=True)
    return tuple(rows)


def compare(args: argparse.Namespace, work: Path) -> running.Row:
    """The whole comparison, with its files in ``work``."""
    source = prepare(args, work)
    costs: dict[str, running.Cost] = {}
    versions: dict[str, dict[str, str]] = {}
    skipped: dict[str, str] = {}
    for peer in (*peers.QUANTIZERS, *(peers.ours(m, OURS[m]) for m in args.methods)):
        if reason := peer.missing(args.envs):
            skipped[peer.name] = reason
            continue
        command = peer.command(args.envs, source, work / "calibration.npy", work / peer.name)
        log = work / f"{peer.name}.log"
        costs[peer.name] = running.succeeded([*command, "--group-size", str(args.group_size)], log).cost
        versions[peer.name] = peer.versions(args.envs)
        print(peer.name, costs[peer.name].row(), flush=True)
    base, *scores = score(source, {name: work / name for name in costs}, np.load(work / "scored.npy"), args.context)
    theirs = {p.name: costs[p.name].cpu for p in peers.QUANTIZERS if p.name in costs}
    return {
        "model": Path(args.model).name,
        "text": args.text.name,
        "bits": 4,
        "group_size": args.group_size,
        "calibration_tokens": [args.samples, args.seq_len],
        "scored_tokens": base["scored_tokens"],
        "context": args.context,
        "float_ppl": base["ppl"],
        "rows": [
            said | cost.row() | {f"{name}_cpu_over_this": round(cpu / cost.cpu, 1) for name, cpu in theirs.items()}
            for said, cost in zip(scores, costs.values(), strict=True)
        ],
        "skipped": skipped,
        "versions": versions,
        "device": str(jax.devices()[0]),
        **running.machine(),
    }


def main(arguments: Sequence[str] | None = None) -> running.Row:
    parser = running.parser(__doc__)
    parser.add_argument("--model", required=True, help="a float checkpoint: directory, .gguf file or hub id")
    parser.add_argument("--text", type=Path, required=True, help="its first tokens calibrate, its last are scored")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=10240)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--methods", nargs="+", choices=OURS, default=list(OURS), help="of awq_jax")
    peers.add_envs(parser)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as work:
        result = compare(args, Path(work))
    return running.finish(result, args.out)


def smoke(directory: Path) -> Iterator[list[str]]:
    model, text = checkpoints.make(directory / "model"), directory / "text.npy"
    np.save(text, checkpoints.random_tokens(256, 4, 16))
    tiny = ["--samples", "2", "--seq-len", "16", "--eval-tokens", "32", "--context", "16", "--group-size", "32"]
    none = ["--envs", str(directory), "--methods", "rtn"]
    yield ["--model", str(model), "--text", str(text), *tiny, *none, "--out", str(directory / "r.json")]


if __name__ == "__main__":
    running.run(main, smoke)
