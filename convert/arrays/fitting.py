"""What the integer formats share: making a weight fit, and saying which modules are float."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from awq_jax.convert.arrays import codes
from awq_jax.convert.format import Record
from awq_jax.convert.formats import joined_linears
from awq_jax.errors import FormatError
from awq_jax.qtensor import QuantizedTensor

# Left float by every consumer of the AWQ layouts without being told.
DEFAULT_FLOAT = re.compile(r"(^|\.)(lm_head|embed\w*|wte|wpe)$")


def check_integer(
    name: str, q: QuantizedTensor, bits: Collection[int], columns: int = 1, format: str = "", perm: bool = False
) -> None:
    """Refuse what a layout of words has no room for.

    Args:
      name: of the weight.
      q: one matrix.
      bits: those the layout has.
      columns: N must be a multiple of it.
      format: for the message.
      perm: whether act-order is allowed.

    Raises:
      FormatError: naming tensor, reason and remedy.
    """
    other = "; save as 'awq-jax', which can hold it"
    if not name.endswith(".weight"):
        raise FormatError(f"{name}: {format} names weights <module>.weight{other}")
    if q.batch:
        raise FormatError(f"{name} has batch axes {q.batch}, {format} holds one matrix per linear{other}")
    if q.bits not in bits:
        held = " or ".join(map(str, sorted(bits)))
        raise FormatError(f"{name} has {q.bits} bits, {format} holds {held}{other}")
    if q.inv_scale is not None:
        raise FormatError(f"{name} has an explicit inv_scale; quantize with explicit_scale=False, or save as 'awq-jax'")
    if q.perm is not None and not perm:
        raise FormatError(
            f"{name} has its rows in act-order, {format} holds them in the order of the inputs; convert to "
            "'gptq', 'compressed-tensors' or 'awq-jax'"
        )
    if q.scales.shape[-2] * q.group_size != q.k:
        raise FormatError(f"{name}: group size {q.group_size} does not divide its {q.k} inputs (padded){other}")
    if q.n % columns:
        raise FormatError(f"{name} has {q.n} outputs, {format} needs a multiple of {columns}{other}")


def integer_zeros(q: QuantizedTensor) -> QuantizedTensor:
    """Offsets turned into the nearest whole zero points; ``q`` itself if it has none.

    Negative scales (MLX) are made positive: codes and zero points are mirrored, ``q -> 2**bits-1-q``.
    Zero points are clipped to the range of the codes.
    """
    if q.offsets is None:
        return q
    top = 2**q.bits - 1
    scales, offsets = np.asarray(q.scales), np.asarray(q.offsets)
    flip = scales < 0
    qweight = np.asarray(q.qweight)
    if flip.any():
        grouped = codes.codes_of(q).reshape(*scales.shape[:1], q.group_size, q.n)
        qweight = codes.pack(np.where(flip[:, None], top - grouped, grouped).reshape(-1, q.n), q.bits)
    wide = scales.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        zeros = np.where(wide == 0, 0.0, np.rint(-offsets.astype(np.float64) / wide))
    zeros = np.clip(np.where(flip, top - zeros, zeros), 0, top).astype(np.uint8)
    return dataclasses.replace(q, qweight=qweight, scales=np.abs(scales), zeros=zeros, offsets=None)


def cast_scales(q: QuantizedTensor, dtype: np.dtype | type = np.float16) -> QuantizedTensor:
    """Scales (and offsets) in ``dtype``; ``q`` itself if they have it already or it holds them exactly."""
    arrays = {"scales": q.scales} | ({} if q.offsets is None else {"offsets": q.offsets})
    with np.errstate(over="ignore"):
        cast: dict[str, Any] = {part: np.asarray(a).astype(dtype) for part, a in arrays.items()}
    exact = all((cast[p].astype(np.float64) == np.asarray(a).astype(np.float64)).all() for p, a in arrays.items())
    return q if exact else dataclasses.replace(q, **cast)


def half_scales(q: QuantizedTensor) -> QuantizedTensor:
    """`cast_scales` to float16."""
    return cast_scales(q, np.float16)


def packed_records(records: Sequence[Record], format: str) -> list[Record]:
    """Those that are quantized.

    Raises:
      FormatError: if there is none.
    """
    packed = [r for r in records if r.bits]
    if not packed:
        raise FormatError(f"no weight is quantized, so there is nothing for {format} to hold; save as 'float'")
    return packed


def common_group(packed: Sequence[Record], format: str) -> int:
    """The one group size, or -1 if every group is a whole column of differing lengths.

    Raises:
      FormatError: if there are several, naming two tensors.
    """
    first = packed[0]
    odd = next((r for r in packed if r.group_size != first.group_size), None)
    if odd is None:
        return first.group_size
    if all(r.group_size == r.shape[-1] for r in packed):
        return -1
    raise FormatError(
        f"{odd.name} has group size {odd.group_size}, {first.name} has {first.group_size}: {format} holds one group "
        "size for the whole checkpoint; drop the per-layer override, or save as 'awq-jax', which can hold it"
    )


def float_modules(records: Sequence[Record], format: str) -> list[str]:
    """Modules of linears that are float and must be named as such, sorted; of experts, the module around them, too.

    Raises:
      FormatError: if naming one would exclude a quantized one: transformers compares whole names, but
        vLLM looks for the entry anywhere in a module's name.
    """
    packed = [r.module for r in records if r.bits]
    keep = [r.module for r in records if not r.bits and len(r.shape) == 2 and r.module != r.name]
    keep = sorted({*(m for m in keep if not DEFAULT_FLOAT.search(m)), *joined_linears.float_experts(records)})
    for module in keep:
        hit = next((p for p in packed if module in p), None)
        if hit:
            raise FormatError(
                f"{module} is float, but a reader of {format} that is told to skip it would skip {hit} as well, whose "
                "name contains it; quantize both or neither, or save as 'awq-jax'"
            )
    return keep
