"""What each setting of a weight would lose, predicted without rounding for it.

A weight's squared output error with compensated rounding is ``sum_k energy_k e_k^2`` where e is the error of each row's
rounding and ``energy_k`` what compensation cannot take away from channel k
(`awq_jax.algorithm.compensation.conditional_energy`). The errors of plain rounding stand for e. Multiplied with how
much an error in the result matters at the end of the model (`awq_jax.budget.sensitivity`), and halved, that is the
divergence, in nats per prediction, that the weight's rounding adds in second order. The scale of AWQ and clipping lower
all of it, for all settings of a weight about alike: on stories15M, groups of 96, 3 bits, what each scale group by
itself really adds is 1 / 1.2 to 1 / 1.8 of it, over squared errors that differ by four orders of magnitude.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.algorithm.grid import column_loss, quantize_dequantize
from awq_jax.calibration.calibration import Stats
from awq_jax.calibration.means import means_of
from awq_jax.config import AwqConfig, LeafConfig
from awq_jax.qtensor import Weight
from awq_jax.quantizer.column_pieces import CanonicalWeight, Columns, settings
from awq_jax.quantizer.group_inputs import How, of_sums
from awq_jax.quantizer.targets import Target


def squared_errors(
    targets: Sequence[Target],
    leaves: Mapping[str, Weight],
    stats: Stats,
    config: AwqConfig,
    candidates: Mapping[str, Mapping[Any, LeafConfig]],
) -> dict[str, np.ndarray]:
    """Expected squared output error per column and token that each candidate makes of each weight of one scale group.

    Args:
      targets: weights of the group.
      leaves: float parameters by path.
      stats: calibration sums of the group.
      config: how it will be quantized.
      candidates: by the name of the site.

    Returns:
      By the name of the site, float64 ``[candidates]``; of experts the mean over tokens. NaN where nothing was seen.
    """
    group = targets[0].group
    means = means_of(group, stats)
    if means is None:
        return {t.site.name: np.full(len(candidates[t.site.name]), np.nan) for t in targets}
    layers, experts = math.prod(group.scan), math.prod(group.batch)
    how = How.of(config, group.channels)
    out = {t.site.name: np.zeros(len(candidates[t.site.name])) for t in targets}
    tokens = 0.0
    with settings():
        for layer in range(layers):
            for expert in range(experts):
                gram, count = means.collect_gram(layer, expert)
                made = of_sums(gram, count, how=how)
                tokens += float(count)
                for t in targets:
                    columns = Columns([CanonicalWeight.of(t, leaves[t.site.path])], group.channels)
                    metric = made.gram if made.energy is None else made.energy
                    assert metric is not None
                    total = np.zeros(len(candidates[t.site.name]))
                    for i in range(columns.pieces):
                        w = columns.piece(layer, expert, i)
                        total += np.asarray(
                            _of_piece(w, metric, tuple(candidates[t.site.name].values()), config.scale_dtype)
                        )
                    out[t.site.name] += float(count) * total / columns.total
    return {name: total / tokens for name, total in out.items()}


@functools.partial(jax.jit, static_argnames=("candidates", "dtype"))
def _of_piece(w: jax.Array, metric: jax.Array, candidates: tuple[LeafConfig, ...], dtype: str) -> list[jax.Array]:
    """Losses of all columns of ``w [K, C]`` together, for each candidate."""

    def loss(c: LeafConfig) -> jax.Array:
        filled = jnp.pad(w, ((0, -len(w) % c.group_size), (0, 0)))
        error = quantize_dequantize(filled, c.group_size, c.bits, c.symmetric, dtype)[: len(w)] - w
        return column_loss(error, metric).sum()

    return [loss(c) for c in candidates]
