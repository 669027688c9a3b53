"""Whole GGUF files: names, row order, types, metadata; read by transformers and the ``gguf`` package."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoints
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from awq_jax import QuantizedTensor, convert
from awq_jax.convert import registry
from awq_jax.convert.arrays import codes, linear
from awq_jax.convert.format import Destination
from awq_jax.convert.formats.gguf import metadata
from awq_jax.convert.formats.gguf.sink import GgufSink
from awq_jax.errors import AwqError, CheckpointError, ConfigError, FormatError

PEERS = Path(os.environ.get("AWQ_JAX_FIXTURES", "absent"))
ARCHS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3"}
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"biases": True},
    "qwen2": {"biases": True, "tied": True},
    "qwen3": {"head_norms": True},
    "smollm3": {"tied": True},
}


def config(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": gguf_files.HIDDEN,
        "intermediate_size": gguf_files.FFN,
        "num_hidden_layers": gguf_files.LAYERS,
        "num_attention_heads": gguf_files.HEADS,
        "num_key_value_heads": gguf_files.KV,
        "vocab_size": gguf_files.VOCAB,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "tie_word_embeddings": OPTIONS.get(kind, {}).get("tied", False),
    } | changes


def packed(weights: dict[str, np.ndarray], seed: int = 0, zeros: bool = True) -> dict[str, Any]:
    """The same model with its linears replaced by random 4-bit ones in groups of 32."""
    rng = np.random.default_rng(seed)
    out: dict[str, Any] = {}
    for name, w in weights.items():
        out[name] = w
        if name.endswith("_proj.weight"):
            n, k = w.shape
            scales = rng.uniform(0.01, 0.1, (k // 32, n)).astype(np.float16)
            z = rng.integers(0, 16, scales.shape).astype(np.uint8) if zeros else None
            c = rng.integers(0, 16, (k, n)).astype(np.uint8)
            out[name] = linear.build(codes.pack(c, 4), scales, z, 4, 32, k, n, "float32")
    return out


def source(directory: Path, tensors: dict[str, Any], settings: dict[str, Any]) -> Path:
    convert.write_checkpoint(directory, tensors.items(), settings, "awq-jax", overwrite=True)
    return directory


def dense(x: Any) -> np.ndarray:
    return codes.dequantize(x).T if isinstance(x, QuantizedTensor) else np.asarray(x, np.float32)


@pytest.mark.parametrize("kind", ARCHS)
def test_names_rows_and_metadata_of_every_architecture(tmp_path: Path, kind: str) -> None:
    tensors = packed(gguf_files.hf_weights(**OPTIONS.get(kind, {})))
    out = tmp_path / "out.gguf"
    convert.checkpoint(source(tmp_path / "model", tensors, config(kind)), out, "gguf-q8_0")
    arch, permuted = ARCHS[kind], ARCHS[kind] in ("llama", "smollm3")
    reader = gguf.GGUFReader(out)
    model = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch]
    # llama.cpp's own table of names, and its converter's order of rows.
    want = gguf_files.to_gguf({n: dense(v) for n, v in tensors.items()}, model, permuted)
    assert {t.name for t in reader.tensors} == set(want)
    for t in reader.tensors:
        value = np.asarray(gguf.quants.dequantize(t.data, t.tensor_type), np.float32)
        np.testing.assert_array_equal(value, want[t.name])
        assert t.tensor_type.name == ("Q8_0" if t.name.startswith("blk") and len(t.shape) == 2 else "F32")
    fields = {k: f.contents() for k, f in reader.fields.items()}
    assert fields["general.architecture"] == arch
    assert fields["general.name"] == "model"
    assert fields["general.file_type"] == 7
    assert fields["tokenizer.ggml.model"] == "no_vocab"
    numbers = {k.removeprefix(f"{arch}."): v for k, v in fields.items() if k.startswith(f"{arch}.")}
    assert numbers.pop("attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert numbers == {
        "vocab_size": gguf_files.VOCAB,
        "context_length": 128,
        "embedding_length": gguf_files.HIDDEN,
        "block_count": gguf_files.LAYERS,
        "feed_forward_length": gguf_files.FFN,
        "attention.head_count": gguf_files.HEADS,
        "attention.head_count_kv": gguf_files.KV,
        "attention.key_length": gguf_files.HEAD_DIM,
        "attention.value_length": gguf_files.HEAD_DIM,
        "rope.dimension_count": gguf_files.HEAD_DIM,
        "rope.freq_base": 50000.0,
    }
    ours = registry.open_source(out, packed=True)
    assert ours.names() == sorted(tensors)
    assert all(np.array_equal(dense(ours.read(n)), dense(v)) for n, v in tensors.items())
    for key in ("hidden_size", "num_key_value_heads", "rope_theta", "rms_norm_eps", "tie_word_embeddings"):
        assert ours.config[key] == config(kind)[key]


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0"])
def test_a_file_read_and_written_again_is_the_same(tmp_path: Path, kind: str) -> None:
    tensors = packed(gguf_files.hf_weights(), zeros=False)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(np.float16)
    src = source(tmp_path / "model", tensors, config())
    to = f"gguf-{kind}"
    convert.checkpoint(src, tmp_path / "model.gguf", to)
    (tmp_path / "again").mkdir()
    convert.checkpoint(tmp_path / "model.gguf", tmp_path / "again" / "model.gguf", to)
    first, second = ((tmp_path / p / "model.gguf").read_bytes() for p in ("", "again"))
    assert first == second
    result = convert.checkpoint(tmp_path / "model.gguf", tmp_path / "back", "awq-jax")
    assert not result.inexact
    back = registry.open_source(tmp_path / "back")
    assert all(np.array_equal(dense(back.read(n)), dense(v)) for n, v in tensors.items())


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # of qwen3 it takes the head size for granted
def test_transformers_computes_the_same(tmp_path: Path, name: str) -> None:
    pytest.importorskip("accelerate")  # transformers wants it for GGUF
    case = next(c for c in tiny_checkpoints.CASES if c.name == name)
    model = tiny_checkpoints.checkpoint(tmp_path / "model", case.family, **case.changes)
    convert.checkpoint(tmp_path / "model", tmp_path / "model.gguf", "gguf-q8_0")
    transformers.logging.set_verbosity_error()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        tiny_checkpoints.close(loaded(ids).logits, model(ids).logits, 1e-5)
    theirs, ours = tiny_checkpoints.tokenizer(), registry.open_source(tmp_path / "model.gguf").tokenizer()
    assert ours("héllo <s>").input_ids == theirs("héllo <s>").input_ids
    assert ours.chat_template == theirs.chat_template


def test_types_of_float_tensors(tmp_path: Path) -> None:
    weights = gguf_files.hf_weights()
    single = weights["model.embed_tokens.weight"]
    wide = (single * 2.0**20).astype(ml_dtypes.bfloat16)  # beyond float16
    brain = single.astype(ml_dtypes.bfloat16)  # within it, also in precision
    changes = {
        "model.embed_tokens.weight": wide,
        "lm_head.weight": np.clip(brain, -4, 4),
        "model.norm.weight": weights["model.norm.weight"].astype(np.float16),
        "model.layers.0.self_attn.q_proj.weight": weights["model.layers.0.self_attn.q_proj.weight"].astype(np.float16),
        "model.layers.0.mlp.up_proj.weight": wide[:1].repeat(gguf_files.FFN, 0).astype(np.float32),
    }
    small = np.abs(changes["lm_head.weight"].astype(np.float32)) < 2.0**-14
    changes["lm_head.weight"][small] = 0
    src = tmp_path / "model"
    convert.write_checkpoint(src, (weights | changes).items(), config(), "float")
    convert.checkpoint(src, tmp_path / "m.gguf", "gguf-q4_0")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    want = {"token_embd": "BF16", "output": "F16", "output_norm": "F32", "blk.0.attn_q": "F16", "blk.0.ffn_up": "BF16"}
    assert {k: types[f"{k}.weight"] for k in want} == want
    assert types["blk.1.attn_q.weight"] == "F32"
    ours, original = registry.open_source(tmp_path / "m.gguf", packed=True), registry.open_source(src)
    assert ours.info("model.embed_tokens.weight").dtype == "bfloat16"
    assert all(np.array_equal(dense(ours.read(n)), dense(original.read(n))) for n in original.names())


def test_tied_heads_and_recomputed_buffers_are_left_out(tmp_path: Path) -> None:
    tensors = packed(gguf_files.hf_weights())
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    src = source(tmp_path / "model", tensors, config(tie_word_embeddings=True))
    convert.checkpoint(src, tmp_path / "m.gguf", "gguf-q8_0")
    ours = registry.open_source(tmp_path / "m.gguf")
    assert set(tensors) - set(ours.names()) == {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert ours.config["tie_word_embeddings"] is True


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def rope_of(tmp_path: Path, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What our reader makes of the file, and the file's keys."""
    src = source(tmp_path / "model", packed(gguf_files.hf_weights()), settings)
    convert.checkpoint(src, tmp_path / "m.gguf", "gguf-q8_0", overwrite=True)
    fields = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    return registry.open_source(tmp_path / "m.gguf").config, fields


