"""``awq-jax bench``: speed of the packed kernels and of whole models on this device."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING

from awq_jax.cli import common
from awq_jax.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from awq_jax.bench.timing import Ceilings, Row
    from awq_jax.kernels.tuned import Chip

_EXAMPLES = """
awq-jax bench kernels --shapes 4096x14336 8192x8192 --rows 1 16 64
awq-jax bench decode --model llama-3-8b
awq-jax bench prefill --model llama-2-7b --context 2048 --json
awq-jax bench tune --out nvidia-h200.json      # entries that are there stay, unless measured again
"""


def add(subparsers: common.Commands) -> None:
    """Register the command."""
    p = common.parser(
        subparsers,
        "bench",
        run,
        "measure kernels and models on this device",
        "Measure against the device's own ceilings and against XLA in bfloat16, on random weights. kernels: products "
        "of packed weights, also those of torch, gemlite and Marlin where installed; decode, prefill: whole models; "
        "tune: the kernels' tile sizes, to be kept as a table.",
        _EXAMPLES,
    )
    p.add_argument("what", choices=("kernels", "decode", "prefill", "tune"))
    p.add_argument("--shapes", nargs="+", type=_shape, metavar="KxN", help="inputs x outputs of the products")
    p.add_argument("--rows", nargs="+", type=common.positive, metavar="M", help="activation rows of the products")
    p.add_argument("--bits", type=int, choices=(4, 8), default=4, help="default: %(default)s")
    p.add_argument("--group-size", type=common.positive, default=128, metavar="G", help="default: %(default)s")
    p.add_argument("--seconds", type=float, default=0.2, help="per measurement, about (default: %(default)s)")
    p.add_argument("--no-peers", action="store_true", help="leave other libraries out")
    p.add_argument(
        "--model", nargs="+", metavar="NAME", help="shapes of known models: llama-3-8b, llama-2-7b, smollm2-135m, small"
    )
    p.add_argument("--layers", type=common.positive, metavar="L", help="only so many layers of the model")
    p.add_argument("--batch", type=common.positive, default=1, metavar="B", help="sequences (default: %(default)s)")
    p.add_argument("--context", type=common.positive, metavar="T", help="tokens of each prompt")
    p.add_argument(
        "--steps", type=common.positive, default=64, metavar="S", help="tokens decoded (default: %(default)s)"
    )
    p.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there as well")


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    if args.out and not args.out.absolute().parent.is_dir():
        raise ConfigError(f"cannot write {args.out}: its directory does not exist")
    if args.what in ("kernels", "tune"):
        _check_shapes(args)
    result = {"kernels": _kernels, "decode": _model, "prefill": _model, "tune": _tune}[args.what](args)
    text = common.to_json(result)
    if args.out:
        args.out.write_text(text + "\n")
    if args.json:
        print(text)


def _shape(text: str) -> tuple[int, int]:
    k, _, n = text.partition("x")
    if not (k.isdigit() and n.isdigit() and int(k) and int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is not inputs x outputs, such as 4096x14336")
    return int(k), int(n)


def _check_shapes(args: argparse.Namespace) -> None:
    unit = args.group_size
    for k, n in args.shapes or ():
        if k % unit or k % 32:
            raise ConfigError(f"{k}x{n}: --group-size {unit} does not divide {k} inputs, or 32 does not")


def _fast() -> bool:
    import jax

    return jax.default_backend() != "cpu"


def _ceilings(args: argparse.Namespace) -> Ceilings:
    from awq_jax.bench import timing

    top = timing.ceilings(1.0 if _fast() else 0.02)
    common.say(f"copy {top.bandwidth / 1e9:.0f} GB/s, bfloat16 {top.flops / 1e12:.2f} TFLOP/s", args.quiet)
    return top


def _kernels(args: argparse.Namespace) -> Row:
    from awq_jax.bench import products, timing

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


def _model(args: argparse.Namespace) -> Row:
    from awq_jax.bench import decoding, random_models, timing

    names = args.model or (["llama-3-8b"] if _fast() else ["small"])
    for name in names:
        random_models.config(name)  # refuses before any work
    top = _ceilings(args)
    context = args.context or (512 if _fast() else 32)
    steps = args.steps if args.what == "decode" else 1
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


def _tune(args: argparse.Namespace) -> Row:
    from awq_jax.bench import products
    from awq_jax.kernels import triton_matmul, tuned

    chip = tuned.local_chip()
    if chip is None:
        raise BackendError("there is nothing to tune: this process has no NVIDIA GPU; run it where it serves")
    reason = triton_matmul.unavailable()
    if reason is not None:
        raise BackendError(f"there is nothing to tune: {reason}")
    before = _table_before(args.out, chip)
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


def _table_before(path: Path | None, chip: Chip) -> Row | None:
    """The table that is to be extended, if there is one; refused now, not after minutes of tuning."""
    from awq_jax.bench import products

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
