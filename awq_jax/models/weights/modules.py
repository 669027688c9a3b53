"""The linears of a checkpoint by the names that it has for them, as PEFT and engines call them."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from awq_jax import paths
from awq_jax.models.config import ModelConfig
from awq_jax.models.weights import params as model_params
from awq_jax.report import FoldedScale


class Linear(NamedTuple):
    """A linear as a checkpoint has it, or that of one expert; or a part of its columns.

    Attributes:
      module: its name: ``model.layers.0.self_attn.q_proj``.
      path: our parameter.
      shape: of that, ``[K, N]`` or ``[E, K, N]``.
      expert: which slice of our parameter it is; None for all of it.
      part: which of the module's columns our parameter has; None for all of them.
    """

    module: str
    path: str
    shape: tuple[int, ...]
    expert: int | None
    part: model_params.Part | None


def linears(config: ModelConfig) -> Iterator[Linear]:
    """Every linear of a model, those of experts and the head included."""
    for path, leaf in paths.flatten(model_params.abstract(config)[1]).items():
        if path.endswith("/kernel"):
            how = model_params.stored(config.names, path, shape := tuple(leaf.shape))
            for e, name in enumerate(how.names):
                module = name.removesuffix(".weight")
                yield Linear(module, path, shape, e if how.stacked else None, how.part)


def folded_scales(scales: Mapping[str, FoldedScale], config: ModelConfig) -> dict[str, FoldedScale]:
    """Scales by path as `awq_jax.convert.folded_scales` keeps them, by module."""
    if not scales:
        return {}
    out: dict[str, FoldedScale] = {}
    outputs: dict[str, dict[int, np.ndarray]] = {}  # of parts of a module
    for linear in linears(config):
        found = scales.get(linear.path, FoldedScale(None, None))
        *batch, k, n = linear.shape
        lead = batch if linear.expert is None else []
        own, past = (
            None if s is None else _each(s, (*batch, size)) for s, size in ((found.input, k), (found.output, n))
        )
        if linear.expert is not None:
            own, past = (None if s is None else s[linear.expert] for s in (own, past))
        if linear.part is not None:
            here = outputs.setdefault(linear.module, {})
            here[linear.part.index] = np.ones((*lead, n), np.float32) if past is None else past
            past = None
            if len(here) == linear.part.count and any((s != 1).any() for s in here.values()):
                past = np.asarray(linear.part.join([jnp.asarray(here[i]) for i in range(len(here))]))
        if own is not None or past is not None:
            out[linear.module] = FoldedScale(own, past)
    return out


def by_path(scales: Mapping[str, FoldedScale], config: ModelConfig) -> dict[str, FoldedScale]:
    """The inverse of `folded_scales`; of experts ``[E, K]`` and ``[E, N]``."""
    if not scales:
        return {}
    out: dict[str, FoldedScale] = {}
    for linear in linears(config):
        found = next((scales[n] for n in config.names.spellings(linear.module) if n in scales), None)
        if found is None:
            continue
        past = found.output
        if past is not None and linear.part is not None:
            past = np.asarray(linear.part.of(jnp.asarray(past)))
        if linear.expert is None:
            out[linear.path] = FoldedScale(found.input, past)
            continue
        each = out.get(linear.path, FoldedScale(None, None))
        out[linear.path] = FoldedScale(
            *(_with(s, linear.expert, own, (linear.shape[0], size))
              for s, own, size in zip(each, (found.input, past), linear.shape[1:], strict=True))
        )  # fmt: skip
    return out


def _with(s: np.ndarray | None, expert: int, own: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray | None:
    """Scales ``[E, ...]`` with those of one expert put in; 1 where none are known."""
    if own is not None:
        s = np.ones(shape, np.float32) if s is None else s
        s[expert] = own
    return s


def _each(s: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """``s`` of each expert: those that read one activation have one for it, and the outputs of all side by side."""
    return np.broadcast_to(s if len(shape) == 1 else s.reshape(-1, shape[-1]), shape)
