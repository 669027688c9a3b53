"""Groups judged on batches that were kept from all fitting, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awq_jax
from awq_jax import paths
from awq_jax.qtensor import QuantizedTensor

K, F, LAYERS = 16, 32, 2
FAST = {"group_size": 16, "bits": 2, "clip": False, "n_grid": 2, "progress": False, "return_report": True}


def params(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"norm": (LAYERS, K), "up": (LAYERS, K, F), "down": (LAYERS, F, K)}
    made = {name: rng.standard_normal(shape).astype(np.float32) / 4 for name, shape in shapes.items()}
    return made | {"norm": 1 + made["norm"]}


def normed(w, x, xp):
    return x / xp.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6) * w


def apply(p, x):
    """Layers one after another, by a scan."""

    def layer(x, w):
        return x + jnp.tanh(normed(w["norm"], x, jnp) @ w["up"]) @ w["down"], None

    return jax.lax.scan(layer, x, p)[0]


def read(p, x: np.ndarray) -> dict[str, list[np.ndarray]]:
    """What ``up`` and ``down`` read in each layer, float64."""
    out: dict[str, list[np.ndarray]] = {"up": [], "down": []}
    x = x.astype(np.float64)
    for i in range(LAYERS):
        h = normed(p["norm"][i].astype(np.float64), x, np)
        u = np.tanh(h @ p["up"][i])
        out["up"].append(h)
        out["down"].append(u)
        x = x + u @ p["down"][i]
    return out


def dense(q) -> dict[str, np.ndarray]:
    found = paths.map_with_path(lambda _, w: w.dequantize() if isinstance(w, QuantizedTensor) else w, q)
    return {name: np.asarray(w, np.float64) for name, w in found.items()}


def test_errors_told_are_those_on_the_batch_kept_out():
    rng, p = np.random.default_rng(0), params(1)
    mix = rng.standard_normal((K, K))
    batches = [(rng.standard_normal((64, K)) @ mix).astype(np.float32) for _ in range(5)]
    calib = awq_jax.calibrate(apply, p, batches, include_head=True, progress=False)
    q, report = awq_jax.quantize(p, calib, quantize_head=True, **FAST)
    assert report.tokens == 5 * 64
    rows, stored, inputs = {r.path: r for r in report.layers}, dense(q), read(p, batches[4])
    for name in ("up", "down"):
        lost = own = 0.0
        for i, x in enumerate(inputs[name]):
            # The norm may have absorbed a scale that the weight has: the float model's input is what it divides.
            by = stored["norm"][i] / p["norm"][i] if name == "up" else 1.0
            lost += np.square((x * by) @ stored[name][i] - x @ p[name][i]).sum()
            own += np.square(x @ p[name][i]).sum()
        assert rows[name].kept_out == pytest.approx(lost / own, rel=2e-3)
        assert rows[name].kept_out < rows[name].kept_out_rtn
        assert rows[name].error < rows[name].kept_out


def test_a_group_that_is_worse_than_plain_rounding_there_is_rounded_and_named(caplog):
    """Three tokens whose correlations are taken for true."""
    rng, p = np.random.default_rng(2), params(3)
    batches = [rng.standard_normal((n, K)).astype(np.float32) for n in (1, 1, 1, 200)]
    how = FAST | {"shrinkage": 0.0, "damping": 1e-6, "quantize_head": True}
    calib = awq_jax.calibrate(apply, p, batches, include_head=True, progress=False)
    _, report = awq_jax.quantize(p, calib, **how)
    rounded = [r for r in report.layers if "worse than plain rounding on 200 tokens kept out" in r.reason]
    assert rounded
    every = awq_jax.calibrate(apply, p, batches[:3], include_head=True, progress=False)
    q, told = awq_jax.quantize(p, every, **how)
    assert all(r.kept_out is None for r in told.layers)
    stored, inputs = dense(q), read(p, batches[3])
    for row in rounded:
        by = [stored["norm"][i] / p["norm"][i] if row.path == "up" else 1.0 for i in range(LAYERS)]
        pairs = list(zip(inputs[row.path], by, stored[row.path], p[row.path], strict=True))
        lost = sum(np.square((x * s) @ w - x @ v).sum() for x, s, w, v in pairs)
        assert row.kept_out < lost / sum(np.square(x @ v).sum() for x, _, _, v in pairs)
