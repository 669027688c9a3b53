"""How a model's weights are cut over the devices of a mesh (Megatron-LM's way, arXiv 1909.08053, section 3).

What reads the residual stream is cut by columns, at whole heads; what writes to it is cut by rows, and the
products are summed over the devices: one sum after the attention, one after the MLP. The rule looks at the
modules of the decoder and their sizes, not at families. Where it cannot be kept, a weight is cut by columns
anyway and the activations are gathered, or every device has the whole; results are the same in each case.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from awq_jax import paths
from awq_jax.errors import ConfigError
from awq_jax.kernels import parallel
from awq_jax.models.config import AttentionConfig, DeltaConfig, LatentConfig, MLPConfig, ModelConfig, MoEConfig
from awq_jax.placement import Dim, Placement, float_spec
from awq_jax.qtensor import QuantizedTensor, Weight

UNIT = 8  # packed columns of a device are a multiple of it
WHERE = {"n": "columns", "k": "rows, summed", "b": "whole experts, summed", "": "on every device"}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What the rule knows of a parameter.

    Attributes:
      shape: of a kernel ``[*B, K, N]``, of an embedding ``[rows, width]``.
      nbytes: of all of it.
      group: rows that a packed weight must not be cut within; None for a float one.
      ordered: its rows are permuted.
    """

    shape: tuple[int, ...]
    nbytes: int
    group: int | None = None
    ordered: bool = False

    @classmethod
    def of(cls, leaf: Weight | jax.ShapeDtypeStruct) -> Leaf:
        """Of an array or `QuantizedTensor`, abstract or not."""
        if not isinstance(leaf, QuantizedTensor):
            return cls(tuple(leaf.shape), math.prod(leaf.shape) * leaf.dtype.itemsize)
        return cls((*leaf.batch, leaf.k, leaf.n), leaf.nbytes, unit(leaf.group_size, leaf.bits), leaf.perm is not None)


@dataclasses.dataclass(frozen=True)
class Cut:
    """Along which dimension a parameter is cut (see `Placement`), and why so if not as the rule has it.

    For an embedding ``[rows, width]``, ``k`` are its rows and ``n`` its width.
    """

    dim: Dim = ""
    why: str = ""

    @property
    def gather(self) -> bool:
        """Cut by columns only to save memory: all devices want all of what it makes."""
        return self.dim == "n" and bool(self.why)

    def place(self, base: Placement) -> Placement:
        """Where the parameter lies."""
        return dataclasses.replace(base, dim=self.dim, gather=self.gather)


