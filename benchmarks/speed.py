"""Time and memory of quantizing, and of decoding on a CPU, each against the float model.

    python benchmarks/speed.py quantize MODEL --text wiki.txt --samples 8 32 128 --out benchmarks/results/speed.json
    python benchmarks/speed.py decode --shape smollm2-135m --group-size 64 --out benchmarks/results/decode_cpu_135m.json
    python benchmarks/speed.py decode --model stories15m --group-size 96 --rounds 201
    python benchmarks/speed.py decode --shape llama-2-7b --layers 4 --rounds 21

`quantize`: every run is a process of its own (import, load, compile and work), one after the other on the same
machine. ``forward`` computes the logits of all tokens with the float model under `jax.jit`; the method's row
calibrates on them and quantizes. Both take four sequences at a time.

`decode`: all kinds live in one process and take turns, so that a busy machine is busy for each. ``dense`` is the
float32 model as `generate` serves it, ``packed`` the packed model as `generate` serves it unasked,
``packed-unmerged`` the same with ``merge=False``, ``packed-only`` with ``resident=False`` (no copy). Packed weights are
rounded to nearest; ``dense`` has the same ones, dequantized. Speeds are medians over rounds of the ratio to ``dense``
in the same round; on a busy machine the best turns and processor time say more.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from shared import checkpoints, running

import awq_jax
from awq_jax import paths
from awq_jax.bench import decoding, random_models
from awq_jax.bench.timing import device
from awq_jax.models.weights import params as model_params
from awq_jax.serve.cpu_copy import resident
from awq_jax.serve.served_weights import ServedWeights

ROWS = 4  # sequences at a time
FORWARD = "forward"
# Kind of decoding -> (merge_linears, copy) of `ServedWeights`; None leaves it to the package.
KINDS: dict[str, tuple[bool | None, bool | None]] = {
    "packed": (None, None),
    "packed-unmerged": (False, None),
    "packed-only": (None, False),
}


def work(args: argparse.Namespace, what: str, samples: int) -> dict[str, float]:
    """One run; seconds by phase if it quantizes."""
    model = awq_jax.load(args.model)
    tokens, _ = checkpoints.split(model, args.text, samples, args.seq_len)
    batches = [tokens[i : i + ROWS] for i in range(0, len(tokens), ROWS)]
    if what != FORWARD:
        _, report = awq_jax.quantize(
            model.params, batches, apply_fn=model.apply, bits=args.bits, group_size=args.group_size, method=what,
            explicit_scale=False, progress=False, return_report=True,
        )  # fmt: skip
        return dict(report.seconds)
    forward = jax.jit(lambda p, t: model.apply(p, t).max(axis=-1))
    for batch in batches:
        jax.block_until_ready(forward(model.params, batch))
    return {}


def quantize(args: argparse.Namespace) -> running.Row:
    """Quantizing against the forward pass."""
    rows: list[running.Row] = []

    def measure(what: str, samples: int) -> tuple[dict[str, float], running.Cost]:
        start = running.measured if args.in_process else running.apart
        phases, cost = start(work, args, what, samples)
        rows.append({"samples": samples, "work": what, "tokens": samples * args.seq_len, **cost.row()})
        return phases, cost

    for samples in args.samples:
        _, plain = measure(FORWARD, samples)
        phases, cost = measure(args.method, samples)
        ratios = {
            "wall_vs_forward": cost.wall / plain.wall,
            "cpu_vs_forward": cost.cpu / plain.cpu,
            "search_vs_forward": (phases["search"] + phases["round"]) / plain.wall,
        }
        rows[-1] |= {"seconds_by_phase": running.rounded(phases), **running.rounded(ratios, 2)}
        print(*rows[-2:], sep="\n", flush=True)
    return {
        "model": Path(args.model).name, "bits": args.bits, "group_size": args.group_size, "method": args.method,
        **running.machine(), "rows": rows,
    }  # fmt: skip


def decode(args: argparse.Namespace) -> running.Row:
    """Packed models against the dense one."""
    if args.model:
        model = awq_jax.load(args.model, dtype="float32")
        # Rounding to nearest reads no statistics, so any tokens will do.
        settings = {"bits": args.bits, "group_size": args.group_size, "method": "rtn"}
        model.quantize([list(range(16))], samples=1, seq_len=16, progress=False, **settings)
        c, packed = model.config, model.params
        graphdef, _ = model_params.abstract(c)
    else:
        c = random_models.config(args.shape, args.layers)
        graphdef, packed = random_models.random_model(c, args.dtype, args.bits, args.group_size)

    def session(kind: str) -> decoding.DecodingTimer:
        params = resident(packed) if kind == "dense" else jax.tree.map(lambda a: a, packed)
        weights = ServedWeights(graphdef, c, params, *KINDS.get(kind, (None, None)))
        return decoding.DecodingTimer(weights, context=args.context, steps=args.steps)

    sessions = {kind: session(kind) for kind in ("dense", *args.kinds)}
    rows: list[running.Row] = []
    for kind, times in decoding.paired(sessions, "dense", args.rounds).items():
        one = sessions[kind]
        rows.append({"kind": kind, **times, "served": one.weights.explain(), "served_bytes": paths.nbytes(one.params),
                     "packed_bytes": None if kind == "dense" else paths.nbytes(packed),
                     "step_temp_bytes": one.temp_bytes()["step"]})  # fmt: skip
        print(
            f"{kind:12s} {times['ms_per_step']:8.2f} ms per token, {times['speed']:.2f} times dense "
            f"(quartiles {times['speed_low']:.2f}, {times['speed_high']:.2f}; processor time {times['cpu_speed']:.2f})"
        )
    return device() | running.machine() | {
        "model": Path(args.model).name if args.model else args.shape, "layers": len(c.layers),
        "dtype": args.dtype, "bits": args.bits, "group_size": args.group_size,
        "context": args.context, "steps": args.steps, "rounds": args.rounds, "decode": rows,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> running.Row:
    parser = running.parser(__doc__)
    sub = parser.add_subparsers(required=True)
    q = sub.add_parser("quantize", help="against the plain forward pass over the same tokens")
    q.add_argument("model")
    q.add_argument("--text", type=Path, required=True)
    q.add_argument("--samples", type=int, nargs="+", default=[8, 32, 128])
    q.add_argument("--seq-len", type=int, default=512)
    q.add_argument("--method", default="awq+gptq")
    q.add_argument("--in-process", action="store_true", help="start no process for each run: quicker, not comparable")
    q.set_defaults(run=quantize)
    d = sub.add_parser("decode", help="packed weights on a CPU, with and without the float32 copy")
    d.add_argument("--shape", default="smollm2-135m", help="a name in awq_jax.bench.random_models.SHAPES")
    d.add_argument("--layers", type=int, help="only so many of the shape's layers")
    d.add_argument("--model", help="measure this model instead")
    d.add_argument("--dtype", default="float32", help="of the shape's floats and activations")
    d.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    d.add_argument("--context", type=int, default=32)
    d.add_argument("--steps", type=int, default=4, help="tokens of each turn")
    d.add_argument("--rounds", type=int, default=41)
    d.set_defaults(run=decode)
    for each in (q, d):
        each.add_argument("--bits", type=int, default=4)
        each.add_argument("--group-size", type=int, default=64)
        each.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    return running.finish(args.run(args), args.out)


def smoke(directory: Path) -> Iterator[list[str]]:
    model, text = checkpoints.make(directory / "model"), directory / "text.npy"
    np.save(text, checkpoints.random_tokens(256, 4, 16))
    tiny = ["--group-size", "32", "--out", str(directory / "r.json")]
    quick = ["--in-process", "--method", "rtn"]
    yield ["quantize", str(model), "--text", str(text), "--samples", "2", "--seq-len", "16", *quick, *tiny]
    yield ["decode", "--model", str(model), "--context", "16", "--steps", "2", "--rounds", "2", *tiny]


if __name__ == "__main__":
    running.run(main, smoke)