@pytest.mark.parametrize("original", [16, 8192])
def test_llama3_scaling(tmp_path: Path, original: int) -> None:
    rope = LLAMA3 | {"original_max_position_embeddings": original}
    got, _ = rope_of(tmp_path, config(rope_scaling=rope))
    assert got["rope_scaling"] == rope
    factors = next(t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "rope_freqs.weight")
    sizes: dict[str, Any] = {"hidden_size": gguf_files.HIDDEN, "num_attention_heads": gguf_files.HEADS}
    theirs = LlamaConfig(rope_parameters=rope | {"rope_theta": 50000.0}, max_position_embeddings=1 << 17, **sizes)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")[0].numpy()
    plain = 50000.0 ** -(np.arange(0, gguf_files.HEAD_DIM, 2) / gguf_files.HEAD_DIM)
    np.testing.assert_allclose(factors.data, plain / scaled, rtol=1e-5)
    assert factors.data.max() == 8
    assert factors.data.min() < 8


def test_other_rotations(tmp_path: Path) -> None:
    linear_rope = {"rope_type": "linear", "factor": 4.0}
    got, keys = rope_of(tmp_path, config(rope_scaling=linear_rope))
    assert got["rope_scaling"] == linear_rope
    got, keys = rope_of(tmp_path, config(rope_scaling=YARN | {"attention_factor": 0.1 * math.log(4) + 1}))
    assert got["rope_scaling"] == YARN
    assert keys["llama.rope.scaling.original_context_length"] == 32
    got, _ = rope_of(tmp_path, config(rope_scaling={"type": "dynamic", "factor": 2.0}))
    assert got["rope_scaling"] is None  # up to the context length it is none
    new = config(rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    del new["rope_theta"]
    assert rope_of(tmp_path, new)[0]["rope_theta"] == 1e6


def test_a_sliding_window_bounds_the_context(caplog: pytest.LogCaptureFixture) -> None:
    def length(kind: str, **changes: Any) -> int:
        keys, _ = metadata.metadata(config(kind, **changes))
        return keys[f"{ARCHS[kind]}.context_length"]

    assert length("mistral", sliding_window=32) == 32
    assert "the context length is the window, 32 tokens" in caplog.text
    assert length("mistral", sliding_window=None) == 128
    assert length("mistral", sliding_window=4096) == 128
    assert length("qwen2", sliding_window=32) == 128  # not used unless told
    assert length("qwen2", sliding_window=32, use_sliding_window=True) == 32
    assert length("qwen3", sliding_window=32, layer_types=["full_attention", "sliding_attention"]) == 32
    assert length("qwen3", sliding_window=32, use_sliding_window=True, layer_types=["full_attention"] * 2) == 128


CONFIG_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "family": ({"model_type": "gpt2"}, "model_type 'gpt2'; GGUF files are written for llama, mistral, qwen2"),
    "no family": ({"model_type": None}, "model_type 'None'"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "longrope": ({"rope_scaling": {"rope_type": "longrope"}}, "rope scaling 'longrope' is not written"),
    "not an object": ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', not an object"),
    "no factor": ({"rope_scaling": {"rope_type": "linear"}}, "factor must be a positive number; got 'None'"),
    "yarn": ({"rope_scaling": YARN | {"beta_fast": 16}}, "yarn with beta_fast 16 is not what llama.cpp computes"),
    "mscale": ({"rope_scaling": YARN | {"mscale": 1.0}}, "yarn with mscale 1.0"),
    "text": ({"rope_scaling": YARN | {"truncate": "x"}}, "yarn with truncate x"),
    "qwen llama3": (
        {"model_type": "qwen2", "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}},
        "no rope scaling 'llama3' in qwen2",
    ),
    "wide heads": ({"model_type": "qwen2", "head_dim": 32}, "head_dim other than hidden_size / heads"),
    "interval": ({"model_type": "smollm3", "no_rope_layer_interval": 2}, "leaves every 4th layer unrotated"),
    "layers": ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "leaves every 4th layer unrotated"),
    "size": ({"intermediate_size": "96"}, "intermediate_size must be a positive integer; got '96'"),
    "bool": ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer; got 'True'"),
    "absent": ({"vocab_size": None}, "vocab_size must be a positive integer; got 'None'"),
    "theta": ({"rope_theta": float("inf")}, "rope_theta must be a positive number"),
}


@pytest.mark.parametrize("case", CONFIG_REFUSALS)
def test_configs_that_llama_cpp_would_compute_otherwise(case: str) -> None:
    changes, message = CONFIG_REFUSALS[case]
    with pytest.raises(CheckpointError, match=message):
        metadata.metadata(config(**changes))


def without(name: str) -> dict[str, np.ndarray]:
    return {k: v for k, v in gguf_files.hf_weights().items() if k != name}


TENSOR_REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], type[AwqError], str]] = {
    "missing": (without("model.layers.1.mlp.up_proj.weight"), {}, CheckpointError, r"no tensor for blk\.1\.ffn_up\."),
    "no head": (without("lm_head.weight"), {}, CheckpointError, r"no tensor for output\.weight"),
    "layers": (
        gguf_files.hf_weights(),
        {"num_hidden_layers": 1},
        FormatError,
        r"blk\.1\.\S+ is not a tensor that llama",
    ),
    "shape": (gguf_files.hf_weights(), {"intermediate_size": 64}, CheckpointError, r"implies \(64, 64\)"),
    "unknown": (
        gguf_files.hf_weights() | {"model.layers.0.mlp.gate.weight": np.ones((2, 64), np.float32)},
        {},
        FormatError,
        r"mlp\.gate\.weight has no place in a GGUF file",
    ),
    "biases": (
        gguf_files.hf_weights(biases=True, head_norms=True),
        {"model_type": "qwen3"},
        FormatError,
        r"attn_\w\.bias is not a tensor",
    ),
    "heads": (gguf_files.hf_weights(), {"num_attention_heads": 3, "head_dim": 16}, CheckpointError, "not 3 heads"),
}


