"""Flax NNX: a linear layer whose kernel may be packed, and a model as a pure function."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from awq_jax import kernels, paths
from awq_jax.errors import ShapeError
from awq_jax.qtensor import QuantizedTensor
from awq_jax.trace.bind import bind


class Linear(nnx.Linear):
    """Drop-in for `flax.nnx.Linear` whose ``kernel`` may hold a `QuantizedTensor`.

    With a float kernel it *is* `flax.nnx.Linear`: same parameters, same initial values for the same
    rngs, same bits out. With a packed kernel the result dtype is the one the float layer would
    have; ``precision`` and a custom ``dot_general`` then have no effect.

    Args:
      in_features: K.
      out_features: N.
      impl: kernel for packed weights, see `awq_jax.kernels.matmul`.
      **options: as `flax.nnx.Linear`: ``rngs`` (required), ``use_bias``, ``dtype``,
        ``param_dtype``, ``kernel_init``, ``bias_init``, ``preferred_element_type``, ...

    Raises:
      BackendError: if ``impl`` is unknown, or at the call if it cannot run.
      ShapeError: at the call, if the packed kernel or the inputs have the wrong size.
    """

    def __init__(self, in_features: int, out_features: int, *, impl: str = "auto", **options: Any):
        self.impl = kernels.check_impl(impl)
        super().__init__(in_features, out_features, **options)

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """``inputs [..., K]`` to ``[..., N]``; further arguments as `flax.nnx.Linear` takes them."""
        kernel: Any = self.kernel.get_value()
        if not isinstance(kernel, QuantizedTensor):
            return super().__call__(inputs, *args, **kwargs)
        if (kernel.k, kernel.n) != (self.in_features, self.out_features):
            raise ShapeError(
                f"a packed kernel of shape {kernel.shape} (axes {kernel.live_axes!r}) in a Linear from "
                f"{self.in_features} to {self.out_features} features; these parameters belong to another model"
            )
        bias = None if self.bias is None else self.bias.get_value()
        stand_in = jnp.zeros((), kernel.dtype)  # takes part in the choice of dtype as the float kernel would
        x, _, bias = self.promote_dtype((inputs, stand_in, bias), dtype=self.dtype)
        y = kernels.matmul(x, kernel, impl=self.impl, preferred_element_type=self.preferred_element_type)
        return y if bias is None else y + bias


class Packed(nnx.Module):
    """A model with packed parameters as an NNX module, for code that wants one: `flax.nnx.jit`, tunix's sampler.

    `nnx.merge` cannot put a `QuantizedTensor` where a layer of the model computes with its kernel; here the function of
    the model is bound (`awq_jax.bind`) and holds the parameters.

    Args:
      apply_fn: the model as a function, such as `functional` makes.
      params: its parameters, some or all of them packed: what `awq_jax.quantize` returned.
      impl: kernel for packed weights, see `awq_jax.kernels.matmul`.
      **attributes: what such code looks up on the model (``config=model.config``); they are set as they are.

    Raises:
      BackendError: if ``impl`` is unknown, or at the call if it cannot run.
    """

    def __init__(self, apply_fn: Callable[..., Any], params: Any, *, impl: str = "auto", **attributes: Any):
        for name, value in attributes.items():
            setattr(self, name, value)
        self.apply = bind(apply_fn, impl=impl)
        self.params = nnx.data(params)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for these arguments."""
        return self.apply(self.params, *args, **kwargs)


def functional(model: nnx.Module, method: str = "__call__") -> tuple[Callable[..., Any], nnx.State]:
    """An NNX model as ``(apply_fn, params)``, the form `calibrate`, `quantize` and `bind` take.

    State other than ``nnx.Param`` (rng streams, batch statistics, caches) is taken as it is now:
    ``apply_fn`` starts from it at every call and drops what the call changes, so it is pure.

    Args:
      model: any NNX module; not modified.
      method: name of the method to call.

    Returns:
      ``apply_fn(params, *args, **kwargs)`` and the ``nnx.State`` of the model's parameters. ``params`` may also be
      nested dicts with the same paths, as `awq_jax.convert.restore` gives them.
    """
    graphdef, params, rest = cast(
        tuple[nnx.GraphDef[nnx.Module], nnx.State, nnx.State], nnx.split(model, nnx.Param, ...)
    )

    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)

    def apply_fn(params: nnx.State | Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not isinstance(params, nnx.State):  # in files the keys of lists are text, and nothing wraps a variable
            params = paths.filled(shapes, paths.flatten(params))
        # Copies, so that the call neither changes the caller's variables nor carries theirs into another trace.
        return getattr(nnx.merge(graphdef, params, rest, copy=True), method)(*args, **kwargs)

    return apply_fn, params
