"""``awq-jax inspect``: what is in a checkpoint, tensor by tensor, what is wrong with it, how it would be scaled."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from awq_jax import report
from awq_jax.cli import common, engines
from awq_jax.errors import ConfigError

if TYPE_CHECKING:
    from awq_jax.cli.contents import Facts
    from awq_jax.plan.plan import Plan

_EXAMPLES = """
awq-jax inspect ./model-awq
awq-jax inspect ./model-awq --check
awq-jax inspect ./model --plan
awq-jax inspect ./model-awq --devices 8
awq-jax inspect ./model-awq --for vllm --tensor-parallel 4
awq-jax inspect owner/name --json | jq .tensors
"""


def add(subparsers: common.Commands) -> None:
    """Register the command."""
    p = common.parser(
        subparsers,
        "inspect",
        run,
        "show what a checkpoint holds, and check it",
        "A table of a checkpoint's tensors, what is wrong with it, and at the end its format, bits, group size and "
        "sizes, which linears are float, whether it can be quantized and how it would be scaled. Only config and "
        "headers are read, "
        "also of a checkpoint on the hub, so it takes seconds whatever the size (a directory may hold config.json "
        "alone); --check reads every tensor, and ends with status 1 if it finds a problem.",
        _EXAMPLES,
    )
    p.add_argument("dir", metavar="DIR", help="checkpoint directory, .gguf file or hub id")
    one = p.add_mutually_exclusive_group()
    one.add_argument("--check", action="store_true", help="read every tensor and report what is wrong with it")
    one.add_argument("--plan", action="store_true", help="print the scale groups discovered in the model instead")
    one.add_argument(
        "--devices",
        type=common.positive,
        metavar="N",
        help="print instead how the weights would lie on a mesh of N devices, and what each would hold; of a "
        "config.json alone, as 4-bit weights in groups of 128",
    )
    engines.add_options(one, p)


def run(args: argparse.Namespace) -> None:
    """Open, describe, print; leaves through ``SystemExit(1)`` if a check finds problems."""
    from awq_jax.cli import contents  # imports JAX, for which --help must not wait

    if args.tensor_parallel and args.engine != "vllm":
        raise ConfigError("--tensor-parallel belongs to --for vllm: give both, or drop it")
    with contents.opened(args.dir, whole=args.check) as source:
        if args.plan:
            plan = contents.plan(source)
            print(common.to_json(plan.to_dict()) if args.json else f"{plan}\n\n{_count(plan)}")
            return
        if args.devices:
            spread = contents.on_devices(source, args.devices)
            print(common.to_json(spread) if args.json else spread["text"])
            return
        if args.engine:
            told = engines.described(source, args.engine, args.tensor_parallel or 1)
            print(common.to_json(told) if args.json else _plain_lines(told["text"]))
            return
        found = contents.describe(source)
        found["bytes_on_disk"] = contents.bytes_on_disk(Path(args.dir).expanduser())
        found["problems"] = contents.problems(source, Path(args.dir).expanduser(), args.check, progress=not args.quiet)
    if args.json:
        print(common.to_json(found))
    else:
        _print(found, args.check)
    if args.check and found["problems"]:
        raise SystemExit(1)


def _print(found: Facts, check: bool) -> None:
    """The long things first: what stands last is what a terminal shows."""
    if found["tensors"]:
        _print_tensors(found, check)
    print("\n".join(report.columns(_summary(found))))


def _print_tensors(found: Facts, check: bool) -> None:
    head = ("tensor", "shape", "type", "group", "scales", "size")
    rows = [
        (
            _plain(t["name"]),
            " x ".join(map(str, t["shape"])),
            t["type"],
            f"{t.get('group_size', '-')}{', act-order' if t.get('act_order') else ''}",
            t.get("scales", "-"),
            report.size(t["bytes"]),
        )
        for t in found["tensors"]
    ]
    print("\n".join(report.columns([head, *rows])))
    print()
    print("problems" if found["problems"] else f"no problem found{'' if check else ' in the headers'}")
    for problem in found["problems"]:
        print(f"  {_plain(problem['where'])}: {_plain(problem['what'])}")
    print()


def _count(plan: Plan) -> str:
    """How many groups a plan has."""
    scaled = sum(1 for g in plan.groups if g.is_folded)
    return (
        f"{len(plan.groups)} scale groups of {sum(len(g.sites) for g in plan.groups)} weights: {scaled} are scaled, "
        f"{len(plan.groups) - scaled} have nothing that absorbs a scale; weights that stay float: {len(plan.skipped)}"
    )


def _plain_lines(text: str) -> str:
    return "\n".join(map(_plain, text.split("\n")))


def _plain(text: str) -> str:
    """Text of a checkpoint without what moves a terminal's cursor."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _summary(found: Facts) -> list[tuple[str, str]]:
    can = [(title, _plain(line)) for title, line in _support(found)]
    if not found["tensors"]:
        size = f"{found['parameters']:,}, by its config" if found["parameters"] else "unknown"
        return [("format", f"{found['format']}, {found['model_type']}"), ("parameters", size), *can]
    types = Counter(t["type"] for t in found["tensors"])
    rows = [
        ("format", f"{found['format']}, {found['model_type']}"),
        ("parameters", f"{found['parameters']:,} in {len(found['tensors'])} tensors"),
        ("types", ", ".join(f"{count} {kind}" for kind, count in types.most_common())),
        ("tensors", report.size(found["bytes"])),
    ]
    if found["bytes_on_disk"] is not None:
        rows.append(("on disk", report.size(found["bytes_on_disk"])))
    if found["quantized"]:
        similar = report.alike((name, "") for name in found["float_linears"])
        left = [f"{_plain(name)} ({count})" if count > 1 else _plain(name) for name, _, count in similar]
        rows += [
            ("bits", f"{_list(found['bits'])} ({found['bits_per_weight']:.2f} per weight with scales and zero points)"),
            ("group size", _list(found["group_size"]) + (", act-order" if found["act_order"] else "")),
            ("left float", ", ".join(left) or "no linear"),
        ]
    return rows + can


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _support(found: Facts) -> list[tuple[str, str]]:
    """Whether it can be quantized, and how it would be scaled."""
    if not found["supported"]:
        return [("supported", f"no: {found['reason']}")]
    out = [("supported", "yes")]
    for title, key in (("scaled", "groups"), ("not scaled", "unscaled"), ("stays float", "float")):
        lines = found["plan"][key]
        out += [(title if i == 0 else "", line) for i, line in enumerate(lines)]
    return out
