"""``awq-jax inspect``: what is in a checkpoint, tensor by tensor, and how its model would be scaled."""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from awq_jax.commands import common

_EXAMPLES = """
awq-jax inspect ./model-awq
awq-jax inspect ./model --plan
awq-jax inspect ./model-awq --json | jq .tensors
"""


def add(subparsers: Any) -> None:
    """Register the command."""
    p = common.parser(
        subparsers,
        "inspect",
        run,
        "show what a checkpoint holds",
        "Format, bits, group size and sizes of a checkpoint, which linears are float, and a table of its tensors.",
        _EXAMPLES,
    )
    p.add_argument("dir", metavar="DIR", help="checkpoint directory, .gguf file or hub id")
    p.add_argument("--plan", action="store_true", help="print the scale groups discovered in the model instead")


def run(args: argparse.Namespace) -> None:
    """Open, describe, print."""
    from awq_jax.convert import registry

    source = registry.open_source(args.dir)
    if args.plan:
        from awq_jax import models
        from awq_jax.commands import preflight

        plan = preflight.plan(models.config_from_hf(source.config))
        print(common.to_json(plan.to_dict()) if args.json else plan)
        return
    found = describe(source, progress=not args.quiet)
    found["bytes_on_disk"] = bytes_on_disk(Path(args.dir))
    if args.json:
        print(common.to_json(found))
        return
    from awq_jax import render

    print("\n".join(render.columns(_summary(found))))
    print()
    head = ("tensor", "shape", "type", "group", "size")
    rows = [
        (t["name"], " x ".join(map(str, t["shape"])), t["type"], _group(t), render.size(t["bytes"]))
        for t in found["tensors"]
    ]
    print("\n".join(render.columns([head, *rows])))


def bytes_on_disk(path: Path) -> int | None:
    """Bytes of the weight files of a local checkpoint; None for a hub id."""
    if path.is_file():
        return path.stat().st_size
    return sum(f.stat().st_size for f in path.glob("*.safetensors")) if path.is_dir() else None


def describe(source: Any, progress: bool = False) -> dict[str, Any]:
    """Plain data about an open `awq_jax.convert.source.Source`; one tensor in memory at a time."""
    from tqdm import tqdm

    from awq_jax.qtensor import QuantizedTensor

    tensors: list[dict[str, Any]] = []
    for name in tqdm(
        sorted(source.names(), key=_natural), desc="inspect", unit="tensor", disable=not progress, leave=False, delay=1
    ):
        value, shape = source.read(name), tuple(source.shape(name))
        entry: dict[str, Any] = {"name": name, "shape": list(shape), "bytes": int(value.nbytes)}
        if isinstance(value, QuantizedTensor):
            entry |= {
                "type": f"{value.bits}-bit {'symmetric' if value.symmetric else 'asymmetric'}",
                "bits": value.bits,
                "group_size": value.group_size,
                "symmetric": value.symmetric,
                "input_scale": value.inv_scale is not None,
            }
        else:
            entry["type"] = str(value.dtype)
        tensors.append(entry)
    packed = [t for t in tensors if "bits" in t]
    weights = sum(math.prod(t["shape"]) for t in packed)
    linears = [t["name"] for t in tensors if "bits" not in t and _is_linear(t)]
    return {
        "format": source.format,
        "model_type": source.config.get("model_type"),
        "parameters": sum(math.prod(t["shape"]) for t in tensors),
        "bytes": sum(t["bytes"] for t in tensors),
        "quantized": len(packed),
        "bits": sorted({t["bits"] for t in packed}),
        "group_size": sorted({t["group_size"] for t in packed}),
        "symmetric": sorted({t["symmetric"] for t in packed}),
        "bits_per_weight": 8 * sum(t["bytes"] for t in packed) / weights if packed else None,
        "float_linears": linears if packed else [],
        "tensors": tensors,
    }


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _is_linear(tensor: dict[str, Any]) -> bool:
    return len(tensor["shape"]) == 2 and "embed" not in tensor["name"]


def _summary(found: dict[str, Any]) -> list[tuple[str, str]]:
    from awq_jax import render

    types = Counter(t["type"] for t in found["tensors"])
    read = found["format"] == "gguf"  # packed in blocks of its own there
    rows = [
        ("format", f"{found['format']}, {found['model_type']}"),
        ("parameters", f"{found['parameters']:,} in {len(found['tensors'])} tensors"),
        ("types", ", ".join(f"{count} {kind}" for kind, count in types.most_common()) + (", as read" if read else "")),
        ("in memory", render.size(found["bytes"])),
    ]
    if found["bytes_on_disk"] is not None:
        rows.append(("on disk", render.size(found["bytes_on_disk"])))
    if found["quantized"]:
        similar = render.alike((name, "") for name in found["float_linears"])
        left = [f"{name} ({count})" if count > 1 else name for name, _, count in similar]
        rows += [
            ("bits", f"{_list(found['bits'])} ({found['bits_per_weight']:.2f} per weight with scales and zero points)"),
            ("group size", _list(found["group_size"])),
            ("left float", ", ".join(left) or "no linear"),
        ]
    return rows


def _list(values: list[Any]) -> str:
    return ", ".join(map(str, values))


def _group(tensor: dict[str, Any]) -> str:
    return str(tensor.get("group_size", "-"))
