"""Linears that a checkpoint stores as one, taken apart for a mesh and put together again.

Equal runs of the columns of queries, keys and values side by side are no device's heads. So the parts are cut
one by one; `awq_jax.models.weights.fuse` may then merge what each device has of them.
"""

import dataclasses
from typing import Any

import jax

from awq_jax.models.config import ModelConfig
from awq_jax.models.mesh import sharding
from awq_jax.models.mesh.sharding import Cut, Leaf
from awq_jax.models.weights import fuse
from awq_jax.placement import TABLES, Placement
from awq_jax.qtensor import QuantizedTensor, Weight


def apart(config: ModelConfig, leaves: dict[str, Weight], base: Placement) -> ModelConfig:
    """Take them apart, in place; one at a time is whole on every device.

    Args:
      config: of the model.
      leaves: its parameters by path, on the mesh.
      base: the mesh.

    Returns:
      The config of the model whose parameters ``leaves`` then are.
    """
    plain = fuse.apart(config)
    known = {path: Leaf.of(leaf) for path, leaf in leaves.items()}
    taken = _fused(config, plain)
    for linears, sizes in taken:
        for kind in ("kernel", "bias"):
            whole = known.pop(f"{linears.module}/{linears.whole}/{kind}", None)
            for part, size in zip(linears.parts, sizes, strict=True):
                if whole is not None:
                    shape = (*whole.shape[:-1], size)
                    known[f"{linears.module}/{part}/{kind}"] = dataclasses.replace(whole, shape=shape)
    cuts = sharding.rule(plain, known, base.size)
    for linears, sizes in taken:
        for kind in ("kernel", "bias"):
            leaf = leaves.pop(f"{linears.module}/{linears.whole}/{kind}", None)
            if leaf is not None:
                for part, value in zip(linears.parts, fuse.split(moved(leaf, Cut(), base), sizes), strict=True):
                    path = f"{linears.module}/{part}/{kind}"
                    leaves[path] = moved(value, cuts[path], base)
    return plain


def together(config: ModelConfig, leaves: dict[str, Weight], base: Placement) -> None:
    """The inverse of `apart`, in place and to the bit."""
    taken = _fused(config, fuse.apart(config))
    for linears, _ in taken:
        for kind in ("kernel", "bias"):
            if f"{linears.module}/{linears.parts[0]}/{kind}" in leaves:
                parts = [moved(leaves.pop(f"{linears.module}/{p}/{kind}"), Cut(), base) for p in linears.parts]
                path = f"{linears.module}/{linears.whole}/{kind}"
                leaves[path] = fuse.join(parts)
                known = {p: Leaf.of(leaf) for p, leaf in leaves.items()}
                leaves[path] = moved(leaves[path], sharding.rule(config, known, base.size)[path], base)


def moved(leaf: Weight, cut: Cut, base: Placement) -> Weight:
    """A parameter on the mesh, cut otherwise."""
    where = sharding.sharding(leaf, cut, base)
    if not isinstance(leaf, QuantizedTensor):
        return leaf if leaf.sharding == where else jax.jit(_same, out_shardings=where)(leaf)
    if leaf.placement == where.placement:
        return leaf
    tables = {f: a for f in TABLES if (a := getattr(leaf, f)) is not None}
    moved_tables: dict[str, Any] = jax.jit(_same, out_shardings={f: getattr(where, f) for f in tables})(tables)
    return dataclasses.replace(leaf, **moved_tables, placement=where.placement)


def _same(a: Any) -> Any:
    return a


def _fused(config: ModelConfig, plain: ModelConfig) -> list[tuple[fuse.FusedLinears, list[int]]]:
    """The linears of ``plain`` that are fused in ``config``, and how many columns each part has."""
    apart_already = set(fuse.fusable(config))
    return [(g, fuse.sizes(plain.layers[g.layer], g)) for g in fuse.fusable(plain) if g not in apart_already]
