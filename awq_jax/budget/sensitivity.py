"""What an error in the result of a matmul costs at the end of the model: measured by gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.calibration.batches import arguments
from awq_jax.errors import CalibrationError, ConfigError
from awq_jax.plan.plan import Plan
from awq_jax.trace.arguments import Form, split
from awq_jax.trace.probes import Place, Sums, probed

SEED = 0  # of the labels that are drawn


def nothing(places: Iterable[Place]) -> dict[Place, jax.Array]:
    """Sums of no gradients."""
    return {place: jnp.zeros((), jnp.float32) for place in places}


def places_of(plan: Plan, paths: Iterable[str]) -> list[Place]:
    """Where a plan's weights of these paths are multiplied."""
    wanted = set(paths)
    return [Place(site.path, tuple(site.part)) for _, site in plan.sites() if site.path in wanted]


def drawn(logits: jax.Array, key: jax.Array) -> jax.Array:
    """The gradient by ``logits [..., V]`` of the negative log likelihood of labels drawn from them, summed.

    Over the draws its outer product is the Fisher matrix, which is the second derivative of KL(model || changed model)
    where they are the same.
    """
    wide = logits.astype(jnp.float32)
    labels = jax.random.categorical(key, wide)
    return (jax.nn.softmax(wide) - jax.nn.one_hot(labels, logits.shape[-1])).astype(logits.dtype)


def logits_of(output: Any) -> jax.Array:
    """The logits among what a model returned: an array, ``.logits``, ``["logits"]``, or the first of several.

    Raises:
      ConfigError: there are none.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, tuple | list) and output:
        found = output[0]
    if not hasattr(found, "dtype") or found.ndim < 2 or not jnp.issubdtype(found.dtype, jnp.floating):
        raise ConfigError(
            "where the model's output has its logits is not known: pass a function that returns them alone, float "
            "[..., classes]"
        )
    return found


def of_model(
    apply_fn: Callable[..., object], params: object, batches: Iterable[object], places: Iterable[Place]
) -> tuple[dict[Place, float], int]:
    """Squared gradients at ``places``, summed over ``batches``, and over how many predictions.

    Args:
      apply_fn, params, batches: as for `awq_jax.calibrate`; its output has logits (see `logits_of`).
      places: weights.

    Raises:
      CalibrationError: no batches.
      ConfigError: no logits, or the model has a loop that cannot be differentiated.
    """
    zeros = nothing(places)
    run = probed(lambda params, *args, **kwargs: logits_of(apply_fn(params, *args, **kwargs)))
    programs: dict[Form, Callable[..., tuple[Sums, jax.Array]]] = {}

    def program(form: Form) -> Callable[..., tuple[Sums, jax.Array]]:
        def squares(params: object, arrays: list[object], key: jax.Array) -> tuple[Sums, jax.Array]:
            args, kwargs = form.join(arrays)
            logits, pull = jax.vjp(lambda sums: run(sums, params, *args, **kwargs), zeros)
            return pull(drawn(logits, key))[0], jnp.asarray(logits.size // logits.shape[-1])

        return jax.jit(squares)

    total = dict.fromkeys(zeros, 0.0)
    predictions = 0
    for number, batch in enumerate(batches):
        arrays, form = split(*arguments(batch))
        programs.setdefault(form, program(form))
        try:
            sums, count = programs[form](params, arrays, jax.random.fold_in(jax.random.key(SEED), number))
        except ValueError as e:
            if "while_loop" not in str(e):
                raise
            raise ConfigError(
                "the model has a loop of unknown length, which cannot be differentiated: say overrides yourself"
            ) from e
        predictions += int(count)
        for place, value in sums.items():
            total[place] += float(np.asarray(value))
    if not predictions:
        raise CalibrationError("there is no batch to measure sensitivities on: pass at least one batch of tokens")
    return total, predictions
