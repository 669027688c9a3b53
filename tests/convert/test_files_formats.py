"""Formats: AutoAWQ gemm against the peers' own files, our own layout, float; detection and refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from awq_jax import AwqConfig, QuantizedTensor, pack
from awq_jax.convert import registry, writing
from awq_jax.convert.format import quant_method
from awq_jax.convert.formats.awq import gemm
from awq_jax.errors import CheckpointError, FormatError, WeightError

FIXTURES = Path(__file__).parent / "fixtures"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float64", "vocab_size": 8}


def make(
    k: int,
    n: int,
    *,
    group: int = 16,
    bits: int = 4,
    seed: int = 0,
    axes: str = "nk",
    symmetric: bool = False,
    **changes: Any,
) -> QuantizedTensor:
    """A random packed weight with float16 scales."""
    rng = np.random.default_rng(seed)
    groups = -(-k // group)
    codes = rng.integers(0, 2**bits, (groups * group, n))
    q = QuantizedTensor(
        qweight=pack.pack(jnp.asarray(codes), bits),
        scales=jnp.asarray(rng.uniform(0.001, 0.1, (groups, n)), jnp.float16),
        zeros=None if symmetric else jnp.asarray(rng.integers(0, 2**bits, (groups, n)), jnp.uint8),
        inv_scale=None,
        bits=bits,
        group_size=group,
        axes=axes,
        k_dims=(k,),
        n_dims=(n,),
        dtype="float32",
    )
    return dataclasses.replace(q, **changes)


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Bit for bit the same arrays and settings."""
    arrays = ("qweight", "scales", "zeros", "inv_scale")
    static = ("bits", "group_size", "axes", "k_dims", "n_dims", "dtype")
    for name in arrays:
        x, y = getattr(a, name), getattr(b, name)
        if (x is None) != (y is None):
            return False
        if x is not None and (x.dtype != y.dtype or np.asarray(x).tobytes() != np.asarray(y).tobytes()):
            return False
    return all(getattr(a, s) == getattr(b, s) for s in static)


def unpack_with_torch(words: torch.Tensor) -> np.ndarray:
    """int32 [R, C/8] to codes [R, C], the way AutoAWQ describes its interleaving."""
    shifts = torch.arange(0, 32, 4)
    nibbles = (words[:, :, None] >> shifts) & 15
    nibbles = nibbles.reshape(words.shape[0], -1, 8)[:, :, [0, 4, 1, 5, 2, 6, 3, 7]]
    return nibbles.reshape(words.shape[0], -1).numpy()


def write(tmp_path: Path, tensors: Any, format: str = "gemm", **settings: Any) -> Path:
    dst = tmp_path / "out"
    shutil.rmtree(dst, ignore_errors=True)
    writing.write_checkpoint(dst, tensors, CONFIG, format, **settings)
    return dst


@pytest.mark.parametrize("name", ["autoawq-gemm", "gptqmodel-gemm"])
def test_peers_checkpoints_dequantize_to_their_own_weights(name: str) -> None:
    source = registry.open_source(FIXTURES / name)
    assert source.format == "gemm"
    dense = np.load(FIXTURES / name / "dense.npz")
    assert set(source.names()) == {*dense.files, "model.norm.weight"}
    for weight in dense.files:
        q = source.read(weight)
        assert isinstance(q, QuantizedTensor)
        assert q.shape == source.shape(weight) == dense[weight].shape
        assert np.abs(np.asarray(q.dequantize()) - dense[weight]).max() == 0


