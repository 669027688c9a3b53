"""AutoAWQ's layouts: against AutoAWQ's own files and against packing written out nibble by nibble."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from awq_files import NAME, fast_words, gemm_words, gemv_words, make, marlin_words, read, same, save, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from awq_jax import convert
from awq_jax.convert import pipeline, registry
from awq_jax.convert.arrays import codes, nibbles
from awq_jax.convert.format import Destination
from awq_jax.convert.formats.awq import gemm, gemv_fast, marlin
from awq_jax.convert.formats.awq.common import zeros_width
from awq_jax.errors import CheckpointError, FormatError, WeightError
from awq_jax.qtensor import QuantizedTensor

FIXTURES = Path(__file__).parent / "fixtures"
LAYOUTS = {"gemm": 4, "gemv": 4, "gemv_fast": 4, "marlin": 4}


# How AutoAWQ stores the codes [K, N] of a weight, an index at a time.


@pytest.mark.parametrize(("k", "n"), [(64, 64), (192, 128), (1024, 192)])
def test_words_nibble_by_nibble(k: int, n: int) -> None:
    w = np.random.default_rng(k).integers(0, 16, (k, n)).astype(np.uint8)
    packed = codes.pack(w, 4)
    for module, want in ((gemv_fast, fast_words(w)), (marlin, marlin_words(w))):
        np.testing.assert_array_equal(module.pack_qweight(packed), want)
        np.testing.assert_array_equal(module.unpack_qweight(want), packed)
    np.testing.assert_array_equal(gemm.pack_qweight(packed, k), gemm_words(w))
    np.testing.assert_array_equal(gemm.unpack_qweight(gemm_words(w)), packed)


def test_words_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges that do not divide the rows, and rows wider than a range."""
    w = np.random.default_rng(0).integers(0, 16, (448, 128)).astype(np.uint8)
    packed = codes.pack(w, 4)
    for sets in (1, 80, 96, 512):
        monkeypatch.setattr(nibbles, "SETS", sets)
        np.testing.assert_array_equal(gemm.unpack_qweight(gemm.pack_qweight(packed, 448)), packed)
        np.testing.assert_array_equal(gemm.pack_qweight(packed, 448), gemm_words(w))
        np.testing.assert_array_equal(gemv_fast.pack_qweight(packed), fast_words(w))
        np.testing.assert_array_equal(gemv_fast.unpack_qweight(fast_words(w)), packed)
        np.testing.assert_array_equal(marlin.pack_qweight(packed), marlin_words(w))
        np.testing.assert_array_equal(marlin.unpack_qweight(marlin_words(w)), packed)


@pytest.mark.parametrize(("k", "group", "width"), [(4096, 128, 4), (11008, 128, 11), (128, 64, 2), (11008, 64, 22)])
def test_width_of_padded_groups(k: int, group: int, width: int) -> None:
    assert zeros_width(k, group) == width  # shapes of AutoAWQ's checkpoints of 7B models
    assert zeros_width(11008, 32) == 44
    assert zeros_width(96, 96) is None


@pytest.mark.parametrize("name", ["autoawq-gemv", "autoawq-gemvfast", "autoawq-marlin"])
def test_autoawqs_own_files(tmp_path: Path, name: str) -> None:
    """They decode to the weights AutoAWQ means, and are written back bit for bit with the same config."""
    directory = FIXTURES / name
    source = registry.open_source(directory)
    assert source.format == {"autoawq-gemvfast": "gemv_fast"}.get(name, name.removeprefix("autoawq-"))
    dense = np.load(directory / "dense.npz")
    assert set(source.names()) == {*dense.files, "model.norm.weight"}
    for weight in dense.files:
        q = source.read(weight)
        assert isinstance(q, QuantizedTensor)
        assert q.shape == source.shape(weight) == dense[weight].shape
        assert np.abs(codes.dequantize(q).T - dense[weight]).max() == 0
        assert np.abs(np.asarray(q.dequantize()) - dense[weight]).max() == 0
    convert.checkpoint(directory, tmp_path / "out", source.format)
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), load_file(directory / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (array.dtype, array.shape)
        assert ours[key].tobytes() == array.tobytes()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"] == source.config["quantization_config"]


@pytest.mark.skipif("AWQ_JAX_FIXTURES" not in os.environ, reason="needs AWQ_JAX_FIXTURES")
@pytest.mark.parametrize(
    "name", ["autoawq-gemm", "autoawq-gemv", "autoawq-gemvfast", "autoawq-marlin", "gptqm-awq-gemm-asym"]
)
def test_whole_models_of_the_peers(tmp_path: Path, name: str) -> None:
    directory = Path(os.environ["AWQ_JAX_FIXTURES"]) / f"{name}-g64-llama"
    source = registry.open_source(directory)
    dense = load_file(directory / "dense.safetensors")
    for weight in source.names():
        value = source.read(weight)
        if isinstance(value, QuantizedTensor):
            assert np.abs(codes.dequantize(value).T - dense[weight]).max() == 0
    convert.checkpoint(directory, tmp_path / "out", source.format)
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), load_file(directory / "model.safetensors")
    assert {k: v.tobytes() for k, v in ours.items()} == {k: v.tobytes() for k, v in theirs.items()}


