"""`convert.checkpoint`: whole checkpoints, interrupted, refused, and within its memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from awq_jax import convert
from awq_jax.convert import conversion, exactness, pipeline, registry
from awq_jax.convert.arrays import codes, linear
from awq_jax.convert.files import manifest, shards
from awq_jax.convert.format import BaseEncoder, Destination, Example
from awq_jax.convert.formats.float_weights import FloatEncoder
from awq_jax.errors import CheckpointError, ConfigError, FormatError

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32}
SHARD = 3000  # bytes: every checkpoint here has several


def tensors(layers: int = 6, k: int = 64, n: int = 32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    out: dict[str, Any] = {"model.embed_tokens.weight": rng.normal(size=(32, k)).astype(np.float16)}
    for i in range(layers):
        q = exactness.example(Example(group_size=32), seed=i)
        q = linear.build(
            q.qweight[: k // 8, :n], q.scales[: k // 32, :n], q.zeros[: k // 32, :n], 4, 32, k, n, "float32"
        )
        out[f"model.layers.{i}.mlp.up_proj.weight"] = q
        out[f"model.layers.{i}.input_layernorm.weight"] = rng.normal(size=k).astype(np.float32)
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("conversion") / "gemm"
    convert.write_checkpoint(directory, tensors().items(), CONFIG, "gemm")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "modeling.py").write_text("raise SystemExit")
    return directory


def content(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def stop_at(call: int) -> Any:
    calls = iter(range(1, 1000))

    def progress(done: int, total: int) -> None:
        assert 0 < done <= total
        if next(calls) == call:
            raise KeyboardInterrupt

    return progress


def test_every_tensor_arrives_and_code_does_not(source: Path, tmp_path: Path) -> None:
    result = convert.checkpoint(source, tmp_path / "out", "awq-jax", max_shard_bytes=SHARD)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    out = registry.open_source(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "modeling.py").exists()
    assert out.names() == sorted(tensors()) == sorted(r.name for r in result.records)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    for name, want in tensors().items():
        got = out.read(name)
        if isinstance(want, np.ndarray):
            np.testing.assert_array_equal(got, want)
        else:
            for part in ("qweight", "scales", "zeros"):
                np.testing.assert_array_equal(getattr(got, part), getattr(want, part))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = [load_file(f) for f in (tmp_path / "out").glob("*.safetensors")]
    assert index["metadata"]["total_size"] == sum(a.nbytes for s in stored for a in s.values()) == result.nbytes
    assert result.inexact == ()


def test_there_and_back_gives_the_same_file(source: Path, tmp_path: Path) -> None:
    convert.checkpoint(source, tmp_path / "there", "awq-jax")
    convert.checkpoint(tmp_path / "there", tmp_path / "back", "gemm")
    there, back = content(source), content(tmp_path / "back")
    assert there["model.safetensors"] == back["model.safetensors"]
    assert (
        json.loads(there["config.json"])["quantization_config"]
        == json.loads(back["config.json"])["quantization_config"]
    )


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("call", [1, 4, 8, 12])
def test_interrupted_and_continued_gives_the_same_bytes(source: Path, tmp_path: Path, call: int, workers: int) -> None:
    settings: dict[str, Any] = {"to": "awq-jax", "max_shard_bytes": SHARD, "workers": workers}
    convert.checkpoint(source, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        convert.checkpoint(source, tmp_path / "out", **settings, progress=stop_at(call))
    assert not (tmp_path / "out").exists()
    result = convert.checkpoint(source, tmp_path / "out", **settings)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert (result.resumed > 0) == (call > 3)
    assert [r.name for r in result.records] == sorted(tensors(), key=conversion._natural)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_killed_and_continued(source: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom awq_jax import convert\ncalls = iter(range(99))\n"
        "def progress(done, total):\n    if next(calls) == 9: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"convert.checkpoint(sys.argv[1], sys.argv[2], 'awq-jax', max_shard_bytes={SHARD}, progress=progress)"
    )
    done = subprocess.run([sys.executable, "-c", code, source, tmp_path / "out"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    result = convert.checkpoint(source, tmp_path / "out", "awq-jax", max_shard_bytes=SHARD)
    assert result.resumed > 0
    convert.checkpoint(source, tmp_path / "whole", "awq-jax", max_shard_bytes=SHARD)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    "damage", ["cut manifest", "short part", "no part", "garbage", "other settings", "other source"]
)
def test_what_an_earlier_run_left_is_used_only_as_far_as_it_is_whole(source: Path, tmp_path: Path, damage: str) -> None:
    src = tmp_path / "src"
    shutil.copytree(source, src)
    with pytest.raises(KeyboardInterrupt):
        convert.checkpoint(src, tmp_path / "out", "awq-jax", max_shard_bytes=SHARD, progress=stop_at(10))
    work = tmp_path / ".out.converting"
    log, part = work / manifest.NAME, work / "part-00001.safetensors"
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) > 3
    if damage == "cut manifest":
        log.write_text("".join(lines[:2]) + lines[2][:40])
    if damage == "short part":
        part.write_bytes(part.read_bytes()[:-1])
    if damage == "no part":
        part.unlink()
    if damage == "garbage":
        log.write_text('{"fingerprint": 3}\nnothing\n')
    if damage == "other source":
        os.utime(src / "model.safetensors", (0, 0))
    shard = SHARD + 1 if damage == "other settings" else SHARD
    result = convert.checkpoint(src, tmp_path / "out", "awq-jax", max_shard_bytes=shard)
    convert.checkpoint(src, tmp_path / "whole", "awq-jax", max_shard_bytes=shard)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    kept = json.loads(lines[1])["records"]
    assert result.resumed == (0 if damage in ("garbage", "other settings", "other source") else len(kept))


def test_two_processes_do_not_write_one_target(source: Path, tmp_path: Path) -> None:
    with manifest.opened(tmp_path / ".out.converting", "x"):
        (tmp_path / ".out.converting" / "mine").write_text("precious")
        with pytest.raises(CheckpointError, match="another process"):
            convert.checkpoint(source, tmp_path / "out", "awq-jax")
        assert (tmp_path / ".out.converting" / "mine").read_text() == "precious"


def test_a_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=conversion.SPARE))
        with pytest.raises(CheckpointError, match="GB free"):
            convert.checkpoint(source, tmp_path / "out", "awq-jax")
    write, calls = shards.write_file, iter(range(99))

    def full(*args: Any) -> None:
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_file", full)
        with pytest.raises(CheckpointError, match=r"No space left.*run the same command again"):
            convert.checkpoint(source, tmp_path / "out", "awq-jax", max_shard_bytes=SHARD)
    assert convert.checkpoint(source, tmp_path / "out", "awq-jax", max_shard_bytes=SHARD).resumed > 0


def test_refusals_leave_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="must be one of"):
        convert.checkpoint(source, tmp_path / "out", "gguff")
    with pytest.raises(ConfigError, match="dtype must be one of"):
        convert.checkpoint(source, tmp_path / "out", "float", dtype="int8")
    with pytest.raises(CheckpointError, match="where the weights come from"):
        convert.checkpoint(source, source, "awq-jax", overwrite=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="exists"):
            convert.checkpoint(source, tmp_path / "here", "awq-jax", overwrite=overwrite)
    convert.checkpoint(source, tmp_path / "float", "float")
    with pytest.raises(FormatError, match="no weight is quantized"):
        convert.checkpoint(tmp_path / "float", tmp_path / "out", "gemm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["float", "here"]


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_float(source: Path, tmp_path: Path, dtype: str | None) -> None:
    result = convert.checkpoint(source, tmp_path / "out", "float", dtype=dtype)
    out = registry.open_source(tmp_path / "out")
    for name, value in tensors().items():
        packed = not isinstance(value, np.ndarray)
        want = np.asarray(value.dequantize("float32")) if packed else value
        want = want.astype({"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, None: want.dtype}[dtype])
        got = out.read(name)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    assert bool(result.inexact) == (dtype is not None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == (dtype or "float32")


class Coarse(BaseEncoder):
    """Moves every scale by the fraction in the config."""

    def fit(self, name: str, q: Any) -> Any:
        import dataclasses

        return dataclasses.replace(q, scales=q.scales.astype(np.float32) * (1 + self.destination.config["shift"]))

    encode = FloatEncoder.encode


def test_how_far_a_weight_moved_is_measured_in_steps() -> None:
    q = exactness.example(Example(form="symmetric"))
    for shift in (0.0, 2.0**-10, 2.0**-5):
        target = Destination(config={"shift": shift})
        fitted = Coarse(target).fit("w.weight", q)
        # the code furthest from the zero point, 8 steps, moves by 8 * shift of a step
        assert pipeline.steps("w.weight", q, fitted) == pytest.approx(8 * shift, rel=1e-3)
    with pytest.raises(FormatError, match=r"w\.weight is not held exactly .* 0\.0078 of a quantization step"):
        pipeline.encode(Coarse(Destination(config={"shift": 2.0**-10})), "w.weight", q, lossy=False)
    with pytest.raises(FormatError, match="another quantization"):
        pipeline.encode(Coarse(Destination(config={"shift": 0.25})), "w.weight", q, lossy=True)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_in_numpy_are_those_in_jax(bits: int) -> None:
    from awq_jax import pack

    rng = np.random.default_rng(bits)
    for k, n in ((1, 1), (31, 3), (32, 8), (100, 5), (256, 2)):
        c = rng.integers(0, 2**bits, (k, n)).astype(np.uint8)
        packed = codes.pack(c, bits)
        np.testing.assert_array_equal(packed, np.asarray(pack.pack(c, bits)))
        np.testing.assert_array_equal(codes.unpack(packed, bits, k), c)


@pytest.mark.parametrize("form", ["zeros", "symmetric", "offsets", "edges"])
def test_dequantized_with_act_order_and_explicit_scale(form: Any) -> None:
    import dataclasses

    rng = np.random.default_rng(0)
    q = exactness.example(Example(form=form))
    perm = rng.permutation(q.k).astype(np.int32)
    inv = rng.uniform(0.5, 2, q.k).astype(np.float32)
    q = dataclasses.replace(q, perm=perm, inv_scale=inv)
    c, w = codes.codes_of(q).astype(np.float64), np.empty((q.k, q.n))
    for r in range(q.k):
        g = r // q.group_size
        scale = q.scales[g].astype(np.float64)
        zero = 0 if q.offsets is not None else (8 if q.zeros is None else q.zeros[g].astype(np.float64))
        offset = 0 if q.offsets is None else q.offsets[g].astype(np.float64)
        w[perm[r]] = ((c[r] - zero) * scale + offset) * inv[perm[r]]
    np.testing.assert_allclose(codes.dequantize(q, np.float64), w, rtol=1e-15)
    np.testing.assert_allclose(q.dequantize("float32").T, w, rtol=3e-6, atol=1e-7)
    x = rng.normal(size=(3, q.k)).astype(np.float32)
    from awq_jax.kernels import matmul, xla

    np.testing.assert_allclose(matmul(x, q), x @ w, rtol=2e-5, atol=2e-4)
    x = (x * inv)[:, perm]
    np.testing.assert_allclose(xla.grouped(x, q, "float32"), x @ (w / inv[:, None])[perm], rtol=2e-5, atol=2e-4)


def test_memory_is_a_shard_and_a_few_tensors(tmp_path: Path) -> None:
    k, n, layers = 1024, 512, 24
    one = k * n // 2
    made = tensors(layers, k=64, n=32)
    q = exactness.example(Example(), seed=1)
    big = {
        name: v
        if isinstance(v, np.ndarray)
        else linear.build(
            np.tile(q.qweight, (2, 8)), np.tile(q.scales, (2, 8)), np.tile(q.zeros, (2, 8)), 4, 128, k, n, "float32"
        )
        for name, v in made.items()
    }
    convert.write_checkpoint(tmp_path / "src", big.items(), CONFIG, "gemm")
    del big, made
    tracemalloc.start()
    convert.checkpoint(tmp_path / "src", tmp_path / "out", "awq-jax", max_shard_bytes=3 * one, workers=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * one + 4 * one + 500_000 < layers * one / 1.5, peak / one


def test_the_table_of_losses_is_what_is_known() -> None:
    table = exactness.table()
    assert all(row["awq-jax"] == 0 and row["float"] == 0 for row in table.values())
    assert table["gemm"]["gemm"] == 0
    grid = exactness.grid(table)
    assert len({len(row) for row in grid}) == 1


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("change", ["offsets", "scales", "codes", "groups", "order"])
def test_the_shortcuts_of_the_measure_agree_with_the_definition(
    bits: int, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    rng = np.random.default_rng(bits)
    monkeypatch.setattr(pipeline, "CHUNK", 5000)  # several blocks
    q = exactness.example(Example(bits=bits, group_size=64))
    f = q
    zeros, scales = np.asarray(q.zeros, np.float64), np.asarray(q.scales, np.float64)
    if change == "offsets":
        f = dataclasses.replace(q, zeros=None, offsets=(-zeros * scales).astype(np.float16))
    if change == "scales":
        f = dataclasses.replace(q, scales=(scales * rng.uniform(0.99, 1.01, scales.shape)).astype(np.float32))
    if change == "codes":
        c = codes.codes_of(q)
        c[300, 7] ^= 1
        f = dataclasses.replace(q, qweight=codes.pack(c, bits))
    if change == "groups":
        f = dataclasses.replace(
            q, group_size=32, scales=np.repeat(q.scales, 2, 0), zeros=None,
            offsets=np.repeat(-zeros * scales + 1e-4, 2, 0).astype(np.float32),
        )  # fmt: skip
    if change == "order":
        perm = rng.permutation(q.k).astype(np.int32)
        grouped = dataclasses.replace(
            q, group_size=1, scales=np.repeat(q.scales, 64, 0), zeros=np.repeat(q.zeros, 64, 0)
        )
        f = dataclasses.replace(
            grouped, perm=perm, qweight=codes.pack(codes.codes_of(q)[perm], bits), scales=grouped.scales[perm] * 1.0,
            zeros=grouped.zeros[perm],
        )  # fmt: skip
    step = np.repeat(scales, 64, axis=0)
    want = (np.abs(codes.dequantize(q, np.float64) - codes.dequantize(f, np.float64)) / step).max()
    got = pipeline.steps("w.weight", q, f)
    assert got == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert (want == 0) == (change == "order")
