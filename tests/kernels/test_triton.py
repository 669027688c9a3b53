"""The CUDA kernels, without a GPU: in Triton's interpreter, as machine code, and what JAX puts around them.

Needs ``pip install "awq-jax[cuda-offline]"`` for the first two; the rest runs anywhere.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from quant_helpers import random_tensor

from awq_jax import dot, kernels, pack
from awq_jax.errors import BackendError, ConfigError, ShapeError
from awq_jax.kernels import dispatch, layout, triton_matmul, tuned
from awq_jax.qtensor import QuantizedTensor

H200 = tuned.Chip("NVIDIA H200", 90, 132)
HELPERS = Path(__file__).parents[1] / "helpers"
KERNELS = Path(tuned.__file__).parent / "triton_kernels.py"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.util.find_spec("torch") is None,
    reason='triton is not installed: pip install "awq-jax[cuda-offline]"',
)


def case(kernel, m, k, n, g, **more):
    defaults = {
        "b": 1, "bits": 4, "zeros": True, "split": 1, "bm": 16, "bn": 32, "late": True, "bias": False,
        "dtype": "float16", "seed": 0, "damage": False,
    }  # fmt: skip
    return defaults | {"kernel": kernel, "m": m, "k": k, "n": n, "g": g} | more


ORACLE = [
    case("mma", 5, 512, 64, 128, split=2),
    case("mma", 5, 512, 64, 128, split=2, late=False),
    case("mma", 1, 384, 40, 128, split=3, zeros=False),
    case("mma", 7, 192, 72, 64, bias=True),
    case("mma", 17, 224, 40, 32, b=2, split=2, late=False),
    case("mma", 3, 576, 33, 96),
    case("mma", 9, 576, 32, -1, split=2),
    case("mma", 13, 160, 40, -1, bits=8, split=2),
    case("mma", 2, 128, 40, 32, bits=8, zeros=False, late=False),
    case("mma", 16, 256, 32, 128, bits=8, dtype="float32"),
    case("mma", 33, 128, 64, 64, bm=32, dtype="float32", late=False, bits=8),
    case("gemv", 1, 512, 64, 128, split=2),
    case("gemv", 3, 224, 40, 32, b=2, bias=True),
    case("gemv", 1, 576, 40, 96, zeros=False),
    case("gemv", 2, 160, 40, -1, bits=8, split=2, dtype="float32"),
    case("gemv", 1, 256, 33, 128, bits=8, dtype="float32"),
    case("dequantize", 0, 512, 64, 128, split=2),
    case("dequantize", 0, 576, 40, 96, split=4, zeros=False),
    case("dequantize", 0, 160, 33, 32, b=2, dtype="float32"),
    case("dequantize", 0, 160, 40, -1, bits=8, split=2),
    case("dequantize", 0, 192, 32, 64, bits=8, dtype="float32", zeros=False),
    case("mma", 5, 256, 32, 128, damage=True),
    case("gemv", 5, 256, 32, 128, damage=True),
    case("dequantize", 0, 256, 32, 128, damage=True),
]


@needs_triton
def test_kernels_in_the_interpreter_against_numpy():
    """float32 sums: 1e-6; weights scaled in float16 before the product: 2**-11 each, 1e-3 in the norm."""
    done = subprocess.run(
        [sys.executable, HELPERS / "triton_oracle.py", KERNELS],
        input=json.dumps(ORACLE),
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for c, result in zip(ORACLE, json.loads(done.stdout), strict=True):
        assert result["written"], c
        if c["damage"]:  # the comparison notices one wrong code of 8192
            assert result["error"] > 1e-3, c
        else:
            early = c["kernel"] == "dequantize" or (c["kernel"] == "mma" and not c["late"])
            assert result["error"] < (1e-3 if early and c["dtype"] == "float16" else 1e-6), (c, result)


def tabled():
    """Every configuration of the tables that compiles to one of the kernels, with its architecture."""
    for path in sorted(tuned.FOLDER.glob("sm_*.json")):
        for rule in json.loads(path.read_text())["rules"]:
            if rule["kernel"] != "dequantize":
                yield pytest.param(int(path.stem[3:]), tuned.config(rule), id=f"{path.stem}-{rule['rows']}rows")


def machine_code(folder, sm, c, **more):
    import triton_sass

    sizes = {"bm": c.block_m, "bn": c.block_n, "warps": c.warps, "stages": c.stages, "late": c.late}
    return triton_sass.compiled(folder, sm, c.kernel, **sizes | more)


def check(code, sm, resident):
    """What every kernel must satisfy; returns the reasons why this one does not."""
    from triton_sass import SHARED

    faults = []
    if not code.loop:
        faults.append("no loop")  # Triton compiles what cannot be compiled to a trap
    if code.count("I2F"):
        faults.append("integers are converted in the loop")
    if not code.count("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "OMMA"):
        faults.append("no tensor cores")
    if code.stack or code.count("LDL", "STL"):
        faults.append("local memory")
    if code.shared > SHARED[sm]:
        faults.append("more shared memory than a program may have")
    if resident * code.shared > SHARED[sm] + 1024 or resident * code.registers * code.threads > 65536:
        faults.append("fewer programs fit than the table says")
    return faults


@needs_triton
@pytest.mark.parametrize(("sm", "c"), tabled())
def test_machine_code_of_the_tables(tmp_path, sm, c):
    code = machine_code(tmp_path, sm, c, split=4 if c.block_m <= 64 else 1)
    assert check(code, sm, c.resident) == []
    weights = c.block_n * 128 / code.threads  # per thread and turn of the loop
    assert code.count("LOP3") <= weights * 0.75, "one mask serves two weights: .5 each, and some for addresses"
    if c.block_m <= 16:  # what decode costs: measured 2.3 to 3.8
        assert len(code.loop) / weights < 4


@needs_triton
def test_the_check_of_machine_code_can_fail(tmp_path):
    import triton_controls

    decode = tuned.Config("mma", resident=4)
    slow = machine_code(tmp_path, 90, decode, function=triton_controls.converts)
    assert check(slow, 90, 4) == ["integers are converted in the loop"]
    taken_apart = machine_code(tmp_path, 90, decode, asm=False)
    assert taken_apart.count("LOP3") > 0.75 * decode.block_n * 128 / taken_apart.threads
    spilled = machine_code(tmp_path, 80, tuned.Config("mma", block_m=256, late=False, warps=8), split=1)
    assert "local memory" in check(spilled, 80, 1)
    large = machine_code(tmp_path, 90, tuned.Config("mma", block_m=128, block_n=256, late=False, warps=8, stages=6))
    assert "more shared memory than a program may have" in check(large, 90, 1)
    trap = machine_code(tmp_path, 100, tuned.Config("mma", block_m=128, late=False, warps=8, stages=3), split=1)
    assert "no loop" in check(trap, 100, 1)
    assert "no tensor cores" in check(machine_code(tmp_path, 90, tuned.Config("gemv", block_n=64)), 90, 1)


@needs_triton
@pytest.mark.parametrize("sm", [80, 90, 100])
def test_machine_code_that_dequantizes(tmp_path, sm):
    """It must only move bytes: few instructions for each weight, all of a thread's bytes in wide ones."""
    more = {"bn": triton_matmul.DENSE_COLUMNS, "split": triton_matmul.DENSE_RUNS}
    code = machine_code(tmp_path, sm, tuned.Config("dequantize"), **more)
    assert check(code, sm, 8) == ["no tensor cores"]
    weights = more["bn"] * 128 / code.threads
    assert len(code.loop) / weights < 6, "13 us for 8192 x 8192 on an H200, whose memory takes 36"
    assert code.count("STG.E.128") * 8 == weights
    taken_apart = machine_code(tmp_path, sm, tuned.Config("dequantize"), asm=False, **more)
    assert len(taken_apart.loop) > len(code.loop)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("more", [{"bits": 8}, {"dtype": "fp16"}, {"g": 32}, {"g": 64, "zeros": False}, {"k": 4000}])