def test_the_same_model_in_two_layouts() -> None:
    """AutoAWQ wrote one quantized model as GEMM and as GEMV; so must we read it."""
    gemm, gemv = registry.open_source(FIXTURES / "autoawq-gemm"), registry.open_source(FIXTURES / "autoawq-gemv")
    common = [n for n in gemv.names() if n in gemm.names() and n.endswith("_proj.weight")]
    assert common
    for name in common:
        assert same(gemm.read(name), gemv.read(name))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.sampled_from([32, 64, 128, 192]), st.integers(0, 2**32), st.booleans())
def test_round_trips_between_exact_layouts(
    tmp_path_factory: pytest.TempPathFactory, groups: int, units: int, group: int, seed: int, symmetric: bool
) -> None:
    """gemm, gemv and (symmetric) marlin hold the same weights: bytes come back through any of them."""
    tmp_path = tmp_path_factory.mktemp("trip")
    q = make(groups * group, 64 * units, group, seed, "symmetric" if symmetric else "zeros")
    first = write(tmp_path / "gemm", {NAME: q}, "gemm")
    assert same(read(first), q)
    for to in ("gemv", "marlin") if symmetric else ("gemv",):
        other = convert.checkpoint(first, tmp_path / to, to, overwrite=True)
        assert not other.inexact
        assert same(read(tmp_path / to), q)
        convert.checkpoint(tmp_path / to, tmp_path / "back", "gemm", overwrite=True)
        back, start = load_file(tmp_path / "back/model.safetensors"), load_file(first / "model.safetensors")
        assert {k: v.tobytes() for k, v in back.items()} == {k: v.tobytes() for k, v in start.items()}


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.sampled_from([64, 128]), st.integers(0, 2**32))
def test_through_gemv_fast(
    tmp_path_factory: pytest.TempPathFactory, groups: int, eights: int, group: int, seed: int
) -> None:
    """Its offsets are rounded, by at most .0074 of a step; codes, scales and zero points survive."""
    tmp_path = tmp_path_factory.mktemp("fast")
    q = make(groups * group, 8 * eights, group, seed)
    first = write(tmp_path / "gemm", {NAME: q}, "gemm")
    result = convert.checkpoint(first, tmp_path / "fast", "gemv_fast", allow_lossy=True)
    assert max((r.deviation for r in result.records), default=0) < 0.0074
    fast = read(tmp_path / "fast")
    exact = -(q.scales.astype(np.float64) * q.zeros)
    np.testing.assert_array_equal(fast.offsets, exact.astype(np.float32).astype(np.float16))
    convert.checkpoint(tmp_path / "fast", tmp_path / "back", "gemm", allow_lossy=True)
    assert same(read(tmp_path / "back"), q)


def test_gemv_fast_needs_leave_to_round(tmp_path: Path) -> None:
    first = write(tmp_path / "gemm", {NAME: make(128, 16, 64)}, "gemm")
    with pytest.raises(FormatError, match=r"up_proj.*not held exactly.*allow-lossy"):
        convert.checkpoint(first, tmp_path / "fast", "gemv_fast")
    even = dataclasses.replace(make(128, 16, 64), scales=np.full((2, 16), 0.25, np.float16))
    exact = convert.checkpoint(write(tmp_path / "even", {NAME: even}, "gemm"), tmp_path / "exact", "gemv_fast")
    assert not exact.inexact
    fast = read(tmp_path / "exact")
    assert same(dataclasses.replace(fast, offsets=None, zeros=even.zeros), even)


