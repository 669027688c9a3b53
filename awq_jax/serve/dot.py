"""`dot`: a product with a weight that may be packed."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from awq_jax import kernels
from awq_jax.errors import ShapeError
from awq_jax.qtensor import QuantizedTensor


def dot(
    x: ArrayLike,
    w: ArrayLike | QuantizedTensor,
    *,
    impl: str = "auto",
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """``x @ w`` for a float or a packed weight.

    Has a gradient with respect to ``x`` (reverse mode); pure, so it works under jit, vmap, scan and remat. Sums
    are taken in float32 for packed weights.

    Args:
      x: activation ``[..., K]``, or ``[..., *k_dims]`` for a packed weight with several contracted
        axes.
      w: float ``[K, N]``, or a `QuantizedTensor` without batch axes.
      impl: kernel for packed weights, see `awq_jax.kernels.matmul`.
      preferred_element_type: dtype of the result. Default: the dtype ``jnp.dot`` would give with
        the float weight, i.e. the promotion of ``x.dtype`` and ``w.dtype``.

    Returns:
      ``[..., N]``, or ``[..., *n_dims]`` for a packed weight.

    Raises:
      ShapeError: if the shapes do not fit.
      BackendError: if ``impl`` is unknown or cannot run here.
    """
    kernels.check_impl(impl)
    x = jnp.asarray(x)
    if not isinstance(w, QuantizedTensor):
        w = jnp.asarray(w)
        if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
            raise ShapeError(f"dot of {x.shape} with a float weight of {w.shape}: expected [..., K] and [K, N]")
        return jnp.dot(x, w, preferred_element_type=preferred_element_type)
    if w.batch:
        raise ShapeError(
            f"dot with a packed weight that still has batch axes {w.batch}: use jax.vmap(dot), a scan, "
            "or slice it with jax.tree.map(lambda a: a[i], w)"
        )
    if len(w.k_dims) > 1 and x.shape[-len(w.k_dims) :] == w.k_dims:
        x = x.reshape(*x.shape[: -len(w.k_dims)], w.k)
    x = x.astype(jnp.promote_types(x.dtype, w.dtype))
    y = kernels.matmul(x, w, impl=impl, preferred_element_type=preferred_element_type)
    return y.reshape(*y.shape[:-1], *w.n_dims)