@pytest.mark.parametrize("name", ["autoawq-gemm", "gptqmodel-gemm"])
def test_peers_checkpoints_are_written_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    source = registry.open_source(FIXTURES / name)
    writing.write_checkpoint(
        tmp_path / "out", ((n, source.read(n)) for n in source.names()), source.config, "gemm", extra=source
    )
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), load_file(FIXTURES / name / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        assert ours[key].dtype == array.dtype
        assert ours[key].tobytes() == array.tobytes()


@pytest.mark.parametrize(("k", "n", "group"), [(16, 8, 16), (64, 24, 16), (48, 40, 48), (20, 16, 20), (4096, 72, 64)])
def test_gemm_packing_against_torch(k: int, n: int, group: int) -> None:
    q = make(k, n, group=group, seed=k)
    codes = np.asarray(q.codes())[:k]
    words = gemm.pack_qweight(np.asarray(q.qweight), k)
    assert words.shape == (k, n // 8)
    assert words.dtype == np.int32
    np.testing.assert_array_equal(unpack_with_torch(torch.from_numpy(words)), codes)
    np.testing.assert_array_equal(gemm.unpack_qweight(words), np.asarray(q.qweight))
    zeros = gemm.pack_qzeros(np.asarray(q.zeros))
    np.testing.assert_array_equal(unpack_with_torch(torch.from_numpy(zeros)), np.asarray(q.zeros))
    np.testing.assert_array_equal(gemm.unpack_qzeros(zeros), np.asarray(q.zeros))


def test_gemm_round_trip_and_axes(tmp_path: Path) -> None:
    weights = {"m.0.a.weight": make(64, 16), "m.0.b.weight": make(32, 8, seed=1)}
    flax = dataclasses.replace(weights["m.0.a.weight"], axes="kn")
    dst = write(tmp_path, [("m.0.a.weight", flax), ("m.0.b.weight", weights["m.0.b.weight"])])
    source = registry.open_source(dst)
    for name, q in weights.items():
        assert same(source.read(name), q)
    quant = source.config["quantization_config"]
    assert quant == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 16,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }


def test_symmetric_gemm(tmp_path: Path) -> None:
    q = make(32, 16, symmetric=True)
    dst = write(tmp_path, [("a.weight", q)])
    assert (unpack_with_torch(torch.from_numpy(load_file(dst / "model.safetensors")["a.qzeros"])) == 8).all()
    source = registry.open_source(dst)
    assert source.config["quantization_config"]["zero_point"] is False
    assert same(source.read("a.weight"), q)
    other = make(32, 16)
    mixed = registry.open_source(write(tmp_path, [("a.weight", q), ("b.weight", other)]))
    assert mixed.config["quantization_config"]["zero_point"] is True
    assert (mixed.read("a.weight").zeros == 8).all()
    np.testing.assert_array_equal(mixed.read("a.weight").dequantize(), q.dequantize())
    assert same(mixed.read("b.weight"), other)


def test_gptqmodels_symmetric_form(tmp_path: Path) -> None:
    """zero_point false, z = 8 stored all the same, bfloat16 scales."""
    rng = np.random.default_rng(0)
    words = rng.integers(-(2**31), 2**31, (32, 2)).astype(np.int32)
    scales = torch.rand(2, 16, dtype=torch.bfloat16)
    zeros = np.full((2, 2), 0x88888888, np.uint32).view(np.int32)
    arrays = {
        "a.qweight": words,
        "a.qzeros": zeros,
        "a.scales": scales.view(torch.int16).numpy().view(ml_dtypes.bfloat16),
    }
    save_file(arrays, tmp_path / "model.safetensors")
    quant = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": False, "format": "gemm"}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quant}))
    q = registry.open_source(tmp_path).read("a.weight")
    assert q.zeros is None
    want = (unpack_with_torch(torch.from_numpy(words)) - 8.0) * np.repeat(scales.double().numpy(), 16, 0)
    np.testing.assert_array_equal(np.asarray(q.dequantize()), want.T.astype(np.float32))


def test_whole_column_groups_of_different_lengths(tmp_path: Path) -> None:
    weights = {"a.weight": make(32, 8, group=32), "b.weight": make(48, 8, group=48)}
    source = registry.open_source(write(tmp_path, list(weights.items())))
    assert source.config["quantization_config"]["group_size"] == -1
    assert all(same(source.read(n), q) for n, q in weights.items())


def test_float_modules_are_excluded_for_both_readers(tmp_path: Path) -> None:
    """transformers matches by whole name or suffix, vLLM by substring; both must skip these and no others."""
    modules = [f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1, 2, 10, 11, 21) for p in ("gate", "up", "down")]
    floats = {"model.layers.1.mlp.down_proj", "model.layers.0.mlp.gate_proj"}
    tensors: list[tuple[str, Any]] = [
        (f"{m}.weight", np.ones((8, 16), np.float16) if m in floats else make(16, 8)) for m in modules
    ]
    tensors += [
        ("model.embed_tokens.weight", np.ones((8, 16), np.float16)),
        ("lm_head.weight", np.ones((8, 16), np.float16)),
        ("vision_tower.encoder.layers.0.mlp.fc1.weight", np.ones((8, 16), np.float16)),
    ]
    tensors += [
        ("model.norm.weight", np.ones(16, np.float32)),
        ("model.layers.0.mlp.up_proj.bias", np.ones(8, np.float16)),
    ]
    dst = write(tmp_path, tensors)
    config = AutoConfig.from_pretrained(dst)
    listed = config.quantization_config["modules_to_not_convert"]
    assert {m for m in modules if not should_convert_module(m, listed)} == floats
    assert {m for m in modules if any(entry in m for entry in listed)} == floats
    assert not should_convert_module("model.vision_tower.encoder.layers.0.mlp.fc1", listed)
    vllms = "vision_tower.vision_model.encoder.layers.0.mlp.fc1"  # has a part more than the file
    assert any(entry in vllms for entry in listed)
    assert config.dtype == torch.float16
    assert json.loads((dst / "config.json").read_text())["torch_dtype"] == "float16"


