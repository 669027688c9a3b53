"""`quantize_sequential`: any model that JAX can trace, quantized on its own quantized stream."""

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar, overload

import jax.numpy as jnp
import numpy as np

from awq_jax import paths
from awq_jax.algorithm.methods import METHODS
from awq_jax.calibration.batches import arguments, check_batches, count_tokens, few_tokens
from awq_jax.config import AwqConfig
from awq_jax.devices.pool import HERE
from awq_jax.errors import CalibrationError, ConfigError
from awq_jax.plan.discover import discover
from awq_jax.plan.plan import Plan, ScaleGroup
from awq_jax.plan.validate import validate
from awq_jax.plan.verify import verify
from awq_jax.progress import Progress, bar
from awq_jax.quantizer import adapters
from awq_jax.quantizer import quantize as quantizer
from awq_jax.quantizer.targets import select
from awq_jax.report import Report
from awq_jax.stream import folds
from awq_jax.stream.cut_blocks import Programs
from awq_jax.stream.decoder_blocks import Leaves
from awq_jax.stream.lockstep import Lockstep
from awq_jax.trace.arguments import Form, split

T = TypeVar("T")


@overload
def quantize_sequential(
    apply_fn: Callable[..., object],
    params: T,
    batches: Iterable[object],
    config: AwqConfig | None = ...,
    *,
    return_report: Literal[True],
    **options: Any,
) -> tuple[T, Report]: ...
@overload
def quantize_sequential(
    apply_fn: Callable[..., object],
    params: T,
    batches: Iterable[object],
    config: AwqConfig | None = ...,
    *,
    return_report: Literal[False] = ...,
    **options: Any,
) -> T: ...
def quantize_sequential(
    apply_fn: Callable[..., object],
    params: T,
    batches: Iterable[object],
    config: AwqConfig | None = None,
    *,
    plan: Plan | None = None,
    progress: Progress = True,
    return_report: bool = False,
    **settings: object,
) -> T | tuple[T, Report]:
    """Quantize every matmul weight of ``params``, each group for the input that those before it leave it.

    The traced program is cut at the inputs of the scale groups. All batches go from cut to cut, through the float model
    and through the quantized one, and every group is rounded before the next one's input is made; where one weight
    meets all tokens it is also corrected for what the two models differ by. The weights of a scan are rounded for all
    of its steps at once, and not corrected.

    Of two batches or more one in eight, at least one, is kept from all fitting: by it groups are judged, as by
    `awq_jax.calibrate`. How strong corrections are is chosen on a quarter of the others: pass eight batches or
    more. Each segment is compiled once for every shape of batches.

    Memory: the parameters twice, all batches and, in host memory, what the float model has alive at the inputs of all
    groups for them; for the group at work three matrices ``[K, K]`` for each fold.

    Args:
      apply_fn, params, batches, plan, progress: as for `awq_jax.calibrate`.
      config, return_report, **settings: as for `awq_jax.quantize`.

    Returns:
      As `awq_jax.quantize`.

    Raises:
      ConfigError: bad settings, or a method that needs no statistics.
      CalibrationError: no batches, or ``batches`` is one array.
      PlanError: ``plan`` does not describe ``params``.
      WeightError: a weight that is packed or folded into holds NaN or inf, or one is packed already.
      ShapeError: the group size does not divide some weights; all are listed.
    """
    if config is not None and settings:
        raise ConfigError("pass either an AwqConfig or settings, not both")
    config = dataclasses.replace(config or AwqConfig.from_dict(settings), sequential=True)
    if not METHODS[config.method].needs_statistics:
        raise ConfigError(f'method="{config.method}" needs no calibration: quantize(params, discover(...)) is enough')
    check_batches(batches)
    inputs = [arguments(batch) for batch in batches]
    if not inputs:
        raise CalibrationError("the calibration set is empty: pass at least one batch of tokens")
    started = time.perf_counter()
    parameters, factors = paths.flatten(params), adapters.factors(params)
    quantizer.check_float(parameters)
    args, kwargs = inputs[0]
    plan = plan or discover(apply_fn, params, *args, **kwargs)
    validate(plan, params)
    quantizer.check_finite(quantizer.changed(plan, select(plan, config, parameters, factors)[0], parameters))
    few, named = few_tokens(apply_fn, params, args, kwargs)
    plan = verify(plan, apply_fn, params, *few, **named)
    work = quantizer.with_targets(plan, select(plan, config, parameters, factors)[0])
    leaves: Leaves = {p: x if hasattr(x, "shape") else jnp.asarray(x) for p, x in parameters.items()}
    steps = _lockstep(apply_fn, params, leaves, inputs, [group for group, _ in work])
    fetch = steps.calibrate()
    calibrated = time.perf_counter() - started
    with bar(progress, "quantize", "group", 2 * len(work)) as shown:
        done = quantizer.quantize_groups(
            plan, work, leaves, fetch, config, shown.update, HERE, consume=True, follower=steps
        )
    seconds = {"calibrate": calibrated, **steps.apart(done.seconds)}
    tokens = sum(count_tokens(*given) for given in inputs)
    out, report = quantizer.conclude(params, plan, config, done, seconds, tokens, progress)
    return (out, report) if return_report else out


def _lockstep(
    apply_fn: Callable[..., object],
    params: object,
    leaves: Leaves,
    inputs: list[tuple[tuple[object, ...], dict[str, Any]]],
    groups: list[ScaleGroup],
) -> Lockstep:
    made: dict[object, Programs] = {}

    def programs(arrays: list[np.ndarray], form: Form) -> Programs:
        key = form, tuple((x.shape, str(x.dtype)) for x in arrays)
        if key not in made:

            def apply(leaves: Leaves, arrays: list[object]) -> object:
                args, kwargs = form.join(arrays)
                return apply_fn(paths.map_with_path(lambda path, _: leaves[path], params), *args, **kwargs)

            made[key] = Programs(apply, leaves, arrays, groups)
        return made[key]

    both = [split(*given) for given in inputs]
    every = [([np.asarray(x) for x in arrays], form) for arrays, form in both]
    streams = [{i: list(arrays) for i, (arrays, _) in enumerate(every)} for _ in range(2)]
    fold_of = folds.of_batches([1] * len(every))
    return Lockstep([programs(*x) for x in every], "", leaves, streams[0], streams[1], 0, fold_of, HERE)
