"""The linear of the reference decoder: what it makes has the dtype of what it reads, however it is stored."""

import jax
import jax.numpy as jnp

from awq_jax import kernels, nnx
from awq_jax.qtensor import QuantizedTensor


class Linear(nnx.Linear):
    """`awq_jax.nnx.Linear` within a residual stream: float32 parameters of a 16-bit model do not make it float32.

    Nor do they change in what dtype the other parameter is multiplied: a bias is added to the product. Where
    all dtypes are one, this is that layer.
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:  # type: ignore[override]
        """``inputs [..., K]`` to ``[..., N]`` of their dtype."""
        kernel: jax.Array | QuantizedTensor = self.kernel.get_value()
        bias = None if self.bias is None else self.bias.get_value()
        if bias is None or bias.dtype == jnp.dtype(kernel.dtype):
            return super().__call__(inputs).astype(inputs.dtype)
        x = inputs.astype(jnp.promote_types(inputs.dtype, kernel.dtype))
        y = kernels.matmul(x, kernel, impl=self.impl) if isinstance(kernel, QuantizedTensor) else x @ kernel
        return (y + bias).astype(inputs.dtype)