def test_gemv_by_hand(tmp_path: Path) -> None:
    """A file made here, with rubbish in the padding, against float64."""
    rng = np.random.default_rng(1)
    k, n, group = 192, 8, 64
    w, z = rng.integers(0, 16, (k, n)), rng.integers(0, 16, (3, n))
    s = rng.uniform(0.01, 1, (3, n)).astype(np.float16)
    zeros = np.concatenate([z, rng.integers(0, 16, (13, n))])
    scales = np.concatenate([s, rng.uniform(0, 1, (13, n)).astype(np.float16)])
    arrays = {"a.qweight": gemv_words(w), "a.qzeros": gemv_words(zeros), "a.scales": scales.T}
    directory = save(tmp_path / "in", arrays, {"group_size": group, "version": "GEMV", "zero_point": True})
    q = read(directory, "a.weight")
    want = (w - np.repeat(z, group, 0)) * np.repeat(s.astype(np.float64), group, 0)
    np.testing.assert_array_equal(codes.dequantize(q, np.float64), want)


@pytest.mark.parametrize(
    ("layout", "group"), [("gemm", 16), ("gemm", 128), ("gemv", 128), ("marlin", 16), ("marlin", 128)]
)
def test_symmetric_checkpoints_of_gptqmodel(tmp_path: Path, layout: str, group: int) -> None:
    """zero_point false, z = 8 stored all the same, bfloat16 scales; one group per column has its own marlin order."""
    rng = np.random.default_rng(2)
    k, n = 128, 64
    w = rng.integers(0, 16, (k, n))
    s = rng.uniform(0.01, 1, (k // group, n)).astype(ml_dtypes.bfloat16)
    eights = np.full((k // group, n), 8)
    if layout == "gemm":
        arrays = {"qweight": gemm_words(w), "qzeros": gemm_words(eights), "scales": s}
    elif layout == "gemv":
        arrays = {"qweight": gemv_words(w), "qzeros": gemv_words(np.full((8, n), 8)), "scales": np.repeat(s.T, 8, 1)}
    else:
        columns = [i + 8 * j for i in range(8) for j in range(8)]
        single = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
        order = columns if group < k else single
        arrays = {
            "qweight": marlin_words(w),
            "scales": s.reshape(-1, len(order))[:, order].reshape(s.shape),
        }
    quant = {"group_size": group, "format": layout, "zero_point": False, "sym": True}
    q = read(save(tmp_path / "in", {f"a.{p}": a for p, a in arrays.items()}, quant), "a.weight")
    assert q.zeros is None
    assert q.scales.dtype == ml_dtypes.bfloat16
    want = (w - 8) * np.repeat(s.astype(np.float64), group, 0)
    np.testing.assert_array_equal(codes.dequantize(q, np.float64), want)
    out = write(tmp_path / "out", {"a.weight": q}, layout)
    again = read(out, "a.weight")
    assert again.scales.dtype == np.float16
    np.testing.assert_array_equal(codes.dequantize(again, np.float64), want)
    assert registry.open_source(out).config["quantization_config"]["zero_point"] is False


@pytest.mark.parametrize("k", [20, 36, 44])
def test_gemm_whose_inputs_are_not_in_eights(tmp_path: Path, k: int) -> None:
    rng = np.random.default_rng(k)
    w, z = rng.integers(0, 16, (k, 16)), rng.integers(0, 16, (k // 4, 16))
    s = rng.uniform(0.01, 1, (k // 4, 16)).astype(np.float16)
    arrays = {"a.qweight": gemm_words(w), "a.qzeros": gemm_words(z), "a.scales": s}
    source = save(tmp_path / "in", arrays, {"group_size": 4, "zero_point": True})
    q = read(source, "a.weight")
    want = (w - np.repeat(z, 4, 0)) * np.repeat(s.astype(np.float64), 4, 0)
    np.testing.assert_array_equal(codes.dequantize(q, np.float64), want)
    ours = load_file(write(tmp_path / "out", {"a.weight": q}, "gemm") / "model.safetensors")
    assert {p: a.tobytes() for p, a in ours.items()} == {p: a.tobytes() for p, a in arrays.items()}


def test_what_checkpoints_on_the_hub_contain(tmp_path: Path) -> None:
    """Upper case, kernels' names for the layout, experts, biases, skipped modules, settings of runtimes."""
    names = ("model.layers.0.block_sparse_moe.experts.3.w1", "model.layers.0.self_attn.q_proj")
    weights = {f"{m}.weight": make(64, 16, 32, i) for i, m in enumerate(names)}
    floats = {
        "model.layers.0.block_sparse_moe.gate.weight": np.ones((4, 64), np.float16),
        "model.layers.0.self_attn.q_proj.bias": np.ones(16, np.float16),
    }
    plain = write(tmp_path / "plain", weights | floats, "gemm")
    config = json.loads((plain / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == ["model.layers.0.block_sparse_moe.gate"]
    for version in ("GEMM", "gemm", "Gemm", "exllama", "ipex"):
        config["quantization_config"] |= {"version": version, "modules_to_not_convert": ["gate"], "do_fuse": False}
        config["quantization_config"] |= {"backend": "autoawq", "exllama_config": None, "pack_dtype": "int32"}
        (plain / "config.json").write_text(json.dumps(config))
        source = registry.open_source(plain)
        assert source.format == "gemm"
        for name, q in weights.items():
            assert same(source.read(name), q)
        for name, array in floats.items():
            np.testing.assert_array_equal(source.read(name), array)
    del config["quantization_config"]["version"]
    settings = config["quantization_config"]
    settings |= {"w_bit": settings.pop("bits"), "q_group_size": settings.pop("group_size")}
    (plain / "config.json").write_text(json.dumps(config))
    assert same(read(plain, f"{names[0]}.weight"), weights[f"{names[0]}.weight"])


def test_group_sizes_by_module(tmp_path: Path) -> None:
    """GPTQModel's ``dynamic``: shapes tell; without it another group size is damage."""
    arrays: dict[str, np.ndarray] = {}
    for module, group in (("a", 32), ("b", 16)):
        part = write(tmp_path / module, {f"{module}.weight": make(64, 8, group, group)}, "gemm")
        arrays |= load_file(part / "model.safetensors")
    quant = {"group_size": 32, "zero_point": True}
    with pytest.raises(CheckpointError, match=r"b has .* group size 32"):
        registry.open_source(save(tmp_path / "in", arrays, quant))
    source = registry.open_source(save(tmp_path / "in", arrays, quant | {"dynamic": {"b": {"group_size": 16}}}))
    assert [source.info(f"{m}.weight").packed.group_size for m in "ab"] == [32, 16]
    assert same(source.read("b.weight"), make(64, 8, 16, 16))


REFUSED: dict[str, tuple[str, QuantizedTensor, str]] = {
    "group": ("gemv", make(80, 8, 16), "up_proj.weight has groups of 16, gemv has groups of 32, 64 or at least 128"),
    "inputs": (
        "gemv",
        make(132, 8, 132),
        "132 inputs and 8 outputs, gemv needs multiples of 8 and 8",
    ),
    "outputs": ("gemv", make(64, 12, 64), "has 12 outputs, gemv needs a multiple of 8"),
    "strides": ("gemv_fast", make(96, 8, 32), "has 96 inputs and 8 outputs, gemv_fast needs multiples of 64 and 8"),
    "tile": ("marlin", make(24, 64, 8, form="symmetric"), "has 24 inputs and 64 outputs, marlin needs multiples of 16"),
    "columns": ("marlin", make(32, 32, 32, form="symmetric"), "has 32 inputs and 32 outputs, marlin needs"),
    "asymmetric": ("marlin", make(32, 64, 32), "has zero points, marlin holds symmetric weights"),
    "explicit": ("gemv", dataclasses.replace(make(64, 8, 64), inv_scale=np.ones(64, np.float32)), "explicit inv_scale"),
    "order": (
        "gemv",
        dataclasses.replace(make(64, 8, 64), perm=np.arange(64, dtype=np.int32)[::-1]),
        "rows in act-order",
    ),
    "bits": ("gemv_fast", dataclasses.replace(make(64, 8, 64), bits=8), "has 8 bits, gemv_fast holds 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_layout_cannot_hold(case: str) -> None:
    to, q, message = REFUSED[case]
    make_encoder = registry.get(to).encoder
    assert make_encoder is not None
    with pytest.raises(FormatError, match=message):
        pipeline.encode(make_encoder(Destination()), NAME, q, lossy=True)


def test_groups_are_cut_to_a_size_that_exists(tmp_path: Path) -> None:
    q = make(192, 8, 96)
    first = write(tmp_path / "gemm", {NAME: q}, "gemm")
    result = convert.checkpoint(first, tmp_path / "gemv", "gemv")
    assert not result.inexact
    cut = read(tmp_path / "gemv")
    assert cut.group_size == 32
    np.testing.assert_array_equal(codes.dequantize(cut), codes.dequantize(q))


def test_zero_points_of_eight_are_symmetric_for_marlin(tmp_path: Path) -> None:
    q = dataclasses.replace(make(32, 64, 32), zeros=np.full((1, 64), 8, np.uint8))
    back = read(write(tmp_path / "marlin", {NAME: q}, "marlin"))
    assert back.zeros is None
    np.testing.assert_array_equal(codes.dequantize(back), codes.dequantize(q))


DAMAGE: list[tuple[str, dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ("gemv", {}, {"bits": 8}, FormatError, "gemv layout is 4-bit; bits is 8"),
    ("gemv", {}, {"bits": True}, FormatError, "bits is True"),
    ("gemv", {}, {"bits": None}, FormatError, "bits is None"),
    ("gemv", {}, {"group_size": 0}, FormatError, "group_size must be"),
    ("gemv", {}, {"group_size": True}, FormatError, "group_size must be"),
    ("gemv", {}, {"group_size": 2**70}, CheckpointError, "a has qweight"),
    ("gemv", {}, {"group_size": 48}, CheckpointError, "a has qweight .* group size 48"),
    ("gemv", {}, {"pack_dtype": "int16"}, FormatError, "pack_dtype is 'int16'"),
    ("gemv", {"qzeros": np.zeros((64, 1), np.int32)}, {}, CheckpointError, "a has qweight .* do not fit"),
    ("gemv", {"scales": np.ones((64, 8), np.float16)}, {}, CheckpointError, "a has qweight .* do not fit"),
    ("gemv", {"scales": np.ones(64, np.float16)}, {}, CheckpointError, r"a.scales has shape \(64,\)"),
    ("gemv", {"qweight": np.zeros((0, 16), np.int32)}, {}, CheckpointError, "a.qweight has shape"),
    ("gemv", {"qweight": np.zeros((64, 16), np.uint8)}, {}, CheckpointError, "a has dtypes uint8"),
    ("gemv_fast", {}, {"pack_dtype": "int32"}, FormatError, "pack_dtype is 'int32'"),
    ("gemv_fast", {"qzeros": np.zeros((16, 32), np.float16)}, {}, CheckpointError, "a has qweight .* do not fit"),
    ("gemv_fast", {"qzeros": np.zeros((16, 64), np.float32)}, {}, CheckpointError, "a has qweight .* do not fit"),
    ("gemv_fast", {"qzeros": np.zeros((16, 64), np.int32)}, {}, CheckpointError, "a has dtypes int16, float16, int32"),
    ("gemv_fast", {"qweight": np.zeros((16, 96), np.int16)}, {}, CheckpointError, "a has qweight .* do not fit"),
    ("marlin", {}, {"zero_point": True}, FormatError, "marlin layout has no zero points"),
    ("marlin", {"qzeros": np.zeros((2, 8), np.int32)}, {}, FormatError, "a has qzeros"),
    ("marlin", {"qweight": np.zeros((8, 127), np.int32)}, {}, CheckpointError, "a has qweight .* do not fit"),
    ("marlin", {"scales": np.zeros((2, 32), np.float16)}, {}, CheckpointError, "a has qweight .* do not fit"),
]


@pytest.mark.parametrize(("layout", "arrays", "quant", "error", "message"), DAMAGE)
def test_damage(tmp_path: Path, layout: str, arrays: dict, quant: dict, error: type[Exception], message: str) -> None:
    good = write(tmp_path / "good", {"a.weight": make(128, 64, 64, form="symmetric")}, layout, allow_lossy=True)
    stored = load_file(good / "model.safetensors") | {f"a.{p}": a for p, a in arrays.items()}
    zero_point = layout != "marlin"
    directory = save(tmp_path / "bad", stored, {"group_size": 64, "version": layout, "zero_point": zero_point} | quant)
    with pytest.raises(error, match=message):
        registry.open_source(directory)


def test_overflowing_scales(tmp_path: Path) -> None:
    q = dataclasses.replace(make(64, 8, 64), scales=np.full((1, 8), 1e6, np.float32))
    for to in ("gemv", "gemv_fast"):
        with pytest.raises(FormatError, match=r"up_proj.*scales that this format's dtype cannot hold"):
            write(tmp_path / "out", {NAME: q}, to, allow_lossy=True)


# Scaled activations

BLOOM = {"model_type": "bloom"}
DOWN = "transformer.h.0.mlp.dense_4h_to_h"
SCALES = "transformer.h.0.mlp.gelu_impl.scales"


@pytest.mark.parametrize("layout", ["gemm", "gemv", "gemv_fast"])
def test_scaled_activations(tmp_path: Path, layout: str) -> None:
    """The scale of an activation is a part of the linear after it, in and out."""
    q = make(64, 8, 64, form="offsets" if layout == "gemv_fast" else "zeros")
    s = np.random.default_rng(3).uniform(0.3, 3, 64).astype(np.float16)
    directory = write(tmp_path / "bloom", {f"{DOWN}.weight": q}, layout, BLOOM)
    stored = load_file(directory / "model.safetensors")
    if layout == "gemm":  # which vLLM reads, that stops at them
        assert SCALES not in stored
    else:
        np.testing.assert_array_equal(stored[SCALES], np.ones(64, np.float16))
    assert same(read(directory, f"{DOWN}.weight"), q)

    quant = json.loads((directory / "config.json").read_text())["quantization_config"]
    scaled = save(tmp_path / "scaled", stored | {SCALES: s}, quant, **BLOOM)
    source = registry.open_source(scaled)
    assert source.names() == [f"{DOWN}.weight"]
    with pytest.raises(CheckpointError, match="part of a packed weight"):
        source.info(SCALES)
    got = source.read(f"{DOWN}.weight")
    assert isinstance(got, QuantizedTensor)
    want = codes.dequantize(q, np.float64) / s.astype(np.float64)[:, None]  # act(x) / s @ W
    np.testing.assert_allclose(codes.dequantize(got, np.float64), want, rtol=1e-6)
    result = convert.checkpoint(scaled, tmp_path / "again", layout)
    assert not result.inexact
    again = load_file(tmp_path / "again/model.safetensors")
    assert {k: v.tobytes() for k, v in again.items()} == {k: v.tobytes() for k, v in (stored | {SCALES: s}).items()}


def test_scaled_activations_that_do_not_fit(tmp_path: Path) -> None:
    directory = write(tmp_path / "bloom", {f"{DOWN}.weight": make(64, 8, 64)}, "gemm", BLOOM)
    stored = load_file(directory / "model.safetensors")
    quant = {"group_size": 64}
    for bad in (np.ones(63, np.float16), np.ones(64, np.int32)):
        with pytest.raises(CheckpointError, match=r"gelu_impl.scales is .*dense_4h_to_h.weight has 64 inputs"):
            registry.open_source(save(tmp_path / "bad", stored | {SCALES: bad}, quant))
    for value in (0, np.inf):
        s = np.ones(64, np.float16)
        s[5] = value
        source = registry.open_source(save(tmp_path / "bad", stored | {SCALES: s}, quant))
        with pytest.raises(WeightError, match=r"gelu_impl.scales .* NaN, inf or zero"):
            source.read(f"{DOWN}.weight")
    floats = {SCALES: np.ones(8, np.float16), f"{DOWN}.weight": np.ones((8, 8), np.float16)}
    packed = {k.replace(DOWN, "a"): v for k, v in stored.items() if k != SCALES}
    with pytest.raises(FormatError, match=r"scales an activation, but the linear after it is not packed"):
        registry.open_source(save(tmp_path / "bad", packed | floats, quant))


def test_explicit_scale_after_an_activation(tmp_path: Path) -> None:
    """Our own quantizer's ``inv_scale`` becomes AutoAWQ's scaled activation, rounded to float16."""
    inverse = np.random.default_rng(4).uniform(0.5, 2, 64).astype(np.float32)
    q = dataclasses.replace(make(64, 8, 64), inv_scale=inverse)
    with pytest.raises(FormatError, match="not held exactly"):
        write(tmp_path / "out", {f"{DOWN}.weight": q}, "gemm", BLOOM)
    directory = write(tmp_path / "out", {f"{DOWN}.weight": q}, "gemm", BLOOM, allow_lossy=True)
    stored = load_file(directory / "model.safetensors")[SCALES]
    np.testing.assert_array_equal(stored, (1 / inverse.astype(np.float64)).astype(np.float16))
    inf = dataclasses.replace(q, inv_scale=np.full(64, 1e-9, np.float32))
    with pytest.raises(FormatError, match=r"inv_scale that float16 cannot hold"):
        write(tmp_path / "out", {f"{DOWN}.weight": inf}, "gemm", BLOOM, allow_lossy=True)
    with pytest.raises(FormatError, match=r"holds only after the activations of .*bloom"):
        write(tmp_path / "out", {"transformer.h.0.mlp.up.weight": q}, "gemm", BLOOM)
