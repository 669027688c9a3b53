"""The low-rank correction of a quantization error, weighted by the calibration's Gram.

Of all products A B of rank R the one that minimizes ``tr (E - A B)^T H (E - A B)``, E being what the weight lost and H
the Gram of its inputs, is the truncated SVD of ``L^T E`` with ``H = L L^T``, times the inverse of ``L^T``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.linalg

from awq_jax import paths
from awq_jax.calibration import shrinkage
from awq_jax.calibration.calibration import Calibration
from awq_jax.calibration.means import means_of
from awq_jax.errors import ConfigError
from awq_jax.qtensor import QuantizedTensor, to_canonical
from awq_jax.report import FoldedScale

DAMPING = 1e-4  # of the mean of the Gram's diagonal, so that channels without energy have a factor


@dataclasses.dataclass(frozen=True)
class Original:
    """What ``init="error"`` corrects towards.

    Attributes:
      params: the float parameters that were quantized.
      scales: `Report.scales` of that quantization.
    """

    params: Any
    scales: Mapping[str, FoldedScale] = dataclasses.field(default_factory=dict)


def factors(
    path: str, leaf: Any, axes: str, rank: int, scale: float, calib: object, original: Original | None
) -> tuple[np.ndarray, np.ndarray]:
    """``(A, B)`` of one weight, float32 ``[*B, K, R]`` and ``[*B, R, N]``, whose product times ``scale`` corrects it.

    Raises:
      ConfigError: the calibration or the float parameters are missing, or have no such weight.
    """
    if not isinstance(calib, Calibration) or original is None:
        raise ConfigError('init="error" needs calib=, a Calibration of the float model, and original=')
    if not isinstance(leaf, QuantizedTensor):
        raise ConfigError(f'{path} is float, and has no error to correct: use init="zero" or other targets')
    group = next((g for g in calib.plan.groups if any(s.path == path for s in g.sites)), None)
    means = None if group is None or group.name not in calib.stats else means_of(group, calib.stats[group.name])
    before = paths.flatten(original.params).get(path)
    if group is None or means is None or before is None:
        raise ConfigError(f"{path} has no statistics in calib, or is not among the original parameters")
    lost = _lost(path, leaf, axes, before, original)
    batch = lost.shape[:-2]
    grams = [
        means.collect_gram(layer, e) for layer in range(math.prod(group.scan)) for e in range(math.prod(group.batch))
    ]
    scales = original.scales.get(path)
    folded = (
        np.ones(lost.shape[:-1]) if scales is None or scales.input is None else np.asarray(scales.input, np.float64)
    )
    flat = lost.reshape(-1, *lost.shape[-2:])
    folded = np.broadcast_to(folded, lost.shape[:-1]).reshape(len(flat), -1)
    made = []
    for i, (e, s) in enumerate(zip(flat, folded, strict=True)):
        gram, count = grams[i if len(grams) == len(flat) else i * len(grams) // len(flat)]
        h = np.asarray(shrinkage.shrunk(gram / count, shrinkage.share(gram, count)), np.float64) / np.outer(s, s)
        made.append(weighted(e, h, rank))
    a, b = (np.stack(x).reshape(*batch, *x[0].shape) for x in zip(*made, strict=True))
    return a.astype(np.float32), (b / scale).astype(np.float32)


def _lost(path: str, leaf: QuantizedTensor, axes: str, before: Any, original: Original) -> np.ndarray:
    """What the weight lost, float64 ``[*B, K, N]``, in the terms of the packed one."""
    w = to_canonical(np.asarray(before, np.float64), axes)
    scale = original.scales.get(path)
    if scale is not None:
        w = w if scale.input is None else w * np.asarray(scale.input, np.float64)[..., :, None]
        w = w if scale.output is None else w / np.asarray(scale.output, np.float64)[..., None, :]
    return w - to_canonical(np.asarray(leaf.dequantize(np.float32), np.float64), axes)


def weighted(error: np.ndarray, gram: np.ndarray | None, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The best factors ``[K, R]`` and ``[R, N]`` for ``error [K, N]``; without a Gram, by the plain SVD."""
    if gram is None:
        root = np.eye(len(error))
    else:
        damped = gram + DAMPING * np.trace(gram) / len(gram) * np.eye(len(gram))
        root = scipy.linalg.cholesky(damped, lower=True).T  # L^T
    u, s, v = np.linalg.svd(root @ error, full_matrices=False)
    half = np.sqrt(s[:rank])
    a = scipy.linalg.solve_triangular(root, u[:, :rank] * half, lower=False)
    b = half[:, None] * v[:rank]
    more = rank - a.shape[1]
    return np.pad(a, [(0, 0), (0, more)]), np.pad(b, [(0, more), (0, 0)])
