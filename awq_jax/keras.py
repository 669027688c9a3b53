"""Keras 3 on JAX: a model as a pure function."""

from collections.abc import Callable
from typing import Any

import jax

from awq_jax.errors import ConfigError


def functional(model: Any) -> tuple[Callable[..., Any], dict[str, jax.Array]]:
    """A Keras model as ``(apply_fn, params)``, the form `calibrate`, `quantize` and `bind` take.

    Variables that are not float (seeds, step counters) are taken as they are now; what a call changes is dropped
    (``stateless_call`` with ``training=False``), so ``apply_fn`` is pure.

    Args:
      model: a built ``keras.Model``; not modified.

    Returns:
      ``apply_fn(params, *args, **kwargs)`` and the model's float variables by their Keras path, trainable or not.

    Raises:
      ConfigError: the backend of Keras is not JAX, or the model is not built.
    """
    import keras

    backend = keras.backend.backend()
    if backend != "jax":
        raise ConfigError(
            f"Keras runs on {backend}: set the environment variable KERAS_BACKEND=jax before it is imported"
        )
    if not model.built:
        raise ConfigError(f"{model.name} is not built: call it once, or model.build(shape), so that it has weights")
    names: dict[int, str] = {}
    for v in model.variables:
        count = sum(name == v.path or name.startswith(f"{v.path}#") for name in names.values())
        names[id(v)] = f"{v.path}#{count}" if count else v.path
    floats = {id(v) for v in model.variables if keras.backend.is_float_dtype(v.dtype)}
    params = {names[id(v)]: v.value for v in model.variables if id(v) in floats}
    fixed = {id(v): v.value for v in model.variables if id(v) not in floats}

    def apply_fn(params: dict[str, jax.Array], *args: Any, **kwargs: Any) -> Any:
        def values(variables: Any) -> list[jax.Array]:
            return [params[names[id(v)]] if id(v) in floats else fixed[id(v)] for v in variables]

        given = {"training": False, **kwargs}
        states = values(model.trainable_variables), values(model.non_trainable_variables)
        return model.stateless_call(*states, *args, **given)[0]

    return apply_fn, params
