"""`dot` and the XLA forms against a NumPy float64 oracle; gradients, vmap, scan; refusals."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from quant_helpers import dense, error, random_packed

from awq_jax import kernels
from awq_jax.errors import BackendError, ShapeError
from awq_jax.kernels import dispatch, xla
from awq_jax.serve.dot import dot

SHAPES = ((32, 8, 16), (48, 5, 32), (33, 7, 16), (40, 3, -1))  # K, N, group: padded and odd ones too
ROWS = (1, 3, 16, 65)
# Rounding of the weight to x.dtype (dequantize only) and of the result to it.
TOLERANCE = {"float32": (2e-6, 2e-6), "bfloat16": (1e-2, 4.1e-3)}


def activation(*shape, dtype="float32", seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_both_forms_against_float64(bits, symmetric, dtype):
    turn = (2, 3, 4, 8).index(bits) + symmetric  # each test takes four of the sixteen pairs; together they take all
    cases = []
    for i, (k, n, g) in enumerate(SHAPES):
        if bits == 3 and i % 2 == symmetric:
            continue  # three-bit unpacking takes seconds to compile
        made = random_packed(k, n, bits=bits, group_size=g, symmetric=symmetric, dtype=dtype, seed=k)
        cases.append((made, activation(ROWS[(i + turn) % 4], k, dtype=dtype)))

    @jax.jit
    def run(pairs):
        return [(dot(x, q), xla.grouped(x, q, x.dtype)) for q, x in pairs]

    outs = run([(q, x) for (q, _), x in cases])
    loose, tight = TOLERANCE[dtype]
    for ((_, w), x), (y, y_grouped) in zip(cases, outs, strict=True):
        want = np.asarray(x, np.float64) @ w
        assert y.dtype == y_grouped.dtype == x.dtype
        assert y.shape == want.shape
        assert error(y, want) < loose
        assert error(y_grouped, want) < tight


def test_explicit_scale_and_result_dtypes():
    q, w = random_packed(32, 6, inv_scale=True, dtype="bfloat16")
    x = activation(2, 5, 32)
    want = np.asarray(x, np.float64) @ w
    assert error(dot(x, q), want) < 2e-6
    assert dot(x, q).dtype == jnp.dot(x, q.dequantize()).dtype == jnp.float32
    low = x.astype(jnp.bfloat16)
    assert dot(low, q).dtype == jnp.bfloat16
    wide = dot(low, q, preferred_element_type=jnp.float32)
    assert wide.dtype == jnp.float32
    assert error(wide, np.asarray(low, np.float64) @ w) < 1e-2
    assert kernels.matmul(x, q).dtype == jnp.float32
    assert dot(np.arange(32), q).dtype == jnp.dot(np.arange(32), q.dequantize()).dtype


def test_accumulates_in_float32():
    q, w = random_packed(4096, 2, bits=8, group_size=128, dtype="bfloat16")
    x = jnp.ones((1, 4096), jnp.bfloat16)
    for form in (xla.dequantize, xla.grouped):
        y = form(x, q, jnp.float32)
        exact = np.asarray(q.dequantize(), np.float64).sum(0) if form is xla.dequantize else w.sum(0)
        assert np.abs(np.asarray(y, np.float64) - exact).max() < 1e-5 * np.abs(w).sum(0).max()


def test_expert_batches():
    q, w = random_packed(32, 6, batch=(3,), inv_scale=True)
    x = activation(3, 2, 4, 32)
    want = np.einsum("etmk,ekn->etmn", np.asarray(x, np.float64), w)
    assert error(kernels.matmul(x, q), want) < 2e-6
    plain = random_packed(32, 6, batch=(2, 2))
    x = activation(2, 2, 4, 32)
    want = np.einsum("abmk,abkn->abmn", np.asarray(x, np.float64), plain[1])
    assert error(xla.grouped(x, plain[0], jnp.float32), want) < 2e-6


def test_several_contracted_and_output_axes():
    q, w = random_packed(32, 12, axes="kknn", k_dims=(4, 8), n_dims=(3, 4))
    x = activation(2, 4, 8)
    y = dot(x, q)
    assert y.shape == (2, 3, 4)
    np.testing.assert_allclose(y, np.tensordot(x, q.dequantize(), 2), atol=1e-5)
    assert error(y.reshape(2, 12), np.asarray(x, np.float64).reshape(2, 32) @ w) < 2e-6
    np.testing.assert_array_equal(dot(x.reshape(2, 32), q), y)
    torch_like, _ = random_packed(32, 12, axes="nk")
    np.testing.assert_allclose(
        dot(x.reshape(2, 32), torch_like), x.reshape(2, 32) @ torch_like.dequantize().T, atol=1e-5
    )


@pytest.mark.parametrize("form", [xla.dequantize, xla.grouped])
def test_gradient_with_respect_to_the_activation(form):
    q, w = random_packed(32, 6)
    x, t = activation(3, 32), activation(3, 6, seed=2)
    grad = jax.jit(jax.grad(lambda x: (form(x, q, jnp.float32) * t).sum()))(x)
    assert error(grad, np.asarray(t, np.float64) @ w.T) < 2e-6


def test_gradient_through_dot_with_explicit_scale():
    q, w = random_packed(32, 6, inv_scale=True)
    x = activation(3, 32)
    grad = jax.grad(lambda x: (dot(x, q) ** 2).sum() / 2)(x)
    assert error(grad, np.asarray(x, np.float64) @ w @ w.T) < 3e-6
    check = jax.grad(lambda q: dot(x, q).sum(), allow_int=True)(q)
    assert check.qweight.dtype == jax.dtypes.float0
    assert np.isfinite(check.scales).all()
    assert np.abs(check.scales).max() > 0


def test_vmap_scan_and_remat():
    q, w = random_packed(16, 16, batch=(3,))
    x = activation(3, 2, 16)
    want = np.einsum("bmk,bkn->bmn", np.asarray(x, np.float64), w)
    assert error(jax.vmap(dot)(x, q), want) < 2e-6
    one = jax.tree.map(lambda a: a[1], q)
    np.testing.assert_allclose(jax.vmap(lambda row: dot(row, one))(x[1]), dot(x[1], one), rtol=1e-5, atol=1e-6)

    def layers(x):
        return jax.lax.scan(jax.checkpoint(lambda h, q: (jnp.tanh(dot(h, q)), None)), x, q)[0]

    def reference(x):
        for i in range(3):
            x = jnp.tanh(x @ jnp.asarray(w[i], jnp.float32))
        return x

    np.testing.assert_allclose(layers(x[0]), reference(x[0]), atol=2e-5)
    grads = [jax.jit(jax.grad(lambda x, f=f: f(x).sum()))(x[0]) for f in (layers, reference)]
    np.testing.assert_allclose(*grads, atol=1e-4)


def test_float_weight_is_jnp_dot():
    x, w = activation(2, 3, 8), activation(8, 4)
    np.testing.assert_array_equal(dot(x, w), jnp.dot(x, w))


def test_empty_batch():
    q, _ = random_packed(16, 4)
    assert dot(jnp.zeros((0, 16)), q).shape == (0, 4)


def test_the_form_follows_rows_and_platform():
    assert xla.form(1, "cuda")[0] == xla.form(64, "cuda")[0] == "grouped"
    assert xla.form(65, "cuda")[0] == xla.form(4, "cpu")[0] == xla.form(4, "tpu")[0] == "dequantize"
    q, w = random_packed(32, 4)
    x = activation(3, 32)
    text = str(jax.make_jaxpr(lambda x: xla.matmul(x, q, jnp.float32, "cuda"))(x))
    assert "i4[" in text, "the CUDA form keeps the codes as int4"
    assert "i4[" not in str(jax.make_jaxpr(lambda x: dot(x, q))(x))
    assert error(xla.matmul(x, q, jnp.float32, "cuda"), np.asarray(x, np.float64) @ w) < 2e-6


@pytest.mark.parametrize("form", ["canonical", "cuda", "offsets"])
def test_tiles_of_columns_join(monkeypatch, form):
    q, w = random_packed(64, 300, group_size=32)
    if form == "offsets":
        q = dataclasses.replace(q, zeros=None, offsets=-q.zeros.astype(jnp.float32) * q.scales)
    elif form == "cuda":
        q = kernels.prepare(q, "cuda")
    x = activation(70, 64)
    monkeypatch.setattr(xla, "TILE", 64 * 140)  # three tiles of 128 columns, of which the last reaches back

    def run(x, q):
        return xla.matmul(x, q, jnp.float32, "cuda")

    assert "length=3" in str(jax.make_jaxpr(run)(x, q))
    assert error(run(x, q), np.asarray(x, np.float64) @ w) < 2e-6
    dx = jax.grad(lambda x: (run(x, q) * jnp.arange(300.0)).sum())(x)
    assert error(dx, np.broadcast_to(w @ np.arange(300.0), x.shape)) < 2e-6
    if form != "offsets":
        return  # the loop vmaps alike over all tables
    assert error(jax.vmap(lambda x: run(x, q))(jnp.stack([x, 2 * x]))[1], 2 * np.asarray(x, np.float64) @ w) < 2e-6


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("axis", ["k", "n", "rows"])
def test_gradients_of_shards_add_up(monkeypatch, axis, check_vma):
    """On as many devices as there are: see test_two_devices.py."""
    q, w = random_packed(64, 600, group_size=32)
    monkeypatch.setattr(xla, "CPU_TILE", 64 * 140)
    x, t, mesh = activation(6, 64), activation(6, 600, seed=3), Mesh(np.array(jax.devices()[:2]), ("d",))

    def shard(x, qweight, scales, zeros):
        sizes = {"k_dims": x.shape[1:], "n_dims": scales.shape[1:]}
        y = dot(x, dataclasses.replace(q, qweight=qweight, scales=scales, zeros=zeros, **sizes))
        return jax.lax.psum(y, "d") if axis == "k" else y

    cut, tables, out = {
        "k": (P(None, "d"), P("d"), P()), "n": (P(), P(None, "d"), P(None, "d")), "rows": (P("d"), P(), P("d"))
    }[axis]  # fmt: skip
    run = jax.shard_map(shard, mesh=mesh, in_specs=(cut, tables, tables, tables), out_specs=out, check_vma=check_vma)
    y, back = jax.vjp(lambda x, scales: run(x, q.qweight, scales, q.zeros), x, q.scales)
    dx, dscales = back(t)
    x, t = np.asarray(x, np.float64), np.asarray(t, np.float64)
    assert error(y, x @ w) < 2e-6
    assert error(dx, t @ w.T) < 2e-6
    codes = np.asarray(q.codes(), np.float64) - np.repeat(np.asarray(q.zeros, np.float64), 32, axis=0)
    assert error(dscales, ((x.T @ t) * codes).reshape(2, 32, 600).sum(1)) < 2e-6


def test_explain_says_what_runs():
    q, _ = random_packed(32, 4)
    assert kernels.explain(activation(3, 32), q).startswith("native ")
    assert kernels.explain(activation(3, 32), q, impl="xla").startswith("xla dequantize: on cpu")
    assert kernels.explain(jax.ShapeDtypeStruct((3, 32), jnp.bfloat16), q, impl="xla").startswith("xla dequantize")
    assert "float array" in kernels.explain(activation(3, 32), dense(q))


def test_unknown_and_unavailable_backends(monkeypatch):
    q, _ = random_packed(32, 4)
    x = activation(3, 32)
    for call in (
        lambda: dot(x, q, impl="cublas"),
        lambda: dot(x, dense(q), impl="cublas"),
        lambda: kernels.explain(x, q, impl=""),
    ):
        with pytest.raises(BackendError, match=r"choose one of auto, .*xla"):
            call()
    absent = dispatch.Backend("far", lambda r: f"no {r.dtype} on {r.platform}", lambda r: "", lambda x, r, o: x)
    monkeypatch.setattr(dispatch, "BACKENDS", (absent, *dispatch.BACKENDS))
    with pytest.raises(BackendError, match="'far' cannot run here: no float32 on cpu"):
        dot(x, q, impl="far")
    np.testing.assert_allclose(dot(x, q), dot(x, q, impl="xla"), atol=1e-5)
    assert "not far: no float32 on cpu" in kernels.explain(x, q)


def test_shape_errors_name_the_shapes():
    q, _ = random_packed(32, 4)
    stacked, _ = random_packed(32, 4, batch=(2,))
    with pytest.raises(ShapeError, match=r"\(3, 31\).*\(32, 4\).*\.\.\., 32"):
        dot(activation(3, 31), q)
    with pytest.raises(ShapeError, match="vmap"):
        dot(activation(3, 32), stacked)
    with pytest.raises(ShapeError, match=r"expected \[2, \.\.\., 32\]"):
        kernels.matmul(activation(3, 1, 32), stacked)
    with pytest.raises(ShapeError, match="floating"):
        kernels.matmul(jnp.zeros((3, 32), jnp.int32), q)
    with pytest.raises(ShapeError, match="expected"):
        dot(activation(3, 31), activation(32, 4))
