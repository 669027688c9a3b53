"""The TPU kernel against a NumPy float64 oracle in Pallas' interpreters, and compiled for chips that are not there."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec
from quant_helpers import error, random_packed

from awq_jax import kernels
from awq_jax.errors import BackendError
from awq_jax.kernels import pallas_kernels, pallas_tpu

# A simulated TPU: memory nobody wrote is NaN, and so is what a block holds after the end of its array.
TPU = pltpu.InterpretParams(out_of_bounds_reads="uninitialized")
# Rounding of the dequantized weight to x.dtype where the sums are not scaled instead.
EXACT, ROUNDED = 1e-6, 6e-3


def rows(*shape, dtype="float32", seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def run(x, q, interpret=TPU):
    """Not with the weight as a constant: XLA on CPU folds a constant's bitcast to int4 the wrong way round."""
    return jax.jit(lambda x, q: pallas_tpu.matmul(x, q, jnp.float32, interpret))(x, q)


def check(m, k, n, g, bits, symmetric, scales, dtype):
    q, w = random_packed(k, n, bits=bits, group_size=g, symmetric=symmetric, dtype=scales, seed=m)
    x = rows(m, k, dtype=dtype)
    assert pallas_tpu.obstacle(kernels.Request(m, q, dtype, "tpu")) is None
    exact = pallas_tpu.tile(m, q, dtype).sums or dtype != "bfloat16"
    y = run(x, q)
    assert y.shape == (m, n)
    # Rounding of K sums in float32, taken as independent.
    assert error(y, np.asarray(x, np.float64) @ w) < (max(EXACT, 2**-24 * k**0.5) if exact else ROUNDED)


@pytest.mark.parametrize(
    "case",
    [
        (3, 1536, 128, 128, 4, False, "float16", "bfloat16"),  # sums are scaled; the last block is half empty
        (70, 128, 200, 32, 8, False, "float32", "bfloat16"),  # weights are scaled; the last columns too few
    ],
)
def test_against_float64(case):
    check(*case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("g", [16, 32, 64, 128, 256, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_against_float64_widely(bits, g, dtype):
    for i, (m, k, n) in enumerate(((1, 256, 128), (17, 1280, 384), (67, 2048, 200), (300, 512, 256))):
        scales = ("float16", "bfloat16", "float32")[i % 3]
        check(m, k, n, g, bits, i % 2 == 1, scales, dtype)


def test_offsets_in_place_of_zero_points():
    q, _ = random_packed(256, 128, group_size=128, symmetric=True)
    q = dataclasses.replace(q, offsets=rows(2, 128, seed=5))
    x = rows(5, 256)
    want = np.asarray(x, np.float64) @ np.asarray(q.dequantize(jnp.float32), np.float64)
    assert error(run(x, q, True), want) < EXACT


def test_the_oracle_sees_a_wrong_code_and_what_lies_after_the_end(monkeypatch):
    q, w = random_packed(1536, 128, group_size=128, dtype="bfloat16")
    x = rows(2, 1536, dtype="bfloat16")
    want = np.asarray(x, np.float64) @ w
    monkeypatch.setattr(pallas_kernels, "_inside", lambda table, rows: table)
    assert not np.isfinite(run(x, q)).all()
    monkeypatch.undo()
    monkeypatch.setattr(pallas_kernels, "_signed", lambda words, bits: pltpu.bitcast(words, jnp.int4))
    assert error(run(x, q, True), want) > 0.1


def test_float16_scales_are_read_to_the_bit():
    bits = np.arange(0x7C00, dtype=np.uint16)  # all finite numbers from 0 up, subnormal ones too
    both = np.concatenate([bits, bits | 0x8000])
    read = np.asarray(pallas_kernels._float(jnp.asarray(both)))
    np.testing.assert_array_equal(read, both.view(np.float16).astype(np.float32))


def test_gradient_batches_and_vmap():
    q, w = random_packed(256, 128, group_size=128, batch=(2,))
    x = rows(2, 3, 256)
    wide = np.asarray(x, np.float64)

    def half_square(x, q):
        return (pallas_tpu.matmul(x, q, jnp.float32, True) ** 2).sum() / 2

    grad = jax.jit(jax.grad(half_square))(x, q)
    assert error(grad, wide @ w @ w.swapaxes(1, 2)) < 2e-6
    assert error(jax.jit(jax.vmap(jax.grad(half_square)))(x, q), wide @ w @ w.swapaxes(1, 2)) < 2e-6
    one = jax.tree.map(lambda a: a[0], q)
    shared = jax.jit(jax.vmap(lambda x, q: pallas_tpu.matmul(x, q, jnp.float32, True), in_axes=(0, None)))
    assert error(shared(x, one), wide @ w[0]) < EXACT
    # The weight is read once however many rows share it: they become rows of one tile.
    text = str(jax.make_jaxpr(shared)(x, one))
    assert "grid=(1, 1, 1)" in text
    assert pallas_tpu.matmul(rows(0, 256), one, jnp.float32).shape == (0, 128)


def test_gradient_of_the_scales_is_that_of_the_plain_form():
    q, _ = random_packed(128, 128, group_size=32)
    x = rows(3, 128)
    ours, plain = (
        jax.jit(jax.grad(lambda q, f=f: (f(q) ** 2).sum(), allow_int=True))(q).scales
        for f in (lambda q: pallas_tpu.matmul(x, q, jnp.float32, True), lambda q: kernels.matmul(x, q, impl="xla"))
    )
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5 * float(jnp.abs(plain).max()))


def test_experts_read_only_theirs_and_skip():
    q, w = random_packed(256, 128, group_size=128, batch=(3,))
    x, which = rows(3, 16, 256), jnp.array([2, -1, 0], jnp.int32)
    q = dataclasses.replace(q, scales=q.scales.at[1].set(jnp.nan))  # nobody's

    def used(x, q):
        return pallas_tpu.experts(x, q, which, jnp.float32, True)[jnp.array([0, 2])]

    want = np.asarray(x, np.float64)[[0, 2]] @ w[[2, 0]]
    assert error(jax.jit(used)(x, q), want) < EXACT
    grad = jax.jit(jax.grad(lambda x, q: (used(x, q) ** 2).sum() / 2))(x, q)
    assert error(grad[jnp.array([0, 2])], want @ w[[2, 0]].swapaxes(1, 2)) < 2e-6
    assert not grad[1].any()


def test_shards():
    """On one device or several: the types of a result inside `jax.shard_map` are checked either way."""
    q, w = random_packed(256, 128, group_size=128)
    x = rows(3, 256)
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    spec = PartitionSpec
    for split, out, join in (
        ((spec(), spec(None, "d")), spec(None, "d"), lambda y: y),
        ((spec(None, "d"), spec("d", None)), spec(), lambda y: jax.lax.psum(y, "d")),
    ):
        body = lambda x, q, join=join: join(pallas_tpu.matmul(x, q, jnp.float32, True))  # noqa: E731
        y = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=split, out_specs=out))(x, q)
        assert error(y, np.asarray(x, np.float64) @ w) < EXACT


