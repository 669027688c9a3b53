"""Parameters and arguments as people have them: numbers, bounds, flags, and fields of any name."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import awq_jax
from awq_jax import paths
from awq_jax.errors import PlanError, WeightError

RTN = {"method": "rtn", "group_size": 16, "quantize_head": True, "progress": False}
N = 16


def matrix(seed, rows=N, columns=N):
    return jax.random.normal(jax.random.key(seed), (rows, columns)) / 4


X = matrix(9, 8)


def dense(q):
    packed = lambda a: isinstance(a, awq_jax.QuantizedTensor)  # noqa: E731
    return jax.tree.map(lambda a: a.dequantize() if packed(a) else a, q, is_leaf=packed)


@flax.struct.dataclass
class Dense:
    kernel: jax.Array


@flax.struct.dataclass
class Cell:
    kernel: jax.Array
    value: Dense


def test_a_field_called_value_has_its_name():
    def model(p, x):
        return jnp.tanh(x @ p["c"].kernel) @ p["c"].value.kernel

    p = {"c": Cell(matrix(0), Dense(matrix(1)))}
    assert list(paths.flatten(p)) == ["c/kernel", "c/value/kernel"]
    q = awq_jax.quantize(p, awq_jax.discover(model, p, X), **RTN)
    assert isinstance(q["c"].value.kernel, awq_jax.QuantizedTensor)
    np.testing.assert_allclose(awq_jax.bind(model)(q, X), model(dense(q), X), rtol=1e-4, atol=1e-4)


def test_wrappers_of_variables_have_no_name():
    boxed = {"value": nn.Partitioned({"value": Dense(jnp.ones(2))}, names=("a",)), "p": nnx.Param(jnp.ones(3))}
    assert list(paths.flatten(boxed)) == ["p", "value/value/kernel"]
    same = paths.map_with_path(lambda path, leaf: (path, leaf), boxed)
    assert same["p"].get_value()[0] == "p"
    assert same["value"].value["value"].kernel[0] == "value/value/kernel"


def test_a_constant_table_that_is_sliced_is_no_parameter():
    table = np.sin(np.arange(64)[:, None] * np.ones(N)).astype(np.float32)

    def cut(p, x):
        return x + jnp.asarray(table)[: len(x)]

    def turned(p, x):
        return x + jnp.asarray(table).reshape(N, 64).T[: len(x)]

    def picked(p, x):
        return x + jax.lax.dynamic_slice_in_dim(jnp.asarray(table), jnp.argmax(x), len(x))

    def looked_up(p, x):
        return x + jnp.asarray(table)[jnp.arange(len(x)) + jnp.argmax(x)]

    def repeated(p, x):
        return x + jnp.broadcast_to(jnp.asarray(table)[:1], x.shape)

    def padded(p, x):
        return x + jnp.pad(jnp.asarray(table)[:4], ((2, 2), (0, 0)))

    p = {"scale": jnp.ones(N), "w": matrix(0)}
    for put in (cut, turned, picked, looked_up, repeated, padded):
        (group,) = awq_jax.discover(lambda p, x, put=put: (put(p, x) * p["scale"]) @ p["w"], p, X).groups
        assert [a.path for a in group.absorbers] == ["scale"]
        (group,) = awq_jax.discover(lambda p, x, put=put: put(p, x * p["scale"]) @ p["w"], p, X).groups
        assert not group.absorbers, put
        assert "constant" in group.reason


def test_numbers_among_the_parameters_stay_what_they_are():
    def model(p, x):
        return (x * p["scale"] + p["eps"]) @ p["w"]

    p = {"eps": 1e-6, "scale": 3, "w": matrix(0)}
    calib = awq_jax.calibrate(model, p, [X], progress=False, include_head=True)
    q = awq_jax.quantize(p, calib, **RTN)
    assert (q["eps"], q["scale"]) == (1e-6, 3)
    want = model({**p, "w": q["w"].dequantize()}, X)
    np.testing.assert_allclose(awq_jax.bind(model)(q, X), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("leaf", ["gelu", jnp.tanh])
def test_a_parameter_that_is_no_array_is_refused_by_name(leaf):
    with pytest.raises(PlanError, match=r"^act is a .*keep it out of the parameters"):
        awq_jax.calibrate(lambda p, x: x @ p["w"], {"act": leaf, "w": matrix(0)}, [X], progress=False)


def test_only_what_is_packed_or_folded_must_be_finite():
    def model(p, x):
        return jnp.clip(x * p["norm"], p["low"], jnp.inf) @ p["up"] @ p["head"]

    p = {"low": jnp.float32(-jnp.inf), "norm": jnp.ones(N), "up": matrix(0), "head": matrix(1)}
    plan = awq_jax.discover(model, p, X)
    q = awq_jax.quantize(p, plan, **RTN)
    assert q["low"] == -jnp.inf
    with pytest.raises(WeightError, match=r"^up holds NaN or inf"):
        awq_jax.quantize({**p, "up": p["up"].at[0, 0].set(jnp.nan)}, plan, **RTN)
    with pytest.raises(WeightError, match=r"^low is quantized already"):
        awq_jax.quantize({**p, "low": q["up"]}, awq_jax.Plan(plan.groups), **RTN)


def test_a_batch_may_carry_flags():
    def model(p, x, train, name="tanh"):
        x = x @ p["up"]
        return (x if train else getattr(jnp, name)(x)) @ p["head"]

    p = {"up": matrix(0), "head": matrix(1)}
    want = awq_jax.calibrate(lambda p, x: model(p, x, False), p, [X, X], include_head=True, progress=False)
    batches = [(X, False), {"x": X, "train": False, "name": "tanh"}]
    got = awq_jax.calibrate(model, p, batches, include_head=True, progress=False)
    assert got.tokens == want.tokens
    for name, stats in want.stats.items():
        np.testing.assert_array_equal(got.stats[name].gram, stats.gram)
    other = awq_jax.calibrate(model, p, [(X, False), (X, True)], include_head=True, progress=False)
    assert not np.allclose(other.stats["head"].gram, want.stats["head"].gram)


@pytest.mark.parametrize("jitted", [False, True])
def test_a_weight_whose_result_is_not_used_stays_float(jitted):
    def model(p, x):
        x = x * p["norm"]
        both = lambda x: (x @ p["up"], (x @ p["k"]) @ p["v"])  # noqa: E731
        up, _ = (jax.jit(both) if jitted else both)(x)
        return jnp.tanh(up) @ p["head"]

    p = {"norm": jnp.ones(N), "k": matrix(0), "v": matrix(1), "up": matrix(2), "head": matrix(3)}
    calib = awq_jax.calibrate(model, p, [X], include_head=True, progress=False)
    assert calib.plan.skipped == dict.fromkeys("kv", "its result is not used")
    first, last = calib.plan.groups
    assert [s.path for s in first.sites] == ["up"]
    assert [a.path for a in first.absorbers] == ["norm"]  # what is not used does not need the unscaled value
    assert last.sites[0].head
    q = awq_jax.quantize(p, calib, **RTN)
    np.testing.assert_allclose(awq_jax.bind(model)(q, X), model(dense(q), X), rtol=1e-4, atol=1e-4)


def test_a_weight_that_only_a_callback_reads_is_used():
    def model(p, x):
        jax.debug.callback(lambda y: None, x @ p["seen"])
        return x @ p["head"]

    plan = awq_jax.discover(model, {"seen": matrix(0), "head": matrix(1)}, X)
    assert not plan.skipped
    assert {s.path for g in plan.groups for s in g.sites} == {"seen", "head"}
