"""``awq-jax convert``: a checkpoint from one format to another."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

from awq_jax import report
from awq_jax.cli import common, engines
from awq_jax.errors import ConfigError
from awq_jax.progress import bar

if TYPE_CHECKING:
    from awq_jax.convert.conversion import Conversion

_EXAMPLES = """
awq-jax convert ./model-awq ./model-ct --to compressed-tensors
awq-jax convert ./model-awq ./model-mlx --to mlx --allow-lossy
awq-jax convert ./model-gptq ./model-float --to float --dtype bfloat16
awq-jax convert ./model-awq ./model.gguf --to gguf-q4_1 --allow-lossy
awq-jax convert ./model ./model-folded --to float --search llama-7b-w4-g128.pt
awq-jax convert ./model-awq ./model-ct --to compressed-tensors --push me/model-ct
awq-jax convert --list
"""


def add(subparsers: common.Commands) -> None:
    """Register the command."""
    p = common.parser(
        subparsers,
        "convert",
        run,
        "change a checkpoint's format",
        "Write a checkpoint in another format, tensor by tensor: memory is one shard and a few tensors. The weights "
        "are the same to the bit, or it says by how much they would move and stops unless --allow-lossy is given. A "
        "run that was killed continues where it was when the same command is given again.",
        _EXAMPLES,
    )
    p.add_argument("src", metavar="SRC", nargs="?", help="checkpoint directory, .gguf file or hub id; any format")
    p.add_argument("dst", metavar="DST", nargs="?", help="directory to create (for GGUF: a file, MODEL.gguf)")
    p.add_argument("--to", metavar="FORMAT", help="target format, see --list")
    p.add_argument("--list", action="store_true", help="formats, what they hold, and which conversions are exact")
    p.add_argument("--allow-lossy", action="store_true", help="accept weights that move by a fraction of a step")
    p.add_argument("--dtype", choices=common.FLOATS,
                   help="of float tensors (default: as stored; dequantized weights: float32)")  # fmt: skip
    p.add_argument("--search", type=Path, metavar="FILE.pt",
                   help="fold llm-awq's search result into the float checkpoint SRC")  # fmt: skip
    p.add_argument("--overwrite", action="store_true", help="replace DST if it is a checkpoint")
    p.add_argument(
        "--max-shard-size", type=size, default=512 << 20, metavar="SIZE", help="of a file, e.g. 2GB (default: 512MiB)"
    )
    common.add_push(p)
    p.add_argument("--workers", type=common.positive, metavar="N", help="tensors encoded at a time (default: up to 4)")


def run(args: argparse.Namespace) -> None:
    """Convert, or list."""
    if args.list:
        _list(args)
        return
    if not (args.src and args.dst and args.to):
        raise ConfigError("give SRC, DST and --to FORMAT, or --list to see the formats")
    from awq_jax import convert  # JAX, for which --help must not wait
    from awq_jax.convert import registry, writing

    common.check_push(args)
    writing.check_path(Path(args.dst).expanduser().absolute(), registry.get(args.to), args.overwrite)
    source = args.src
    if args.search is not None:
        source = convert.apply_search(convert.open_source(args.src), args.search)
    with bar(not args.quiet, "convert", "B", leave=False, delay=1, unit_scale=True) as shown:

        def progress(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        result = convert.checkpoint(
            source,
            args.dst,
            args.to,
            dtype=args.dtype,
            allow_lossy=args.allow_lossy,
            overwrite=args.overwrite,
            max_shard_bytes=args.max_shard_size,
            workers=args.workers,
            progress=progress,
        )
    if args.json:
        print(common.to_json(_data(args.dst, result)))
    else:
        print("\n".join(report.columns(_rows(args, result))))
    common.push(args)


def _rows(args: argparse.Namespace, result: Conversion) -> list[tuple[str, str]]:
    packed = sum(1 for r in result.records if r.bits)
    rows = [
        ("written", f"{Path(args.dst)} ({result.target}, from {result.source})"),
        ("tensors", f"{len(result.records)}, of which {packed} quantized"),
        ("size", report.size(result.nbytes)),
        ("time", f"{result.seconds:.1f} s, {result.nbytes / 1e6 / max(result.seconds, 1e-9):.0f} MB/s"),
    ]
    if result.resumed:
        rows.append(("continued", f"{result.resumed} tensors were there from an interrupted run"))
    rows.append(("weights", _exactness(result)))
    rows.append(("served by", engines.served_by(args.dst)))
    return rows


def size(text: str) -> int:
    """An argparse type: bytes, with KB/MB/GB (decimal) or KiB/MiB/GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 500MB or 2GiB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** ("KMGT".find(match[2].upper()) + 1 if match[2] else 0))


def _exactness(result: Conversion) -> str:
    moved = [r for r in result.inexact if r.bits]
    cast = [r for r in result.inexact if not r.bits]
    parts = []
    if moved:
        worst = moved[0]
        parts.append(f"{len(moved)} moved by at most {worst.deviation:.2g} of a quantization step ({worst.name})")
    if cast:
        worst = cast[0]
        parts.append(
            f"{len(cast)} rounded to {worst.dtype}, at most {worst.deviation:.2g} of the largest ({worst.name})"
        )
    return "; ".join(parts) or "exactly those of the source"


def _data(dst: str, result: Conversion) -> dict[str, object]:
    return {
        "written": str(dst),
        "source_format": result.source,
        "target_format": result.target,
        "seconds": result.seconds,
        "bytes": result.nbytes,
        "resumed": result.resumed,
        "exact": not result.inexact,
        "largest_deviation_steps": max((r.deviation for r in result.inexact if r.bits), default=0.0),
        "tensors": [dataclasses.asdict(r) for r in result.records],
    }


def _list(args: argparse.Namespace) -> None:
    from awq_jax.convert import exactness  # as in `run`
    from awq_jax.convert.engines import verdicts
    from awq_jax.convert.registry import FORMATS

    table = exactness.table()
    if args.json:
        about = {
            f.name: {"title": f.title, "holds": f.holds, "read": f.reader is not None, "written": f.encoder is not None}
            for f in FORMATS.values()
        }
        print(common.to_json({"formats": about, "conversions": table}))
        return
    print(
        "\n".join(
            report.columns([("format", "whose", "holds"), *((f.name, f.title, f.holds) for f in FORMATS.values())])
        )
    )
    print("\nConversions: = exact, a number = largest shift in quantization steps (needs --allow-lossy), - impossible")
    print("\n".join(report.columns(exactness.grid(table))))
    print(
        "\nEngines that serve a Llama so, of the versions that were tried (a checkpoint of yours: "
        "awq-jax inspect DIR --for ENGINE)"
    )
    print("\n".join(report.columns(verdicts.table(list(FORMATS)))))
