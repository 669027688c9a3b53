"""`add`: adapters to train beside the weights of any model, packed or float."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from awq_jax import paths
from awq_jax.calibration.calibration import Calibration
from awq_jax.errors import ConfigError, ShapeError
from awq_jax.kernels.adapted import Adapted
from awq_jax.lora import error_init
from awq_jax.lora.error_init import Original
from awq_jax.models import remat as rematerialized
from awq_jax.models.layers.moe import by_expert
from awq_jax.plan.plan import Plan
from awq_jax.qtensor import QuantizedTensor, split_shape
from awq_jax.quantizer import adapters as factors
from awq_jax.report import FoldedScale
from awq_jax.serve.model import Model
from awq_jax.trace.bind import bind

ALL = "all-linear"
INITS = ("zero", "error")
NAMES = ("lora_a", "lora_b")
Scales = Mapping[str, FoldedScale]  # by path
Adapters = dict[str, Any]  # nested by path; at each weight {"lora_a": [*B, K, R], "lora_b": [*B, R, N]}
NOT_ALL = re.compile(r"(^|/)(lm_head|gate|router|shared_expert_gate|vision|project_in|project_out)/kernel$|^vision/")


def add(
    model: Callable[..., Any] | Model,
    params: Any = None,
    *,
    rank: int = 16,
    alpha: float | None = None,
    targets: str = ALL,
    rslora: bool = False,
    init: str = "zero",
    calib: Calibration | Plan | None = None,
    original: Original | None = None,
    scales: Scales | None = None,
    dtype: DTypeLike = jnp.float32,
    seed: int = 0,
    remat: str | None = None,
) -> tuple[Callable[..., Any], Adapters, Any]:
    """Adapters beside the weights of a model: ``x W + alpha/rank (x A) B`` (arXiv 2106.09685).

    ::

        apply, adapters, frozen = awq_jax.lora.add(model.apply, qparams, rank=16)
        grads = jax.grad(lambda a: loss(apply(a, frozen, tokens)))(adapters)

    Packed kernels run as ever, with the adapter's product beside them. ``adapters`` is a small tree of float arrays of
    its own, for `jax.grad`, optax and Orbax.

    The factors are those of the float model: where scales are folded into a weight, which then reads x / s and makes
    y / t, ``diag(s) A`` and ``B diag(1 / t)`` stand beside it. So a learning rate means what it means there, whichever
    scales the quantizer chose. `awq_jax.lora.adapter` gives them in the base's terms.

    Args:
      model: ``apply_fn(params, *args)``, of Linen, of `awq_jax.nnx.functional`, or any function that `awq_jax.bind`
        takes; or a model of `awq_jax.load`, whose parameters need not be given.
      params: its parameters, packed or float; any leaf of several axes may hold stacked layers or experts.
      rank: R.
      alpha: factors are scaled by ``alpha / rank``, or over the root of the rank with ``rslora`` (arXiv 2312.03732).
        None: twice the rank.
      targets: a regular expression that paths of weights are searched for; or ``"all-linear"``: all packed weights, and
        the float ones that ``calib`` names as matmuls or, without it, two-dimensional kernels. No router and no head.
      init: ``"zero"``: A is drawn, B is 0, and the model is at first what it was. ``"error"``: the product is the best
        correction of the quantization error on the calibration tokens, weighted by their Gram.
      calib: of the float model; needed by ``init="error"``, and for float leaves of more than two axes.
      original: the float parameters, and what was folded; needed by ``init="error"``.
      scales: folded into ``params``: `Report.scales`. None: those of ``original``; of a model of `awq_jax.load` they
        are known.
      dtype: of the factors.
      seed: of A.
      remat: ``"block"``: of a model of `awq_jax.load`, activations within a layer are made again for the gradient.

    Returns:
      ``(apply, adapters, frozen)`` with ``apply(adapters, frozen, *args)``; ``frozen`` is ``params``.

    Raises:
      ConfigError: a setting is out of range, nothing is matched, or something that ``init`` needs is missing.
      ShapeError: scales do not fit their weight.
    """
    check(rank, alpha, init, remat)
    if isinstance(model, Model):
        params = model.params if params is None else params
        run = _decoder(model, remat)
        if scales is not None:
            raise ConfigError("scales are for other models; what is folded into a model of awq_jax.load is known")
        scales = model.folded_scales()
    else:
        if remat is not None:
            raise ConfigError("remat is for a model of awq_jax.load; use jax.checkpoint or nnx.remat within your own")
        run = bind(model)
    scales = scales if scales is not None else {} if original is None else original.scales
    leaves = paths.flatten(params)
    axes = _axes(leaves, targets, calib, isinstance(model, Model))
    alpha = 2.0 * rank if alpha is None else alpha
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    keys = jax.random.split(jax.random.key(seed), len(axes))
    pairs: dict[str, tuple[Any, Any]] = {}
    folded: dict[str, FoldedScale] = {}
    for key, (path, roles) in zip(keys, axes.items(), strict=True):
        batch, k, n = _sizes(leaves[path], roles)
        folded[path] = _fitted(path, scales.get(path), batch, k, n)
        if init == "error":
            best = error_init.factors(path, leaves[path], roles, rank, scale, calib, original)
            pairs[path] = unscaled(*best, folded[path])
        else:  # as PEFT draws it
            a = jax.random.uniform(key, (*batch, k, rank), jnp.float32, -1, 1) / math.sqrt(k)
            pairs[path] = a, jnp.zeros((*batch, rank, n))
    adapters = nested({path: dict(zip(NAMES, pair, strict=True)) for path, pair in pairs.items()})
    adapters = jax.tree.map(lambda a: jnp.asarray(a, dtype), adapters)

    def apply(adapters: Adapters, frozen: Any, *args: Any, **kwargs: Any) -> Any:
        return run(beside(frozen, adapters, axes, scale, folded), *args, **kwargs)

    return apply, adapters, params


def check(rank: int, alpha: float | None, init: str, remat: str | None) -> None:
    """Refuse settings that are out of range.

    Raises:
      ConfigError: naming the setting.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank must be a positive integer; got {rank!r}")
    if alpha is not None and not alpha > 0:
        raise ConfigError(f"alpha must be positive; got {alpha!r}")
    if init not in INITS:
        raise ConfigError(f"init must be one of {', '.join(INITS)}; got {init!r}")
    if remat not in (None, "block"):
        raise ConfigError(f'remat must be None or "block"; got {remat!r}')