@pytest.mark.parametrize("case", TENSOR_REFUSALS)
def test_models_that_are_not_whole(tmp_path: Path, case: str) -> None:
    tensors, changes, error, message = TENSOR_REFUSALS[case]
    src = tmp_path / "model"
    convert.write_checkpoint(src, tensors.items(), config(**changes), "float")
    with pytest.raises(error, match=message):
        convert.checkpoint(src, tmp_path / "m.gguf", "gguf-q8_0")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_the_target_is_one_file(tmp_path: Path) -> None:
    src = source(tmp_path / "model", packed(gguf_files.hf_weights()), config())
    with pytest.raises(ConfigError, match=r"gguf-q8_0 is a single file; give a target like .*out\.gguf"):
        convert.checkpoint(src, tmp_path / "out", "gguf-q8_0")


@dataclasses.dataclass
class Nothing:
    """A source without a tokenizer."""

    directory: Path

    def tokenizer(self) -> None:
        return None


def test_the_sink_keeps_no_tensor(tmp_path: Path) -> None:
    sink = GgufSink(tmp_path, Destination(config()), Nothing(Path("x")), file_type=2)  # type: ignore[arg-type]
    block = np.zeros(1 << 20, np.float32)
    tracemalloc.start()
    for i in range(12):
        sink.add({f"t{i}": block})
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    with pytest.raises(CheckpointError, match="'t3' was given twice"):
        sink.add({"t3": block})


