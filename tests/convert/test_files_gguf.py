"""GGUF as a float source: block types, names and row order, synthesised config, damaged files."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf_files import (
    BLOCKS,
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV,
    LAYERS,
    VOCAB,
    T,
    hf_weights,
    random_blocks,
    to_gguf,
    write,
)
from transformers import AutoConfig

from awq_jax.convert import registry
from awq_jax.convert.formats.gguf import source as reader
from awq_jax.errors import AwqError, CheckpointError, FormatError, UnsupportedModelError


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda k: k.name)
def test_blocks_against_their_definition(tmp_path: Path, kind: T) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = random_blocks(kind, 40, 2, seed=int(kind))
    meta: dict[str, Any] = {"llama__embedding_length": 2 * block, "llama__attention__head_count": 2}
    source = registry.open_source(write(tmp_path / "m.gguf", {"token_embd.weight": (data, kind)}, **meta))
    got = source.read("model.embed_tokens.weight")
    blocks = data.tobytes()
    want = [v for i in range(0, len(blocks), size) for v in BLOCKS[kind](blocks[i : i + size])]
    assert got.dtype == np.float32
    assert got.shape == source.shape("model.embed_tokens.weight") == (40, 2 * block)
    np.testing.assert_allclose(got.reshape(-1), np.asarray(want, np.float32), rtol=2e-6, atol=1e-7)


def test_float_types(tmp_path: Path) -> None:
    w = hf_weights(tied=True)["model.embed_tokens.weight"]
    brain = w.astype(ml_dtypes.bfloat16)
    for stored, want in (
        (w, w),
        (w.astype(np.float16), w.astype(np.float16).astype(np.float32)),
        ((brain.view(np.uint8), T.BF16), brain.astype(np.float32)),
    ):
        source = registry.open_source(write(tmp_path / "m.gguf", {"token_embd.weight": stored}))
        got = source.read("model.embed_tokens.weight")
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("arch", "permute", "options"),
    [
        ("llama", True, {}),
        ("llama", True, {"biases": True, "tied": True}),
        ("qwen2", False, {"biases": True}),
        ("qwen3", False, {"head_norms": True, "tied": True}),
        ("smollm3", True, {"tied": True}),
    ],
)
def test_names_and_row_order(tmp_path: Path, arch: str, permute: bool, options: dict) -> None:
    weights = hf_weights(**options)
    model = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch]
    source = registry.open_source(write(tmp_path / "m.gguf", to_gguf(weights, model, permute), arch))
    assert source.format == "gguf"
    assert source.names() == sorted(weights)
    for name, w in weights.items():
        assert source.shape(name) == w.shape
        np.testing.assert_array_equal(source.read(name), w)
    config = AutoConfig.for_model(**source.config)
    assert (config.model_type, config.architectures) == (arch, [reader.READ[arch].hf_class])
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (HIDDEN, FFN, LAYERS)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (HEADS, KV, HEAD_DIM)
    assert (config.vocab_size, config.max_position_embeddings, config.rms_norm_eps) == (VOCAB, 128, 1e-5)
    assert config.rope_parameters["rope_theta"] == 50000.0
    assert config.tie_word_embeddings is options.get("tied", False)
    if arch == "llama":
        assert config.attention_bias is options.get("biases", False)
    with pytest.raises(CheckpointError, match="no tensor 'x'"):
        source.read("x")


def tied(**more: Any) -> dict[str, Any]:
    return {"token_embd.weight": np.ones((VOCAB, HIDDEN), np.float32), **more}


def test_rope_scaling(tmp_path: Path) -> None:
    def scaling(**metadata: Any) -> Any:
        return registry.open_source(write(tmp_path / "m.gguf", tied(), **metadata)).config["rope_scaling"]

    prefix = "llama__rope__scaling__"
    assert scaling() is None
    assert scaling(**{prefix + "type": "linear", prefix + "factor": 4.0}) == {"rope_type": "linear", "factor": 4.0}
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 32, "attn_factor": 0.7}
    assert scaling(**{prefix + k: v for k, v in yarn.items()}) == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.7,
    }
    with pytest.raises(UnsupportedModelError, match="'longrope'"):
        scaling(**{prefix + "type": "longrope"})


def test_llama3_scaling_is_recovered_from_its_factors(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theta = {"rope_theta": 50000.0}
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "max_position_embeddings": 1 << 17}
    scaled = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(rope_parameters=rope | theta, **sizes), "cpu")[0].numpy()
    plain = 50000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    factors = (plain / scaled).astype(np.float32)
    assert len(set(factors.round(3))) > 2  # the smooth part is exercised
    path = write(tmp_path / "m.gguf", tied(**{"rope_freqs.weight": factors}))
    source = registry.open_source(path)
    assert source.config["rope_scaling"] == rope
    assert source.names() == ["model.embed_tokens.weight"]
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        registry.open_source(write(path, tied(**{"rope_freqs.weight": factors[::-1].copy()})))


def test_special_ids(tmp_path: Path) -> None:
    def config(**ids: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {f"tokenizer__ggml__{k}_token_id": v for k, v in ids.items()}
        return registry.open_source(write(tmp_path / "m.gguf", tied(), **metadata)).config

    first = config(bos=1, eos=2)
    assert (first["bos_token_id"], first["eos_token_id"], first["pad_token_id"]) == (1, 2, None)
    assert config(eos=2, eot=5)["eos_token_id"] == [2, 5]


def q5_k() -> tuple[np.ndarray, T]:
    return np.zeros((VOCAB, 176), np.uint8), T.Q5_K


REFUSALS: dict[str, tuple[dict, dict, type[AwqError], str]] = {
    "type": (
        {"token_embd.weight": q5_k()},
        {"llama__embedding_length": 256},
        FormatError,
        "'token_embd.weight' has ggml type Q5_K; read are F32, F16",
    ),
    "name": (tied(**{"blk.0.ssm_a": np.ones(4, np.float32)}), {}, FormatError, "'blk.0.ssm_a' is not one a llama"),
    "arch": (tied(), {"arch": "mamba"}, UnsupportedModelError, "architecture 'mamba'.*llama, qwen2, qwen3, smollm3"),
    "experts": (tied(), {"llama__expert_count": 8}, UnsupportedModelError, "mixture of experts"),
    "no embedding": ({"output_norm.weight": np.ones(4, np.float32)}, {}, CheckpointError, "token_embd"),
    "partial rope": (
        tied(),
        {"llama__rope__dimension_count": 8, "llama__attention__key_length": 16},
        UnsupportedModelError,
        "rotates 8 of 16",
    ),
    "heads": (
        tied(**{"blk.0.attn_q.weight": np.ones((48, HIDDEN), np.float32)}),
        {},
        CheckpointError,
        r"4 heads of 16",
    ),
    "missing key": (tied(), {"drop": ("block_count",)}, CheckpointError, r"llama.block_count must be a positive"),
    "fraction": (tied(), {"llama__block_count": 2.5}, CheckpointError, r"llama.block_count must be a positive"),
    "text": (tied(), {"llama__block_count": "2"}, CheckpointError, r"llama.block_count is '2'"),
    "varying": (tied(), {"llama__attention__head_count": [4, 2]}, UnsupportedModelError, "differs between layers"),
    "alignment": (tied(), {"general__alignment": 33}, CheckpointError, "not a power of two"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_culprit(tmp_path: Path, case: str) -> None:
    tensors, options, error, message = REFUSALS[case]
    path = write(tmp_path / "model.gguf", tensors, **options)
    with pytest.raises(error, match=message) as caught:
        registry.open_source(path)
    assert "model.gguf" in str(caught.value)


def test_a_directory_of_ggufs_asks_for_one(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", tied())
    with pytest.raises(CheckpointError, match=r"pass one of them, e\.g\. .*a\.gguf"):
        registry.open_source(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        registry.open_source(str(tmp_path / "b.gguf"))
    with pytest.raises(CheckpointError, match="does not exist"):
        registry.open_source("somewhere/b.gguf")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    weights = to_gguf(hf_weights(), gguf.MODEL_ARCH.LLAMA, True)
    path = write(tmp_path / "m.gguf", weights, tokenizer__ggml__tokens=["a", "b"])
    data = path.read_bytes()
    registry.open_source(path)
    pad = len(data) - max(t.data_offset + t.n_bytes for t in gguf.GGUFReader(path).tensors)
    cuts = [*range(0, 3000, 41), *range(3000, len(data) - pad, 9973), len(data) - pad - 1]
    for cut in cuts:
        path.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match=r"truncated|not a GGUF"):
            registry.open_source(path)


def test_other_byte_order_and_versions(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    data = bytearray(write(path, tied()).read_bytes())
    for version, message in ((1, "version 1"), (9, "version 9"), (3 << 24, "big-endian")):
        data[4:8] = version.to_bytes(4, "little")
        path.write_bytes(data)
        with pytest.raises(FormatError, match=message):
            registry.open_source(path)
    path.write_bytes(b"GGML" + data[4:])
    with pytest.raises(FormatError, match="not a GGUF file"):
        registry.open_source(path)


def test_fuzzed_headers_are_refused_or_read(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = write(
        tmp_path / "m.gguf",
        {
            "token_embd.weight": np.ones((VOCAB, HIDDEN), np.float32),
            "blk.0.attn_q.weight": np.ones((HIDDEN, HIDDEN), np.float32),
        },
        tokenizer__ggml__model="llama",
        tokenizer__ggml__tokens=["<unk>", "<s>", "a", "b", "ab"],
        tokenizer__ggml__scores=[0.0, 0.0, -1.0, -2.0, -3.0],
        tokenizer__ggml__unknown_token_id=0,
    )
    good = path.read_bytes()
    end = min(t.data_offset for t in gguf.GGUFReader(path).tensors)
    refused = 0
    tracemalloc.start()
    for _ in range(400):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(end)] = rng.choice([0, 1, 2, 8, 9, 127, 255, rng.randrange(256)])
        path.write_bytes(bytes(data))
        tracemalloc.reset_peak()
        try:
            source = registry.open_source(path)
            for name in source.names():
                assert source.read(name).shape == source.shape(name)
        except AwqError:
            refused += 1
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert 100 < refused < 400