def beside(params: Any, adapters: Adapters, axes: Mapping[str, str], scale: float, folded: Scales) -> Any:
    """``params`` whose weights at the paths of ``axes`` have the factors beside them, in the weights' terms."""
    pairs = by_path(adapters)

    def one(path: str, leaf: Any) -> Any:
        if path not in axes:
            return leaf
        a, b = (pairs[path][name] for name in NAMES)
        a, b = scaled(a, b, folded[path])
        return Adapted.of(by_expert(leaf) if a.ndim > 2 else leaf, a * jnp.asarray(scale, a.dtype), b, axes[path])

    return paths.map_with_path(one, params)


def scaled(a: Any, b: Any, folded: FoldedScale) -> tuple[Any, Any]:
    """Factors ``[*B, K, R]`` and ``[*B, R, N]`` of the float model for a weight that scales are folded into."""
    a = a if folded.input is None else (a * folded.input[..., :, None]).astype(a.dtype)
    return a, b if folded.output is None else (b / folded.output[..., None, :]).astype(b.dtype)


def unscaled(a: Any, b: Any, folded: FoldedScale) -> tuple[Any, Any]:
    """The inverse of `scaled`."""
    return scaled(a, b, FoldedScale(*(None if s is None else 1 / s for s in folded)))


def _fitted(path: str, folded: FoldedScale | None, batch: tuple[int, ...], k: int, n: int) -> FoldedScale:
    """Scales as ``[*B, K]`` and ``[*B, N]``: experts that read one activation have one for it."""

    def one(s: np.ndarray | None, size: int) -> np.ndarray | None:
        if s is None:
            return None
        try:
            own = s.reshape(*batch, size) if s.size == math.prod((*batch, size)) else s
            return np.asarray(np.broadcast_to(own, (*batch, size)), np.float32)
        except ValueError:
            raise ShapeError(f"{path} is {k} x {n}, and has scales of shape {s.shape}: of another model?") from None

    return FoldedScale(None, None) if folded is None else FoldedScale(one(folded.input, k), one(folded.output, n))


