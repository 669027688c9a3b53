"""Linears that a checkpoint stores as one, taken apart for a mesh and put together again.

Equal runs of the columns of queries, keys and values side by side are no device's heads. So the parts are cut
one by one; `awq_jax.models.weights.fuse` may then merge what each device has of them.
"""

import dataclasses
from collections.abc import Iterator
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
    taken = [fused for fused in _fused(config, plain) if fused[0] in leaves]
    for path, parts, sizes in taken:
        whole = known.pop(path)
        known |= {
            p: dataclasses.replace(whole, shape=(*whole.shape[:-1], n)) for p, n in zip(parts, sizes, strict=True)
        }
    cuts = sharding.rule(plain, known, base.size)
    for path, parts, sizes in taken:
        values = fuse.split(moved(leaves.pop(path), Cut(), base), sizes)
        leaves |= {p: moved(value, cuts[p], base) for p, value in zip(parts, values, strict=True)}
    return plain


def together(config: ModelConfig, leaves: dict[str, Weight], base: Placement) -> None:
    """The inverse of `apart`, in place and to the bit."""
    for path, parts, _ in _fused(config, fuse.apart(config)):
        if parts[0] in leaves:
            leaves[path] = fuse.join([moved(leaves.pop(p), Cut(), base) for p in parts])
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


def _fused(config: ModelConfig, plain: ModelConfig) -> Iterator[tuple[str, list[str], list[int]]]:
    """Kernels and biases that are fused in ``config`` and not in ``plain``: path, those of the parts, their columns."""
    apart_already = set(fuse.fusable(config))
    for linears in fuse.fusable(plain):
        if linears not in apart_already:
            sizes = fuse.sizes(plain.layers[linears.layer], linears)
            for kind in ("kernel", "bias"):
                whole, *parts = (f"{linears.module}/{name}/{kind}" for name in (linears.whole, *linears.parts))
                yield whole, parts, sizes