def test_when_it_runs(monkeypatch):
    q, _ = random_packed(256, 128, group_size=128)
    x = rows(3, 256)
    with pytest.raises(BackendError, match="TPU kernel, and this runs on cpu"):
        kernels.matmul(x, q, impl="pallas")
    monkeypatch.setattr(kernels.dispatch, "platform_of", lambda x: "tpu")
    assert kernels.explain(x, q).startswith("pallas tiles of 16 x 256 x 128, scales applied to sums")
    for options, why in (
        ({"bits": 3}, "3-bit codes"),
        ({"group_size": 96}, "groups of 96 rows"),
        ({"group_size": 40}, "groups of 40 rows"),
        ({"n": 96}, "96 columns"),
        ({"k": 224, "group_size": 32}, "224 rows"),
    ):
        q, _ = random_packed(**{"k": 256, "n": 128} | options)
        assert why in pallas_tpu.obstacle(kernels.Request(3, q, "bfloat16", "tpu"))
        assert why in kernels.explain(rows(3, q.k), q)
    assert "float64" in pallas_tpu.obstacle(kernels.Request(3, q, "float64", "tpu"))


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2"])
def test_compiles_for_chips_that_are_not_there(chip):
    """The compiler itself refuses tiles that do not fit VMEM, which the last cases show."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("pip install libtpu compiles for TPUs without one")
    script = Path(__file__).parents[1] / "helpers" / "tpu_compile.py"
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # libtpu refuses flags that it does not know
    done = subprocess.run([sys.executable, str(script), chip], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    *good, large, odd = (json.loads(line) for line in done.stdout.splitlines())
    assert len(good) == 13
    for case in good:
        assert "error" not in case, case
        assert case["kernel"]
        assert case["temp"] <= 0.1 * case["arguments"], f"something as large as the weight is written: {case}"
    assert "vmem" in large["error"].lower()
    assert "128" in odd["error"]
