"""GGUF's 4- and 8-bit blocks: against ``gguf.quants``, read packed, and which weights fit which."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
from safetensors.numpy import load_file

from awq_jax import QuantizedTensor
from awq_jax.convert import pipeline, registry
from awq_jax.convert.arrays import codes, linear
from awq_jax.convert.format import Destination
from awq_jax.convert.formats.gguf.blocks import BLOCK_TYPES, from_blocks, to_blocks
from awq_jax.convert.formats.gguf.encoder import FORMATS
from awq_jax.errors import CheckpointError, FormatError, WeightError

T = gguf.GGMLQuantizationType
PEERS = Path(os.environ.get("AWQ_JAX_FIXTURES", "absent"))
NAME = "model.layers.0.mlp.up_proj.weight"
ENCODERS = {f.name: f.encoder for f in FORMATS}


def dense(x: Any) -> np.ndarray:
    """What a tensor read from a source stands for, [N, K]."""
    return codes.dequantize(x).T if isinstance(x, QuantizedTensor) else np.asarray(x, np.float32)


def make(
    bits: int = 4,
    group: int = 32,
    k: int = 128,
    n: int = 6,
    zeros: Any = None,
    offsets: Any = None,
    seed: int = 0,
    values: np.ndarray | None = None,
) -> QuantizedTensor:
    rng = np.random.default_rng(seed)
    c = rng.integers(0, 2**bits, (k, n)) if values is None else values
    scales = rng.uniform(0.01, 0.1, (k // group, n)).astype(np.float16)
    if isinstance(zeros, int):
        zeros = np.full(scales.shape, zeros, np.uint8)
    if callable(offsets):
        offsets = offsets(scales)
    packed = codes.pack(c.astype(np.uint8), bits)
    return linear.build(packed, scales, zeros, bits, group, k, n, "float32", offsets=offsets)


def encode(to: str, q: QuantizedTensor, lossy: bool = False, name: str = NAME) -> tuple[np.ndarray, str, float]:
    """The weight as ``gguf.quants`` reads what is stored, its block type, and the deviation reported."""
    make_encoder = ENCODERS[to]
    assert make_encoder is not None
    out = pipeline.encode(make_encoder(Destination()), name, q, lossy)
    ((stored, array),) = out.arrays.items()
    kind = out.metadata[stored]
    return gguf.quants.dequantize(array, T[kind]), kind, out.record.deviation


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_there_and_back(kind: str) -> None:
    block, size = gguf.GGML_QUANT_SIZES[T[kind]]
    for seed in range(25):
        rng = np.random.default_rng(seed)
        n, blocks = int(rng.integers(1, 70)), int(rng.integers(1, 9))
        raw = gguf_files.random_blocks(T[kind], n, blocks, seed)  # all codes, also -128, and scales of both signs
        q = from_blocks(raw, kind, n, blocks * block)
        assert (q.shape, q.bits, q.group_size, q.zeros) == ((n, blocks * block), BLOCK_TYPES[kind].bits, 32, None)
        np.testing.assert_array_equal(dense(q), gguf.quants.dequantize(raw, T[kind]))
        back = to_blocks(q, kind)
        assert back.shape == (n, blocks * size)
        assert back.tobytes() == raw.tobytes()


def test_large_blocks_go_by_strips() -> None:
    raw = gguf_files.random_blocks(T.Q4_1, 300, 128, 0)
    q = from_blocks(raw, "Q4_1", 300, 4096)
    np.testing.assert_array_equal(dense(q)[::37], gguf.quants.dequantize(raw[::37], T.Q4_1))
    assert to_blocks(q, "Q4_1").tobytes() == raw.tobytes()


def packed_file(path: Path, kind: T = T.Q4_1) -> Path:
    """A whole model whose matrices are random blocks, except where a name asks for another type."""
    other = {"token_embd.weight": T.Q8_0, "output.weight": T.F16, "blk.0.attn_v.weight": T.Q5_0}
    weights = gguf_files.to_gguf(gguf_files.hf_weights(biases=True), gguf.MODEL_ARCH.LLAMA, True)
    tensors: dict[str, Any] = {}
    for i, (name, w) in enumerate(weights.items()):
        use = other.get(name, kind)
        if w.ndim == 1:
            tensors[name] = w
        elif use == T.F16:
            tensors[name] = w.astype(np.float16)
        else:
            tensors[name] = (gguf_files.random_blocks(use, w.shape[0], w.shape[1] // 32, i), use)
    return gguf_files.write(path, tensors)


def test_packed_reading_is_the_dequantized_one(tmp_path: Path) -> None:
    path = packed_file(tmp_path / "m.gguf")
    plain, packed = registry.open_source(path), registry.open_source(path, packed=True)
    assert plain.names() == packed.names()
    seen = set()
    for name in packed.names():
        value, info = packed.read(name), packed.info(name)
        assert info.shape == packed.shape(name) == plain.info(name).shape
        assert plain.info(name).packed is None
        assert plain.info(name).dtype == "float32"
        want = plain.read(name)
        assert isinstance(want, np.ndarray)
        assert want.dtype == np.float32
        np.testing.assert_array_equal(dense(value), want)
        if isinstance(value, QuantizedTensor):
            assert info.packed is not None
            assert (info.packed.bits, info.packed.group_size) == (value.bits, value.group_size) == (value.bits, 32)
            assert info.packed.symmetric is value.symmetric
            assert info.packed.offsets is (value.offsets is not None)
        else:
            assert info.packed is None
            assert info.dtype == value.dtype.name
        seen.add((info.packed.bits if info.packed else 0, info.dtype))
    assert seen == {(4, "float32"), (8, "float32"), (0, "float16"), (0, "float32")}
    assert isinstance(packed.read("model.layers.0.self_attn.v_proj.weight"), np.ndarray)  # Q5_0
    with pytest.raises(CheckpointError, match="no tensor 'x'"):
        packed.info("x")


def test_a_scale_that_is_not_a_number_is_named(tmp_path: Path) -> None:
    blocks = gguf_files.random_blocks(T.Q4_1, 40, 2, 0)
    blocks[3, 2:4] = np.array([np.inf], np.float16).view(np.uint8)
    path = gguf_files.write(tmp_path / "m.gguf", {"token_embd.weight": (blocks, T.Q4_1)})
    with pytest.raises(WeightError, match=r"m\.gguf: a scale of tensor 'token_embd\.weight' is NaN or inf"):
        registry.open_source(path, packed=True).read("model.embed_tokens.weight")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_q4_0(bits: int) -> None:
    q = make(bits, zeros=2 ** (bits - 1))
    got, kind, deviation = encode("gguf-q4_0", q)
    assert (kind, deviation) == ("Q4_0", 0)
    np.testing.assert_array_equal(got, dense(q))
    symmetric = dataclasses.replace(q, zeros=None)
    np.testing.assert_array_equal(encode("gguf-q4_0", symmetric)[0], dense(q))


def test_q4_0_is_refused_where_a_zero_point_is_off_centre() -> None:
    zeros = np.full((4, 6), 8, np.uint8)
    zeros[1, 2] = 7
    q = make(zeros=zeros)
    message = r"up_proj\.weight has zero points other than 8 \(1 of 24\).*'gguf-q4_1' or 'gguf-q8_0'"
    with pytest.raises(FormatError, match=message):
        encode("gguf-q4_0", q)
    scales = np.asarray(q.scales).copy()
    scales[1, 2] = 0  # then the zero point makes no difference
    got, _, deviation = encode("gguf-q4_0", dataclasses.replace(q, scales=scales))
    assert deviation == 0
    assert not got[2, 32:64].any()


def test_q4_0_from_offsets_of_both_signs() -> None:
    rng = np.random.default_rng(0)
    q = make(offsets=lambda s: s)
    scales = np.asarray(q.scales) * rng.choice([-1, 1], (4, 6)).astype(np.float16)
    q = dataclasses.replace(q, scales=scales, offsets=scales * np.float16(-8))
    got, kind, deviation = encode("gguf-q4_0", q)
    assert (kind, deviation) == ("Q4_0", 0)
    np.testing.assert_array_equal(got, dense(q))
    constant = dataclasses.replace(q, scales=np.zeros_like(scales))
    for format in ("gguf-q4_0", "gguf-q4_1", "gguf-q8_0"):
        got, _, deviation = encode(format, constant)
        assert deviation == 0
        np.testing.assert_array_equal(got, dense(constant))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_q4_1(group: int) -> None:
    zeros = np.random.default_rng(1).integers(0, 16, (128 // group, 6)).astype(np.uint8)
    q = make(group=group, zeros=zeros)
    with pytest.raises(FormatError, match="is not held exactly"):
        encode("gguf-q4_1", q)
    got, kind, deviation = encode("gguf-q4_1", q, lossy=True)
    step = np.repeat(np.asarray(q.scales, np.float64), group, 0).T
    assert kind == "Q4_1"
    assert 0 < deviation <= 0.0073
    assert np.abs((got - dense(q).astype(np.float64)) / step).max() <= deviation + 1e-5
    exact = make(group=group, offsets=lambda s: s * np.float16(-3.3))
    got, _, deviation = encode("gguf-q4_1", exact)
    assert deviation == 0
    np.testing.assert_array_equal(got, dense(exact))
    narrow = make(3, group=group)  # symmetric: 4 steps are a power of two
    np.testing.assert_array_equal(encode("gguf-q4_1", narrow)[0], dense(narrow))


@pytest.mark.parametrize("bits", range(2, 9))
def test_q8_0_holds_whole_zero_points_exactly(bits: int) -> None:
    top = 2**bits
    zeros = np.random.default_rng(1).integers(0, top, (2, 6)).astype(np.uint8)
    values = np.random.default_rng(2).integers(0, top, (128, 6))
    if bits == 8:  # within int8
        wide = np.repeat(zeros.astype(int), 64, 0)
        values = np.clip(values, wide - 128, wide + 127)
        values[0] = np.maximum(wide[0] - 128, 0)
    q = make(bits, 64, zeros=zeros, values=values)
    got, kind, deviation = encode("gguf-q8_0", q)
    assert (kind, deviation) == ("Q8_0", 0)
    np.testing.assert_array_equal(got, dense(q))
    np.testing.assert_array_equal(encode("gguf-q8_0", make(bits))[0], dense(make(bits)))  # with -128 at 8 bits


def test_q8_0_has_a_range() -> None:
    with pytest.raises(FormatError, match=r"more than 128 steps from zero.*'mlx'"):
        encode("gguf-q8_0", make(8, zeros=200, values=np.zeros((128, 6), int)))
    with pytest.raises(FormatError, match="more than 128 steps from zero"):
        encode("gguf-q8_0", make(4, offsets=lambda s: s * np.float16(1000)), lossy=True)


def test_wider_weights_among_4_bit_ones_are_q8_0() -> None:
    for to in ("gguf-q4_0", "gguf-q4_1"):
        for bits in (5, 6, 8):
            got, kind, deviation = encode(to, make(bits))
            assert (kind, deviation) == ("Q8_0", 0)
            np.testing.assert_array_equal(got, dense(make(bits)))


FIT_REFUSALS: dict[str, tuple[QuantizedTensor, str, str]] = {
    "group": (make(group=16), NAME, r"up_proj\.weight has group size 16, gguf-q4_0 has blocks of 32"),
    "order": (dataclasses.replace(make(), perm=np.arange(128, dtype=np.int32)), NAME, "rows in act-order"),
    "inv_scale": (dataclasses.replace(make(), inv_scale=np.ones(128, np.float32)), NAME, "explicit inv_scale"),
    "name": (make(), "model.layers.0.mlp.experts.0.up_proj.weight", r"experts\.0\.up_proj\.weight has no place"),
    "overflow": (dataclasses.replace(make(), scales=np.full((4, 6), 1e6, np.float32)), NAME, "dtype cannot hold"),
    "inexact": (dataclasses.replace(make(), scales=np.full((4, 6), 0.1, np.float32)), NAME, "is not held exactly"),
}


@pytest.mark.parametrize("case", FIT_REFUSALS)
def test_what_does_not_fit(case: str) -> None:
    q, name, message = FIT_REFUSALS[case]
    with pytest.raises(FormatError, match=message):
        encode("gguf-q4_0", q, name=name)


@pytest.mark.skipif(not PEERS.is_dir(), reason="AWQ_JAX_FIXTURES is not set")
@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0"])
def test_peers_files_dequantize_to_their_own_weights(kind: str) -> None:
    directory = PEERS / f"gguf-{kind}-llama"
    for packed in (False, True):
        source = registry.open_source(directory / "model.gguf", packed=packed)
        for name, want in load_file(directory / "dense.safetensors").items():
            value = source.read(name)
            assert isinstance(value, QuantizedTensor) is packed
            assert np.abs(dense(value) - want).max() == 0