def nested(flat: Mapping[str, Any]) -> Adapters:
    """``{"layers/0/kernel": x}`` as ``{"layers": {"0": {"kernel": x}}}``."""
    out: Adapters = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        at = out
        for key in parents:
            at = at.setdefault(key, {})
        at[last] = value
    return out


def by_path(adapters: Adapters) -> dict[str, dict[str, jax.Array]]:
    """The inverse of `nested`: the two factors of each weight."""
    found: dict[str, dict[str, jax.Array]] = {}
    for path, leaf in paths.flatten(adapters).items():
        where, _, name = path.rpartition("/")
        found.setdefault(where, {})[name] = leaf
    return found


def _decoder(model: Model, remat: str | None) -> Callable[..., Any]:
    if remat is None:
        return model.apply
    graphdef = model.generator.graphdef

    def run(params: nnx.State, tokens: jax.Array) -> jax.Array:
        decoder = nnx.merge(graphdef, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return decoder.head(decoder.hidden(tokens, positions, None, None, rematerialized.call)[0])

    return run


def _axes(leaves: Mapping[str, Any], targets: str, calib: Calibration | Plan | None, ours: bool) -> dict[str, str]:
    """The roles of the axes of each weight that gets an adapter, by path."""
    plan = calib.plan if isinstance(calib, Calibration) else calib
    sites = {} if plan is None else {s.path: s for _, s in plan.sites() if not s.part}
    try:
        wanted = None if targets == ALL else re.compile(targets)
    except re.error as e:
        raise ConfigError(f"targets {targets!r} is no regular expression: {e}") from None
    found: dict[str, str] = {}
    unknown: list[str] = []
    for path, leaf in leaves.items():
        if wanted is not None and not wanted.search(path):
            continue
        site, ndim = sites.get(path), getattr(leaf, "ndim", 0)
        if wanted is None and (NOT_ALL.search(path) or (site is not None and (site.head or site.router))):
            continue
        if isinstance(leaf, QuantizedTensor):
            found[path] = leaf.live_axes
        elif ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating) or factors.is_named_factor(path):
            continue
        elif site is not None:
            found[path] = site.canonical_axes
        elif path.endswith("kernel") and ndim == (2 if not ours else ndim):
            found[path] = "b" * (ndim - 2) + "kn"
        elif wanted is not None:
            unknown.append(path)
    if unknown:
        raise ConfigError(
            f"the roles of the axes of {unknown[0]} are not known: pass calib=, from awq_jax.calibrate or "
            "awq_jax.discover of the float model"
        )
    if not found:
        raise ConfigError(f"targets {targets!r} matches no weight; paths are like {next(iter(leaves), 'none')}")
    return found


def _sizes(leaf: Any, axes: str) -> tuple[tuple[int, ...], int, int]:
    if isinstance(leaf, QuantizedTensor):
        leaf = by_expert(leaf)
        return leaf.batch, leaf.k, leaf.n
    batch, k, n = split_shape(tuple(np.shape(leaf)), axes)
    return batch, math.prod(k), math.prod(n)
