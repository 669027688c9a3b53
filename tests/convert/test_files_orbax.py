"""Orbax checkpoints: what plain Orbax sees, what comes back, what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import fuzz
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

import awq_jax
from awq_jax import convert
from awq_jax.convert import conversion, registry
from awq_jax.convert.arrays import linear
from awq_jax.convert.format import Destination
from awq_jax.convert.formats.orbax import OrbaxSink
from awq_jax.convert.writing import write_checkpoint
from awq_jax.errors import AwqError, BackendError, CheckpointError, FormatError
from awq_jax.qtensor import QuantizedTensor

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with act-order, float offsets in bfloat16, explicit scales, 3 bits, and float tensors."""
    directory = tmp_path_factory.mktemp("orbax") / "native"
    tensors = fuzz.weights(bits=4)
    q = tensors["model.layers.0.self_attn.q_proj.weight"]
    rng = np.random.default_rng(0)
    tensors["model.layers.0.self_attn.q_proj.weight"] = dataclasses.replace(
        q, perm=rng.permutation(64).astype(np.int32)
    )
    tensors["model.layers.0.self_attn.k_proj.weight"] = dataclasses.replace(
        q, inv_scale=rng.random(64).astype(np.float32)
    )
    tensors["model.layers.0.self_attn.v_proj.weight"] = fuzz.weights(4, offsets=True, scale_dtype=ml_dtypes.bfloat16)[
        "model.layers.0.self_attn.v_proj.weight"
    ]
    tensors[UP] = fuzz.weights(bits=3)[UP]
    write_checkpoint(directory, tensors.items(), fuzz.llama_config(64, 128), "awq-jax")
    (directory / "generation_config.json").write_text('{"eos_token_id": 1}')
    return directory


@pytest.fixture(scope="module")
def orbax(native: Path) -> Path:
    directory = native.parent / "orbax"
    conversion.checkpoint(native, directory, "orbax")
    return directory


def copied(orbax: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(orbax, tmp_path / "copy"))


def leaf(tree: Any, name: str) -> Any:
    for key in name.split("."):
        tree = tree[key]
    return tree


def test_there_and_back_is_byte_identical(native: Path, orbax: Path, tmp_path: Path) -> None:
    assert sorted(p.name for p in orbax.iterdir()) == [
        "README.md",
        "awq-jax.json",
        "config.json",
        "generation_config.json",
        "params",
    ]
    back = conversion.checkpoint(orbax, tmp_path / "back", "awq-jax")
    assert back.source == "orbax"
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (native / file).read_bytes(), file
    assert [p.name for p in tmp_path.iterdir()] == ["back"]
    float_dir = tmp_path / "float"
    conversion.checkpoint(native, float_dir, "float")
    conversion.checkpoint(float_dir, tmp_path / "float-orbax", "orbax", dtype="bfloat16", allow_lossy=True)
    tree = convert.restore(tmp_path / "float-orbax")
    assert leaf(tree, UP).dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(leaf(tree, UP), registry.open_source(float_dir).read(UP).astype(ml_dtypes.bfloat16))


def test_plain_orbax_restores_the_arrays(native: Path, orbax: Path) -> None:
    """What a Flax app sees that knows nothing of this library; on its devices if it says so."""
    from fuzz_reference import containers

    stored, _ = containers(native)
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(orbax / "params")
        flat = {".".join(str(k.key) for k in path): a for path, a in jax.tree_util.tree_flatten_with_path(tree)[0]}
        assert set(flat) == set(stored)
        for name, array in stored.items():
            assert flat[name].dtype == array.dtype
            np.testing.assert_array_equal(flat[name], array, err_msg=name)
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)
        placed = checkpointer.restore(orbax / "params", target)
    assert isinstance(leaf(placed, UP)["qweight"], jax.Array)
    np.testing.assert_array_equal(leaf(placed, UP)["qweight"], stored[f"{UP}.qweight"])