def test_machine_code_of_other_weights(tmp_path, sm, more):
    faults = check(machine_code(tmp_path, sm, tuned.Config("mma"), **more), sm, 1)
    assert faults == []
    code = machine_code(tmp_path, sm, tuned.Config("gemv", block_n=64, stages=1), **more)
    assert check(code, sm, 1) == ["no tensor cores"]


def evaluate(asm: str, word: int, outputs: int) -> list[int]:
    """The registers that a kernel's assembly leaves for one input register (the three instructions it uses)."""
    registers = {f"${outputs}": word}

    def value(text):
        return registers[text] if text in registers else int(text, 0)

    for op, arguments in re.findall(r"(lop3\.b32|shr\.b32|shl\.b32|prmt\.b32|mov\.b32) ([^;]+);", asm):
        target, *rest = [a.strip() for a in arguments.split(",")]
        a, *more = [value(r) for r in rest]
        if op == "lop3.b32":
            b, c, table = more
            bits = ((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))
            result = sum(bits)
        elif op == "prmt.b32":
            pool = a | more[0] << 32
            result = sum((pool >> 8 * (more[1] >> 4 * i & 7) & 255) << 8 * i for i in range(4))
        else:
            result = a if op == "mov.b32" else a >> more[0] if op == "shr.b32" else a << more[0]
        registers[target] = result & 0xFFFFFFFF
    return [registers[f"${i}"] for i in range(outputs)]