def unit(group_size: int, bits: int) -> int:
    """Rows that stay together: whole groups in whole 32-bit words."""
    return math.lcm(group_size, 32 // math.gcd(32, bits))


def on(mesh: Mesh | int) -> Placement:
    """The axis of a mesh along which weights are cut.

    Args:
      mesh: with one axis of more than one device; or how many of JAX's devices to take.

    Raises:
      ConfigError: if there are fewer devices, or the mesh has more axes.
    """
    if isinstance(mesh, int):
        devices = jax.devices()
        if not 0 < mesh <= len(devices):
            raise ConfigError(f"mesh of {mesh} devices: JAX sees {len(devices)} ({devices[0].platform})")
        mesh = Mesh(np.array(devices[:mesh]), ("model",))
    wide = [a for a in mesh.axis_names if mesh.shape[a] > 1] or list(mesh.axis_names[-1:])
    if len(wide) != 1:
        raise ConfigError(
            f"mesh has axes {dict(mesh.shape)}: weights are cut along one; make a mesh of one axis for each replica"
        )
    return Placement(mesh, wide[0], "")


def rule(config: ModelConfig, leaves: Mapping[str, Leaf], devices: int) -> dict[str, Cut]:
    """How each parameter is cut.

    Args:
      config: of the decoder.
      leaves: all of its parameters by path.
      devices: how many parts.
    """
    cuts = _Cuts(leaves, devices)
    rows, width = leaves["embed_tokens/embedding"].shape
    if rows % devices == 0:
        cuts.put("embed_tokens/embedding", "k")
    else:
        why = f"{rows} tokens are not a multiple of {devices}"
        cuts.put("embed_tokens/embedding", "n" if width % devices == 0 else "", why)
    cuts.columns("lm_head/kernel", "")
    for i, layer in enumerate(config.layers):
        _mixer(cuts, f"layers/{i}/self_attn", layer.attention)
        if isinstance(layer.mlp, MLPConfig):
            _mlp(cuts, f"layers/{i}/mlp", layer.mlp)
        else:
            _experts(cuts, f"layers/{i}/mlp/experts", layer.mlp)
            if layer.mlp.shared is not None:
                _mlp(cuts, f"layers/{i}/mlp/shared_expert", layer.mlp.shared)
    return {path: cuts.found.get(path, Cut()) for path in leaves}


class _Cuts:
    def __init__(self, leaves: Mapping[str, Leaf], devices: int):
        self.leaves, self.devices = leaves, devices
        self.found: dict[str, Cut] = {}

    def put(self, path: str, dim: Dim, why: str = "") -> None:
        self.found[path] = Cut(dim if self.devices > 1 else "", why)

    def no_columns(self, path: str) -> str:
        """Why it cannot be cut by columns, or nothing."""
        leaf = self.leaves[path]
        size = self.devices * (UNIT if leaf.group else 1)
        return f"{leaf.shape[-1]} columns are not a multiple of {size}" if leaf.shape[-1] % size else ""

    def no_rows(self, path: str) -> str:
        """Why it cannot be cut by rows, or nothing."""
        leaf = self.leaves[path]
        if leaf.ordered:
            return "act-order: a group's rows come from all over"
        part, rest = divmod(leaf.shape[-2], self.devices)
        if rest or part % (leaf.group or 1):
            return f"{leaf.shape[-2]} rows are not {self.devices} parts of whole groups of {leaf.group or 1}"
        return ""

    def columns(self, path: str, odd: str) -> None:
        """By columns; ``odd``: why the parts are not what a device goes on with, if so."""
        if path in self.leaves:
            problem = self.no_columns(path)
            self.put(path, "" if problem else "n", problem or (odd and f"{odd}: gathered after it"))

    def rows(self, path: str, odd: str = "") -> None:
        """By rows, else by columns."""
        if path in self.leaves:
            why = odd or self.no_rows(path)
            if not why:
                self.put(path, "k")
            else:
                problem = self.no_columns(path)
                self.put(path, "" if problem else "n", f"{why}; {problem or 'gathered before and after it'}")


def _uneven(count: int, what: str, devices: int) -> str:
    return f"{count} {what} for {devices} devices" if count % devices else ""


def _mixer(cuts: _Cuts, place: str, c: AttentionConfig | LatentConfig | DeltaConfig) -> None:
    n = cuts.devices
    if isinstance(c, DeltaConfig):
        cuts.columns(f"{place}/in_proj_qkvz/kernel", "mixed by a convolution")
        cuts.rows(f"{place}/out_proj/kernel", _uneven(c.value_heads, "heads", n))
        return
    heads = _uneven(c.heads, "heads", n)
    cuts.rows(f"{place}/o_proj/kernel", heads)
    for name in ("q_proj", "q_b_proj", "kv_b_proj"):
        cuts.columns(f"{place}/{name}/kernel", heads)
    if isinstance(c, AttentionConfig):
        shared = _uneven(c.kv_heads, "key/value heads", n)
        cuts.columns(f"{place}/qkv_proj/kernel", shared or ("" if c.fused == "grouped" else "queries, keys and values"))
        for path in (f"{place}/k_proj/kernel", f"{place}/v_proj/kernel"):
            if shared and path in cuts.leaves:
                cuts.put(path, "", shared)
            else:
                cuts.columns(path, "")


def _mlp(cuts: _Cuts, place: str, c: MLPConfig) -> None:
    cuts.rows(f"{place}/down_proj/kernel")
    for name in ("gate_proj", "up_proj"):
        cuts.columns(f"{place}/{name}/kernel", "")
    cuts.columns(f"{place}/gate_up_proj/kernel", "both halves")


def _experts(cuts: _Cuts, place: str, c: MoEConfig) -> None:
    into = [p for n in ("gate_proj", "up_proj", "gate_up_proj") if (p := f"{place}/{n}/kernel") in cuts.leaves]
    down = f"{place}/down_proj/kernel"
    why = cuts.no_rows(down) or next(filter(None, map(cuts.no_columns, into)), "")
    if any("gate_up_proj" in p for p in into):
        why = why or "gate and up lie in one weight, which is not cut into columns"
    packed = {cuts.leaves[p].group is not None for p in (*into, down)}
    if not why:
        for path in into:
            cuts.put(path, "n")
        cuts.put(down, "k")
        return
    whole = c.experts % cuts.devices == 0 and packed == {True}
    for path in (*into, down):
        cuts.put(
            path, "b" if whole else "", why if whole else f"{why}, nor {c.experts} packed experts of {cuts.devices}"
        )


def forecast_leaves(config: ModelConfig, group_size: int = 128, bits: int = 4) -> dict[str, Leaf]:
    """The parameters of a model that is not there: linears of the layers packed, the rest of 16 bits.

    Packed ones have a scale of 16 bits and a zero point of 8 for each group; routers stay float, and what the
    group size does not divide.
    """
    from awq_jax.models.weights.params import abstract

    def leaf(path: str, shape: tuple[int, ...]) -> Leaf:
        count, linear = math.prod(shape), path.startswith("layers/") and path.endswith("/kernel")
        if linear and not path.endswith("gate/kernel") and shape[-2] % group_size == 0 and shape[-1] % UNIT == 0:
            return Leaf(shape, count * bits // 8 + count // group_size * 3, unit(group_size, bits))
        return Leaf(shape, count * 2)

    return {path: leaf(path, tuple(x.shape)) for path, x in paths.flatten(abstract(config)[1]).items()}


def shardings(config: ModelConfig, params: Any, mesh: Mesh | int) -> Any:
    """The rule applied: ``params``, abstract or not, with a `NamedSharding` for each array.

    Packed weights are a `QuantizedTensor` of them, which says where it lies (``placement``). Put the
    parameters of a model there with ``jax.device_put``, or load it there with ``awq_jax.load(src, mesh=mesh)``.
    """
    base = on(mesh)
    cuts = rule(config, {path: Leaf.of(leaf) for path, leaf in paths.flatten(params).items()}, base.size)
    return paths.map_with_path(lambda path, leaf: sharding(leaf, cuts[path], base), params)


def sharding(leaf: Any, cut: Cut, base: Placement) -> Any:
    """Of one parameter."""
    place = cut.place(base)
    if isinstance(leaf, QuantizedTensor):
        return dataclasses.replace(parallel.shardings(leaf, place), placement=place)
    return NamedSharding(base.mesh, float_spec(cut.dim, len(leaf.shape), base.axis))


def per_device(leaves: Mapping[str, Leaf], cuts: Mapping[str, Cut], devices: int) -> int:
    """Bytes of the parameters that each device holds."""
    return sum(leaf.nbytes // (devices if cuts[path].dim else 1) for path, leaf in leaves.items())


def explain(leaves: Mapping[str, Leaf], cuts: Mapping[str, Cut], devices: int) -> str:
    """A line for each kind of parameter: how it is cut, what each device holds of it, and why."""
    kinds: dict[tuple[str, Cut], list[str]] = collections.defaultdict(list)
    for path in leaves:
        kinds[re.sub(r"(^|/)\d+(?=/)", r"\1*", path), cuts[path]].append(path)
    lines = [f"{devices} devices, {_mb(per_device(leaves, cuts, devices))} of weights on each"]
    for (kind, cut), members in kinds.items():
        if len(leaves[members[0]].shape) < 2 and not cut.dim:
            continue
        held = per_device({p: leaves[p] for p in members}, cuts, devices)
        why = f" ({cut.why})" if cut.why else ""
        lines.append(f"  {len(members):>4} x {kind}: {WHERE[cut.dim]}, {_mb(held)}{why}")
    return "\n".join(lines)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
