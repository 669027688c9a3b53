"""MLX's affine layout: against MLX's own arrays, both ways, with settings per module, and refusals."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from awq_jax import QuantizedTensor, convert
from awq_jax.convert import pipeline, registry, writing
from awq_jax.convert.arrays import codes, linear
from awq_jax.convert.format import Destination
from awq_jax.convert.formats.mlx import MlxEncoder
from awq_jax.errors import AwqError, CheckpointError, FormatError

FIXTURES = Path(__file__).parent / "fixtures"
PEERS = Path(os.environ.get("AWQ_JAX_FIXTURES", "absent"))
OWN = np.load(FIXTURES / "mlx-affine.npz")  # written and dequantized by mlx 0.32.4
KINDS = sorted({name.rpartition(".")[0] for name in OWN.files})
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8}


def entry(group_size: int, bits: int) -> dict[str, Any]:
    return {"group_size": group_size, "bits": bits, "mode": "affine"}


def checkpoint(tmp_path: Path, tensors: dict[str, np.ndarray], quant: Any) -> Path:
    tmp_path.mkdir(exist_ok=True)
    save_file({"model.norm.weight": np.ones(4, np.float32)} | tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization": quant}))
    return tmp_path


def module(kind: str, name: str) -> dict[str, np.ndarray]:
    return {f"{name}.{part}": OWN[f"{kind}.{part}"] for part in ("weight", "scales", "biases")}


def of_mlx(directory: Path) -> Path:
    """A checkpoint with one module of each kind; the first one's settings are the default."""
    tensors: dict[str, np.ndarray] = {}
    quant: dict[str, Any] = {}
    for i, kind in enumerate(KINDS):
        bits, group = map(int, kind.split("."))
        tensors |= module(kind, f"m.{i}.proj")
        quant = quant | {f"m.{i}.proj": entry(group, bits)} if quant else entry(group, bits)
    return checkpoint(directory, tensors, quant)


