"""A Hugging Face ``config.json`` from GGUF metadata."""

import math
from collections.abc import Mapping

import numpy as np

from awq_jax.convert.config_json import TIED, JsonObject
from awq_jax.convert.formats.gguf.families import READ_ONLY, Architecture, Keys, shortest
from awq_jax.convert.formats.gguf.file import GgufFile
from awq_jax.errors import CheckpointError, FormatError, UnsupportedModelError

ROPE = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
IN_CONFIG = (ROPE, LONG, SHORT)  # tensors that are constants of the rotation
# Constants of Llama 3's scaling, as in config.json, with the values of all published models but for the
# factor. llama.cpp's converter does not keep them; our own files have them under rope.scaling.llama3.
LLAMA3: Mapping[str, float] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192.0,
}

# Those that are written, too.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", True),  # also Mistral, SmolLM2, TinyLlama, Yi
    "qwen2": Architecture("Qwen2ForCausalLM", False),
    "qwen3": Architecture("Qwen3ForCausalLM", False),
    "smollm3": Architecture("SmolLM3ForCausalLM", True, {"no_rope_layer_interval": 4}),
}
READ: Mapping[str, Architecture] = {**ARCHITECTURES, **READ_ONLY}


def hf_config(file: GgufFile) -> JsonObject:
    """The config a Hugging Face reader expects for this file.

    Raises:
      UnsupportedModelError: another architecture, mixture of experts, or partial rotation.
      CheckpointError: a needed key or tensor is absent or out of range.
      FormatError: constants of the rotation are stored as something else than float32.
    """
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in READ:
        raise UnsupportedModelError(
            f"{file.path} has architecture {str(arch)[:100]!r}; GGUF files are read for {', '.join(READ)}"
        )
    spec = READ[arch]
    get = Keys(file, arch)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path} has no tensor 'token_embd.weight'; download it again")
    if get("expert_count", 0):
        raise UnsupportedModelError(f"{file.path} is a mixture of experts ({arch}.expert_count); dense models are read")
    heads = get.positive("attention.head_count")
    hidden = get.positive("embedding_length")
    size = hidden // heads if spec.partial_rope else get.positive("rope.dimension_count", hidden // heads)
    head_dim = get.positive("attention.key_length", size)
    rotated = get.positive("rope.dimension_count", head_dim)
    partial = spec.partial_rope and rotated < head_dim and rotated % 2 == 0
    if (
        (rotated != head_dim and not partial)
        or head_dim % 2
        or get.positive("attention.value_length", head_dim) != head_dim
    ):
        raise UnsupportedModelError(
            f"{file.path} rotates {rotated} of {head_dim} channels per head, or has values of another size; "
            "the decoder rotates all of an even number, with values of the same size"
        )
    kv_heads = get.positive("attention.head_count_kv", heads)
    _check_heads(file, heads, kv_heads, head_dim)
    theta, scaling = _rope(file, get)
    config = {
        "architectures": [spec.hf_class],
        "model_type": spec.model_type or arch,
        "hidden_size": hidden,
        "intermediate_size": get.positive("feed_forward_length"),
        "num_hidden_layers": get.positive("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": get.positive("context_length"),
        spec.norm_eps: _eps(get, spec),
        "rope_theta": theta,
        "rope_scaling": scaling,
        TIED: "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "bos_token_id": _token(file, "bos"),
        "eos_token_id": _eos(file),
        "pad_token_id": _token(file, "padding"),
        "torch_dtype": "float32",
        **spec.extra,
    }
    if partial:
        config["partial_rotary_factor"] = rotated / head_dim
    return config | (spec.keys(get, config) if spec.keys else {})


def _check_heads(file: GgufFile, heads: int, kv_heads: int, head_dim: int) -> None:
    """The q and k rows must be whole heads before their order can be undone."""
    for name, info in file.tensors.items():
        for part, count in (("attn_q", heads), ("attn_k", kv_heads)):
            if name.endswith((f".{part}.weight", f".{part}.bias")) and info.shape[:1] != (count * head_dim,):
                raise CheckpointError(
                    f"{file.path}: tensor {name!r} has shape {info.shape}, metadata says {count} heads of {head_dim}"
                )


def _rope(file: GgufFile, get: Keys) -> tuple[float, JsonObject | None]:
    """``(rope_theta, rope_scaling)``."""
    theta = float(get("rope.freq_base", 10000.0))
    kind = get.text("rope.scaling.type") or "none"
    factor = float(get("rope.scaling.factor", 0) or get("rope.scale_linear", 0))
    original = int(get("rope.scaling.original_context_length", 0)) or get.positive("context_length")
    if ROPE in file.tensors:
        return theta, _llama3(file, get, theta)
    if LONG in file.tensors and SHORT in file.tensors:
        return theta, _longrope(file, get)
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor or 1.0, "original_max_position_embeddings": original}
        for ours, theirs in (
            ("attention_factor", "attn_factor"),
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
        ):
            value = get(f"rope.scaling.{theirs}", 0)
            if value:
                scaling[ours] = shortest(value)
        return theta, scaling
    if kind == "linear" or (kind == "none" and factor not in (0.0, 1.0)):
        return theta, {"rope_type": "linear", "factor": factor}
    if kind != "none":
        raise UnsupportedModelError(
            f"{file.path}: rope scaling {kind!r} is not supported; none, linear, yarn, llama3 are"
        )
    return theta, None


