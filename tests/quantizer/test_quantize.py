"""`quantize` on models a user would write, and its numbers against NumPy in float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from flax_models import LAYERS, D, Decoder, MoeModel, ScannedModel, V
from numpy_rounding import plain
from quant_helpers import assert_bitwise, dense
from safetensors.numpy import load_file

import awq_jax
from awq_jax import AwqConfig, Calibration, calibrate, paths
from awq_jax.convert import writing
from awq_jax.errors import CalibrationError, ConfigError, PlanError, ShapeError, WeightError
from awq_jax.qtensor import is_quantized

# ----------------------------------------------------------------------------- what tests share


@dataclasses.dataclass(frozen=True)
class Subject:
    """A float model, its calibration, and what the default method made of it."""

    apply: Callable[..., Any]
    serve: Callable[..., Any]
    params: Any
    calib: Calibration
    packed: Any
    report: awq_jax.Report
    settings: dict[str, Any]


def tokens(seed: int, rows: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, (rows, 32)).astype(np.int32)


def trained(params: Any) -> Any:
    """Norm weights as training leaves them: a few channels far larger than the rest."""
    rng = np.random.default_rng(7)

    def one(path: str, w: jax.Array) -> jax.Array:
        return w * np.exp(rng.normal(size=w.shape)).astype(np.float32) if path.endswith("scale") else w

    return paths.map_with_path(one, params)


def make(name: str) -> tuple[Callable[..., Any], Any, dict[str, Any]]:
    if name == "moe":
        apply, params = awq_jax.nnx.functional(MoeModel(nnx.Rngs(0)))
        return apply, trained(params), {"skip": "router"}
    model = Decoder() if name == "tied" else ScannedModel()
    return model.apply, trained(jax.jit(model.init)(jax.random.key(0), tokens(0))), {}


@functools.cache
def subject(name: str) -> Subject:
    apply, params, extra = make(name)
    settings = {"bits": 4, "group_size": 16, "progress": False} | extra
    calib = calibrate(apply, params, [tokens(1), tokens(2)], progress=False)
    packed, report = awq_jax.quantize(params, calib, return_report=True, **settings)
    return Subject(jax.jit(apply), jax.jit(awq_jax.bind(apply)), params, calib, packed, report, settings)


def output_error(got: Any, want: Any) -> float:
    """Mean squared difference over the variance of ``want``."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.square(got - want).mean() / want.var()


MODELS = ("tied", "moe", "scan")
BOUND = {"tied": 0.021, "moe": 0.03, "scan": 0.005}


@pytest.mark.parametrize("name", MODELS)
def test_three_lines_quantize_a_strangers_model(name) -> None:
    s = subject(name)
    rtn = awq_jax.quantize(s.params, s.calib, method="rtn", **s.settings)
    want = s.apply(s.params, tokens(3))  # not what it was calibrated on
    default, nearest = (output_error(s.serve(q, tokens(3)), want) for q in (s.packed, rtn))
    print(f"{name}: {default:.5f} of the variance, rounded to nearest {nearest:.5f}")
    assert default < 0.75 * nearest
    assert default < BOUND[name]
    assert paths.nbytes(s.packed) < 0.6 * paths.nbytes(s.params)


@pytest.mark.parametrize("name", MODELS)
def test_packed_output_is_that_of_the_dequantized_leaves(name) -> None:
    s = subject(name)
    want = np.asarray(s.apply(dense(s.packed), tokens(3)))
    got = np.asarray(s.serve(s.packed, tokens(3)))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_packed_and_what_is_left(name) -> None:
    s = subject(name)
    packed = {p for p, w in paths.flatten(s.packed).items() if is_quantized(w)}
    want = {
        "tied": {f"params/attention_{i}/{n}/kernel" for i in range(LAYERS) for n in ("query", "key", "value", "out")}
        | {f"params/{n}_{i}/kernel" for i in range(LAYERS) for n in ("gate", "up", "down")},
        "moe": {f"blocks/{i}/{n}" for i in range(LAYERS) for n in ("w_gate", "w_up", "w_down")},
        "scan": {f"params/blocks/{n}/kernel" for n in ("fc1", "fc2")},
    }
    assert packed == want[name] == {r.path for r in s.report.layers}
    assert packed.isdisjoint(s.report.skipped)
    assert all(r.scale == "folded" for r in s.report.layers), [r for r in s.report.layers if r.scale != "folded"]
    assert all(r.error < r.error_rtn for r in s.report.layers)
    assert s.report.tokens == 2 * 8 * 32