GEMM_REFUSALS: dict[str, tuple[list[tuple[str, Any]], str]] = {
    "bits": ([("a.weight", make(32, 8, bits=3))], "a.weight has 3 bits.*'awq-jax'"),
    "inv_scale": (
        [("a.weight", make(32, 8, inv_scale=jnp.ones(32)))],
        "a.weight has an explicit inv_scale.*explicit_scale=False",
    ),
    "padding": ([("a.weight", make(24, 8))], "a.weight: group size 16 does not divide its 24 inputs"),
    "columns": ([("a.weight", make(16, 12))], "a.weight has 12 outputs.*multiple of 8"),
    "inexact": ([("a.weight", make(16, 8, scales=jnp.full((1, 8), 0.1)))], "a.weight is not held exactly"),
    "overflow": (
        [("a.weight", make(16, 8, scales=jnp.full((1, 8), 2.0**17)))],
        "a.weight has scales that this format's dtype cannot hold",
    ),
    "name": ([("kernel", make(16, 8))], "kernel: gemm names weights"),
    "groups": (
        [("a.weight", make(64, 8)), ("b.weight", make(64, 8, group=32))],
        "b.weight has group size 32, a.weight has 16: gemm holds one group size",
    ),
    "nothing": ([("a.weight", np.ones((4, 4), np.float32))], "no weight is quantized"),
    "substring": (
        [("mlp.gate_proj.weight", make(16, 8)), ("mlp.gate.weight", np.ones((4, 16), np.float32))],
        "mlp.gate is float, but .* would skip mlp.gate_proj as well",
    ),
}


@pytest.mark.parametrize("case", GEMM_REFUSALS)
@pytest.mark.parametrize("stream", [False, True])
def test_gemm_refuses_what_it_cannot_hold(tmp_path: Path, case: str, stream: bool) -> None:
    tensors, message = GEMM_REFUSALS[case]
    assert writing.unfit("awq-jax", tensors) is None
    assert writing.unfit("gemm", tensors)
    with pytest.raises(FormatError, match=message):
        writing.write_checkpoint(tmp_path / "out", iter(tensors) if stream else tensors, CONFIG, "gemm")
    assert not list(tmp_path.iterdir())


