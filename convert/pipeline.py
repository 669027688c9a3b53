"""Tensors through an encoder: fitted, judged, encoded, several at a time and in order."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from awq_jax import pack
from awq_jax.convert.arrays import codes, linear
from awq_jax.convert.format import Encoder, Record
from awq_jax.dtypes import FLOATS
from awq_jax.errors import FormatError
from awq_jax.qtensor import QuantizedTensor

CHUNK = 1 << 20  # weights compared at a time
LIMIT = 0.5  # steps; what is further away is another quantization, not a rounding of this one


@dataclasses.dataclass(frozen=True)
class EncodedTensor:
    """A tensor ready to be stored."""

    record: Record
    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]


def run(
    encoder: Encoder,
    names: Iterable[str],
    read: Callable[[str], np.ndarray | QuantizedTensor],
    lossy: bool,
    workers: int = 1,
) -> Iterator[EncodedTensor]:
    """Encode tensors in order, ``workers`` at a time in threads (NumPy releases the interpreter lock).

    Memory: ``workers + 1`` tensors.

    Raises:
      FormatError: a tensor does not fit, or only with a loss that was not allowed (``lossy``).
    """
    if workers <= 1:
        for name in names:
            yield encode(encoder, name, read(name), lossy)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: collections.deque[Future[EncodedTensor]] = collections.deque()
        try:
            for name in names:
                if len(waiting) >= workers:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(lambda n: encode(encoder, n, read(n), lossy), name))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def encode(encoder: Encoder, name: str, value: np.ndarray | QuantizedTensor, lossy: bool) -> EncodedTensor:
    """One tensor; see `run`."""
    if isinstance(value, QuantizedTensor):
        q = linear.as_linear(value)
        fitted = encoder.fit(name, q)
        if fitted is not None:
            deviation = 0.0 if fitted is q else steps(name, q, fitted)
            _judge(name, deviation, lossy)
            arrays, metadata = encoder.encode(name, fitted)
            record = Record(
                name=name,
                shape=q.shape,
                dtype=np.asarray(fitted.scales).dtype.name,
                bits=fitted.bits,
                group_size=fitted.group_size,
                symmetric=fitted.symmetric,
                act_order=fitted.perm is not None,
                deviation=deviation,
            )
            return _sized(record, arrays, metadata)
        return _dequantized(encoder, name, q)
    value, dtype = np.asarray(value), encoder.destination.dtype
    floating = value.dtype.name in FLOATS
    stored = value.astype(FLOATS[dtype]) if dtype and floating else value
    if floating and not np.isfinite(stored).all():
        raise FormatError(f"{name} holds NaN or inf as {stored.dtype}; convert with dtype='float32', or fetch it again")
    record = Record(name, tuple(value.shape), stored.dtype.name, deviation=_relative(value, stored))
    return _sized(record, encoder.encode_float(name, stored), {})


def steps(name: str, q: QuantizedTensor, fitted: QuantizedTensor) -> float:
    """Largest difference between two packed forms of a weight, in steps (|scale|) of the first.

    Of a group that was coded anew with a far larger scale, as a constant one is, in steps of that.

    Raises:
      FormatError: if they are not even of one size.
    """
    if q.shape != fitted.shape:
        raise FormatError(f"{name}: shape {q.shape} became {fitted.shape}")
    if not (_equal(q.perm, fitted.perm) and _equal(q.inv_scale, fitted.inv_scale)):
        return max(_ratio(*pair) for pair in _whole(q, fitted))
    if q.qweight is fitted.qweight and q.bits == fitted.bits:
        shift = _constant_shift(q, fitted)
        if shift is not None:
            return shift
    return max(_ratio(*block) for block in _blocks(q, fitted))


def _equal(a: pack.Array | None, b: pack.Array | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def _constant_shift(q: QuantizedTensor, fitted: QuantizedTensor) -> float | None:
    """The largest shift if codes and scales are the same, so that whole groups move alike; else None."""
    fine = math.gcd(q.group_size, fitted.group_size)
    (scale, offset), (other, moved) = (
        tuple(np.repeat(a, p.group_size // fine, axis=0) for a in _scale_and_offset(p)) for p in (q, fitted)
    )
    rows = min(scale.shape[0], other.shape[0])
    if not np.array_equal(scale[:rows], other[:rows]):
        return None
    return _ratio(offset[:rows], moved[:rows], np.abs(scale[:rows]))


def _scale_and_offset(q: QuantizedTensor) -> tuple[np.ndarray, np.ndarray]:
    """``w = code * scale + offset``, both float64 ``[groups, N]``."""
    scale = np.asarray(q.scales, np.float64)
    if q.offsets is not None:
        return scale, np.asarray(q.offsets, np.float64)
    return scale, -(2.0 ** (q.bits - 1) if q.zeros is None else np.asarray(q.zeros, np.float64)) * scale


Triple = tuple[np.ndarray, np.ndarray, np.ndarray]


def _blocks(q: QuantizedTensor, fitted: QuantizedTensor) -> Iterator[Triple]:
    """``(weight, fitted weight, step)`` some rows at a time, in packed order and without ``inv_scale``."""
    unit = math.lcm(32, q.group_size, fitted.group_size)  # rows after which words and groups begin anew in both
    rows = unit * max(1, CHUNK // max(1, unit * q.n))
    for start in range(0, q.k, rows):
        a, b = (_rows(p, start, min(start + rows, q.k)) for p in (q, fitted))
        step, other = (np.repeat(np.abs(np.asarray(p.scales, np.float64)), p.group_size, axis=0)[: p.k] for p in (a, b))
        yield codes.dequantize(a, np.float64), codes.dequantize(b, np.float64), np.where(other > 2 * step, other, step)


def _rows(q: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Packed rows ``start … stop - 1``, without ``perm`` and ``inv_scale``."""
    groups = slice(start // q.group_size, -(-stop // q.group_size))
    words = slice(start * q.bits // 32, pack.words(groups.stop * q.group_size, q.bits))
    parts = {part: a[groups] for part in ("scales", "zeros", "offsets") if (a := getattr(q, part)) is not None}
    return dataclasses.replace(
        q, qweight=q.qweight[words], k_dims=(stop - start,), perm=None, inv_scale=None, axes="kn", **parts
    )


def _whole(q: QuantizedTensor, fitted: QuantizedTensor) -> Iterator[Triple]:
    """As `_blocks` for weights whose rows lie in different orders: all at once."""
    step = np.repeat(np.abs(np.asarray(q.scales, np.float64)), q.group_size, axis=0)[: q.k]
    if q.perm is not None:
        step[np.asarray(q.perm)] = step.copy()
    if q.inv_scale is not None:
        step = step * np.asarray(q.inv_scale, np.float64)[:, None]
    yield codes.dequantize(q, np.float64), codes.dequantize(fitted, np.float64), step


def _dequantized(encoder: Encoder, name: str, q: QuantizedTensor) -> EncodedTensor:
    """A packed weight stored as float: exact in float32, unless another dtype was asked for."""
    if q.batch:
        raise FormatError(f"{name} is a stack of packed matrices, which cannot be stored as float; save as 'awq-jax'")
    wanted = encoder.destination.dtype
    with np.errstate(over="ignore"):
        w = codes.dequantize(q)
        stored = np.ascontiguousarray(w.T if q.axes == "nk" else w).astype(FLOATS[wanted or "float32"])
    if not np.isfinite(stored).all():
        raise FormatError(f"{name} is too large for {stored.dtype}: its scales or offsets are; fetch it again")
    deviation = _relative(w.T, stored) if wanted else 0.0
    record = Record(name, stored.shape, stored.dtype.name, deviation=deviation)
    return _sized(record, encoder.encode_float(name, stored), {})


def _judge(name: str, deviation: float, lossy: bool) -> None:
    if not np.isfinite(deviation):
        raise FormatError(
            f"{name} has scales that this format's dtype cannot hold (too large or too small); save as 'awq-jax', "
            "which keeps their dtype"
        )
    if deviation > LIMIT:
        raise FormatError(
            f"{name} would move by {deviation:.3g} quantization steps in this format, which is another quantization; "
            "convert to 'float' and quantize again, or choose a format that holds it"
        )
    if deviation and not lossy:
        raise FormatError(
            f"{name} is not held exactly by this format: it would move by {deviation:.2g} of a quantization step. Pass "
            "--allow-lossy (allow_lossy=True), or choose a format that holds it (awq-jax convert --list)"
        )


def _ratio(a: np.ndarray, b: np.ndarray, step: np.ndarray) -> float:
    difference = np.abs(a - b)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(difference == 0, 0.0, difference / step)
    return float(ratio.max(initial=0.0))


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    if a.dtype == b.dtype or not a.size:
        return 0.0
    largest = difference = 0.0
    rows = max(1, CHUNK // max(1, math.prod(a.shape[1:])))
    for start in range(0, len(a) if a.ndim else 1, rows):
        x, y = (np.asarray(v[start : start + rows] if v.ndim else v, np.float64) for v in (a, b))
        largest, difference = max(largest, float(np.abs(x).max())), max(difference, float(np.abs(x - y).max()))
    return difference / largest if largest else 0.0


def _sized(record: Record, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> EncodedTensor:
    return EncodedTensor(dataclasses.replace(record, nbytes=sum(a.nbytes for a in arrays.values())), arrays, metadata)