def make(k: int, n: int, bits: int, group: int, seed: int = 0, form: str = "offsets", dtype: Any = np.float16) -> Any:
    rng = np.random.default_rng(seed)
    packed = codes.pack(rng.integers(0, 2**bits, (k, n)).astype(np.uint8), bits)
    scales = (rng.uniform(0.001, 0.1, (k // group, n)) * rng.choice([-1, 1], (k // group, n))).astype(dtype)
    offsets = rng.normal(size=scales.shape).astype(dtype) if form == "offsets" else None
    zeros = rng.integers(0, 2**bits, scales.shape).astype(np.uint8) if form == "zeros" else None
    return linear.build(packed, scales, zeros, bits, group, k, n, "float32", offsets=offsets)


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    for part in ("qweight", "scales", "zeros", "offsets"):
        x, y = getattr(a, part), getattr(b, part)
        if (x is None) != (y is None) or (x is not None and (x.dtype != y.dtype or x.tobytes() != y.tobytes())):
            return False
    return (a.bits, a.group_size, a.shape) == (b.bits, b.group_size, b.shape)


def test_mlx_own_arrays_dequantize_to_its_own_weights(tmp_path: Path) -> None:
    source = registry.open_source(of_mlx(tmp_path))
    assert source.format == "mlx"
    negative = 0
    for i, kind in enumerate(KINDS):
        bits, group = map(int, kind.split("."))
        name = f"m.{i}.proj.weight"
        q = source.read(name)
        assert isinstance(q, QuantizedTensor)
        assert (q.bits, q.group_size, q.shape, q.zeros) == (bits, group, (8, 128), None)
        assert source.info(name).packed is not None
        assert np.abs(codes.dequantize(q).T - OWN[f"{kind}.dense"]).max() == 0
        # By hand, bit by bit: bit j of code i of a row is bit i * bits + j of its bytes.
        stream = np.unpackbits(OWN[f"{kind}.weight"].view(np.uint8), axis=1, bitorder="little")
        want = stream.reshape(8, 128, bits) @ (1 << np.arange(bits))
        np.testing.assert_array_equal(codes.codes_of(q), want.T)
        negative += int((np.asarray(q.scales) < 0).sum())
    assert negative > 20


def test_mlx_own_arrays_are_written_back_bit_for_bit(tmp_path: Path) -> None:
    src = of_mlx(tmp_path / "src")
    convert.checkpoint(src, tmp_path / "own", "awq-jax")
    convert.checkpoint(tmp_path / "own", tmp_path / "out", "mlx")
    ours, theirs = (load_file(d / "model.safetensors") for d in (tmp_path / "out", src))
    assert ours.keys() == theirs.keys()
    assert all(ours[k].tobytes() == theirs[k].tobytes() and ours[k].dtype == theirs[k].dtype for k in theirs)
    again = registry.open_source(tmp_path / "out").config
    assert again["quantization"] == again["quantization_config"]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_round_trips(bits: int) -> None:
    encoder = MlxEncoder(Destination())
    for seed in range(12):
        rng = np.random.default_rng(seed)
        group = int(rng.choice([32, 64, 128]))
        k, n = group * int(rng.integers(1, 4)), int(rng.integers(1, 70))
        dtype = [np.float16, np.float32, ml_dtypes.bfloat16][seed % 3]
        q = make(k, n, bits, group, seed, dtype=dtype)
        assert encoder.fit("a.weight", q) is q
        arrays, _ = encoder.encode("a.weight", q)
        assert arrays["a.weight"].shape == (n, k * bits // 32)
        assert arrays["a.scales"].shape == arrays["a.biases"].shape == (n, k // group)
        back = linear.build(
            *(np.ascontiguousarray(arrays[p].T) for p in ("a.weight", "a.scales")),
            None,
            bits,
            group,
            k,
            n,
            "float32",
            offsets=np.ascontiguousarray(arrays["a.biases"].T),
        )
        assert same(back, q)


def test_settings_of_modules_both_ways(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {
        "model.embed_tokens.weight": make(64, 16, 8, 32),
        "lm_head.weight": make(64, 16, 6, 64),
        "model.layers.0.mlp.up_proj.weight": make(64, 12, 4, 64, seed=1),
        "model.layers.0.mlp.down_proj.weight": make(64, 12, 4, 64, seed=2),
        "model.layers.0.mlp.gate.weight": np.ones((4, 64), np.float16),
        "model.layers.0.mlp.up_proj.bias": np.ones(12, np.float16),
    }
    convert.write_checkpoint(tmp_path / "out", tensors.items(), CONFIG, "mlx")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization"] == {
        **entry(64, 4),
        "lm_head": entry(64, 6),
        "model.embed_tokens": entry(32, 8),
        "model.layers.0.mlp.gate": False,
    }
    source = registry.open_source(tmp_path / "out")
    assert source.names() == sorted(tensors)
    for name, want in tensors.items():
        got = source.read(name)
        assert same(got, want) if isinstance(want, QuantizedTensor) else np.array_equal(got, want)


def test_whole_zero_points_become_offsets() -> None:
    q = make(128, 8, 4, 64, form="zeros")
    zeros = np.repeat(np.asarray(q.zeros, np.float64), 64, 0)
    want = (codes.codes_of(q) - zeros) * np.repeat(np.asarray(q.scales, np.float64), 64, 0)
    loss = pipeline.encode(MlxEncoder(Destination()), "a.weight", q, lossy=True).record
    assert 0 < loss.deviation <= 0.0073  # half a unit in the last place of a float16 near 15 steps
    with pytest.raises(FormatError, match=r"a\.weight is not held exactly"):
        pipeline.encode(MlxEncoder(Destination()), "a.weight", q, lossy=False)
    single = Destination(dtype="float32")
    exact = pipeline.encode(MlxEncoder(single), "a.weight", q, lossy=False)
    assert exact.record.deviation == 0
    scales, offsets = (np.repeat(exact.arrays[f"a.{p}"].T, 64, 0) for p in ("scales", "biases"))
    assert scales.dtype == offsets.dtype == np.float32
    np.testing.assert_array_equal(codes.codes_of(q) * scales.astype(np.float64) + offsets, want)
    middle = make(128, 8, 4, 64, form="symmetric")
    assert pipeline.encode(MlxEncoder(Destination()), "a.weight", middle, lossy=False).record.deviation == 0


def test_scales_of_two_types_and_groups_that_are_larger() -> None:
    q = make(256, 8, 3, 256)
    mixed = dataclasses.replace(q, offsets=np.asarray(q.offsets).astype(np.float32) / 3)
    encoded = pipeline.encode(MlxEncoder(Destination()), "a.weight", mixed, lossy=False)
    assert (encoded.record.group_size, encoded.record.deviation) == (128, 0)
    assert encoded.arrays["a.biases"].dtype == encoded.arrays["a.scales"].dtype == np.float32
    np.testing.assert_array_equal(encoded.arrays["a.biases"], np.repeat(mixed.offsets, 2, 0).T)
    target = Destination(dtype="bfloat16")
    brain = pipeline.encode(MlxEncoder(target), "a.weight", mixed, lossy=True)
    assert brain.arrays["a.biases"].dtype == ml_dtypes.bfloat16
    assert brain.record.deviation > 0


WRITE_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "group": ({"a.weight": make(96, 8, 4, 48)}, r"a\.weight has group size 48, mlx holds 32, 64, 128"),
    "bits": ({"a.weight": make(64, 8, 7, 64)}, r"a\.weight has 7 bits, mlx holds 2 or 3 or 4 or 5 or 6 or 8"),
    "order": (
        {"a.weight": dataclasses.replace(make(64, 8, 4, 64), perm=np.arange(64, dtype=np.int32))},
        r"a\.weight has its rows in act-order",
    ),
    "expert": ({"mlp.experts.3.up_proj.weight": make(64, 8, 4, 64)}, "one of several experts"),
    "nothing": ({"a.weight": np.ones((4, 4), np.float32)}, "no weight is quantized"),
}


@pytest.mark.parametrize("case", WRITE_REFUSALS)
def test_what_cannot_be_written(tmp_path: Path, case: str) -> None:
    tensors, message = WRITE_REFUSALS[case]
    with pytest.raises(FormatError, match=message):
        convert.write_checkpoint(tmp_path / "out", tensors.items(), CONFIG, "mlx")
    assert not list(tmp_path.iterdir())


GOOD = module("4.64", "a")
READ_REFUSALS: dict[str, tuple[dict[str, Any], Any, type[AwqError], str]] = {
    "mode": (GOOD, {"group_size": 32, "bits": 4, "mode": "mxfp4"}, FormatError, "mode 'mxfp4'.*'affine'"),
    "module mode": (
        GOOD,
        entry(64, 4) | {"a": {"group_size": 16, "bits": 4, "mode": "nvfp4"}},
        FormatError,
        r"quantization\.a has mode 'nvfp4'",
    ),
    "bits": (GOOD, entry(64, 1), FormatError, r"quantization\.bits is 1"),
    "true": (GOOD, entry(64, True), FormatError, r"quantization\.bits is True"),
    "text": (GOOD, entry(64, "4"), FormatError, r"quantization\.bits is '4'"),  # type: ignore[arg-type]
    "group": (GOOD, entry(0, 4), FormatError, r"quantization\.group_size is 0"),
    "unknown": (GOOD, entry(64, 4) | {"a": {"global_scale": True}}, FormatError, r"quantization\.a has 'global_scale'"),
    "unknown value": (
        GOOD,
        entry(64, 4) | {"linear_class": "bit"},
        FormatError,
        r"quantization\.linear_class is 'bit'",
    ),
    "not an object": (GOOD, [], FormatError, "quantization must be an object"),
    "other bits": (GOOD, entry(64, 8), CheckpointError, r"a has weight \(8, 16\).* with 8 bits in groups of 64"),
    "float": (GOOD, entry(64, 4) | {"a": False}, CheckpointError, "a is quantized, but config.json says it is not"),
    "absent": (GOOD, entry(64, 4) | {"b": entry(64, 8)}, CheckpointError, "b is quantized, but b.scales is not there"),
    "biases": ({k: v for k, v in GOOD.items() if "biases" not in k}, entry(64, 4), CheckpointError, r"lacks a\.biases"),
    "dtype": (GOOD | {"a.weight": GOOD["a.weight"].view(np.int32)}, entry(64, 4), CheckpointError, "dtypes int32"),
    "experts": (
        {k: np.stack([v, v]) for k, v in GOOD.items()},
        entry(64, 4),
        FormatError,
        "stack of 2 matrices, of which those of switch_mlp are readable",
    ),
    "nan": (GOOD | {"a.scales": GOOD["a.scales"] * np.nan}, entry(64, 4), AwqError, r"a\.scales of .* holds NaN"),
}


@pytest.mark.parametrize("case", READ_REFUSALS)
def test_what_cannot_be_read(tmp_path: Path, case: str) -> None:
    tensors, quant, error, message = READ_REFUSALS[case]
    with pytest.raises(error, match=message):
        registry.open_source(checkpoint(tmp_path / "m", tensors, quant)).read("a.weight")


def test_defaults_where_an_entry_does_not_say(tmp_path: Path) -> None:
    """MLX's own defaults, 4 bits in groups of 64, not those of the whole checkpoint."""
    tensors = module("8.32", "b") | module("4.64", "a")
    source = registry.open_source(checkpoint(tmp_path, tensors, entry(32, 8) | {"a": {}, "b": True}))
    assert np.abs(codes.dequantize(source.read("a.weight")).T - OWN["4.64.dense"]).max() == 0  # type: ignore[arg-type]
    assert np.abs(codes.dequantize(source.read("b.weight")).T - OWN["8.32.dense"]).max() == 0  # type: ignore[arg-type]


def test_null_is_the_default(tmp_path: Path) -> None:
    """As mlx-lm's mixed recipes write where no group size was asked for."""
    null = {"group_size": None, "bits": None, "mode": None}
    tensors = module("8.32", "b") | module("4.64", "a") | module("3.64", "c")
    three = {"group_size": None, "bits": 3, "mode": "affine"}
    for quant in (entry(32, 8) | {"a": null, "c": three}, null | {"b": entry(32, 8), "c": three}):
        source = registry.open_source(checkpoint(tmp_path, tensors, quant))
        for name, kind in (("a", "4.64"), ("b", "8.32"), ("c", "3.64")):
            q = source.read(f"{name}.weight")
            assert np.abs(codes.dequantize(q).T - OWN[f"{kind}.dense"]).max() == 0  # type: ignore[arg-type]


def constant(bits: int, value: float, scale: float, dtype: Any) -> QuantizedTensor:
    """Two groups a column: of the first columns one is a constant as MLX codes it, all else is random."""
    whole = make(128, 8, bits, 64, form="zeros", dtype=dtype)
    grouped = codes.codes_of(whole).reshape(2, 64, 8).copy()
    zeros, scales = np.asarray(whole.zeros).astype(np.float64), np.asarray(whole.scales).copy()
    scales = (2.0 ** np.round(np.log2(np.abs(scales.astype(np.float64)))) * np.sign(scales)).astype(dtype)
    offsets = (-zeros * scales.astype(np.float64)).astype(dtype)
    for at in ((0, 0), (1, 3)):
        grouped[at[0], :, at[1]], scales[at], offsets[at] = 0, scale, value
    packed = codes.pack(grouped.reshape(128, 8), bits)
    return linear.build(packed, scales, None, bits, 64, 128, 8, "float32", offsets=offsets)


@pytest.mark.parametrize("to", ["gemm", "gemv", "gptq-v2", "compressed-tensors", "gguf-q8_0", "gguf-q4_1"])
@pytest.mark.parametrize("value", [0.5, -0.5, 0.0123, -31.5, 0.0])
@pytest.mark.parametrize(("scale", "dtype"), [(-1e-7, np.float16), (1e-7, ml_dtypes.bfloat16), (0, np.float16)])
def test_constant_groups(to: str, value: float, scale: float, dtype: Any) -> None:
    """They are held exactly, as the value itself is, beside groups that keep their codes."""
    q = constant(4, float(dtype(value)), scale, dtype)
    encoder = writing.encoder_of(to, Destination(config=CONFIG))
    fitted = encoder.fit("model.layers.0.mlp.up_proj.weight", q)
    assert fitted is not None
    np.testing.assert_array_equal(codes.dequantize(fitted, np.float64), codes.dequantize(q, np.float64))
    done = pipeline.encode(encoder, "model.layers.0.mlp.up_proj.weight", q, lossy=False)
    assert done.record.deviation == 0


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_constant_groups_of_other_widths(bits: int) -> None:
    q = constant(bits, 0.25, -1e-7, np.float16)
    fitted = writing.encoder_of("compressed-tensors", Destination(config=CONFIG)).fit("a.b.weight", q)
    assert fitted is not None
    np.testing.assert_array_equal(codes.dequantize(fitted, np.float64), codes.dequantize(q, np.float64))


def test_constant_groups_beyond_the_dtype() -> None:
    """A value that float16 rounds moves by a part of itself, not by thousands of the steps that mean nothing."""
    q = constant(4, 0.0123, 1e-7, np.float32)
    encoder = writing.encoder_of("gemm", Destination(config=CONFIG))
    moved = pipeline.encode(encoder, "model.layers.0.mlp.up_proj.weight", q, lossy=True).record.deviation
    assert 0 < moved < 2**-10


@pytest.mark.parametrize(("mlp", "last"), [("mlp", "up_proj"), ("block_sparse_moe", "w3")])
def test_stacked_experts_are_read_one_by_one(tmp_path: Path, mlp: str, last: str) -> None:
    stack = f"model.layers.3.{mlp}.switch_mlp.up_proj"
    parts = ("weight", "scales", "biases")
    tensors = {f"{stack}.{p}": np.stack([OWN[f"4.64.{p}"], OWN[f"4.64.{p}"][::-1]]) for p in parts}
    src = checkpoint(tmp_path / "m", tensors | module("8.32", "a"), entry(32, 8) | {stack: entry(64, 4)})
    source = registry.open_source(src)
    names = [f"model.layers.3.{mlp}.experts.{e}.{last}.weight" for e in range(2)]
    assert source.names() == sorted([*names, "a.weight", "model.norm.weight"])
    for name, want in zip(names, (OWN["4.64.dense"], OWN["4.64.dense"][::-1]), strict=True):
        q = source.read(name)
        assert isinstance(q, QuantizedTensor)
        assert source.info(name).nbytes == sum(OWN[f"4.64.{p}"].nbytes for p in parts)
        assert np.abs(codes.dequantize(q).T - want).max() == 0
    twice = tensors | {f"model.layers.3.{mlp}.experts.1.{last}.weight": OWN["4.64.weight"]}
    with pytest.raises(CheckpointError, match="twice, alone and in"):
        registry.open_source(checkpoint(tmp_path / "twice", twice, entry(64, 4)))


def test_experts_are_written_where_mlx_lm_stacks_them(tmp_path: Path) -> None:
    """mixtral, qwen2_moe and deepseek_v2: its loader stacks packed experts of one kind."""
    names = [f"model.layers.0.block_sparse_moe.experts.{e}.w1.weight" for e in range(3)]
    tensors: dict[str, Any] = {n: make(64, 8, 4, 64, seed=i) for i, n in enumerate(names)}
    mixtral = CONFIG | {"model_type": "mixtral"}
    convert.write_checkpoint(tmp_path / "out", tensors.items(), mixtral, "mlx")
    source = registry.open_source(tmp_path / "out")
    assert source.config["quantization"] == entry(64, 4)
    assert all(same(source.read(n), q) for n, q in tensors.items())  # type: ignore[arg-type]
    other = tensors | {names[1]: make(64, 8, 8, 64)}
    with pytest.raises(FormatError, match=r"experts\.1\.w1\.weight is not quantized like most of the model"):
        convert.write_checkpoint(tmp_path / "two", other.items(), mixtral, "mlx")
    floats: dict[str, Any] = {n: np.ones((8, 64), np.float16) for n in names} | {"lm_head.weight": make(64, 8, 4, 64)}
    convert.write_checkpoint(tmp_path / "three", floats.items(), mixtral, "mlx")
    assert registry.open_source(tmp_path / "three").config["quantization"] == entry(64, 4)


def test_a_tied_head_is_left_out_unless_it_differs(tmp_path: Path) -> None:
    tensors = {f"{m}.weight": make(64, 16, 4, 64) for m in ("lm_head", "model.embed_tokens")}
    convert.write_checkpoint(tmp_path / "out", tensors.items(), CONFIG | {"tie_word_embeddings": True}, "mlx")
    assert registry.open_source(tmp_path / "out").names() == ["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = make(64, 16, 4, 64, seed=1)
    convert.write_checkpoint(tmp_path / "own", tensors.items(), CONFIG | {"tie_word_embeddings": True}, "mlx")
    source = registry.open_source(tmp_path / "own")
    assert same(source.read("lm_head.weight"), tensors["lm_head.weight"])
    assert source.config["tie_word_embeddings"] is False


def test_gpt2_is_refused(tmp_path: Path) -> None:
    """mlx-lm transposes its linears when it loads them, also packed ones."""
    tensors = {"h.0.mlp.c_fc.weight": make(64, 16, 4, 64)}
    with pytest.raises(FormatError, match="stored transposed in gpt2, and mlx-lm would turn it"):
        convert.write_checkpoint(tmp_path / "out", tensors.items(), CONFIG | {"model_type": "gpt2"}, "mlx")


@pytest.mark.skipif(not PEERS.is_dir(), reason="AWQ_JAX_FIXTURES is not set")
@pytest.mark.parametrize("name", ["mlx-q4-g64-llama", "mlx-q8-g32-llama"])
def test_whole_checkpoints_of_mlx_lm(tmp_path: Path, name: str) -> None:
    source = registry.open_source(PEERS / name)
    dense = load_file(PEERS / name / "dense.safetensors")
    for weight, want in dense.items():
        assert np.abs(codes.dequantize(source.read(weight)).T - want).max() == 0  # type: ignore[arg-type]
    convert.checkpoint(source, tmp_path / "out", "mlx")
    ours, theirs = (load_file(d / "model.safetensors") for d in (tmp_path / "out", PEERS / name))
    assert ours.keys() == theirs.keys()
    assert all(ours[k].tobytes() == theirs[k].tobytes() for k in theirs)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization"] == json.loads((PEERS / name / "config.json").read_text())["quantization"]