def test_a_tied_embedding_is_not_touched() -> None:
    s = subject("tied")
    before, after = (t["params"]["wte"]["embedding"] for t in (s.params, s.packed))
    assert np.asarray(before).tobytes() == np.asarray(after).tobytes()
    assert "tied embedding" in s.report.skipped["params/wte/embedding"]


def test_a_router_stays_float_and_sees_the_same_logits() -> None:
    s = subject("moe")
    before, after = paths.flatten(s.params), paths.flatten(s.packed)
    x = np.random.default_rng(0).normal(size=(20, D))
    for i in range(LAYERS):
        norm, router = f"norms/{i}/scale", f"blocks/{i}/router/kernel"
        assert s.report.skipped[router] == "matched a skip pattern"
        old, new = (x * np.float64(t[norm]) @ np.float64(t[router]) for t in (before, after))
        assert not np.array_equal(before[router], after[router])
        np.testing.assert_allclose(new, old, atol=1e-6 * np.abs(old).max())
    for p in ("head/kernel", "norms/2/scale", "embed/embedding"):
        assert np.array_equal(before[p], after[p])


def test_the_same_call_gives_the_same_bits_and_leaves_its_input_alone() -> None:
    apply, params, _ = make("scan")
    s = subject("scan")
    copies = jax.tree.map(np.array, s.params)
    assert_bitwise(awq_jax.quantize(s.params, s.calib, **s.settings), s.packed)
    assert_bitwise(s.params, copies)
    batches = iter([tokens(1), tokens(2)])
    raw, report = awq_jax.quantize(params, batches, apply_fn=apply, return_report=True, **s.settings)
    assert_bitwise(raw, s.packed)
    assert report.tokens == s.report.tokens
    assert report.seconds["calibrate"] > 0
    config = AwqConfig(bits=4, group_size=16)
    assert_bitwise(awq_jax.quantize(s.params, s.calib, config, progress=False), s.packed)


# ------------------------------------------------------------------------- numbers of the report


def block(p: Any, x: Any) -> Any:
    """A plain MLP: the norm absorbs the first scale, nothing absorbs the second (gelu)."""
    h = x / jnp.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6) * p["norm"]
    return jax.nn.gelu(h @ p["up"]) @ p["down"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def block_params(k: int = D, f: int = D, n: int = D) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    norm = np.exp(rng.normal(size=k))
    spread = np.exp(rng.normal(size=f))
    p = {"norm": norm, "up": rng.normal(size=(k, f)) * spread / k**0.5, "down": rng.normal(size=(f, n)) / f**0.5}
    return jax.tree.map(np.float32, p)


def features(k: int = D, seed: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(300, k)) @ (np.eye(k) + rng.normal(size=(k, k)) / k**0.5)).astype(np.float32)


