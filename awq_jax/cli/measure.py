"""What ``awq-jax bench`` measures with the arguments it was given, and prints while it does."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

import jax

from awq_jax.bench import decoding, products, random_models, timing
from awq_jax.bench.timing import Measurement
from awq_jax.cli import common
from awq_jax.errors import BackendError, ConfigError
from awq_jax.kernels import triton_matmul, tuned


def _fast() -> bool:
    return jax.default_backend() != "cpu"


def _ceilings(args: argparse.Namespace) -> timing.Ceilings:
    top = timing.ceilings(1.0 if _fast() else 0.02)
    common.say(f"copy {top.bandwidth / 1e9:.0f} GB/s, bfloat16 {top.flops / 1e12:.2f} TFLOP/s", args.quiet)
    return top


def kernels(args: argparse.Namespace) -> Measurement:
    """Products of packed weights."""
    top = _ceilings(args)
    shapes = args.shapes or (products.SHAPES if _fast() else ((1024, 1024),))
    rows = args.rows or (products.ROWS if _fast() else (1, 16))
    measured = products.measure(
        shapes, rows, args.group_size, args.bits, top, seconds=args.seconds, with_peers=not args.no_peers
    )
    kept = []
    for row in measured:
        kept.append(row)
        if not args.json:
            print(products.line(row), flush=True)
    return timing.device() | {"ceilings": dataclasses.asdict(top), "kernels": kept}


def model(args: argparse.Namespace) -> Measurement:
    """Decoding or prefill of whole models.

    Raises:
      ConfigError: see `awq_jax.bench.decoding.run`.
    """
    names = args.model or (["llama-3-8b"] if _fast() else ["small"])
    context = args.context or (512 if _fast() else 32)
    steps = args.steps if args.what == "decode" else 1
    for name in names:  # what cannot be done is refused before anything is measured
        c = random_models.config(name, args.layers)
        decoding.check_room(c, context, steps)
        jax.eval_shape(lambda c=c: random_models.random_model(c, "bfloat16", args.bits, args.group_size)[1])
    top = _ceilings(args)
    kept = []
    for name, bits in itertools.product(names, (None, args.bits)):
        row = decoding.run(
            name, bits, top, group=args.group_size, batch=args.batch, context=context, steps=steps, layers=args.layers
        )
        if args.what == "prefill":
            row = {k: v for k, v in row.items() if k not in decoding.OF_STEPS}
        kept.append(row)
        if not args.json:
            print(decoding.line(row), flush=True)
    return timing.device() | {"ceilings": dataclasses.asdict(top), args.what: kept}


def tune(args: argparse.Namespace) -> Measurement:
    """The table of tile sizes of this chip.

    Raises:
      BackendError: this process has no GPU that can be tuned for.
      ConfigError: see `table_before`.
    """
    chip = tuned.local_chip()
    if chip is None:
        raise BackendError("there is nothing to tune: this process has no NVIDIA GPU; run it where it serves")
    reason = triton_matmul.unavailable()
    if reason is not None:
        raise BackendError(f"there is nothing to tune: {reason}")
    before = table_before(args.out, chip)
    entries = products.tune(
        args.shapes or products.SHAPES,
        args.rows or products.ROWS,
        args.group_size,
        args.bits,
        chip,
        seconds=args.seconds,
        say=lambda line: common.say(line, args.quiet),
    )
    table = products.table(chip, entries, before)
    if not args.json and not args.out:
        print(json.dumps(table, indent=1))
    return table


def table_before(path: Path | None, chip: tuned.Chip) -> Measurement | None:
    """The table that is to be extended, if there is one; refused now, not after minutes of tuning."""
    if path is None or not path.is_file():
        return None
    try:
        table = json.loads(path.read_text())
        if table["chip"] == chip.kind:
            return products.table(chip, (), table)
        reason = f"it is of {table['chip']}, and this is {chip.kind}"
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        reason = f"it is no table of tile sizes ({type(e).__name__}: {e})"
    raise ConfigError(f"cannot extend {path}: {reason}; name another file with --out")