@needs_triton
def test_the_assembly_separates_every_code():
    """Which the interpreter cannot run: evaluated here, by the definition of each instruction."""
    from awq_jax.kernels import triton_kernels as programs

    rng = np.random.default_rng(0)
    for _ in range(64):
        low, high = (int(v) for v in rng.integers(0, 1 << 16, 2))
        word = low | high << 16
        nibbles = [((low >> 4 * i) & 15, (high >> 4 * i) & 15) for i in range(4)]
        halves = np.array(evaluate(programs._FIELDS_FP16.value, word, 4), np.uint32).view(np.float16).reshape(4, 2)
        np.testing.assert_array_equal(halves, 1024.0 + np.array(nibbles))
        brains = np.array(evaluate(programs._FIELDS_BF16.value, word, 4), np.uint32).view(np.uint16).astype(np.uint32)
        np.testing.assert_array_equal((brains << 16).view(np.float32).reshape(4, 2), 128.0 + np.array(nibbles))
        floats = np.array(evaluate(programs._FIELDS_FP32.value, word, 8), np.uint32).view(np.float32)
        np.testing.assert_array_equal(floats.reshape(4, 2), 128.0 + np.array(nibbles))
        bytes_ = np.array(evaluate(programs._BYTES_FP32.value, word, 4), np.uint32).view(np.float32).reshape(2, 2)
        np.testing.assert_array_equal(bytes_ - 2.0**23, [[low & 255, high & 255], [low >> 8, high >> 8]])


