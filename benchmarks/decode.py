"""Decoding on a CPU: packed weights, with and without the float32 copy, against the float32 model.

    python benchmarks/decode.py --shape smollm2-135m --group-size 64 --out benchmarks/results/decode_cpu_135m.json
    python benchmarks/decode.py --model stories15m --group-size 96 --out benchmarks/results/decode_cpu_stories15m.json
    python benchmarks/decode.py --shape llama-2-7b --layers 4 --out benchmarks/results/decode_cpu_7b_4_layers.json

All kinds live in one process and take turns, so that a busy machine is busy for each: ``dense`` is the float32
model as `generate` serves it, ``packed`` the packed model as `generate` serves it unasked, ``packed-unmerged`` the
same with ``merge=False``, ``packed-only`` with ``resident=False`` (no copy). Packed weights are rounded to nearest;
``dense`` has the same ones, dequantized. Speeds are medians over rounds of the ratio to ``dense`` in the same round;
on a busy machine the best turns and processor time say more.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

KINDS = ("dense", "packed", "packed-unmerged", "packed-only")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="smollm2-135m", help="a name in awq_jax.bench.random_models.SHAPES")
    parser.add_argument("--layers", type=int, help="only so many of the shape's layers")
    parser.add_argument("--model", help="measure this model instead")
    parser.add_argument("--dtype", default="float32", help="of the shape's floats and activations")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--kinds", nargs="+", choices=KINDS[1:], default=KINDS[1:])
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4, help="tokens of each turn")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import jax

    import awq_jax
    from awq_jax import paths
    from awq_jax.bench import decoding, random_models
    from awq_jax.cli.bench import device
    from awq_jax.serve.cpu_copy import resident
    from awq_jax.serve.served_weights import Weights

    if args.model:
        model = awq_jax.load(args.model, dtype="float32")
        settings = {"bits": args.bits, "group_size": args.group_size, "method": "rtn"}  # reads no statistics
        model.quantize([list(range(16))], samples=1, seq_len=16, progress=False, **settings)
        graphdef, c, packed = model._weights.graphdef, model.config, model.params
    else:
        c = random_models.config(args.shape, args.layers)
        graphdef, packed = random_models.random_model(c, args.dtype, args.bits, args.group_size)

    def session(kind: str) -> Any:
        params = resident(packed) if kind == "dense" else jax.tree.map(lambda a: a, packed)
        choices = {"packed-unmerged": {"merge_linears": False}, "packed-only": {"copy": False}}
        weights = Weights(graphdef, c, params, **choices.get(kind, {}))
        return decoding.Session(weights, context=args.context, steps=args.steps)

    sessions = {kind: session(kind) for kind in ("dense", *args.kinds)}
    rows: list[dict[str, Any]] = []
    for kind, times in decoding.paired(sessions, "dense", args.rounds).items():
        one = sessions[kind]
        rows.append({"kind": kind, **times, "served": one.weights.explain(), "served_bytes": paths.nbytes(one.params),
                     "packed_bytes": None if kind == "dense" else paths.nbytes(packed),
                     "step_temp_bytes": one.temp_bytes["step"]})  # fmt: skip
        print(
            f"{kind:12s} {times['ms_per_step']:8.2f} ms per token, {times['speed']:.2f} times dense "
            f"(quartiles {times['speed_low']:.2f}, {times['speed_high']:.2f}; processor time {times['cpu_speed']:.2f})"
        )
    result = device() | {
        "model": Path(args.model).name if args.model else args.shape, "layers": len(c.layers),
        "dtype": args.dtype, "bits": args.bits, "group_size": args.group_size,
        "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "context": args.context, "steps": args.steps, "rounds": args.rounds, "decode": rows,
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
