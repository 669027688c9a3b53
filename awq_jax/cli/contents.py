"""What is in a checkpoint, from its headers: formats, shapes and sizes, how it would lie on a mesh, what is wrong."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from awq_jax import paths
from awq_jax.cli import check as checks
from awq_jax.cli import quantizable, remote
from awq_jax.cli.quantizable import ConfigOnly
from awq_jax.convert import registry
from awq_jax.convert.files.safetensors import find_files
from awq_jax.convert.formats import float_weights
from awq_jax.convert.formats.orbax_files import PARAMS, holds_params
from awq_jax.convert.source import Source
from awq_jax.models.layers import cache
from awq_jax.models.mesh import sharded_loading, sharding
from awq_jax.models.weights import params
from awq_jax.plan.plan import Plan
from awq_jax.progress import through
from awq_jax.stream import decoder_blocks

Facts = dict[str, Any]  # JSON


@contextlib.contextmanager
def opened(path: str, whole: bool) -> Iterator[Source | ConfigOnly]:
    """The source; of a hub id the headers alone, unless it is wanted ``whole``."""
    local = Path(path).expanduser()
    if not whole and local.is_dir() and quantizable.config_only(local):
        yield ConfigOnly(local)
    elif whole or os.path.lexists(local) or local.suffix == ".gguf" or not float_weights.HUB_ID.fullmatch(path):
        yield registry.open_source(path, packed=True)
    else:
        with remote.headers(path) as source:
            yield source


def plan(source: Source | ConfigOnly) -> Plan:
    """The scale groups of the model."""
    return decoder_blocks.Chain(quantizable.architecture(source)).plan()


def on_devices(source: Source | ConfigOnly, devices: int) -> Facts:
    """How the weights would lie on a mesh (see `awq_jax.models.mesh.sharding`), from the headers alone."""
    config = quantizable.architecture(source)
    if isinstance(source, ConfigOnly):
        leaves = sharding.forecast_leaves(config)
    else:
        shapes = {path: tuple(leaf.shape) for path, leaf in paths.flatten(params.abstract(config)[1]).items()}
        weights = params.Weights(source, config, shapes)
        leaves = sharded_loading.leaves_of(source, weights, shapes)
    cuts = sharding.rule(config, leaves, devices)
    kept = cache.bytes_per_token(config, devices)
    whole, _, kinds = sharding.explain(leaves, cuts, devices).partition("\n")
    return {
        "devices": devices,
        "bytes_per_device": sharding.per_device(leaves, cuts, devices),
        "cache_bytes_per_token": kept,
        "text": f"{kinds}\n{whole}\nkeys and values in 16 bits: {kept / 1e3:,.1f} kB for each token of each row",
    }


def bytes_on_disk(path: Path) -> int | None:
    """Bytes of the weight files of a local checkpoint; None for a hub id, or without weights."""
    if path.is_file():
        return path.stat().st_size
    if not path.is_dir() or quantizable.config_only(path):
        return None
    weights = (path / PARAMS).rglob("*") if holds_params(path) else find_files(path)[1]
    return sum(f.stat().st_size for f in weights if f.is_file())


def problems(source: Source | ConfigOnly, path: Path, check: bool, progress: bool = False) -> list[dict[str, str]]:
    """``{"where", "what"}`` of everything that is wrong; from the headers alone unless ``check``."""
    if isinstance(source, ConfigOnly):
        return []
    found = [("files", what) for what in (checks.files(path) if path.is_dir() else [])]
    found += [("config.json", what) for what in checks.config(source)]
    if check:
        found += [("model", what) for what in checks.model(source)]
        names = through(_sorted(source), progress, "check", "tensor", leave=False, delay=1)
        found += checks.values(source, names)
    return [{"where": where, "what": what} for where, what in found]


def describe(source: Source | ConfigOnly) -> Facts:
    """Plain data about an open `awq_jax.convert.source.Source`, from its headers."""
    tensors: list[Facts] = []
    for name in _sorted(source):
        info = source.info(name)
        entry: Facts = {"name": name, "shape": list(info.shape), "bytes": info.nbytes, "type": info.dtype}
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


def _sorted(source: Source | ConfigOnly) -> list[str]:
    return sorted(source.names(), key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _is_linear(tensor: Facts) -> bool:
    return len(tensor["shape"]) == 2 and "embed" not in tensor["name"]
