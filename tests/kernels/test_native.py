"""The compiled kernel for CPUs against NumPy in float64, with all instructions there are; builds, refusals, threads."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from quant_helpers import dense, error, random_packed

from awq_jax import dot, kernels
from awq_jax.errors import BackendError
from awq_jax.kernels import dispatch, native, native_build

HERE = native.target()
pytestmark = pytest.mark.skipif(isinstance(HERE, str), reason=f"no compiled kernel: {HERE}")

# K, N, group: tails of vectors, groups that share words, padded rows, whole columns, fewer columns than lanes.
SHAPES = ((33, 7, 16), (90, 37, 45), (520, 65, -1), (256, 64, 128), (77, 3, 7))
ROWS = (1, 2, 5, 17, 4, 3)
FLOATS = ("float32", "bfloat16", "float16")
TOLERANCE = {"float32": 1e-6, "bfloat16": 3e-4, "float16": 3e-4}  # of 24 and 16 bits; results are float32


def activation(*shape, dtype="float32", seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def cases(bits):
    """One of each kind of zero point, activation and scale by turns; with the float64 result."""
    for i, (k, n, g) in enumerate(SHAPES):
        kind, dtype, scales = i % 3, FLOATS[(i + bits) % 3], FLOATS[i % 3]
        q, w = random_packed(k, n, bits=bits, group_size=g, symmetric=kind == 1, dtype=scales, seed=k)
        if kind == 2:
            offsets = activation(*q.scales.shape, dtype=scales, seed=2)
            g = q.group_size
            fields = np.asarray(q.codes(), np.float64) * np.asarray(q.scales, np.float64).repeat(g, 0)
            w = (fields + np.asarray(offsets, np.float64).repeat(g, 0))[:k]
            q = dataclasses.replace(q, zeros=None, offsets=offsets)
        x = activation(ROWS[(i + bits) % 6], k, dtype=dtype)
        yield x, q, np.asarray(x, np.float64) @ w


def levels():
    """Those with vectors of their own, and plain C++."""
    return [level.name for level in native_build.levels()]


@pytest.mark.parametrize("bits", native.BITS)
def test_against_float64(bits):
    check("", bits)


@pytest.mark.slow
@pytest.mark.parametrize("bits", native.BITS)
@pytest.mark.parametrize("level", levels()[1:])
def test_other_levels_against_float64(level, bits):
    assert not isinstance(native.target(level), str), native.target(level)
    check(level, bits)


def check(level, bits):
    made = list(cases(bits))
    run = jax.jit(lambda pairs: [native.matmul(x, q, jnp.float32, level, most=17) for x, q in pairs])
    for (x, q, want), y in zip(made, run([(x, q) for x, q, _ in made]), strict=True):
        assert y.shape == want.shape
        assert error(y, want) < TOLERANCE[x.dtype.name], (q.k, q.n, q.group_size, x.shape, x.dtype)


@pytest.mark.parametrize(("rows", "k", "group"), [(700, 520, 40), (6, 4200, 300), (33, 256, 128)])
def test_many_rows_and_long_columns(rows, k, group):
    """More than is held at once: of rows, of a column's codes, of a tile's codes."""
    q, w = random_packed(k, 21, group_size=group)
    x = activation(rows, k)
    y = jax.jit(lambda x, q: native.matmul(x, q, jnp.float32, most=rows))(x, q)
    assert error(y, np.asarray(x, np.float64) @ w) < 1e-6


def test_a_row_is_the_same_with_others():
    """To the bit, from as many rows as are multiplied alike."""
    q, _ = random_packed(96, 40, group_size=32)
    x = activation(40, 96)
    run = jax.jit(lambda x, q: native.matmul(x, q, jnp.float32, most=40))
    y = np.asarray(run(x, q))
    assert np.array_equal(run(x[:16], q), y[:16])
    assert np.array_equal(run(x[30:], q), y[30:])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_results_are_rounded_to_nearest(dtype):
    q, _ = random_packed(64, 40, group_size=32)
    x = jnp.concatenate([activation(2, 64), 1e-7 * activation(1, 64), 1e4 * activation(1, 64)])
    wide = native.matmul(x, q, jnp.float32)
    np.testing.assert_array_equal(native.matmul(x, q, jnp.dtype(dtype)), wide.astype(dtype))


def test_what_is_not_finite_stays_in_its_row():
    q, w = random_packed(64, 24, group_size=32)
    x = activation(5, 64).at[1, 40].set(jnp.inf).at[3, 3].set(jnp.nan).at[4].set(0)
    y = np.asarray(dot(x, q))
    assert np.isnan(y[[1, 3]]).all()
    assert error(y[[0, 2]], np.asarray(x, np.float64)[[0, 2]] @ w) < 1e-6
    assert (y[4] == 0).all()


def test_a_large_mean_costs_nothing():
    """Sums of codes less their zero points are exact, so what is common to all activations does not drown the rest."""
    q, w = random_packed(256, 16, group_size=128)
    x = 1000 + activation(2, 256)
    assert error(dot(x, q), np.asarray(x, np.float64) @ w) < 1e-6


def test_gradients_vmap_scan_and_batches():
    q, w = random_packed(48, 40, batch=(3,))
    x = activation(3, 2, 48)
    want = np.einsum("bmk,bkn->bmn", np.asarray(x, np.float64), w)
    one = jax.tree.map(lambda a: a[1], q)
    assert error(kernels.matmul(x, q), want) < 1e-6
    assert error(jax.vmap(dot)(x, q), want) < 1e-6
    assert error(jax.vmap(dot, (None, 0))(x[1], q)[1], want[1]) < 1e-6
    assert error(jax.vmap(lambda row: dot(row, one))(x[1]), want[1]) < 1e-6
    assert error(jax.lax.scan(lambda _, q: (None, dot(x[0], q)), None, q)[1][0], want[0]) < 1e-6
    t = activation(2, 40, seed=3)
    dx, dq = jax.jit(jax.grad(lambda x, q: (dot(x, q) * t).sum(), (0, 1), allow_int=True))(x[1], one)
    assert error(dx, np.asarray(t, np.float64) @ w[1].T) < 2e-6
    assert np.abs(np.asarray(dq.scales)).max() > 0
    assert dq.qweight.dtype == jax.dtypes.float0


def test_under_shard_map():
    q, w = random_packed(32, 24)
    x = activation(4, 32)
    run = jax.shard_map(dot, mesh=Mesh(np.array(jax.devices()[:1]), ("d",)), in_specs=(P("d"), P()), out_specs=P("d"))
    assert error(run(x, q), np.asarray(x, np.float64) @ w) < 1e-6


def test_columns_by_threads_are_the_same_bits():
    """Large enough for several threads, several of which call at once."""
    q, _ = random_packed(128, 16, group_size=32)
    q = jax.tree.map(lambda a: jnp.tile(a, (1, 1100)), q)
    q = dataclasses.replace(q, n_dims=(16 * 1100,))
    x = activation(8, 128)
    run = jax.jit(lambda x, q: native.matmul(x, q, jnp.float32))
    found = [None] * 6
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, np.asarray(run(x, q)))) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for y in found:
        np.testing.assert_array_equal(y, np.tile(found[0][:, :16], (1, 1100)))


def test_the_weight_is_never_floats():
    q, _ = random_packed(512, 256, group_size=128)
    compiled = jax.jit(dot).lower(activation(1, 512), q).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < q.nbytes / 4
    assert "awq_packed_matmul" in compiled.as_text()


def test_what_it_leaves_to_xla():
    q, _ = random_packed(32, 4)
    x = activation(3, 32)
    assert kernels.explain(x, q).startswith(f"native {HERE[0]}: activations in 24 bits")
    many = jax.ShapeDtypeStruct((native.MOST_ROWS[HERE[0]] + 1, 32), jnp.float32)
    assert kernels.explain(many, q).startswith("native dequantize: ")
    five, _ = random_packed(32, 4, bits=5)
    assert "xla" in kernels.explain(x, five)
    assert "not native: codes have 5 bits" in kernels.explain(x, five)
    with pytest.raises(BackendError, match="CPUs, and this runs on tpu"):
        dispatch.pick(dispatch.Request(1, q, jnp.float32, "tpu"), "native")
    text = jax.jit(lambda x: dot(x, q)).trace(x).lower(lowering_platforms=("tpu",)).as_text()
    assert "awq_packed" not in text


ASK = """
import logging, sys
logging.basicConfig(level=logging.WARNING)
import jax.numpy as jnp, numpy as np
sys.path.insert(0, {helpers!r})
from quant_helpers import error, random_packed
from awq_jax import dot, kernels
q, w = random_packed(32, 8)
x = jnp.ones((2, 32))
assert error(dot(x, q), np.ones((2, 32)) @ w) < 1e-6
assert error(dot(x + 1, q), 2 * np.ones((2, 32)) @ w) < 1e-6
print(kernels.explain(x, q))
"""


def ask(**environment):
    """A process that multiplies twice, and says how."""
    helpers = str(Path(__file__).parents[1] / "helpers")
    return subprocess.Popen(
        [sys.executable, "-c", ASK.format(helpers=helpers)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )  # fmt: skip


def test_without_a_compiler_xla_serves_and_says_so_once(tmp_path):
    out, err = ask(PATH=str(tmp_path), CXX="").communicate(timeout=300)
    assert out.startswith("xla dequantize"), err
    assert err.count("there is no C++ compiler") == 1


def test_two_processes_compile_at_once(tmp_path):
    """With a compiler that takes no time: it copies what the real one made."""
    level = next(iter(native_build.levels()))
    made = Path(native_build.library(level)._name)
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nsleep 1\ncp "{made}" "$2"\n')
    compiler.chmod(0o755)
    both = [ask(CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path / "cache")) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=300)
        assert out.startswith(f"native {level.name}"), err
    folder = tmp_path / "cache" / "awq_jax" / "native"
    assert folder.stat().st_mode & 0o777 == 0o700
    (place,) = folder.iterdir()
    assert sorted(p.name for p in place.iterdir()) == ["kernel.so", "sha256"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache and a compiler that only copies; `library` of the best level."""
    level = next(iter(native_build.levels()))
    made = Path(native_build.library(level)._name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ncp "{made}" "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    return tmp_path, lambda: native_build.library(level)


def test_altered_code_is_not_loaded(cache):
    _, library = cache
    code = Path(library()._name)
    altered = code.read_bytes() + b"x"
    code.unlink()  # this process has it loaded
    code.write_bytes(altered)
    with pytest.raises(native_build.CannotBuild, match="not what was compiled; delete"):
        library()


def test_a_folder_open_to_others_is_refused(cache):
    root, library = cache
    folder = root / "awq_jax" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(native_build.CannotBuild, match="open to others"):
        library()
    folder.rmdir()
    (root / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(root / "elsewhere")
    with pytest.raises(native_build.CannotBuild, match="open to others"):
        library()


def test_a_compiler_that_fails_is_quoted(cache, monkeypatch, caplog):
    root, library = cache
    (root / "c++").write_text("#!/bin/sh\necho 'x.cc:1: error: no such thing' >&2\nexit 1\n")
    with pytest.raises(native_build.CannotBuild, match=r"fails: x\.cc:1: error: no such thing"):
        library()
    monkeypatch.setattr(native, "target", lambda name="": "its code cannot be compiled here: for a test")
    q, _ = random_packed(32, 4)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(dot(activation(1, 32), q), dot(activation(1, 32), q, impl="xla"))
    assert caplog.text.count("not by native: its code cannot be compiled here: for a test") <= 1
    assert error(dot(activation(1, 32), q), np.asarray(activation(1, 32), np.float64) @ np.asarray(dense(q))) < 1e-5
