"""The scales that another maker folded into an AWQ checkpoint, found again with the float model at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from awq_jax.convert.source import Source
from awq_jax.errors import ShapeError
from awq_jax.models.weights import modules, naming
from awq_jax.models.weights import params as model_params
from awq_jax.paths import flatten
from awq_jax.plan.folded import channel_scales
from awq_jax.plan.plan import Absorber, Plan, ScaleGroup
from awq_jax.qtensor import QuantizedTensor, to_canonical
from awq_jax.report import FoldedScale
from awq_jax.stream.decoder_blocks import Chain


@dataclasses.dataclass(frozen=True)
class Recovered:
    """What was found.

    Attributes:
      scales: by module, as `awq_jax.convert.folded_scales` keeps them.
      error: root mean square of what the scaled float weights and the base's differ by, relative to the latter: what
        was lost in rounding, if all scales were found.
      worst: the module that fits worst, with its error.
    """

    scales: dict[str, FoldedScale]
    error: float
    worst: str


def recover(base: Source, original: Source) -> Recovered:
    """The scales folded into ``base``, from its norms (exact but for their rounding) and, where a linear absorbed a
    scale, from the rows and columns of both checkpoints' weights by least squares.

    Memory: the weights of one scale group. Experts are left as they are.

    Args:
      base: an AWQ checkpoint.
      original: the float checkpoint that it was made from.

    Raises:
      ShapeError, WeightError: they are not of one model.
      UnsupportedModelError: the architecture is not one of `awq_jax.models.supported`.
    """
    config = naming.config_of(original)
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(model_params.abstract(config)[1]).items()}
    before, after = (
        model_params.Weights(source, own, shapes, "float32")
        for source, own in ((original, config), (base, naming.config_of(base)))
    )
    groups = [g for g in Chain(config).plan().groups if g.absorbers and not g.batch and not g.scan]
    scales = {g.name: s for g in groups if ((s := _scale(g, before, after)) != 1).any()}
    found = channel_scales(Plan(tuple(groups)), scales)
    squares, worst = [0.0, 0.0], ("", -1.0)
    for path, scale in found.items():
        w, q = _matrix(before, path), _matrix(after, path)
        w = w if scale.input is None else w * scale.input[:, None]
        w = w if scale.output is None else w / scale.output
        off, size = float(np.sum((w - q) ** 2)), float(np.sum(q**2))
        squares = [squares[0] + off, squares[1] + size]
        if (error := (off / max(size, 1e-30)) ** 0.5) > worst[1]:
            worst = path, error
    names = {linear.path: linear.module for linear in modules.linears(config)}
    return Recovered(
        modules.folded_scales(found, config),
        (squares[0] / max(squares[1], 1e-30)) ** 0.5,
        f"{worst[1]:.3g} ({names.get(worst[0], worst[0])})",
    )


def _scale(group: ScaleGroup, before: model_params.Weights, after: model_params.Weights) -> np.ndarray:
    """The scale of one group, float32 ``[K]``."""
    norms = [a for a in group.absorbers if not a.path.endswith(("/kernel", "/bias"))]
    logs = np.zeros(group.channels)
    counts = np.zeros(group.channels)
    for at, log in _from_norms(norms, before, after) if norms else _from_linears(group, before, after):
        np.add.at(logs, at, log)
        np.add.at(counts, at, 1)
    labels = np.arange(group.channels) if group.shared_channels is None else np.asarray(group.shared_channels)
    total, number = (np.zeros(labels.max() + 1) for _ in range(2))
    np.add.at(total, labels, logs)
    np.add.at(number, labels, counts)
    return np.exp(total[labels] / np.maximum(number[labels], 1)).astype(np.float32)


def _from_norms(
    norms: list[Absorber], before: model_params.Weights, after: model_params.Weights
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Channels, and the logarithms of their scales: what each norm's weight was divided by."""
    for a in norms:
        old, new = (np.asarray(w.leaf(a.path), np.float64) + a.offset for w in (before, after))
        index = np.broadcast_to(np.asarray(a.index), old.shape).reshape(-1)
        old, new = old.reshape(-1), new.reshape(-1)
        use = (index >= 0) & (old * new > 0)
        yield index[use], np.log(old[use] / new[use])


def _from_linears(
    group: ScaleGroup, before: model_params.Weights, after: model_params.Weights
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same from how long the rows of the weights have become."""
    for site in group.sites:
        w, q = _matrix(before, site.path), _matrix(after, site.path)
        fit = np.sum(w * q, axis=1) / np.maximum(np.sum(w * w, axis=1), 1e-30)
        use = np.flatnonzero(fit > 0)
        yield use, np.log(fit[use])


def _matrix(weights: model_params.Weights, path: str) -> np.ndarray:
    """A linear's weight as float64 ``[K, N]``."""
    leaf = weights.leaf(path)
    if isinstance(leaf, QuantizedTensor):
        return np.asarray(leaf.dequantize(np.float32), np.float64)
    if leaf.ndim != 2:
        raise ShapeError(f"{path} has shape {leaf.shape}: scales of experts are not found again")
    return to_canonical(np.asarray(leaf, np.float64), "kn")