def _eps(get: Keys, spec: Architecture) -> float:
    if spec.norm_eps == "rms_norm_eps":
        return get.number("attention.layer_norm_rms_epsilon", 1e-6)
    return get.number("attention.layer_norm_epsilon", 1e-5)


def _longrope(file: GgufFile, get: Keys) -> JsonObject:
    """The divisors of the frequencies of short and of long rows, which GGUF keeps as tensors."""
    scaling: JsonObject = {"rope_type": "longrope"}
    for key, tensor in (("short_factor", SHORT), ("long_factor", LONG)):
        if file.tensors[tensor].type_id != 0:
            raise FormatError(f"{file.path}: tensor {tensor!r} is not float32; download the file again")
        scaling[key] = [shortest(v) for v in file.raw(tensor).view("<f4")]
    length, original = get.positive("context_length"), get.positive("rope.scaling.original_context_length")
    factor, usual = get("rope.scaling.attn_factor", 0), 1.0
    if original > 1 and length > original:
        usual = math.sqrt(1 + math.log(length / original) / math.log(original))
    if factor and not math.isclose(factor, usual, rel_tol=1e-6):
        scaling["attention_factor"] = shortest(factor)
    return scaling


def _llama3(file: GgufFile, get: Keys, theta: float) -> JsonObject:
    """Llama 3's scaling, of which GGUF keeps only the divisors of the frequencies.

    Where the file does not say more, the constants are `LLAMA3` and the factor is the largest divisor.
    The divisors are recomputed from that and must agree.
    """
    stored = file.raw(ROPE).view("<f4").astype(np.float64)
    usual = {**LLAMA3, "factor": float(stored.max(initial=0.0))}
    constants = {k: shortest(get(f"rope.scaling.llama3.{k}", v)) for k, v in usual.items()}
    expected = llama3_divisors(theta, stored.size, **constants) if all(constants.values()) else np.zeros(1)
    if not np.isfinite(stored).all() or not np.allclose(stored, expected, rtol=1e-3):
        raise UnsupportedModelError(f"{file.path}: the frequency factors in {ROPE!r} are not Llama 3's")
    original = int(constants["original_max_position_embeddings"])
    return {"rope_type": "llama3", **constants, "original_max_position_embeddings": original}


def llama3_divisors(
    theta: float,
    count: int,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> np.ndarray:
    """What Llama 3 divides its ``count`` frequencies by, float32: 1 for the fast ones, ``factor`` for the slow."""
    plain = theta ** -(np.arange(count) / count)
    turns = original_max_position_embeddings * plain / (2 * np.pi)  # over the original context
    smooth = np.clip((turns - low_freq_factor) / ((high_freq_factor - low_freq_factor) or 1e-9), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def _token(file: GgufFile, which: str) -> int | None:
    value = file.metadata.get(f"tokenizer.ggml.{which}_token_id")
    return value if isinstance(value, int) else None


def _eos(file: GgufFile) -> int | list[int] | None:
    """The ids that end a text: end of sequence and, in chat models, end of turn."""
    ids = [i for i in (_token(file, "eos"), _token(file, "eot")) if i is not None]
    unique = list(dict.fromkeys(ids))
    return unique if len(unique) > 1 else (unique[0] if unique else None)
