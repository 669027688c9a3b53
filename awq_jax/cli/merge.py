"""``awq-jax merge``: a LoRA adapter added into the weights of its base, which are quantized anew or float then."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from awq_jax.cli import common
from awq_jax.config import METHOD_NAMES, AwqConfig
from awq_jax.errors import ConfigError

if TYPE_CHECKING:
    from awq_jax.lora import Requantized

_EXAMPLES = """
awq-jax merge ./model-awq ./my-lora ./model-mine --bits 4 --data chats.jsonl
awq-jax merge ./model ./sql-lora ./model-sql
awq-jax quantize ./model-sql ./model-sql-awq --calib chats.jsonl
"""


def add(subparsers: common.Commands) -> None:
    """Register the command."""
    p = common.parser(
        subparsers,
        "merge",
        run,
        "add a LoRA adapter into the weights",
        "Write BASE with the adapter's product added to its weights; packed ones are dequantized for it. With --bits\n"
        "the sum is quantized anew, calibrated on the tuning text, and the loss on rows that are held out is printed,\n"
        "before and after; without, DST is float. (Rounding the sum to the old grid would lose most of what was\n"
        "learnt.) The whole model is in memory; one that is too large for that: merge, then awq-jax quantize.",
        _EXAMPLES,
    )
    p.add_argument("dir", metavar="BASE", help="checkpoint directory, .gguf file or hub id")
    p.add_argument("lora", metavar="ADAPTER", help="directory of PEFT's with the adapter")
    p.add_argument("dst", metavar="DST", type=Path, help="directory to create")
    p.add_argument("--terms", choices=("auto", "float", "base"), default="auto",
                   help="on whose inputs the adapter was trained (default: as it says)")  # fmt: skip
    p.add_argument("--overwrite", action="store_true", help="replace DST if it is a checkpoint")
    q = p.add_argument_group("quantization")
    q.add_argument("--bits", type=int, help="2, 3, 4 or 8 (default: DST is float)")
    q.add_argument("--group-size", type=int, default=128, metavar="N",
                   help="rows per scale; -1: whole column (default: %(default)s)")  # fmt: skip
    q.add_argument("--method", default="awq+gptq", help=f"{', '.join(METHOD_NAMES)} (default: %(default)s)")
    q.add_argument("--symmetric", action="store_true", help="fixed zero point")
    q.add_argument("--data", type=Path, metavar="FILE",
                   help="rows that the adapter was trained on, .jsonl, .json or .parquet: calibrated on")  # fmt: skip
    q.add_argument("--held-out", type=Path, metavar="FILE",
                   help="rows to measure the loss on (default: the last 5%% of DATA's, at most 64)")  # fmt: skip
    common.add_samples(q, "sequences to calibrate on")
    q.add_argument("--format", default="auto", metavar="NAME", help="as for awq-jax quantize (default: %(default)s)")
    common.add_dtype(p)


def run(args: argparse.Namespace) -> None:
    """Load, add, quantize if asked for, write."""
    common.check_new_directory(args.dst.absolute(), args.overwrite)
    if (args.bits is None) != (args.data is None):
        raise ConfigError("--bits needs --data, the rows that the adapter was trained on, and --data needs --bits")
    from awq_jax.convert import registry, writing  # JAX, for which --help must not wait
    from awq_jax.lora import merging, rows
    from awq_jax.serve import model
    from awq_jax.stream.session import Session

    # What cannot be done is refused before the work.
    if args.format != "auto":
        writing.check_path(args.dst, registry.get(args.format), args.overwrite)
    settings = {n: getattr(args, n) for n in ("bits", "group_size", "method", "symmetric")} | {"explicit_scale": False}
    config = None if args.bits is None else AwqConfig.from_dict(settings)
    loaded = model.load(args.dir, args.dtype, adapter=args.lora, terms=args.terms)
    if config is None:
        merging.merge(loaded)
        loaded.save(args.dst, "float", overwrite=args.overwrite)
        told: dict[str, object] = {"format": "float"}
    else:
        Session(loaded.config, config)
        data, _ = rows.read(args.data, loaded.tokenizer, loaded.config.max_length)
        if args.held_out is None:
            data, held = rows.parted(data)
        else:
            held, _ = rows.read(args.held_out, loaded.tokenizer, loaded.config.max_length)
        done = merging.requantize(
            loaded, data, held, samples=args.samples, seq_len=args.seq_len, progress=not args.quiet, **settings
        )
        told = {"format": loaded.save(args.dst, args.format, overwrite=args.overwrite)}
        told |= {"held_out_rows": len(held), "loss_beside": done.beside, "loss_merged": done.merged}
        if not args.json:
            print(_losses(done, len(held)))
    if args.json:
        print(common.to_json({"written": str(args.dst), "bytes": loaded.nbytes, **told}))
    elif args.bits is None:
        print(f"wrote {args.dst} (float): quantize it with awq-jax quantize {args.dst} DIR --calib TEXT")
    else:
        print(f"wrote {args.dst} ({told['format']})")


def _losses(done: Requantized, held: int) -> str:
    if done.beside is None or done.merged is None:
        return "too few rows to hold any out: the loss was not measured (--held-out FILE)"
    change = done.merged - done.beside
    return (
        f"loss on {held} rows held out: {done.beside:.4f} with the adapter beside, {done.merged:.4f} merged and "
        f"quantized ({change:+.4f})"
    )