def test_batched_weights_need_our_own_format(tmp_path: Path) -> None:
    one = make(32, 8)
    arrays: dict[str, Any] = {f: jnp.stack([getattr(one, f)] * 3) for f in ("qweight", "scales", "zeros")}
    experts = dataclasses.replace(one, axes="bkn", **arrays)
    with pytest.raises(FormatError, match="batch axes"):
        write(tmp_path, [("a.weight", experts)])
    source = registry.open_source(write(tmp_path, [("a.weight", experts)], "awq-jax"))
    assert source.shape("a.weight") == (3, 32, 8)
    assert same(source.read("a.weight"), experts)


def cases() -> Iterator[tuple[str, QuantizedTensor]]:
    for bits in (2, 3, 4, 8):
        yield f"b{bits}.weight", make(64, 12, bits=bits)
        yield f"pad{bits}.weight", make(40, 5, bits=bits, symmetric=bits == 3)
    yield "column.weight", make(40, 5, group=48, bits=3)
    yield "inv.weight", make(32, 8, inv_scale=jnp.linspace(0.5, 2, 32), dtype="bfloat16")
    yield "brain.weight", make(32, 8, scales=jnp.full((2, 8), 0.3, jnp.bfloat16))
    yield "single.weight", make(32, 8, scales=jnp.full((2, 8), 0.3, jnp.float32), dtype="float16")


def test_own_format_holds_everything(tmp_path: Path) -> None:
    tensors: dict[str, Any] = dict(cases())
    tensors["norm.weight"] = np.arange(5, dtype=ml_dtypes.bfloat16)
    settings = AwqConfig(bits=3, group_size=16, overrides=(("b4", {"bits": 4}),))
    dst = write(tmp_path, tensors.items(), "awq-jax", settings=settings, max_shard_bytes=1000)
    assert len(list(dst.glob("*.safetensors"))) > 2
    source = registry.open_source(dst)
    assert source.format == "awq-jax"
    assert source.names() == sorted(tensors)
    for name, want in tensors.items():
        got = source.read(name)
        assert source.shape(name) == want.shape
        if isinstance(want, QuantizedTensor):
            assert same(got, want), name
        else:
            assert got.tobytes() == want.tobytes()
    assert AwqConfig.from_dict(source.config["quantization_config"]["settings"]) == settings


def test_float_format_holds_the_dequantized_weights(tmp_path: Path) -> None:
    q = make(32, 8, inv_scale=jnp.linspace(0.5, 2, 32))
    flax = dataclasses.replace(q, axes="kn")
    source = registry.open_source(write(tmp_path, [("a.weight", flax), ("n.weight", np.ones(3, np.float32))], "float"))
    assert source.format == "float"
    codes, zeros = np.asarray(q.codes(), np.float64), np.asarray(q.zeros, np.float64)
    want = (codes - np.repeat(zeros, 16, 0)) * np.repeat(np.asarray(q.scales, np.float64), 16, 0)
    want = (want * np.asarray(q.inv_scale, np.float64)[:, None]).T
    np.testing.assert_allclose(source.read("a.weight"), want, rtol=1e-6)
    assert "quantization_config" not in source.config
    assert source.config["dtype"] == source.config["torch_dtype"] == "float32"