class FakeTriton:
    """Stands for jax-triton on a CPU: does what the kernels' documentation says, in JAX."""

    mma, gemv, dequantize = "mma", "gemv", "dequantize"

    def __init__(self):
        self.calls = []

    def triton_call(self, *arrays, kernel, grid, out_shape, compute_capability, **c):
        assert compute_capability == 90
        if kernel == "dequantize":
            self.calls.append((kernel, grid, 1))
            assert out_shape.shape == (len(arrays[0]), c["N"], c["K"])
            runs = -(-c["K"] // (32 * (16 // c["BITS"])))
            assert grid == (-(-c["N"] // c["BN"]), -(-runs // c["PER"]), len(arrays[0]))
            return self.dense(*arrays, c).swapaxes(1, 2).astype(out_shape.dtype)
        return self.product(*arrays, kernel=kernel, grid=grid, out_shape=out_shape, **c)

    @staticmethod
    def dense(words, scales, zeros, c):
        """``[B, K, N]``."""
        k, bits = c["K"], c["BITS"]
        group = jnp.minimum(jnp.arange(k) // (32 * c["GROUP_PLANES"]), c["GROUPS"] - 1)
        zero = zeros[:, group].astype(jnp.float32) if c["ZEROS"] else 2.0 ** (bits - 1)
        codes = pack.unpack_cuda(words, bits, k).astype(jnp.float32)
        return (codes - zero) * scales[:, group].astype(jnp.float32)

    def product(self, x, words, scales, zeros, bias, m, *, kernel, grid, out_shape, **c):
        self.calls.append((kernel, grid, c["SPLIT"]))
        b, k, n, split, bits = len(x), c["K"], c["N"], c["SPLIT"], c["BITS"]
        rows = c["BM"] if kernel == "mma" else 1
        assert x.shape == (b, m, k)
        assert grid == (-(-m // rows), -(-n // c["BN"]), b * split)
        assert out_shape.shape == (b * split, m, n)
        run = 32 * (16 // bits)
        runs = -(-k // run)
        per = -(-runs // split) * run  # rows of each part
        w = self.dense(words, scales, zeros, c)
        parts = [
            x[:, :, i * per : (i + 1) * per].astype(jnp.float32) @ w[:, i * per : (i + 1) * per] for i in range(split)
        ]
        y = jnp.stack(parts, 1).reshape(b * split, m, n) + (bias.astype(jnp.float32) if c["BIAS"] else 0)
        return y.astype(out_shape.dtype)


@pytest.fixture
def fake(monkeypatch):
    """CUDA as far as the library can tell, with `FakeTriton` for its kernels."""
    triton = FakeTriton()
    monkeypatch.setattr(triton_matmul, "_modules", lambda: (triton, triton, "out_shape"))
    monkeypatch.setattr(tuned, "local_chip", lambda: H200)
    monkeypatch.setattr(dispatch, "platform_of", lambda x: "cuda")

    def on_cuda(*args, default, cuda=None, cpu=None):
        return (cuda or cpu)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", on_cuda)
    triton_matmul.unavailable.cache_clear()
    triton_matmul._vmappable.cache_clear()  # JAX keeps what its functions were traced to, with an earlier fake
    yield triton
    triton_matmul.unavailable.cache_clear()
    triton_matmul._vmappable.cache_clear()


def random_cuda(k, n, g=64, bits=4, batch=(), offsets=False, zeros=True, seed=0):

    q, _ = random_tensor(k, n, g, bits, batch, offsets, seed)
    q = dataclasses.replace(q, dtype="bfloat16", zeros=q.zeros if zeros else None)
    return layout.to_cuda(q), np.asarray(q.dequantize_canonical(jnp.float32), np.float64)


def activation(*shape, dtype=jnp.bfloat16, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def close(y, want, bound=4e-3):
    y, want = np.asarray(y, np.float64), np.asarray(want, np.float64)
    assert y.shape == want.shape
    assert np.linalg.norm(y - want) <= bound * np.linalg.norm(want)


@pytest.mark.parametrize(("m", "kind"), [(1, "zeros"), (7, "symmetric"), (1, "offsets"), (40, "8 bits")])
def test_the_product_with_splits_bias_and_offsets(fake, m, kind):
    q, w = random_cuda(576, 40, 64, 8 if kind == "8 bits" else 4, (), kind == "offsets", kind != "symmetric")
    x, bias = activation(2, m, 576), activation(40, dtype=jnp.float32)
    want = np.asarray(x, np.float64) @ w + np.asarray(bias, np.float64)
    close(kernels.matmul(x, q, bias=bias), want)
    close(kernels.matmul(x, q, bias=bias, preferred_element_type=jnp.float32), want, 1e-5)
    assert fake.calls[0][0] == "mma"


def test_a_new_table_is_for_what_is_traced_next(fake, monkeypatch):
    monkeypatch.setattr(tuned, "_given", {})
    q, w = random_cuda(256, 32, 64)
    x = activation(2, 256)

    def run():
        close(jax.jit(lambda x: kernels.matmul(x, q))(x), np.asarray(x, np.float64) @ w)
        return fake.calls[-1][0]

    assert run() == "mma"
    tuned.use(H200, {"shapes": [{"k": 256, "n": 32, "bits": 4, "rows": 4, "kernel": "gemv", "split": 1}]})
    assert run() == "gemv"


def test_cards_that_are_too_old(fake, monkeypatch):
    monkeypatch.setattr(tuned, "local_chip", lambda: tuned.Chip("Tesla T4", 75, 40))
    q, _ = random_cuda(64, 32, 32)
    assert "not triton: Tesla T4 has compute capability 7.5" in kernels.explain(activation(2, 64), q)
    with pytest.raises(BackendError, match=r"need 8\.0"):
        kernels.matmul(activation(2, 64), q, impl="triton")


@pytest.mark.parametrize("split", [1, 5])
def test_parts_of_k_add_up(fake, split):
    q, w = random_cuda(640, 24, 32)
    x = activation(3, 640)
    c = tuned.Config("gemv", split=split)
    y = triton_matmul.matmul(x, q, jnp.float32, chip=H200, config=c, bias=jnp.ones(24))
    close(y, np.asarray(x, np.float64) @ w + 1, 1e-5)
    assert fake.calls[-1][0] == "gemv"
    assert fake.calls[-1][2] == split


@pytest.mark.parametrize("kind", ["zeros", "symmetric", "offsets", "8 bits"])
def test_the_product_with_a_dequantized_weight(fake, kind):
    q, w = random_cuda(160, 24, 32, 8 if kind == "8 bits" else 4, (2,), kind == "offsets", kind != "symmetric")
    x, bias = activation(2, 5, 160), activation(24, dtype=jnp.float32)
    want = np.asarray(x, np.float64) @ w
    dense = functools.partial(triton_matmul.matmul, chip=H200, config=tuned.Config("dequantize"))
    close(dense(x, q, jnp.bfloat16), want, 8e-3)
    close(dense(x, q, jnp.float32, bias=bias), want + np.asarray(bias, np.float64), 8e-3)
    assert [call[0] for call in fake.calls] == ["dequantize"] * 2
    grad = jax.grad(lambda x: dense(x, q, jnp.float32).sum())(x)
    close(grad, np.broadcast_to(w.sum(-1)[:, None], x.shape), 1e-2)


def test_which_rows_are_dequantized(fake):
    q, w = random_cuda(64, 8)
    x = activation(2000, 64)
    close(dot(x, q), np.asarray(x, np.float64) @ w, 8e-3)
    assert fake.calls[-1][0] == "dequantize"
    assert "triton dequantize: 2000 rows" in kernels.explain(x, q)
    dot(x[:1000], q)
    assert fake.calls[-1][0] == "mma"


def test_vmap_joins_rows_or_stacks_weights(fake):
    q, w = random_cuda(128, 24)
    x = activation(3, 2, 128)
    close(jax.vmap(lambda a: dot(a, q))(x), np.asarray(x, np.float64) @ w)
    assert fake.calls[-1][1][2] == fake.calls[-1][2], "one weight: its rows are joined"
    many, ws = random_cuda(128, 24, batch=(3,))
    close(jax.vmap(dot)(x, many), np.einsum("bmk,bkn->bmn", np.asarray(x, np.float64), ws))
    close(jax.vmap(lambda v: dot(x[0], v))(many), np.einsum("mk,bkn->bmn", np.asarray(x[0], np.float64), ws))
    close(kernels.matmul(x, many), np.einsum("bmk,bkn->bmn", np.asarray(x, np.float64), ws))
    biases = activation(3, 24, dtype=jnp.float32, seed=2)
    y = jax.vmap(lambda a, v, c: kernels.matmul(a, v, bias=c))(x, many, biases)
    close(y, np.einsum("bmk,bkn->bmn", np.asarray(x, np.float64), ws) + np.asarray(biases)[:, None])


def test_gradients_and_transforms_of_them(fake):
    q, w = random_cuda(128, 24)
    x = activation(2, 3, 128)

    def loss(x):
        return (dot(x, q).astype(jnp.float32) ** 2).sum()

    want = 2 * (np.asarray(x, np.float64) @ w) @ w.T
    close(jax.grad(loss)(x), want, 1e-2)
    close(jax.vmap(jax.grad(loss))(x), want, 1e-2)
    grads = jax.grad(lambda v: dot(x, v).astype(jnp.float32).sum(), allow_int=True)(q)
    y = jax.grad(lambda s: (np.asarray(x, np.float32).reshape(-1, 128) @ _dense(q, s)).sum())(q.scales)
    close(grads.scales, y, 2e-2)


def _dense(q, scales):
    codes = q.codes().astype(jnp.float32) - jnp.repeat(q.zeros, q.group_size, 0).astype(jnp.float32)
    return codes * jnp.repeat(scales, q.group_size, 0)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("axis", ["n", "k"])
def test_each_shard_runs_its_own_kernel(fake, axis, check_vma):
    q, w = random_cuda(256, 48)
    x = activation(5, 256)
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    columns = axis == "n"

    def shard(x, words, scales, zeros):
        local = QuantizedTensor(
            words, scales, zeros, None, 4, 64, "kn", x.shape[1:], words.shape[:1], "float32", layout="cuda"
        )
        y = kernels.matmul(x, local, impl="triton")
        return y if columns else jax.lax.psum(y, "d")

    tables = P(None, "d") if columns else P("d", None)
    specs = (P(), P("d", None), tables, tables) if columns else (P(None, "d"), P(None, "d"), tables, tables)
    run = jax.jit(
        jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=P(None, "d") if columns else P(), check_vma=check_vma)
    )
    close(run(x, q.qweight, q.scales, q.zeros), np.asarray(x, np.float64) @ w)
    grad = jax.grad(lambda x: run(x, q.qweight, q.scales, q.zeros).astype(jnp.float32).sum())(x)
    close(grad, np.broadcast_to(w.sum(1), x.shape), 1e-2)


def test_reasons_and_fallback(fake, caplog):
    dispatch._warn_once.cache_clear()
    q, w = random_cuda(128, 24)
    x = activation(3, 128)
    plain = layout.to_canonical(q)
    assert kernels.explain(x, q).startswith("triton mma: tiles of 8 rows x 128 columns, K in 1 part")
    for operands, reason in (
        ((x.astype(jnp.float32), q), "activations are float32"),
        ((x, plain), "repack it once with awq_jax.kernels.prepare"),
        ((x[:0], q), "no activation rows"),
    ):
        with pytest.raises(BackendError, match=reason):
            kernels.matmul(*operands, impl="triton")
        assert reason in kernels.explain(*operands)
    for _ in range(2):
        close(kernels.matmul(x, plain), np.asarray(x, np.float64) @ w, 8e-3)
    assert [r.message for r in caplog.records if "canonical" in r.message] == [
        "a packed weight is multiplied by xla, not by triton: the weight has the canonical layout; "
        "repack it once with awq_jax.kernels.prepare"
    ]
    with pytest.raises(ShapeError, match=r"expected \[24\]"):
        kernels.matmul(x, q, bias=jnp.zeros(23))


def test_without_jax_triton(fake, monkeypatch):
    def absent():
        raise ImportError("No module named 'jax_triton'")

    monkeypatch.setattr(triton_matmul, "_modules", absent)
    triton_matmul.unavailable.cache_clear()
    q, w = random_cuda(128, 24)
    x = activation(3, 128)
    with pytest.raises(BackendError, match=r"No module named 'jax_triton'.*awq-jax\[cuda\]"):
        kernels.matmul(x, q, impl="triton")
    close(kernels.matmul(x, q), np.asarray(x, np.float64) @ w, 8e-3)


def test_on_a_cpu_the_reason_is_the_platform():
    q, _ = random_cuda(128, 24)
    with pytest.raises(BackendError, match="for CUDA, and this runs on cpu"):
        kernels.matmul(activation(3, 128), q, impl="triton")


def test_splits_fill_the_chip_and_no_more():
    decode = tuned.Config("mma", resident=4)
    for k, n, m in ((8192, 8192, 16), (4096, 14336, 4), (14336, 4096, 16), (8192, 28672, 16), (4096, 128256, 1)):
        split = decode.splits(H200, 1, m, k, n, 4)
        programs = -(-n // 128) * split
        assert split <= k // 128 // 4
        assert programs / (-(-programs // 528) * 528) >= 0.8, (k, n, split)
    assert decode.splits(H200, 1, 16, 128, 128, 4) == 1
    assert tuned.Config("mma", split=8).splits(H200, 1, 16, 256, 128, 4) == 2


def test_tables_choose_the_most_special_row(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned._table.cache_clear()
    rules = [{"rows": 8, "kernel": "gemv", "bits": 8}, {"rows": 8, "kernel": "mma", "block_m": 8}]
    shapes = [{"k": 64, "n": 32, "rows": 4, "kernel": "mma", "block_n": 64}]
    (tmp_path / "sm_90.json").write_text(json.dumps({"rules": rules, "shapes": []}))
    (tmp_path / "nvidia-h200.json").write_text(json.dumps({"rules": [], "shapes": shapes}))
    assert tuned.choose(H200, 4, 3, 64, 32) == tuned.Config("mma", block_n=64)
    assert tuned.choose(H200, 4, 5, 64, 32) == tuned.Config("mma", block_m=8)
    assert tuned.choose(H200, 8, 5, 64, 32) == tuned.Config("gemv")
    assert tuned.choose(H200, 4, 9, 64, 32) == tuned.Config("dequantize")
    tuned._table.cache_clear()
    with pytest.raises(ConfigError, match="not a kernel configuration"):
        tuned.Config("mma", block_m=12)


@needs_triton
def test_it_lowers_for_cuda_through_jax_triton():
    pytest.importorskip("jax_triton", exc_type=ImportError)
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    for bits, batch in ((4, ()), (8, (2,))):
        q, _ = random_cuda(256, 64, bits=bits, batch=batch)
        x = activation(*batch, 4, 256)

        def product(x, q):
            return triton_matmul.matmul(x, q, jnp.bfloat16, chip=H200)

        per_shard = jax.shard_map(product, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"))
        assert "@triton_kernel_call" in jax.jit(per_shard).trace(x, q).lower(lowering_platforms=("cuda",)).as_text()
        f = jax.jit(product)
        text = f.trace(x, q).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@triton_kernel_call") == 1
        assert "triton" not in f.trace(x, q).lower(lowering_platforms=("cpu",)).as_text()
