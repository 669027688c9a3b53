"""``awq-jax inspect``: what is in a checkpoint, tensor by tensor, what is wrong with it, how it would be scaled."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from awq_jax.cli import common

_EXAMPLES = """
awq-jax inspect ./model-awq
awq-jax inspect ./model-awq --check
awq-jax inspect ./model --plan
awq-jax inspect ./model-awq --devices 8
awq-jax inspect owner/name --json | jq .tensors
"""


def add(subparsers: Any) -> None:
    """Register the command."""
    p = common.parser(
        subparsers,
        "inspect",
        run,
        "show what a checkpoint holds, and check it",
        "Format, bits, group size and sizes of a checkpoint, which linears are float, whether it can be quantized and "
        "how it would be scaled, a table of its tensors, and what is wrong with it. Only config and headers are read, "
        "also of a checkpoint on the hub, so it takes seconds whatever the size (a directory may hold config.json "
        "alone); --check reads every tensor, and ends with status 1 if it finds a problem.",
        _EXAMPLES,
    )
    p.add_argument("dir", metavar="DIR", help="checkpoint directory, .gguf file or hub id")
    p.add_argument("--check", action="store_true", help="read every tensor and report what is wrong with it")
    p.add_argument("--plan", action="store_true", help="print the scale groups discovered in the model instead")
    p.add_argument(
        "--devices",
        type=common.positive,
        metavar="N",
        help="print instead how the weights would lie on a mesh of N devices, and what each would hold; of a "
        "config.json alone, as 4-bit weights in groups of 128",
    )


def run(args: argparse.Namespace) -> None:
    """Open, describe, print; leaves through ``SystemExit(1)`` if a check finds problems."""
    with opened(args.dir, whole=args.check) as source:
        if args.plan:
            from awq_jax import models
            from awq_jax.cli import quantizable
            from awq_jax.stream import decoder_blocks

            alone = isinstance(source, quantizable.ConfigOnly)
            architecture = models.config_from_hf(source.config) if alone else models.config_of(source)
            plan = decoder_blocks.Chain(architecture).plan()
            print(common.to_json(plan.to_dict()) if args.json else plan)
            return
        if args.devices:
            spread = on_devices(source, args.devices)
            print(common.to_json(spread) if args.json else spread["text"])
            return
        found = describe(source)
        found["bytes_on_disk"] = bytes_on_disk(Path(args.dir).expanduser())
        found["problems"] = problems(source, Path(args.dir).expanduser(), args.check, progress=not args.quiet)
    if args.json:
        print(common.to_json(found))
    else:
        _print(found, args.check)
    if args.check and found["problems"]:
        raise SystemExit(1)


@contextlib.contextmanager
def opened(path: str, whole: bool) -> Iterator[Any]:
    """The source; of a hub id the headers alone, unless it is wanted ``whole``."""
    from awq_jax.convert import registry
    from awq_jax.convert.formats import float_weights

    local = Path(path).expanduser()
    if not whole and local.is_dir():
        from awq_jax.cli import quantizable

        if quantizable.config_only(local):
            yield quantizable.ConfigOnly(local)
            return
    if whole or os.path.lexists(local) or local.suffix == ".gguf" or not float_weights.HUB_ID.fullmatch(path):
        yield registry.open_source(path, packed=True)
        return
    from awq_jax.cli import remote

    with remote.headers(path) as source:
        yield source


def on_devices(source: Any, devices: int) -> dict[str, Any]:
    """How the weights would lie on a mesh (see `awq_jax.models.mesh.sharding`), from the headers alone."""
    import numpy as np

    from awq_jax import models, paths
    from awq_jax.cli import quantizable
    from awq_jax.models.layers import cache
    from awq_jax.models.mesh import sharded_loading, sharding
    from awq_jax.models.weights import params

    if isinstance(source, quantizable.ConfigOnly):
        config = models.config_from_hf(source.config)
        leaves = sharding.forecast_leaves(config)
    else:
        config = models.config_of(source)
        shapes = {path: tuple(leaf.shape) for path, leaf in paths.flatten(params.abstract(config)[1]).items()}
        weights = params.Weights(source, config, shapes)
        size = np.dtype(source.info(weights.names(params.EMBEDDING)[0]).dtype).itemsize
        leaves = sharded_loading.leaves_of(source, weights, shapes, size)
    cuts = sharding.rule(config, leaves, devices)
    kept = cache.bytes_per_token(config, devices)
    text = sharding.explain(leaves, cuts, devices)
    return {
        "devices": devices,
        "bytes_per_device": sharding.per_device(leaves, cuts, devices),
        "cache_bytes_per_token": kept,
        "text": f"{text}\n  keys and values in 16 bits: {kept / 1e3:,.1f} kB for each token of each row",
    }


def bytes_on_disk(path: Path) -> int | None:
    """Bytes of the weight files of a local checkpoint; None for a hub id, or without weights."""
    from awq_jax.cli import quantizable

    if path.is_file():
        return path.stat().st_size
    if not path.is_dir() or quantizable.config_only(path):
        return None
    from awq_jax.convert.files.safetensors import find_files
    from awq_jax.convert.formats.orbax_files import PARAMS, holds_params

    weights = (path / PARAMS).rglob("*") if holds_params(path) else find_files(path)[1]
    return sum(f.stat().st_size for f in weights if f.is_file())


def problems(source: Any, path: Path, check: bool, progress: bool = False) -> list[dict[str, str]]:
    """``{"where", "what"}`` of everything that is wrong; from the headers alone unless ``check``."""
    from tqdm import tqdm

    from awq_jax.cli import check as checks
    from awq_jax.cli import quantizable

    if isinstance(source, quantizable.ConfigOnly):
        return []
    found = [("files", what) for what in (checks.files(path) if path.is_dir() else [])]
    found += [("config.json", what) for what in checks.config(source)]
    if check:
        found += [("model", what) for what in checks.model(source)]
        names = tqdm(_sorted(source), desc="check", unit="tensor", disable=not progress, leave=False, delay=1)
        found += checks.values(source, names)
    return [{"where": where, "what": what} for where, what in found]


def describe(source: Any) -> dict[str, Any]:
    """Plain data about an open `awq_jax.convert.source.Source`, from its headers."""
    from awq_jax.cli import quantizable

    tensors: list[dict[str, Any]] = []
    for name in _sorted(source):
        info = source.info(name)
        entry: dict[str, Any] = {"name": name, "shape": list(info.shape), "bytes": info.nbytes, "type": info.dtype}
        if info.packed is not None:
            kind = "symmetric" if info.packed.symmetric else "offsets" if info.packed.offsets else "asymmetric"
            entry |= {
                "type": f"{info.packed.bits}-bit {kind}",
                "bits": info.packed.bits,
                "group_size": info.packed.group_size,
                "symmetric": info.packed.symmetric,
                "act_order": info.packed.act_order,
                "scales": info.packed.scale_dtype,
            }
        tensors.append(entry)
    packed = [t for t in tensors if "bits" in t]
    weights = sum(math.prod(t["shape"]) for t in packed)
    linears = [t["name"] for t in tensors if "bits" not in t and _is_linear(t)]
    possible = quantizable.support(source)
    stored = sum(math.prod(t["shape"]) for t in tensors)
    return {
        "format": source.format,
        "model_type": source.config.get("model_type"),
        **possible,
        "parameters": stored if tensors else possible["parameters"],
        "bytes": sum(t["bytes"] for t in tensors),
        "quantized": len(packed),
        "bits": sorted({t["bits"] for t in packed}),
        "group_size": sorted({t["group_size"] for t in packed}),
        "symmetric": sorted({t["symmetric"] for t in packed}),
        "act_order": any(t["act_order"] for t in packed),
        "bits_per_weight": 8 * sum(t["bytes"] for t in packed) / weights if packed else None,
        "float_linears": linears if packed else [],
        "tensors": tensors,
    }


def _print(found: dict[str, Any], check: bool) -> None:
    from awq_jax.cli import tables

    print("\n".join(tables.columns(_summary(found))))
    if not found["tensors"]:
        return
    print()
    head = ("tensor", "shape", "type", "group", "scales", "size")
    rows = [
        (
            _plain(t["name"]),
            " x ".join(map(str, t["shape"])),
            t["type"],
            f"{t.get('group_size', '-')}{', act-order' if t.get('act_order') else ''}",
            t.get("scales", "-"),
            tables.size(t["bytes"]),
        )
        for t in found["tensors"]
    ]
    print("\n".join(tables.columns([head, *rows])))
    print()
    print("problems" if found["problems"] else f"no problem found{'' if check else ' in the headers'}")
    for problem in found["problems"]:
        print(f"  {_plain(problem['where'])}: {_plain(problem['what'])}")


def _sorted(source: Any) -> list[str]:
    return sorted(source.names(), key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _plain(text: str) -> str:
    """Text of a checkpoint without what moves a terminal's cursor."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _is_linear(tensor: dict[str, Any]) -> bool:
    return len(tensor["shape"]) == 2 and "embed" not in tensor["name"]