def test_tokenizer_and_generation_config_come_along(tmp_path: Path) -> None:
    src = tmp_path / "src"
    shutil.copytree(FIXTURES / "autoawq-gemm", src)
    for name in ("modeling_evil.py", "optimizer.pt"):
        (src / name).write_text("raise SystemExit")
    source = registry.open_source(src)
    assert source.generation_config["eos_token_id"] == 2
    writing.write_checkpoint(
        tmp_path / "out", ((n, source.read(n)) for n in source.names()), CONFIG, "gemm", extra=source
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (src / name).read_bytes()
    assert not list((tmp_path / "out").glob("*.p*"))
    tokenizer = source.tokenizer()
    writing.write_checkpoint(tmp_path / "two", [("a", np.ones(2))], CONFIG, "float", tokenizer=tokenizer)
    again = registry.open_source(tmp_path / "two").tokenizer()
    assert again("Once upon a time").input_ids == tokenizer("Once upon a time").input_ids


def edit(tmp_path: Path, config: dict | None = None, drop: tuple[str, ...] = (), **arrays: np.ndarray) -> Path:
    """The AutoAWQ fixture with some of its config and tensors replaced."""
    dst = tmp_path / "edited"
    shutil.copytree(FIXTURES / "autoawq-gemm", dst)
    data = json.loads((dst / "config.json").read_text())
    data["quantization_config"].update(config or {})
    (dst / "config.json").write_text(json.dumps(data))
    tensors = load_file(dst / "model.safetensors")
    module = "model.layers.0.mlp.down_proj."
    tensors.update({module + k: v for k, v in arrays.items()})
    save_file({k: v for k, v in tensors.items() if k.removeprefix(module) not in drop}, dst / "model.safetensors")
    return dst


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"config": {"version": "gemx"}}, FormatError, "AWQ version 'gemx' is not readable; known are gemm, gemv"),
        ({"config": {"bits": 3}}, FormatError, "bits is 3"),
        ({"config": {"bits": "4"}}, FormatError, "bits is '4'"),
        ({"config": {"group_size": 0}}, FormatError, "group_size must be"),
        ({"config": {"group_size": "64"}}, FormatError, "group_size must be"),
        ({"config": {"zero_point": 1}}, FormatError, "zero_point true or false"),
        ({"config": {"group_size": 128}}, CheckpointError, "down_proj has qweight .* group size 128"),
        ({"config": {"group_size": -1}}, CheckpointError, "_proj has qweight .* group size -1"),
        ({"config": {"quant_method": "unheard"}}, FormatError, "quant_method 'unheard'.*known are .*gemm.*awq-jax"),
        ({"config": {"quant_method": None}}, FormatError, "quant_method 'None'"),
        ({"config": {"quant_method": ["awq"]}}, FormatError, "not readable"),
        ({"drop": ("qzeros",)}, CheckpointError, "lacks model.layers.0.mlp.down_proj.qzeros"),
        ({"drop": ("scales",)}, CheckpointError, "lacks model.layers.0.mlp.down_proj.scales"),
        ({"weight": np.ones((128, 256), np.float32)}, CheckpointError, "holds both"),
        ({"qweight": np.ones((256, 15), np.int32)}, CheckpointError, "down_proj has qweight"),
        ({"qweight": np.ones(256, np.int32)}, CheckpointError, "down_proj.qweight has shape"),
        ({"qweight": np.ones((256, 16), np.float32)}, CheckpointError, "down_proj has dtypes float32"),
        ({"scales": np.ones((4, 128), np.int32)}, CheckpointError, "down_proj has dtypes int32, int32, int32"),
    ],
)
def test_inconsistent_gemm_checkpoints(tmp_path: Path, change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        registry.open_source(edit(tmp_path, **change))


def test_bad_scales_are_named(tmp_path: Path) -> None:
    scales = np.ones((4, 128), np.float16)
    scales[1, 2] = np.nan
    source = registry.open_source(edit(tmp_path, scales=scales))
    with pytest.raises(WeightError, match=r"down_proj.scales of .* NaN or inf"):
        source.read("model.layers.0.mlp.down_proj.weight")


def test_config_of_old_autoawq(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "autoawq-gemm", tmp_path / "old")
    path = tmp_path / "old/config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match="no quantization_config"):
        registry.open_source(tmp_path / "old")
    old = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "old/quant_config.json").write_text(json.dumps(old))
    name = "model.layers.0.mlp.down_proj.weight"
    assert same(
        registry.open_source(tmp_path / "old").read(name), registry.open_source(FIXTURES / "autoawq-gemm").read(name)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 5},
        {"bits": True},
        {"group_size": 0},
        {"group_size": 32},
        {"group_size": 2**60},
        {"axes": "kn"},
        {"axes": "bnk"},
        {"axes": "xk"},
        {"axes": 3},
        {"k_dims": [65]},
        {"k_dims": []},
        {"k_dims": [2**62]},
        {"n_dims": [-8]},
        {"dtype": "int4"},
        {"zeros": False},
        {"inv_scale": True},
        {"more": 1},
        None,
    ],
)
def test_metadata_of_our_format_that_lies(tmp_path: Path, change: dict | None) -> None:
    q = make(64, 8)
    dst = write(tmp_path, [("a.weight", q)], "awq-jax")
    header = {"bits": 4, "group_size": 16, "axes": "nk", "k_dims": [64], "n_dims": [8], "dtype": "float32"}
    text = json.dumps(header | {"zeros": True, "inv_scale": False} | (change or {})) if change else "[[["
    save_file(load_file(dst / "model.safetensors"), dst / "model.safetensors", {"awq-jax:a.weight": text})
    if change == {"axes": "kn"}:  # the same arrays, said to stand for the transposed leaf
        assert registry.open_source(dst).read("a.weight").shape == (64, 8)
        return
    with pytest.raises(CheckpointError, match=r"a\.weight"):
        registry.open_source(dst)