def test_restore_gives_packed_leaves_that_dequantize_right(native: Path, orbax: Path) -> None:
    from fuzz_reference import reference

    want = reference(native)
    params = convert.restore(orbax)
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QuantizedTensor))
    assert sum(isinstance(x, QuantizedTensor) for x in leaves) == 7
    for name, value in want.items():
        got = leaf(params, name)
        got = got.dequantize(jnp.float32) if isinstance(got, QuantizedTensor) else got
        np.testing.assert_allclose(np.asarray(got, np.float64), value, rtol=1e-6, atol=1e-6, err_msg=name)
    x = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)
    y = awq_jax.dot(x, jax.device_put(leaf(params, UP)))
    np.testing.assert_allclose(np.asarray(y), x @ want[UP].T, rtol=1e-4, atol=1e-4)


def test_the_decoder_loads_it(native: Path, orbax: Path) -> None:
    theirs, ours = awq_jax.load(native, dtype="float32"), awq_jax.load(str(orbax), dtype="float32")
    assert jax.tree.structure(ours.params) == jax.tree.structure(theirs.params)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert ours.eos_ids() == (1,)


def test_headers_say_what_is_read(native: Path, orbax: Path) -> None:
    a, b = registry.open_source(native), registry.open_source(orbax)
    assert b.format == "orbax"
    assert {n: a.info(n) for n in a.names()} == {n: b.info(n) for n in b.names()}
    with pytest.raises(CheckpointError, match="no tensor 'nowhere'"):
        b.read("nowhere")


def test_an_apps_own_tree(tmp_path: Path) -> None:
    q = fuzz.weights(bits=4)[UP]
    stack = linear.build(*(np.stack([a, a]) for a in (q.qweight, q.scales, q.zeros)), 4, 64, 64, 128, "bfloat16")
    stack = dataclasses.replace(stack, axes="bkn")
    params = {
        "params": {"blocks": [{"kernel": stack}, {"kernel": q}], "bias": jnp.arange(3, dtype=jnp.bfloat16), "n": 3}
    }
    convert.store(tmp_path / "app", params)
    got = convert.restore(tmp_path / "app")
    assert set(got["params"]) == {"blocks", "bias", "n"}
    for number, want in enumerate((stack, q)):
        back = got["params"]["blocks"][str(number)]["kernel"]
        assert jax.tree.structure(back) == jax.tree.structure(want)
        jax.tree.map(np.testing.assert_array_equal, back, want)
    assert got["params"]["bias"].dtype == ml_dtypes.bfloat16
    assert got["params"]["n"].shape == ()
    assert [p.name for p in tmp_path.iterdir()] == ["app"]
    with pytest.raises(CheckpointError, match="exists"):
        convert.store(tmp_path / "app", params)
    with pytest.raises(CheckpointError, match=r"key 'a\.b' holds a dot"):
        convert.store(tmp_path / "dot", {"a.b": np.ones(2)})
    with pytest.raises(CheckpointError, match="empty"):
        convert.store(tmp_path / "empty", {})
    assert [p.name for p in tmp_path.iterdir()] == ["app"]


def test_names_that_make_no_tree(tmp_path: Path) -> None:
    one = np.ones(2, np.float32)
    for names, message in (
        (("a.b", "a"), "above another"),
        (("a", "a.b"), "below another"),
        (("a", "a"), "given twice"),
        (("a..b",), "cannot be a path"),
        (("../a",), "cannot be a path"),
    ):
        sink = OrbaxSink(tmp_path, Destination(), None)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=message):
            [sink.add({name: one}) for name in names], sink.close({})
        (tmp_path / "spool.bin").unlink()
    assert not list(tmp_path.iterdir())


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps(data))


def claim(directory: Path, name: str = f"{UP}.scales", **changes: Any) -> None:
    """Change what the file beside says of an array."""
    arrays = json.loads((directory / "awq-jax.json").read_text())["arrays"]
    arrays[name] = {**arrays[f"{UP}.scales"], **changes}
    edit(directory / "awq-jax.json", arrays=arrays)


