"""Safetensors in and out: against the safetensors package, damaged files, atomic writes."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from awq_jax.convert.files.safetensors import INDEX, SafetensorsDir, read_header
from awq_jax.convert.files.shards import SPOOL, ShardWriter, atomic_directory, write_file
from awq_jax.errors import CheckpointError, ConfigError

TORCH = {
    "half": torch.randn(3, 5).half(),
    "brain": torch.randn(4, 2).bfloat16(),
    "single": torch.randn(2, 3, 4),
    "double": torch.randn(7).double(),
    "int": torch.arange(6, dtype=torch.int32).reshape(2, 3),
    "byte": torch.arange(5, dtype=torch.uint8),
    "flag": torch.tensor([True, False, True]),
    "e4m3": torch.randn(8).to(torch.float8_e4m3fn),
    "e5m2": torch.randn(8).to(torch.float8_e5m2),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


def raw(header: object, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def info(shape: object, begin: int, end: int, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_every_dtype_as_torch_does(tmp_path: Path) -> None:
    safetensors.torch.save_file(TORCH, tmp_path / "model.safetensors", {"format": "pt"})
    files = SafetensorsDir(tmp_path)
    assert files.names() == sorted(TORCH)
    for name, tensor in TORCH.items():
        got = files.read(name)
        assert got.shape == tuple(tensor.shape)
        assert got.tobytes() == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        np.testing.assert_array_equal(got.astype(np.float64), tensor.double().numpy())


def test_torch_reads_what_is_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "b": rng.standard_normal((3, 5)).astype(ml_dtypes.bfloat16),
        "a": rng.integers(0, 2**32, (4, 2), dtype=np.uint32).view(np.int32),
        "c": rng.standard_normal((5, 4)).astype(np.float32).T,  # not contiguous
        "d": np.float16(1.5) * np.ones((), np.float16),
        "e": np.zeros((0, 3), np.float32),
        "f": rng.integers(0, 255, 3, dtype=np.uint8),
    }
    write_file(tmp_path / "one", tensors, {"k": "v"})
    write_file(tmp_path / "two", dict(reversed(tensors.items())), {"k": "v"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with safetensors.safe_open(tmp_path / "one", "pt") as f:
        assert f.metadata() == {"k": "v"}
        assert set(f.keys()) == set(tensors)
        for name, array in tensors.items():
            got = f.get_tensor(name)
            assert tuple(got.shape) == array.shape
            np.testing.assert_array_equal(got.double().numpy(), array.astype(np.float64))
    for entry in read_header(tmp_path / "one")[0].values():
        assert entry.offset % entry.dtype.itemsize == 0


def test_shards_are_bounded_and_indexed(tmp_path: Path) -> None:
    tensors = {f"t{i}": np.full((10, 10), i, np.float32) for i in range(7)} | {"big": np.ones((50, 50), np.float32)}
    writer = ShardWriter(tmp_path, 1000)
    for name, array in tensors.items():
        writer.add({name: array})
    writer.close()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    for file in files:
        stored = safetensors.torch.load_file(file)
        assert sum(t.nbytes for t in stored.values()) <= 1000 or list(stored) == ["big"]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    source = SafetensorsDir(tmp_path)
    for name, array in tensors.items():
        np.testing.assert_array_equal(source.read(name), array)
        assert name in safetensors.torch.load_file(tmp_path / index["weight_map"][name])


def test_writer_holds_one_shard(tmp_path: Path) -> None:
    tracemalloc.start()
    writer = ShardWriter(tmp_path, 4 << 20)
    for i in range(32):
        writer.add({f"t{i}": np.full(1 << 18, i, np.float32)})  # 1 MiB each
    writer.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 7 << 20
    assert len(list(tmp_path.glob("*.safetensors"))) == 8


def test_writer_refuses_duplicates_odd_dtypes_and_silly_bounds(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 100)
    writer.add({"a": np.zeros(3)})
    with pytest.raises(CheckpointError, match="'a' was given twice"):
        writer.add({"a": np.zeros(3)})
    with pytest.raises(CheckpointError, match=r"'b' has dtype <U1"):
        writer.add({"b": np.array(["x"])})
    with pytest.raises(ConfigError, match="max_shard_bytes"):
        ShardWriter(tmp_path, 0)


DATA = bytes(range(32))
GOOD = {"a": info([2, 2], 0, 16), "b": info([4], 16, 32)}
BAD = {
    "no header": (b"abc", "truncated"),
    "length beyond file": (raw(GOOD, DATA, 10**6), "claims 1000000 bytes"),
    "length huge": (raw(GOOD, DATA, 2**63), "claims 9223372036854775808 bytes"),
    "length too short": (raw(GOOD, DATA, 20), "corrupt header"),
    "data cut": (raw(GOOD, DATA[:-1]), r"'b' ends at byte .* truncated"),
    "data trailing": (raw(GOOD, DATA + b"x"), "1 bytes that belong to no tensor"),
    "overlap": (raw({"a": info([2, 2], 0, 16), "b": info([4], 12, 28)}, DATA[:28]), "'b' overlaps"),
    "gap": (raw({"a": info([3], 0, 12), "b": info([4], 16, 32)}, DATA), "'b' leaves a gap"),
    "reversed": (raw({"a": info([2, 2], 16, 0)}, DATA), "'a' has impossible offsets"),
    "negative": (raw({"a": info([2, 2], -16, 0)}, DATA), "'a' has impossible offsets"),
    "negative size": (raw({"a": info([-2, -2], 0, 16)}, DATA), "'a' has an impossible shape"),
    "boolean size": (raw({"a": info([True, 4], 0, 16)}, DATA), "'a' has an impossible shape"),
    "float size": (raw({"a": info([4.0], 0, 16)}, DATA), "'a' has an impossible shape"),
    "huge size": (raw({"a": info([2**62, 2**62], 0, 16)}, DATA[:16]), "'a' of shape .* needs"),
    "dtype": (raw({"a": info([2, 2], 0, 16, "F31")}, DATA[:16]), "'a' has dtype 'F31'"),
    "dtype kind": (raw({"a": info([2, 2], 0, 16, ["F32"])}, DATA[:16]), "'a' has dtype"),
    "bytes": (raw({"a": info([2, 3], 0, 16)}, DATA[:16]), "needs 24 bytes, has 16"),
    "lacking": (raw({"a": {"dtype": "F32", "shape": [4]}}, DATA), "'a' lacks"),
    "twice": (raw(b'{"a":1,"a":2}', b""), "'a' appears twice"),
    "not JSON": (raw(b"{nonsense", b""), "corrupt header"),
    "not UTF-8": (raw(b'{"\xff":1}', b""), "corrupt header"),
    "a list": (raw([1, 2], b""), "list instead of an object"),
    "nested": (raw(b"[" * 200_000, b""), "corrupt header"),
    "metadata": (raw({"__metadata__": {"a": 1}}, b""), "__metadata__"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_file_is_named(tmp_path: Path, case: str) -> None:
    data, message = BAD[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as error:
        SafetensorsDir(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value)


def test_a_file_that_shrinks_while_open(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw(GOOD, DATA))
    files = SafetensorsDir(tmp_path)
    os.truncate(path, path.stat().st_size - 4)
    assert files.read("a").tobytes() == DATA[:16]
    with pytest.raises(CheckpointError, match="became shorter"):
        files.read("b")
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot read tensor 'a'"):
        files.read("a")
    with pytest.raises(CheckpointError, match="no tensor 'c'"):
        files.read("c")


def sharded(directory: Path, weight_map: object = None) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "x.safetensors").write_bytes(raw({"a": info([4], 0, 16)}, DATA[:16]))
    (directory / "y.safetensors").write_bytes(raw({"b": info([4], 0, 16)}, DATA[16:]))
    weights = {"a": "x.safetensors", "b": "y.safetensors"} if weight_map is None else weight_map
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../x.safetensors"}, "only .safetensors files inside it"),
        ({"a": "sub/../../x.safetensors"}, "only .safetensors files inside it"),
        ({"a": "/etc/passwd"}, "only .safetensors files inside it"),
        ({"a": "config.json"}, "only .safetensors files inside it"),
        ({"a": ""}, "only .safetensors files inside it"),
        ({"a": "x\0.safetensors"}, "only .safetensors files inside it"),
        ({"a": "z.safetensors"}, "z.safetensors is missing"),
        ({"a": "y.safetensors", "b": "y.safetensors"}, "puts tensor 'a' in y.safetensors, which does not hold it"),
        ({"a": "x.safetensors", "c": "y.safetensors"}, "puts tensor 'c'"),
        ({"a": 1}, "no weight_map"),
        ([], "no weight_map"),
        ({}, "no weight_map"),
    ],
)
def test_index_that_lies(tmp_path: Path, weight_map: object, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(raw({"a": info([4], 0, 16)}, DATA[:16]))
    sharded(tmp_path / "model", weight_map)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsDir(tmp_path / "model")


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "y.safetensors").write_bytes(raw({"a": info([4], 0, 16), "b": info([4], 16, 32)}, DATA))
    with pytest.raises(CheckpointError, match=r"'a' is stored twice: in x.safetensors and y.safetensors"):
        SafetensorsDir(tmp_path)


def test_links_may_only_lead_into_the_hub_cache(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(raw({"a": info([4], 0, 16)}, DATA[:16]))
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "model.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        SafetensorsDir(plain)
    repo = tmp_path / "models--o--n"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots" / "rev").mkdir(parents=True)
    (repo / "blobs" / "abc").write_bytes(outside.read_bytes())
    link = repo / "snapshots" / "rev" / "model.safetensors"
    link.symlink_to("../../blobs/abc")
    assert SafetensorsDir(link.parent).read("a").tobytes() == DATA[:16]
    link.unlink()
    link.symlink_to(outside)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        SafetensorsDir(link.parent)


def test_directories_without_an_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(CheckpointError, match="2 safetensors files"):
        SafetensorsDir(tmp_path)
    (tmp_path / "x.safetensors").rename(tmp_path / "m-00001-of-00002.safetensors")
    (tmp_path / "y.safetensors").rename(tmp_path / "m-00002-of-00002.safetensors")
    assert SafetensorsDir(tmp_path).names() == ["a", "b"]
    (tmp_path / "m-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="number 1 is missing"):
        SafetensorsDir(tmp_path)
    (tmp_path / "m-00002-of-00002.safetensors").rename(tmp_path / "any.safetensors")
    assert SafetensorsDir(tmp_path).names() == ["b"]
    (tmp_path / "any.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no"):
        SafetensorsDir(tmp_path)


def mutate(rng: random.Random, good: bytes) -> bytes:
    """One random change to the file: bytes, length field, a number in the header, or its end."""
    kind = rng.randrange(5)
    data = bytearray(good)
    header = 8 + int.from_bytes(good[:8], "little")
    if kind == 0:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(header)] = rng.randrange(256)
    elif kind == 1:
        data = data[: rng.randrange(len(data))]
    elif kind == 2:
        data[:8] = rng.choice([0, 1, header, len(good), 2**31, 2**40, 2**64 - 1]).to_bytes(8, "little")
    elif kind == 3:
        digits = [i for i in range(8, header) if chr(data[i]).isdigit()]
        data[rng.choice(digits)] = ord(rng.choice("0123456789"))
    else:
        i = rng.randrange(8, header)
        data[i:i] = rng.choice([b"9" * 12, b"-", b"{", b"]", b'"', b"\\u0000", b",", b"null"])
    return bytes(data)


def test_fuzzed_files_are_refused_or_read_as_the_reference_reads_them(tmp_path: Path) -> None:
    rng = random.Random(0)
    good = safetensors.torch.save({k: v for k, v in TORCH.items() if not k.startswith("e")}, {"format": "pt"})
    path = tmp_path / "model.safetensors"
    refused = accepted = 0
    tracemalloc.start()
    for _ in range(300):
        data = mutate(rng, good)
        path.write_bytes(data)
        tracemalloc.reset_peak()
        try:
            files = SafetensorsDir(tmp_path)
            got = {n: files.read(n) for n in files.names()}
        except CheckpointError:
            refused += 1
            continue
        finally:
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        accepted += 1
        reference = dict(safetensors.deserialize(data))  # raises if it finds fault with it
        assert {n: (list(a.shape), a.tobytes()) for n, a in got.items()} == {
            n: (t["shape"], bytes(t["data"])) for n, t in reference.items()
        }
    tracemalloc.stop()
    assert refused > 150
    assert accepted > 10


def test_fuzzed_index_is_refused_or_right(tmp_path: Path) -> None:
    rng = random.Random(1)
    sharded(tmp_path)
    good = (tmp_path / INDEX).read_bytes()
    want = {"a": DATA[:16], "b": DATA[16:]}
    refused = 0
    for _ in range(100):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.choice(b'abxyz./\\"{}[]:0\x00\xff')
        (tmp_path / INDEX).write_bytes(bytes(data))
        try:
            files = SafetensorsDir(tmp_path)
            got = {n: files.read(n).tobytes() for n in files.names()}
        except CheckpointError:
            refused += 1
            continue
        assert got.items() <= want.items()
    assert refused > 50


def siblings(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with atomic_directory(tmp_path / "out") as directory:
            (directory / "half").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert siblings(tmp_path) == []


def test_a_full_disk_is_reported_and_cleaned(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write .*out.*No space"), atomic_directory(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert siblings(tmp_path) == []


def test_existing_targets(tmp_path: Path) -> None:
    dst = tmp_path / "out"
    dst.mkdir()
    (dst / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="out exists"), atomic_directory(dst):
        pass
    with pytest.raises(CheckpointError, match="not a checkpoint"), atomic_directory(dst, overwrite=True):
        pass
    assert (dst / "notes.txt").read_text() == "mine"
    (dst / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="stop"), atomic_directory(dst, overwrite=True):
        raise ValueError("stop")
    assert (dst / "notes.txt").exists()  # a failure leaves the old one
    with atomic_directory(dst, overwrite=True) as directory:
        (directory / "new").write_text("x")
    assert siblings(tmp_path) == ["out"]
    assert siblings(dst) == ["new"]
    (tmp_path / "plain").mkdir()
    assert dst.stat().st_mode == (tmp_path / "plain").stat().st_mode  # not private, as mkdtemp would make it


def test_a_spooled_shard_is_the_same_file(tmp_path):
    """Memory or disk: what is collected there ends in the same bytes, and the spool is gone."""
    r = np.random.default_rng(0)
    tensors = {
        "a": r.normal(size=(5, 3)).astype(np.float32),
        "b": r.normal(size=(7,)).astype(ml_dtypes.bfloat16),
        "c": r.integers(0, 99, (2, 3, 4)).astype(np.int32).transpose(2, 0, 1),
        "d": np.zeros((0, 3), np.float16),
        "e": np.float32(3.5).reshape(()),
    }
    for name in ("memory", "disk"):
        (tmp_path / name).mkdir()
        writer = ShardWriter(tmp_path / name, 100, spool=name == "disk")
        for key, value in tensors.items():
            writer.add({key: value}, {key: "x"})
            assert (tmp_path / name / SPOOL).exists() == (name == "disk")
        writer.close()
    files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("memory", "disk")]
    assert len(files[0]) > 2
    assert files[0] == files[1]


def test_what_a_kill_between_two_renames_left_is_removed(tmp_path):
    dst, left, other = (tmp_path / n for n in ("out", ".out.old-1-aa", ".out2.old-1-aa"))
    for directory in (left, other):
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"x")
    with atomic_directory(dst) as work:
        (work / "new").write_bytes(b"y")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out2.old-1-aa", "out"]
