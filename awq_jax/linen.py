"""Flax Linen: a dense layer whose kernel may be packed."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from awq_jax import kernels
from awq_jax.errors import ShapeError
from awq_jax.qtensor import QuantizedTensor


class Dense(nn.Dense):
    """Drop-in for `flax.linen.Dense` whose ``params/.../kernel`` may be a `QuantizedTensor`.

    With a float kernel it *is* `flax.linen.Dense`: same names, same initial values, same bits out.
    With a packed kernel the result dtype is the one the float layer would have; ``precision`` and a
    custom ``dot_general`` then have no effect.

    Attributes (beyond those of `flax.linen.Dense`):
      impl: kernel for packed weights, see `awq_jax.kernels.matmul`.

    Raises:
      BackendError: at the call, if ``impl`` is unknown or cannot run.
      ShapeError: at the call, if the packed kernel does not have ``features`` columns.
    """

    impl: str = "auto"

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """``inputs [..., K]`` to ``[..., features]``."""
        kernels.check_impl(self.impl)
        # Not `self.param`, which compares shapes leaf by leaf; a packed kernel cannot pass that.
        kernel = meta.unbox(self.get_variable("params", "kernel"))
        if not isinstance(kernel, QuantizedTensor):
            return super().__call__(inputs)
        if kernel.n != self.features:
            raise ShapeError(
                f"{'/'.join((*self.path, 'kernel'))}: a packed kernel of shape {kernel.shape} in a Dense of "
                f"{self.features} features; these parameters belong to another model"
            )
        bias = meta.unbox(self.get_variable("params", "bias")) if self.use_bias else None
        stand_in = jnp.zeros((), kernel.dtype)  # takes part in the choice of dtype as the float kernel would
        x, _, bias = self.promote_dtype(inputs, stand_in, bias, dtype=self.dtype)
        assert x is not None  # as `inputs` is not
        y = kernels.matmul(x, kernel, impl=self.impl)
        return y if bias is None else y + bias
