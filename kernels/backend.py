"""What a backend of the packed matmul is: its name, what it can serve, and how it runs."""

import dataclasses
from collections.abc import Callable

import jax
from jax.typing import DTypeLike

from awq_jax.qtensor import QuantizedTensor


@dataclasses.dataclass(frozen=True)
class Request:
    """What a backend needs to know to say whether and how it would run.

    Attributes:
      m: activation rows (per batch element).
      q: the weight (arrays, tracers or abstract).
      dtype: dtype of the activation.
      platform: where it will run: ``"cpu"``, ``"cuda"``, ``"tpu"``, ...
      bias: float ``[N]`` to be added by a backend that fuses it, or None.
    """

    m: int
    q: QuantizedTensor
    dtype: DTypeLike
    platform: str
    bias: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of the packed matmul; its file ends in it, and `awq_jax.kernels.dispatch` lists it.

    Attributes:
      name: what ``impl=`` calls it.
      obstacle: why it cannot serve a request, or None if it can.
      describe: which form it would use for a request, and why.
      run: ``(x [*B, m, K], request, out_dtype) -> [*B, m, N]``, without ``inv_scale`` and ``perm``.
      fuses_bias: ``run`` adds ``request.bias``.
      made_for: the platform whose own kernel it is: where another backend serves there, a warning says why.
      layout: the order of codes in memory that it reads, see `awq_jax.pack`.
      experts: ``(tiles [T, R, K], request, expert int32 [T], out_dtype) -> [T, R, N]``: each tile of rows times
        the matrix of its expert out of ``request.q [E, K, N]``, or undefined where that is negative. None: it
        has no kernel for that, and multiplies by one expert at a time.
    """

    name: str
    obstacle: Callable[[Request], str | None]
    describe: Callable[[Request], str]
    run: Callable[[jax.Array, Request, DTypeLike], jax.Array]
    fuses_bias: bool = False
    made_for: str = ""
    layout: str = "canonical"
    experts: Callable[[jax.Array, Request, jax.Array, DTypeLike], jax.Array] | None = None
