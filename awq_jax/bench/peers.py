"""Int4 products of other libraries on the same weight, where they are installed: torch, gemlite, Marlin.

They run under CUDA graphs, which is the fastest way to start them. A peer that fails is reported with
its error, and the measurement goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.bench import timing
from awq_jax.qtensor import QuantizedTensor

if TYPE_CHECKING:  # torch takes seconds, and need not be installed
    import torch

    Product = Callable[[torch.Tensor], torch.Tensor]

LONGEST = 20  # seconds for one peer and product: some search for tile sizes when they are first called


@dataclasses.dataclass(frozen=True)
class TorchWeight:
    """A weight on torch's device.

    Attributes:
      q: where it comes from.
      codes: uint8 ``[N, K]``.
      scales, zeros: float32 ``[N, K/g]``.
    """

    q: QuantizedTensor
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


class Peer(NamedTuple):
    """What a library offers.

    Attributes:
      product: makes a product by another copy of the weight.
      dtype: of activations.
      checked: whether the result is that of our weight.
    """

    product: Callable[[], Product]
    dtype: torch.dtype
    checked: bool


def measure(
    q: QuantizedTensor,
    x: jax.Array,
    seed: int,
    error: Callable[[np.ndarray, jax.Array, QuantizedTensor, int], float],
    seconds: float,
) -> dict[str, float | str]:
    """Microseconds of each peer for ``x @ q``, or why there are none.

    Args:
      q: asymmetric, canonical, one matrix.
      x: bfloat16 ``[m, K]``.
      seed, error: for the check against float64 (see `awq_jax.bench.products.error`).
      seconds: to measure each for, about.
    """
    try:
        import torch
    except ImportError:
        return {"torch": "not installed"}
    if jax.default_backend() not in ("gpu", "cuda") or not torch.cuda.is_available():
        return {"torch": "sees no CUDA device"}
    assert q.zeros is not None
    w = TorchWeight(
        q,
        torch.from_numpy(np.array(q.codes().T)).cuda(),
        torch.from_numpy(np.array(q.scales.astype(jnp.float32).T)).cuda(),
        torch.from_numpy(np.array(q.zeros.T)).cuda().float(),
    )
    rows = torch.from_numpy(np.array(x.astype(jnp.float32))).cuda()
    out: dict[str, float | str] = {}
    for name, build in (("torch", _torch), ("gemlite", _gemlite), ("marlin", _marlin)):
        try:
            with deadline(LONGEST):
                peer = build(w)
                products = [peer.product() for _ in range(timing.copies(q.qweight.nbytes))]
                given = rows.to(peer.dtype)
                y = products[0](given).float().cpu().numpy()
                wrong = error(y, x, q, seed) if peer.checked else 0.0
                right = wrong < 2e-2  # unlike NaN
                out[name] = (
                    _graph_time(products, given, seconds) * 1e6 if right else f"wrong: relative error {wrong:.1e}"
                )
        except Exception as e:  # whatever another library does must not end our measurement
            out[name] = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:160]}"
    return out


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in what runs longer; no limit outside of the main thread, or without such signals.

    One limit within another ends with it, and gives it back what time it has left.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    start, outer = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, 0)[0]
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, min(seconds, outer or seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:  # at least a moment, since zero would be no limit
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - start), 1e-3))


def _graph_time(products: Sequence[Product], x: torch.Tensor, seconds: float) -> float:
    """Seconds of one product, as the median of replays of a CUDA graph of all."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for product in products[:3]:
            product(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product(x)
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    took: list[float] = []
    while sum(took) < seconds or len(took) < 5:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(took) / len(products)


def _torch(w: TorchWeight) -> Peer:
    """``torch._weight_int4pack_mm``: bfloat16, ``(code - 8) * scale + zero``; even rows in the high nibble."""
    import torch

    q, codes, scales, zeros = w.q, w.codes, w.scales, w.zeros
    if q.bits != 4:
        raise NotImplementedError(f"{q.bits} bits")
    packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    both = torch.stack([scales, (8 - zeros) * scales], -1).transpose(0, 1).contiguous().to(torch.bfloat16)

    def product(packed: torch.Tensor, both: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch._weight_int4pack_mm(x, packed, q.group_size, both)

    return Peer(lambda: functools.partial(product, packed.clone(), both.clone()), torch.bfloat16, True)


def _gemlite(w: TorchWeight) -> Peer:
    """gemlite's Triton kernels, in bfloat16, ``(code - zero) * scale``."""
    import gemlite
    import torch

    def product() -> Product:
        q, kind = w.q, gemlite.DType.BF16
        sizes = {"group_size": q.group_size, "in_features": q.k, "out_features": q.n}
        layer = gemlite.GemLiteLinear(q.bits, **sizes, input_dtype=kind, output_dtype=kind)
        layer.pack(w.codes, w.scales.to(torch.bfloat16), w.zeros.to(torch.bfloat16), None)
        return layer

    return Peer(product, torch.bfloat16, True)


def _marlin(w: TorchWeight) -> Peer:
    """IST-DASLab's Marlin: float16, symmetric, so it is timed on random words and not checked."""
    import marlin
    import torch

    q = w.q
    if q.bits != 4 or q.group_size not in (128, q.k):
        raise NotImplementedError(f"{q.bits} bits in groups of {q.group_size}")
    words = torch.randint(-(2**31), 2**31 - 1, (q.k // 16, q.n * 2), dtype=torch.int32, device="cuda")
    table = w.scales.T.contiguous().half()
    workspace = torch.zeros(q.n // 128 * 16, dtype=torch.int32, device="cuda")

    def product(words: torch.Tensor, table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y = torch.empty(len(x), q.n, dtype=torch.float16, device="cuda")
        marlin.mul(x, words, y, table, workspace, -1, -1, -1)
        return y

    return Peer(lambda: functools.partial(product, words.clone(), table.clone()), torch.float16, False)