ARRAY = f"params/{UP}.scales"
DAMAGES: dict[str, tuple[Any, type[AwqError], str]] = {
    "no statics": (lambda d: (d / "awq-jax.json").unlink(), CheckpointError, "awq-jax.json; it is not"),
    "statics are a list": (lambda d: (d / "awq-jax.json").write_text("[]"), CheckpointError, "must hold a JSON object"),
    "no entry": (lambda d: edit(d / "awq-jax.json", packed={}), CheckpointError, "qweight has no metadata"),
    "entry is a number": (lambda d: edit(d / "awq-jax.json", packed={UP: 3}), CheckpointError, "lacks its objects"),
    "other bits": (
        lambda d: (d / "awq-jax.json").write_text((d / "awq-jax.json").read_text().replace('"bits": 3', '"bits": 2')),
        CheckpointError,
        "implies that",
    ),
    "newer": (
        lambda d: edit(d / "config.json", quantization_config={"quant_method": "awq-jax-orbax", "format_version": 2}),
        FormatError,
        "format version 2",
    ),
    "no metadata": (lambda d: (d / "params/_METADATA").unlink(), CheckpointError, "holds no"),
    "an array is gone": (lambda d: shutil.rmtree(d / ARRAY), CheckpointError, "is damaged"),
    "a chunk is gone": (lambda d: (d / ARRAY / "0.0").unlink(), CheckpointError, "is damaged"),
    "a chunk is cut": (lambda d: os.truncate(d / ARRAY / "0.0", 9), CheckpointError, "is damaged"),
    "a bomb": (lambda d: claim(d, shape=[2**36, 2**3]), CheckpointError, "claims"),
    "a larger one": (lambda d: edit(d / ARRAY / ".zarray", shape=[2**38, 2]), CheckpointError, "awq-jax.json says"),
    "another shape": (lambda d: claim(d, shape=[2, 64]), CheckpointError, "implies that"),
    "another dtype": (lambda d: edit(d / ARRAY / ".zarray", dtype="<c16"), CheckpointError, "awq-jax.json says"),
    "an unknown dtype": (lambda d: claim(d, dtype="object"), CheckpointError, "'dtype': 'object'"),
    "a negative size": (lambda d: claim(d, shape=[-1, 128]), CheckpointError, r"\[-1, 128\]"),
    "a path outside": (lambda d: claim(d, name="../../x"), CheckpointError, r"'\.\./\.\./x' is"),
    "a link": (lambda d: (d / "params/x").symlink_to("/etc"), CheckpointError, "is a link"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named(orbax: Path, tmp_path: Path, case: str) -> None:
    damage, error, message = DAMAGES[case]
    directory = copied(orbax, tmp_path)
    damage(directory)
    with pytest.raises(error, match=message):
        fuzz.read(directory)


def test_without_orbax(monkeypatch: pytest.MonkeyPatch, native: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(BackendError, match="pip install orbax-checkpoint"):
        conversion.checkpoint(native, tmp_path / "out", "orbax")
    with pytest.raises(BackendError, match="pip install orbax-checkpoint"):
        convert.store(tmp_path / "out", {"a": np.ones(2)})
    assert not list(tmp_path.iterdir())


def test_writing_holds_a_few_tensors(tmp_path: Path) -> None:
    class Nothing:
        def companions(self) -> list[Path]:
            return []

        def tokenizer(self) -> None:
            return None

    rng = np.random.default_rng(0)
    tracemalloc.start()
    try:
        sink = OrbaxSink(tmp_path, Destination(), Nothing())  # type: ignore[arg-type]
        for i in range(48):
            sink.add({f"t{i}": rng.integers(0, 255, 1 << 20, np.uint8)})
        sink.close({})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20  # of 48; what TensorStore itself holds is not counted here
    np.testing.assert_array_equal(
        convert.restore(tmp_path)["t0"], np.random.default_rng(0).integers(0, 255, 1 << 20, np.uint8)
    )