@pytest.mark.skipif(not PEERS.is_dir(), reason="AWQ_JAX_FIXTURES is not set")
@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0"])
def test_peers_files_are_written_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    src = PEERS / f"gguf-{kind}-llama" / "model.gguf"
    convert.checkpoint(src, tmp_path / "m.gguf", f"gguf-{kind}")
    ours, theirs = ({t.name: t for t in gguf.GGUFReader(p).tensors} for p in (tmp_path / "m.gguf", src))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].tensor_type == tensor.tensor_type
        assert ours[name].data.tobytes() == tensor.data.tobytes()


@pytest.mark.skipif(not PEERS.is_dir(), reason="AWQ_JAX_FIXTURES is not set")
def test_a_checkpoint_of_autoawq(tmp_path: Path) -> None:
    src = PEERS / "autoawq-gemm-g64-llama"
    assert not convert.checkpoint(src, tmp_path / "m.gguf", "gguf-q8_0").inexact
    ours, theirs = registry.open_source(tmp_path / "m.gguf", packed=True), registry.open_source(src)
    assert all(np.array_equal(dense(ours.read(n)), dense(theirs.read(n))) for n in theirs.names())
    text = json.loads((src / "tokenizer_config.json").read_text()).get("bos_token", "x") + " Once upon a time"
    assert ours.tokenizer()(text).input_ids == theirs.tokenizer()(text).input_ids
