"""What a quantized model of somebody else's package loses: run in that package's environment.

``python measure.py FILE MODEL ...`` prints one JSON object for each of the models that FILE enters into `MODELS`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np

import awq_jax

GROUP = 32
VOCAB = 256
STEPS = 6  # that are decoded one by one
MODELS: dict[str, Callable[[], Model]] = {}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model built by its own classes.

    Attributes:
      fn: ``fn(params, *batch)`` that returns logits or features.
      params: random, float32.
      batch: of a seed.
      folds: a weight -> what absorbs the scale of its input, by parts of their paths; written down before a plan was
        looked at.
      decode: ``decode(bind, params, *batch)`` that returns what `fn` does by the model's own function for one token of
        the last of ``batch`` after another, each with what it keeps of those before; ``bind`` is to be put around it.
      apart: in float, too, `decode` returns something else than `fn`: it is held to itself with the same weights
        dequantized.
    """

    fn: Callable[..., Any]
    params: Any
    batch: Callable[[int], tuple[Any, ...]]
    folds: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    decode: Callable[..., jax.Array] | None = None
    apart: bool = False


def model(build: Callable[[], Model]) -> Callable[[], Model]:
    """Enter a model into `MODELS` by the name of the function that builds it."""
    MODELS[build.__name__] = build
    return build


def tokens(seed: int, shape: tuple[int, int] = (8, 48), low: int = 0) -> jax.Array:
    """Token ids of at least ``low`` with correlations: each is near the one before it."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.maximum(np.abs(rng.integers(-20, 21, shape).cumsum(axis=1)) % VOCAB, low), jnp.int32)


def uneven(params: Any, seed: int = 0) -> Any:
    """Parameters as training leaves them: some channels of each vector and matrix much larger than others."""
    rng = np.random.default_rng(seed)

    def one(a: Any) -> Any:
        if not jnp.issubdtype(a.dtype, jnp.floating) or a.ndim == 0:
            return a
        channels = np.exp(0.8 * rng.normal(size=a.shape[-1]))
        return (jnp.asarray(a, jnp.float32) * channels / np.sqrt(np.mean(channels**2))).astype(a.dtype)

    return jax.tree.map(one, params)


def measure(name: str) -> dict[str, Any]:
    """Share packed, groups folded, and errors on batches that calibration has not seen."""
    made, started = MODELS[name](), time.perf_counter()
    params = uneven(made.params)
    calib = awq_jax.calibrate(made.fn, params, [made.batch(s) for s in range(2)], progress=False, include_head=True)
    plan = calib.plan
    settings: dict[str, Any] = {"group_size": GROUP, "bits": 4, "on_indivisible": "float", "progress": False}
    held_out = [made.batch(s) for s in (100, 101)]
    errors = {}
    for method in ("rtn", "awq+gptq"):
        q, report = awq_jax.quantize(params, calib, method=method, return_report=True, **settings)
        bound = awq_jax.bind(made.fn)
        moved = size = 0.0
        for batch in held_out:
            want, got = (np.asarray(f(p, *batch), np.float64) for f, p in ((made.fn, params), (bound, q)))
            moved, size = moved + float(((want - got) ** 2).sum()), size + float((want**2).sum())
        errors[method] = (moved / size) ** 0.5
    served = None
    if made.decode is not None:
        *given, ids = made.batch(200)
        few = [a[:1] for a in given] + [jax.tree.map(lambda a: a[:1, :STEPS], ids)]
        one_by_one = np.asarray(made.decode(awq_jax.bind, q, *few), np.float64)
        if made.apart:
            whole = np.asarray(made.decode(lambda f: f, dequantized(q), *few), np.float64)
        else:
            whole = np.asarray(bound(q, *few), np.float64)
        served = float(np.abs(one_by_one - whole).max() / np.abs(whole).max())
    share = report.share
    assert share is not None
    divisible = {s.path for g, s in plan.sites() if g.channels % GROUP == 0}
    chosen = {path for path, _, _, by_rule in share.left if by_rule}
    meant = {
        path: n for path, n in plan.sizes.items() if path not in chosen and (path in divisible or path in plan.skipped)
    }
    left = {path: why for path, _, why, by_rule in share.left if path in meant and not by_rule}
    absorbers = {g.name: g.absorbers for g in plan.groups}
    above = {g.name: absorbers[g.follows.group] if g.follows else g.absorbers for g in plan.groups}
    folded = {" ".join(s.name for s in g.sites): sorted(a.path for a in above[g.name]) for g in plan.groups}
    return {
        "name": name,
        "packed": 1 - sum(meant[path] for path in left) / max(sum(meant.values()), 1),
        "of_all": share.of_all,
        "left": left,
        "groups": len(plan.groups),
        "folded": sum(bool(a) for a in folded.values()),
        "unlike": wrong_folds(made.folds, folded),
        "rounded": errors["rtn"],
        "error": errors["awq+gptq"],
        "decoded": served,
        "seconds": time.perf_counter() - started,
    }


def dequantized(q: Any) -> Any:
    """The tree with the numbers that its packed leaves stand for."""
    packed = awq_jax.qtensor.is_quantized
    return jax.tree.map(lambda a: a.dequantize() if packed(a) else a, q, is_leaf=packed)


def wrong_folds(expected: dict[str, set[str]], found: dict[str, list[str]]) -> list[str]:
    """Where the absorbers found are not those written down."""
    wrong = []
    for end, absorbers in expected.items():
        groups = {name: paths for name, paths in found.items() if end in name}
        if not groups:
            wrong.append(f"no group {end}")
        for name, paths in groups.items():
            if not all(any(a in path for path in paths) for a in absorbers) or len(paths) != len(absorbers):
                wrong.append(f"{name}: {paths}, expected {sorted(absorbers)}")
    return wrong


if __name__ == "__main__":
    import measure as entered  # this file under its name, as those that enter models know it

    importlib.import_module(sys.argv[1])
    for chosen in sys.argv[2:]:
        try:
            print(json.dumps(entered.measure(chosen)), flush=True)
        except Exception as e:
            print(json.dumps({"name": chosen, "crash": f"{type(e).__name__}: {str(e)[:300]}"}), flush=True)
            if os.environ.get("ZOO_TRACEBACK"):
                raise
