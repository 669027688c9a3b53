"""Any model quantized on its own quantized stream, against NumPy in float64 and against one pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awq_jax
from awq_jax import paths
from awq_jax.errors import CalibrationError, ConfigError
from awq_jax.qtensor import QuantizedTensor

K, F, LAYERS = 32, 48, 3
FAST = {"group_size": 16, "bits": 2, "clip": False, "n_grid": 2, "progress": False}


def params(seed: int) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    shapes = {"norm": (K,), "up": (K, F), "down": (F, K)}
    made = {f"layer{i}": {n: rng.standard_normal(s).astype(np.float32) / 4 for n, s in shapes.items()} for i in "012"}
    for layer in made.values():
        layer["norm"] += 1
    return made


def layer(w, x, xp):
    h = x / xp.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6) * w["norm"]
    u = xp.tanh(h @ w["up"])
    return x + u @ w["down"], h, u


def apply(p, x, *, factor=1.0):
    for i in "012":
        x = layer(p[f"layer{i}"], x, jnp)[0]
    return x * factor


def dense(q):
    found = paths.map_with_path(lambda _, w: w.dequantize() if isinstance(w, QuantizedTensor) else w, q)
    return jax.tree.map(lambda w: np.asarray(w, np.float64), found)


def inputs(p, x):
    """What every weight reads, and what comes out, float64."""
    x, out = x.astype(np.float64), {}
    for i in "012":
        x, out[f"layer{i}/up"], out[f"layer{i}/down"] = layer(p[f"layer{i}"], x, np)
    return out, x


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(5)
    mix = rng.standard_normal((K, K))
    return [{"x": (rng.standard_normal((1, 64, K)) @ mix).astype(np.float32), "factor": 2.0} for _ in range(9)]


def test_it_is_nearer_to_the_float_model_than_one_pass_and_tells_the_errors_on_what_was_kept_out(batches):
    p = params(1)
    q, report = awq_jax.quantize_sequential(apply, p, batches, quantize_head=True, return_report=True, **FAST)
    assert report.tokens == 9 * 64
    assert report.config["sequential"]
    once = awq_jax.quantize(p, batches, apply_fn=apply, **FAST, quantize_head=True)
    fresh = np.concatenate([b["x"][0] for b in batches[:4]])[::-1] * 0.9
    want = inputs(jax.tree.map(np.float64, p), fresh)[1]
    lost = [np.square(inputs(dense(m), fresh)[1] - want).mean() for m in (q, once)]
    assert lost[0] < 0.95 * lost[1]
    rows, stored, kept = {r.path: r for r in report.layers}, dense(q), batches[8]["x"][0]
    a, b = inputs(stored, kept)[0], inputs(jax.tree.map(np.float64, p), kept)[0]
    for i in range(LAYERS):
        path, name = f"layer{i}/up", f"layer{i}"
        scale = p[name]["norm"] / stored[name]["norm"]  # what the norm has absorbed
        aim = b[path] @ p[name]["up"]
        lost_there = np.square(a[path] @ stored[name]["up"] - aim).sum()
        assert rows[path].kept_out == pytest.approx(
            lost_there / np.square(a[path] * scale @ p[name]["up"]).sum(), rel=2e-3
        )


def test_weights_of_a_scan_are_rounded_for_what_they_read(batches):
    stacked = jax.tree.map(lambda *x: np.stack(x), *params(2).values())

    def scanned(p, x, factor):
        return jax.lax.scan(lambda x, w: (layer(w, x, jnp)[0], None), x, p)[0] * factor

    how = FAST | {"quantize_head": True, "return_report": True}
    q, report = awq_jax.quantize_sequential(scanned, stacked, batches, **how)
    assert {r.path for r in report.layers} == {"up", "down"}
    x = np.concatenate([b["x"][0] for b in batches])
    nearest = awq_jax.quantize(stacked, awq_jax.discover(scanned, stacked, **batches[0]), **FAST, method="rtn")

    def out(p):
        return inputs({f"layer{i}": {n: w[i] for n, w in p.items()} for i in range(LAYERS)}, x)[1]

    want = out(jax.tree.map(np.float64, stacked))
    lost, plain = (np.square(out(dense(m)) - want).mean() for m in (q, nearest))
    assert lost < 0.7 * plain


def test_what_cannot_be_is_refused_before_any_work():
    with pytest.raises(CalibrationError, match="calibration set is empty"):
        awq_jax.quantize_sequential(apply, params(1), [], **FAST)
    with pytest.raises(ConfigError, match="needs no calibration"):
        awq_jax.quantize_sequential(apply, params(1), [np.ones((1, 4, K), np.float32)], **FAST, method="rtn")


def test_one_array_is_not_taken_for_its_rows():
    with pytest.raises(CalibrationError, match="batches is one array of shape"):
        awq_jax.quantize_sequential(apply, params(0), np.zeros((4, 8, K), np.float32), **FAST)