def test_newer_version_of_our_format(tmp_path: Path) -> None:
    dst = write(tmp_path, [("a.weight", make(16, 8))], "awq-jax")
    config = json.loads((dst / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (dst / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="version 2"):
        registry.open_source(dst)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        registry.open_source(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config.json"):
        registry.open_source(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match="holds no"):
        registry.open_source(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FormatError, match=r"pytorch_model.bin, a pickle.*save_pretrained"):
        registry.open_source(tmp_path)
    with pytest.raises(CheckpointError, match=r"pass the directory"):
        registry.open_source(tmp_path / "pytorch_model.bin")
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(registry.open_source(tmp_path).read("a"), np.ones(3, np.float32))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"bits": 4}}))
    with pytest.raises(FormatError, match="quant_method"):
        registry.open_source(tmp_path)
    for bad in ("[]", "{", "[" * 100_000, "\x00"):
        (tmp_path / "config.json").write_text(bad)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            registry.open_source(tmp_path)
    with pytest.raises(FormatError, match=r"must be one of .*gemm, .*awq-jax, .*float; got 'gemx'"):
        writing.write_checkpoint(tmp_path / "x", [], CONFIG, "gemx")


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fnmatch

    import huggingface_hub

    calls: list[dict] = []

    def offline(repo: str, **options: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError(f"cannot find {repo} in the cache, and offline")

    def online(repo: str, **options: Any) -> str:
        calls.append({"repo": repo, **options})
        save_file({"a": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"'no/such' is neither a local path .*offline.*pass a directory"):
        registry.open_source("no/such")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", online)
    assert registry.open_source("owner/name@v1.0").names() == ["a"]
    (call,) = calls
    assert (call["repo"], call["revision"]) == ("owner/name", "v1.0")

    def fetched(file: str) -> bool:
        hit = [any(fnmatch.fnmatch(file, p) for p in call[f"{k}_patterns"]) for k in ("allow", "ignore")]
        return hit[0] and not hit[1]

    wanted = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"]
    wanted += ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "merges.txt", "chat_template.jinja"]
    assert all(map(fetched, wanted))
    for file in (
        "pytorch_model.bin",
        "modeling_x.py",
        "a.pt",
        "a.pth",
        "a.pkl",
        "onnx/model.safetensors",
        "train.json",
    ):
        assert not fetched(file)


def test_a_quant_method_that_is_no_text_is_not_a_missing_one():
    for method, name in ((3, "3"), (["awq"], "['awq']"), ("AWQ", "awq"), (None, "")):
        assert quant_method({"quantization_config": {"quant_method": method}}) == name
    mlx = {"quantization": {"group_size": 64, "bits": 4}}
    assert registry.FORMATS["mlx"].matches(mlx, set())
    assert not registry.FORMATS["mlx"].matches(mlx | {"quantization_config": {"quant_method": 3}}, set())