def _summary(found: dict[str, Any]) -> list[tuple[str, str]]:
    from awq_jax.cli import quantizable, tables

    can = [(title, _plain(line)) for title, line in quantizable.summary(found)]
    if not found["tensors"]:
        size = f"{found['parameters']:,}, by its config" if found["parameters"] else "unknown"
        return [("format", f"{found['format']}, {found['model_type']}"), ("parameters", size), *can]
    types = Counter(t["type"] for t in found["tensors"])
    rows = [
        ("format", f"{found['format']}, {found['model_type']}"),
        ("parameters", f"{found['parameters']:,} in {len(found['tensors'])} tensors"),
        ("types", ", ".join(f"{count} {kind}" for kind, count in types.most_common())),
        ("tensors", tables.size(found["bytes"])),
    ]
    if found["bytes_on_disk"] is not None:
        rows.append(("on disk", tables.size(found["bytes_on_disk"])))
    if found["quantized"]:
        similar = tables.alike((name, "") for name in found["float_linears"])
        left = [f"{_plain(name)} ({count})" if count > 1 else _plain(name) for name, _, count in similar]
        rows += [
            ("bits", f"{_list(found['bits'])} ({found['bits_per_weight']:.2f} per weight with scales and zero points)"),
            ("group size", _list(found["group_size"]) + (", act-order" if found["act_order"] else "")),
            ("left float", ", ".join(left) or "no linear"),
        ]
    return rows + can


def _list(values: list[Any]) -> str:
    return ", ".join(map(str, values))
