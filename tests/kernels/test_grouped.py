"""Rows times the matrices of their experts, against float64, in both forms; and the model that uses it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from quant_helpers import dense, error, random_packed
from random_decoders import MOE, TOKENS, decoder

from awq_jax.errors import BackendError, ShapeError
from awq_jax.kernels import dispatch, grouped, pallas_tpu
from awq_jax.models.layers import moe


def routed(rows, k, n, experts, seed=0, **options):
    """Activations, weights, routing with an expert that nobody goes to, and the float64 result."""
    q, w = random_packed(k, n, batch=(experts,), seed=seed, **options)
    rng = np.random.default_rng(seed)
    expert = rng.choice([e for e in range(experts) if e != 1], rows).astype(np.int32)
    x = rng.normal(size=(rows, k)).astype(np.float32)
    return jnp.asarray(x), q, jnp.asarray(expert), np.einsum("tk,tkn->tn", x.astype(np.float64), w[expert]), w[expert]


@pytest.mark.parametrize(("rows", "experts"), [(5, 3), (70, 3)])
def test_against_float64_with_gradients(rows, experts):
    x, q, expert, want, w = routed(rows, 32, 6, experts, inv_scale=True)
    order = np.random.default_rng(9).permuted(np.tile(np.arange(32, dtype=np.int32), (experts, 1)), axis=1)
    q = dataclasses.replace(q, perm=jnp.asarray(order))
    w = np.asarray(jax.vmap(lambda q: q.dequantize(jnp.float32))(q), np.float64)[expert]
    want = np.einsum("tk,tkn->tn", np.asarray(x, np.float64), w)

    @jax.jit
    def both(x, q, expert):
        f = lambda x: grouped.matmul(x, q, expert)  # noqa: E731
        y, back = jax.vjp(f, x)
        return y, back(y)[0]

    y, grad = both(x, q, expert)
    assert y.shape == (rows, 6)
    assert error(y, want) < 2e-6
    assert error(grad, np.einsum("tn,tkn->tk", want, w)) < 3e-6


@pytest.mark.parametrize(("total", "experts", "rows"), [(61, 5, 4), (3, 8, 16)])
def test_tiles_hold_one_expert_each(total, experts, rows):
    place = jax.jit(lambda expert: grouped.tiles(expert, experts, rows))
    for seed in range(20):
        expert = np.random.default_rng(seed).integers(0, experts, total).astype(np.int32)
        if seed < experts:
            expert[:] = seed  # all to one
        slots, owner = (np.asarray(a) for a in place(expert))
        assert len(set(slots.tolist())) == total
        assert slots.min() >= 0
        np.testing.assert_array_equal(owner[slots // rows], expert)
        used = sum(-(-c // rows) for c in np.bincount(expert))
        assert (owner[:used] >= 0).all()
        assert (owner[used:] == -1).all()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_against_float64_widely(bits, dtype):
    """Few rows and many, odd counts, experts without rows, several experts per row, all rows to one."""
    experts, k, n = 5, 96, 40
    bound = {"float16": 2e-3, "bfloat16": 1.5e-2, "float32": 2e-6}[dtype]  # the result and the weight are rounded
    run = jax.jit(grouped.matmul)
    for symmetric in (False, True):
        q, w = random_packed(k, n, bits=bits, group_size=32, batch=(experts,), symmetric=symmetric, dtype="float16")
        rng = np.random.default_rng(bits)
        twice = np.stack([rng.permutation(experts)[:2] for _ in range(17)]).reshape(-1)  # top 2 of 17 tokens
        for expert in ([3], [4, 0, 4], twice, np.full(33, 2), rng.integers(0, 2, 301)):
            expert = np.asarray(expert, np.int32)
            x = jnp.asarray(rng.normal(size=(len(expert), k)), dtype)
            want = np.einsum("tk,tkn->tn", np.asarray(x, np.float64), w[expert])
            assert error(run(x, q, jnp.asarray(expert)), want) < bound
            if len(set(expert)) > 1:  # the comparison notices rows that go to the wrong expert
                assert error(run(x, q, jnp.asarray(expert[::-1] ^ 1)), want) > bound


@pytest.mark.parametrize("rows", [3, 40])
def test_vmap_and_each_device_its_own(rows):
    x, q, expert, want, _ = routed(2 * rows, 32, 6, 3)
    halves = jax.vmap(grouped.matmul, (0, None, 0))(x.reshape(2, rows, 32), q, expert.reshape(2, rows))
    assert error(halves.reshape(-1, 6), want) < 2e-6
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    cut = jax.shard_map(grouped.matmul, mesh=mesh, in_specs=(P("d"), P(), P("d")), out_specs=P("d"))
    assert error(jax.jit(cut)(x, q, expert), want) < 2e-6


def test_no_float_weights_of_all_experts():
    x, q, expert, _, _ = routed(70, 64, 64, 8)
    text = str(jax.make_jaxpr(lambda x, q, e: grouped.matmul(x, q, e, impl="xla"))(x, q, expert))
    assert "f32[64,64]" in text
    assert "f32[8,64,64]" not in text
    assert "f32[70,64,64]" not in text
    # The check sees it where it is.
    assert "f32[8,64,64]" in str(jax.make_jaxpr(lambda q: q.dequantize())(q))


def test_on_tpu_the_kernel_picks_the_experts(monkeypatch):
    x, q, expert, want, _ = routed(20, 128, 128, 3, group_size=128)
    monkeypatch.setattr(dispatch, "platform_of", lambda x: "tpu")
    kernel = pallas_tpu.experts
    monkeypatch.setattr(pallas_tpu, "experts", lambda *a: kernel(*a, interpret=True))
    assert error(jax.jit(grouped.matmul)(x, q, expert), want) < 1e-6


def test_refusals_and_nothing_to_do():
    x, q, expert, _, _ = routed(3, 32, 6, 3)
    assert grouped.matmul(x[:0], q, expert[:0]).shape == (0, 6)
    for bad in (
        (x[:, :31], q, expert),
        (x, q, expert[:2]),
        (x[None], q, expert),
        (x, jax.tree.map(lambda a: a[0], q), expert),
    ):
        with pytest.raises(ShapeError, match="expected"):
            grouped.matmul(*bad)
    with pytest.raises(BackendError, match="choose one of"):
        grouped.matmul(x, q, expert, impl="none")


def test_packed_experts_are_the_dequantized_model():
    _, graphdef, params = decoder("qwen2_moe", **MOE)
    forward = jax.jit(lambda p, t: nnx.merge(graphdef, p)(t))
    want = forward(dense(params), TOKENS)
    np.testing.assert_allclose(forward(params, TOKENS), want, atol=5e-6 * float(jnp.abs(want).max()))
    assert moe.by_expert(jnp.ones(3)).shape == (3,)
