"""A packed weight made to fit a format: refused, or its zero points and scales in the form that the format has."""

import dataclasses
from collections.abc import Collection

import numpy as np

from awq_jax.convert.arrays import codes
from awq_jax.errors import FormatError
from awq_jax.qtensor import QuantizedTensor


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


def constants_in_range(q: QuantizedTensor) -> QuantizedTensor:
    """Groups of one value that their offset puts out of the range of zero points, coded one step from the middle.

    MLX gives such a group a scale of 1e-7, GGUF's Q4_1 a scale of 0: no zero point holds what the offset says. With
    the value as the scale it is exact. ``q`` itself if it has none.
    """
    if q.offsets is None or q.scales.shape[0] * q.group_size != q.k:
        return q
    dtype = np.promote_types(np.asarray(q.scales).dtype, np.asarray(q.offsets).dtype)
    scales, offsets = np.asarray(q.scales, np.float64), np.asarray(q.offsets, np.float64)
    away = (offsets * np.sign(scales) > 0.5 * np.abs(scales)) | (np.abs(offsets) > (2**q.bits - 0.5) * np.abs(scales))
    if not away.any():
        return q
    grouped = codes.codes_of(q).reshape(-1, q.group_size, q.n)
    constant = away & ((grouped == grouped[:, :1]).all(1) | (scales == 0))
    if not constant.any():
        return q
    value, middle = grouped[:, 0] * scales + offsets, 2 ** (q.bits - 1)
    recoded = np.where(constant[:, None], (middle + np.sign(value)).astype(np.uint8)[:, None], grouped)
    scales = np.where(constant, np.abs(value), scales).astype(dtype)
    offsets = np.where(constant, -middle * scales.astype(np.float64), offsets).astype(dtype)
    return dataclasses.replace(q, qweight=codes.pack(recoded.reshape(-1, q.n), q.bits), scales=scales, offsets=offsets)


def integer_zeros(q: QuantizedTensor) -> QuantizedTensor:
    """Offsets turned into the nearest whole zero points; ``q`` itself if it has none.

    Negative scales (MLX) are made positive: codes and zero points are mirrored, ``q -> 2**bits-1-q``.
    Zero points are clipped to the range of the codes.
    """
    if q.offsets is None:
        return q
    q = constants_in_range(q)
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
    given = [np.asarray(a) for a in (q.scales, q.offsets) if a is not None]
    with np.errstate(over="ignore"):
        cast = [a.astype(dtype) for a in given]
    if all((a.astype(np.float64) == b.astype(np.float64)).all() for a, b in zip(cast, given, strict=True)):
        return q
    return dataclasses.replace(q, scales=cast[0], offsets=cast[1] if len(cast) > 1 else None)


def with_offsets(q: QuantizedTensor, dtype: np.dtype | type = np.float16) -> QuantizedTensor:
    """Zero points turned into offsets ``-zero * scale``, rounded to ``dtype``; ``q`` itself if it has offsets."""
    if q.offsets is not None:
        return q
    zeros = 2.0 ** (q.bits - 1) if q.zeros is None else np.asarray(q.zeros).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller judges what overflows
        offsets = (np.asarray(q.scales).astype(np.float32) * -zeros).astype(dtype)
    return dataclasses.replace(q, zeros=None, offsets=offsets)