def activations(p: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What meets ``up`` and ``down`` in the float model, float64."""
    x, p = np.float64(x), jax.tree.map(np.float64, p)
    h = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6) * p["norm"]
    return h, gelu(h @ p["up"])


def relative(x: np.ndarray, delta: np.ndarray, w: np.ndarray) -> float:
    return np.square(x @ delta).sum() / np.square(x @ np.float64(w)).sum()


HEAD = {"quantize_head": True, "progress": False}
COMBINATIONS = [
    (2, 16, False, "awq+gptq"),
    (3, 32, True, "awq"),
    (4, -1, False, "awq"),
    (8, -1, False, "rtn"),
]


@functools.cache
def block_calibration() -> Calibration:
    return calibrate(block, block_params(), [features()], include_head=True, progress=False)


@pytest.mark.parametrize(("bits", "group", "symmetric", "method"), COMBINATIONS)
def test_reported_errors_are_those_of_the_activations_themselves(bits, group, symmetric, method) -> None:
    p, x = block_params(), features()
    settings = {"bits": bits, "group_size": group, "symmetric": symmetric, "method": method} | HEAD
    q, report = awq_jax.quantize(p, block_calibration(), return_report=True, **settings)
    h, a = activations(p, x)
    rows = {r.path: r for r in report.layers}
    # Dividing by the new norm undoes whatever scale was folded, without asking what it was.
    up = np.float64(q["up"].dequantize()) * (np.float64(q["norm"]) / p["norm"])[:, None]
    down = np.float64(q["down"].dequantize())
    for name, acts, got in (("up", h, up), ("down", a, down)):
        nearest = plain(p[name], D if group == -1 else group, bits, symmetric)
        row = rows[name]
        np.testing.assert_allclose(row.error, relative(acts, got - p[name], p[name]), rtol=2e-3)
        np.testing.assert_allclose(row.error_rtn, relative(acts, nearest - p[name], p[name]), rtol=2e-3)
        assert row.error <= row.error_rtn * (1 + 1e-6)
        if method == "rtn":
            np.testing.assert_allclose(got, nearest, atol=1e-6)
        else:
            assert row.error < 0.9 * row.error_rtn
        assert (row.bits, row.symmetric, row.group_size) == (bits, symmetric, D if group == -1 else group)
        assert row.bytes_after == q[name].nbytes
        assert row.bytes_before == 4 * D * D
    scales = {n: rows[n].scale for n in rows}
    assert scales == ({"up": "none", "down": "none"} if method == "rtn" else {"up": "folded", "down": "explicit"})
    assert (q["up"].inv_scale is None, q["down"].inv_scale is None) == (True, method == "rtn")


# ----------------------------------------------------------------------------------- hard inputs


def hard(dtype: str) -> tuple[Any, Any]:
    p, x = block_params(), features()
    p["up"][:16, 0] = 0.0  # an all-zero group
    p["up"][:, 1] = 0.0
    p["up"][:16, 2] = np.linspace(1.0, 1.1, 16)  # constant groups far from zero
    p["up"][:, 3] = 1.1
    p["down"][3] = 0.0
    p["norm"][5] = 0.0  # a dead channel
    p["norm"][9] *= 1000.0
    p["norm"][17] *= 1e-3
    return jax.tree.map(lambda w: jnp.asarray(w, dtype), p), x.astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("bits", "method"), [(2, "awq+gptq"), (4, "awq")])
def test_hard_inputs_are_never_worse_than_nearest(bits, method, dtype) -> None:
    p, x = hard(dtype)
    settings = {"bits": bits, "group_size": 16, "method": method} | HEAD
    calib = calibrate(block, p, [x], include_head=True, progress=False)
    q, report = awq_jax.quantize(p, calib, return_report=True, **settings)
    for leaf in jax.tree.leaves(q):
        assert np.isfinite(np.asarray(leaf, np.float64)).all()
    y = awq_jax.bind(block)(q, x)
    assert y.dtype == jnp.dtype(dtype)
    assert np.isfinite(np.asarray(y, np.float64)).all()
    p64 = jax.tree.map(np.float64, p)
    live = p64["norm"] != 0
    back = np.where(live, np.float64(q["norm"]), 1) / np.where(live, p64["norm"], 1)
    assert (np.asarray(q["norm"])[~live] == 0).all()
    h, a = activations(p, x)
    exact = 1e-6 if dtype == "float32" else 2e-2  # a 16-bit model's own rounding of norm and activations
    up, down = (np.float64(q[n].dequantize(jnp.float32)) for n in ("up", "down"))
    for name, acts, got in (("up", h, up * back[:, None]), ("down", a, down)):
        nearest = relative(acts, plain(p64[name].astype(np.float32), 16, bits, False) - p64[name], p64[name])
        assert relative(acts, got - p64[name], p64[name]) <= nearest * (1 + exact) + 1e-9
    for row in report.layers:
        assert row.error <= row.error_rtn * (1 + 1e-6)


def overflowing(p: Any, x: Any) -> Any:
    return jnp.square(jax.nn.relu(x @ p["up"])) @ p["down"]


def test_activations_that_overflow_in_half_precision_are_left_out_and_named() -> None:
    p = {n: jnp.asarray(w, jnp.float16) for n, w in block_params().items() if n != "norm"}
    x = features()
    x[[4, 40]] *= 2000.0  # the square of these passes 65504
    x[7, 3] = np.inf
    x = jnp.asarray(x, jnp.float16)
    assert not np.isfinite(np.asarray(overflowing(p, x))).all()
    calib = calibrate(overflowing, p, [x], include_head=True, progress=False)
    q, report = awq_jax.quantize(p, calib, bits=4, group_size=16, method="awq", return_report=True, **HEAD)
    notes = {r.path: r.reason for r in report.layers}
    assert notes["up"].startswith("1 tokens with NaN or inf")
    assert notes["down"].startswith("3 tokens with NaN or inf")
    good = np.delete(np.arange(len(x)), [4, 7, 40])
    assert output_error(awq_jax.bind(overflowing)(q, x[good]), overflowing(p, x[good])) < 0.05
    for row in report.layers:
        assert 0 < row.error < row.error_rtn


def test_a_scale_that_overflows_what_absorbs_it_is_not_used() -> None:
    rng = np.random.default_rng(0)
    params = {
        "g": jnp.full(32, 20, jnp.float16),
        "a": jnp.asarray(rng.normal(size=(32, 32)) * 0.05, jnp.float16),
        "b": jnp.asarray(rng.normal(size=(32, 32)), jnp.float16),
    }
    x = rng.normal(size=(200, 32))
    x[:, :4] *= 1e-7
    x[:, 4] *= 300

    def fn(p, x):
        return jax.nn.relu((x * p["g"]) @ p["a"]) @ p["b"]

    calib = awq_jax.calibrate(fn, params, [jnp.asarray(x, jnp.float16)], progress=False)
    packed, report = awq_jax.quantize(params, calib, group_size=32, method="awq", progress=False, return_report=True)
    assert [r.reason for r in report.layers] == ["the scale does not fit into g (float16)"]
    np.testing.assert_array_equal(packed["g"], params["g"])


def test_statistics_without_a_finite_token_fall_back_to_nearest() -> None:
    p = block_params()
    calib = calibrate(block, p, [np.full((5, D), np.nan, np.float32)], include_head=True, progress=False)
    q, report = awq_jax.quantize(p, calib, bits=4, group_size=16, return_report=True, **HEAD)
    for row in report.layers:
        assert "rounded to nearest" in row.reason
        assert row.error is None
        np.testing.assert_allclose(q[row.path].dequantize(), plain(p[row.path], 16, 4, False), atol=1e-6)


# ---------------------------------------------------------------------------- settings by weight


def test_overrides_and_skips_by_regular_expression() -> None:
    s = subject("tied")
    q, report = awq_jax.quantize(
        s.params,
        s.calib.plan,
        method="rtn",
        group_size=32,
        skip=(r"attention_0/(query|key)",),
        overrides=[(r"down_\d", {"bits": 8}), ("n_1/", {"group_size": 16, "symmetric": True}), ("", {"bits": 3})],
        return_report=True,
        progress=False,
    )
    rows = {r.path.removeprefix("params/").removesuffix("/kernel"): r for r in report.layers}
    got = {p: (r.bits, r.group_size, r.symmetric) for p, r in rows.items()}
    assert got["down_0"] == got["down_1"] == (8, 32, False)
    assert got["attention_1/value"] == (4, 16, True)
    assert got["attention_0/value"] == got["up_1"] == (3, 32, False)
    assert {p for p, why in report.skipped.items() if why == "matched a skip pattern"} == {
        f"params/attention_0/{n}/kernel" for n in ("query", "key")
    }
    for path, leaf in paths.flatten(s.params).items():
        new = paths.flatten(q)[path]
        if path in {r.path for r in report.layers}:
            row = rows[path.removeprefix("params/").removesuffix("/kernel")]
            assert (new.bits, new.group_size, new.symmetric, new.shape) == (*dataclasses.astuple(row)[3:6], leaf.shape)
            want = plain(np.asarray(leaf), row.group_size, row.bits, row.symmetric)
            np.testing.assert_allclose(new.dequantize(), want, atol=1e-6)
        else:
            assert new is leaf
    assert report.bits_per_weight == 8 * sum(r.bytes_after for r in report.layers) / sum(
        np.prod(r.shape) for r in report.layers
    )


def test_the_head_needs_to_be_asked_for() -> None:
    p, calib = block_params(), block_calibration()
    q, report = awq_jax.quantize(p, calib, method="rtn", group_size=16, return_report=True, progress=False)
    assert "quantize_head=True" in report.skipped["down"]
    assert q["down"] is p["down"]
    q = awq_jax.quantize(p, calib.plan, method="rtn", group_size=16, **HEAD)
    assert is_quantized(q["down"])
    headless = dataclasses.replace(calib, stats={"up": calib.stats["up"]})
    with pytest.raises(CalibrationError, match=r"no statistics for down: .*include_head=True"):
        awq_jax.quantize(p, headless, method="awq", group_size=16, **HEAD)


def test_scales_stay_one_where_only_an_explicit_one_would_do() -> None:
    p, calib = block_params(), block_calibration()
    settings = {"bits": 4, "group_size": -1, "method": "awq"} | HEAD
    q, report = awq_jax.quantize(p, calib, explicit_scale=False, return_report=True, **settings)
    up, down = report.layers
    assert (up.scale, down.scale, down.ratio) == ("folded", "none", None)
    assert "gelu" in down.reason
    assert q["down"].inv_scale is None
    assert down.error < down.error_rtn  # clipping still helps
    free = awq_jax.quantize(p, calib, return_report=True, **settings)[1].layers[1]
    assert free.scale == "explicit"
    assert free.error < down.error


def two_readers(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["a"]) + jnp.tanh(x @ p["b"])


def test_a_skipped_weight_beside_an_explicit_scale_is_not_scaled() -> None:
    """The scale stands beside the packed weight alone: the other one still reads the raw activation."""
    w = block_params()
    p, x = {"a": w["up"], "b": w["down"]}, features() * w["norm"]
    settings = {"bits": 4, "group_size": -1, "method": "awq"} | HEAD
    calib = calibrate(two_readers, p, [x], include_head=True, progress=False)
    assert [tuple(s.path for s in g.sites) for g in calib.plan.groups] == [("a", "b")]
    q, report = awq_jax.quantize(p, calib, skip="b", return_report=True, **settings)
    assert q["a"].inv_scale is not None
    assert q["b"] is p["b"]
    got, want = np.asarray(awq_jax.bind(two_readers)(q, x)), np.asarray(two_readers(dense(q), x))
    assert np.abs(got - want).max() < 1e-5
    (row,) = report.layers
    delta = np.float64(q["a"].dequantize()) - p["a"]
    np.testing.assert_allclose(row.error, relative(np.float64(x), delta, p["a"]), rtol=2e-3)
    assert row.error < row.error_rtn


def test_scales_are_of_the_dtype_that_serves(tmp_path: Path) -> None:
    """Codes are chosen for scales that bfloat16 holds, which float16 of these sizes holds as well."""
    p = block_params(32, 32, 32)
    plan = awq_jax.discover(block, p, features(32))
    q = awq_jax.quantize(p, plan, method="rtn", group_size=16, scale_dtype="bfloat16", **HEAD)["up"]
    w = p["up"].reshape(2, 16, 32)
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    scale = ((high - low) / np.float32(15)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(q.scales, scale)
    wide = scale.astype(np.float64)[:, None]
    zero = np.rint(-low[:, None] / wide)
    want = (np.clip(np.rint(w / wide) + zero, 0, 15) - zero) * wide
    np.testing.assert_allclose(q.dequantize(), want.reshape(32, 32), atol=1e-6)
    (record,) = writing.write_checkpoint(tmp_path / "q", [("a.weight", q)], {}, "gemm")
    assert record.deviation == 0
    stored = load_file(tmp_path / "q/model.safetensors")["a.scales"]
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, scale.astype(np.float16))
    with pytest.raises(ConfigError, match="scale_dtype must be one of float16, bfloat16"):
        AwqConfig(scale_dtype="float32")


# ---------------------------------------------------------------------- sizes that do not divide


def test_sizes_that_do_not_divide_are_all_listed_with_the_remedy() -> None:
    p = block_params(24, 40, 8)

    plan = awq_jax.discover(block, p, features(24))
    with pytest.raises(ShapeError) as e:
        awq_jax.quantize(p, plan, method="rtn", group_size=16, **HEAD)
    for part in ("up: 24 rows, group size 16", "down: 40 rows", "group_size=-1", '"pad"', '"float"', "override"):
        assert part in str(e.value)
    with pytest.raises(ShapeError, match="group_size=32 divides all of them"):
        awq_jax.quantize(block_params(64, 32), plan_of(64, 32), method="rtn", group_size=48, **HEAD)


def plan_of(k: int, f: int) -> awq_jax.Plan:
    return awq_jax.discover(block, block_params(k, f), features(k))


def test_raw_batches_are_not_run_for_settings_that_cannot_work() -> None:
    def batches():
        yield features(24)
        raise AssertionError("a second batch was asked for")

    with pytest.raises(ShapeError, match="up: 24 rows"):
        awq_jax.quantize(block_params(24, 40), batches(), apply_fn=block, group_size=16, progress=False)


def test_padding_and_leaving_float() -> None:
    p, x = block_params(24, 24, 24), features(24)
    calib = calibrate(block, p, [x], include_head=True, progress=False)
    settings = {"bits": 4, "group_size": 16, "return_report": True} | HEAD
    q, report = awq_jax.quantize(p, calib, on_indivisible="pad", method="awq", **settings)
    assert (q["up"].shape, q["up"].scales.shape) == ((24, 24), (2, 24))
    assert (q["down"].shape, q["down"].codes().shape) == ((24, 24), (32, 24))
    got, want = np.asarray(awq_jax.bind(block)(q, x)), np.asarray(block(dense(q), x))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    _, a = activations(p, x)
    down = report.layers[1]
    delta = np.float64(q["down"].dequantize()) - p["down"]
    np.testing.assert_allclose(down.error, relative(a, delta, p["down"]), rtol=2e-3)
    nearest = plain(np.pad(p["down"], ((0, 8), (0, 0))), 16, 4, False)[:24] - p["down"]
    np.testing.assert_allclose(down.error_rtn, relative(a, nearest, p["down"]), rtol=2e-3)
    assert down.error < down.error_rtn
    settings |= {"on_indivisible": "float", "method": "rtn", "overrides": {"up": {"group_size": -1}}}
    q, report = awq_jax.quantize(p, calib.plan, **settings)
    assert is_quantized(q["up"])
    assert q["down"] is p["down"]
    assert report.skipped == {"down": "24 rows are not a multiple of the group size 16"}


# --------------------------------------------------------------------------------- rare experts


def test_experts_seen_too_rarely_take_the_statistics_of_their_layer() -> None:
    rng = np.random.default_rng(4)
    p = {"w": rng.normal(size=(3, D, D)).astype(np.float32)}
    x = features() * block_params()["norm"]
    chosen = rng.choice(3, size=len(x), p=[0.6, 0.4, 0.0])
    chosen[:10] = 2

    def experts(p, x, chosen):
        slots = jnp.where(jax.nn.one_hot(chosen, 3).T[..., None] > 0, x, 0)
        return jnp.einsum("etd,edf->etf", slots, p["w"]).sum(0)

    calib = calibrate(experts, p, [(x, chosen)], include_head=True, progress=False)
    q, report = awq_jax.quantize(p, calib, bits=4, group_size=-1, method="awq", return_report=True, **HEAD)
    (row,) = report.layers
    assert row.reason == "experts [2] saw under 64 tokens: the layer's statistics were used"
    # Expert 2 is rounded as if all tokens had been its own: the same as a plain layer on all of them.
    alone = {"w": p["w"][2]}
    calib = calibrate(lambda p, x: x @ p["w"], alone, [x], include_head=True, progress=False)
    want = awq_jax.quantize(alone, calib, bits=4, group_size=-1, method="awq", **HEAD)["w"]
    assert (np.asarray(q["w"].codes()[2]) == np.asarray(want.codes())).mean() > 0.999
    np.testing.assert_allclose(q["w"].inv_scale[2], want.inv_scale, rtol=1e-4)
    assert not np.allclose(q["w"].inv_scale[0], q["w"].inv_scale[2])


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("path", ["up", "norm"])
def test_a_weight_that_is_not_finite_is_refused_by_name(path, value) -> None:
    p = block_params()
    p[path].flat[5] = value
    with pytest.raises(WeightError, match=f"^{path} holds NaN or inf"):
        awq_jax.quantize(p, block_calibration(), method="rtn", group_size=16, progress=False)
    batches = iter([np.ones((4, 32), np.float32)])
    with pytest.raises(WeightError, match=f"^{path} holds NaN or inf"):  # before anything is computed
        awq_jax.quantize(p, batches, apply_fn=block, group_size=16, progress=False)


def test_bad_calls_are_refused() -> None:
    p, calib = block_params(), block_calibration()
    with pytest.raises(PlanError, match="up"):
        awq_jax.quantize(block_params(64), calib, group_size=16)
    with pytest.raises(PlanError, match="up"):
        awq_jax.quantize({"norm": p["norm"], "other": p["up"]}, calib, group_size=16)
    with pytest.raises(CalibrationError, match=r'"awq" needs calibration statistics.*"rtn"'):
        awq_jax.quantize(p, calib.plan, method="awq", group_size=16)
    with pytest.raises(CalibrationError, match="no statistics for up"):
        awq_jax.quantize(p, dataclasses.replace(calib, stats={}), method="awq", group_size=16)
    with pytest.raises(CalibrationError, match="apply_fn"):
        awq_jax.quantize(p, [features()], group_size=16)
    with pytest.raises(CalibrationError, match="empty"):
        awq_jax.quantize(p, [], apply_fn=block, group_size=16, progress=False)
    with pytest.raises(ConfigError, match="not both"):
        awq_jax.quantize(p, calib, AwqConfig(), bits=3)
    with pytest.raises(ConfigError, match=r"unknown settings.*groupsize"):
        awq_jax.quantize(p, calib, groupsize=16)
    packed = awq_jax.quantize(p, calib, method="rtn", group_size=16, progress=False)
    with pytest.raises(WeightError, match="up is quantized already"):
        awq_jax.quantize(packed, calib, method="rtn", group_size=16)
