"""``awq-jax merge``: a LoRA adapter added into the weights of its base, which are float then."""

from __future__ import annotations

import argparse
from pathlib import Path

from awq_jax.cli import common

_EXAMPLES = """
awq-jax merge ./model ./sql-lora ./model-sql
awq-jax merge ./model-awq ./my-lora ./model-mine
awq-jax quantize ./model-mine ./model-mine-awq --calib book.txt
"""


def add(subparsers: common.Commands) -> None:
    """Register the command."""
    p = common.parser(
        subparsers,
        "merge",
        run,
        "add a LoRA adapter into the weights",
        "Write BASE with the adapter's product added to its weights, as a float checkpoint; packed weights are\n"
        "dequantized for it. Quantize that anew, calibrated on the tuning text: rounding the sum to the old grid\n"
        "would lose most of what was learnt.",
        _EXAMPLES,
    )
    p.add_argument("dir", metavar="BASE", help="checkpoint directory, .gguf file or hub id")
    p.add_argument("lora", metavar="ADAPTER", help="directory of PEFT's with the adapter")
    p.add_argument("dst", metavar="DST", type=Path, help="directory to create")
    p.add_argument("--terms", choices=("auto", "float", "base"), default="auto",
                   help="on whose inputs the adapter was trained (default: as it says)")  # fmt: skip
    p.add_argument("--overwrite", action="store_true", help="replace DST if it is a checkpoint")
    common.add_dtype(p)


def run(args: argparse.Namespace) -> None:
    """Load, add, write."""
    common.check_new_directory(args.dst.absolute(), args.overwrite)
    from awq_jax.lora import merging  # JAX, for which --help must not wait
    from awq_jax.serve import model

    loaded = model.load(args.dir, args.dtype, adapter=args.lora, terms=args.terms)
    merging.merge(loaded)
    loaded.save(args.dst, "float", overwrite=args.overwrite)
    if args.json:
        print(common.to_json({"written": str(args.dst), "bytes": loaded.nbytes}))
    else:
        print(f"wrote {args.dst} (float): quantize it with awq-jax quantize {args.dst} DIR --calib TEXT")
