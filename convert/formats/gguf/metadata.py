"""GGUF metadata from a Hugging Face ``config.json``: the inverse of `awq_jax.convert.formats.gguf.config`.

What llama.cpp would compute differently is refused; a sliding window, which it does not have for these
architectures, bounds the context length instead, within which it makes no difference.
"""

import logging
import math
from collections.abc import Mapping

import numpy as np

from awq_jax.convert.config_json import HfConfig, JsonObject, is_tied
from awq_jax.convert.formats.gguf.config import ARCHITECTURES, LLAMA3, llama3_divisors
from awq_jax.errors import CheckpointError, FormatError

log = logging.getLogger(__name__)

GGUF_OF = {"mistral": "llama"}  # by model_type, where llama.cpp's name differs
THETA = {"smollm3": 2e6}
INTERVAL = 4  # every fourth layer of smollm3 does not rotate

_BIASES = {
    "llama": ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    "qwen2": ("attn_q", "attn_k", "attn_v"),
    "qwen3": (),
    "smollm3": (),
}
_LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def architecture(config: HfConfig) -> str:
    """llama.cpp's name for the architecture of a ``config.json``.

    Raises:
      FormatError: if it is not one that is written.
    """
    kind = config.get("model_type")
    arch = GGUF_OF.get(kind, kind) if isinstance(kind, str) else ""
    if arch not in ARCHITECTURES:
        known = ", ".join(sorted({*ARCHITECTURES, *GGUF_OF}))
        raise FormatError(f"config.json has model_type {str(kind)[:100]!r}; GGUF files are written for {known}")
    return arch


def metadata(config: HfConfig) -> tuple[JsonObject, np.ndarray | None]:
    """Keys of the architecture, and the tensor ``rope_freqs.weight`` if the rotation needs one.

    Returns:
      Ints (stored as uint32), floats (float32) and strings by key; float32 ``[head_dim / 2]`` or None.

    Raises:
      FormatError: the architecture, or something in the config, is not one llama.cpp computes.
      CheckpointError: a needed entry is absent or out of range.
    """
    arch = architecture(config)
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    head_dim = _size(config, "head_dim", hidden // heads)
    _refuse(config, arch, hidden == heads * head_dim)
    rope, freqs = _rope(config, arch, head_dim)
    keys = {
        "vocab_size": _size(config, "vocab_size"),
        "context_length": _context(config),
        "embedding_length": hidden,
        "block_count": _size(config, "num_hidden_layers"),
        "feed_forward_length": _size(config, "intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": _size(config, "num_key_value_heads", heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": _number(config, "rms_norm_eps", 1e-6),
        "rope.dimension_count": head_dim,
        **rope,
    }
    return {f"{arch}.{k}": v for k, v in keys.items()}, freqs


def check_tensors(config: HfConfig, metadata: HfConfig, names: Mapping[str, tuple[int, ...]]) -> None:
    """Check that llama.cpp finds the tensors it looks for, and no others.

    Args:
      config: ``config.json``.
      metadata: what the function of that name made of it.
      names: shapes by llama.cpp's names, without ``rope_freqs.weight``.

    Raises:
      CheckpointError: one is missing or has another shape than the config says.
      FormatError: there is one that llama.cpp does not know in this architecture.
    """
    arch = architecture(config)
    keys = {k.removeprefix(f"{arch}."): v for k, v in metadata.items()}
    hidden, ffn, vocab = keys["embedding_length"], keys["feed_forward_length"], keys["vocab_size"]
    size = keys["attention.key_length"]
    q, kv = keys["attention.head_count"] * size, keys["attention.head_count_kv"] * size
    rows = dict(zip(_LINEARS, (q, kv, kv, hidden, ffn, ffn, hidden), strict=True))
    inputs = dict.fromkeys(_LINEARS, hidden) | {"attn_output": q, "ffn_down": ffn}
    layer: dict[str, tuple[int, ...]] = {f"{m}.weight": (rows[m], inputs[m]) for m in _LINEARS}
    layer |= {"attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
    if arch == "qwen3":
        layer |= {"attn_q_norm.weight": (size,), "attn_k_norm.weight": (size,)}
    want: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    if "output.weight" in names or not is_tied(config):  # llama.cpp takes the embedding where there is no head
        want["output.weight"] = (vocab, hidden)
    want |= {f"blk.{i}.{n}": shape for i in range(keys["block_count"]) for n, shape in layer.items()}
    optional = {f"blk.{i}.{m}.bias": (rows[m],) for i in range(keys["block_count"]) for m in _BIASES[arch]}
    for name in want:
        if name not in names:
            raise CheckpointError(f"the checkpoint has no tensor for {name}, which llama.cpp needs; fetch it again")
    for name, shape in names.items():
        known = want.get(name, optional.get(name))
        if known is None:
            raise FormatError(f"{name} is not a tensor that llama.cpp has in {arch} models; save as 'awq-jax'")
        if known != shape:
            raise CheckpointError(f"{name} has shape {shape}, config.json implies {known}")


def _refuse(config: HfConfig, arch: str, square: bool) -> None:
    """Raise for what llama.cpp computes in another way."""
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise FormatError(f"config.json has hidden_act {str(act)[:50]!r}; llama.cpp has silu in {arch} models")
    if _rope_data(config).get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise FormatError(f"config.json has a partial_rotary_factor; llama.cpp rotates whole heads in {arch} models")
    if arch == "qwen2" and not square:
        raise FormatError("config.json has a head_dim other than hidden_size / heads, which llama.cpp has not in qwen2")
    if arch == "smollm3":
        layers = range(_size(config, "num_hidden_layers"))
        rotates = config.get("no_rope_layers")  # despite its name: 1 where the layer rotates
        if rotates is None:
            every = config.get("no_rope_layer_interval", INTERVAL)
            rotates = [int((i + 1) % every != 0) for i in layers] if type(every) is int and every > 0 else every
        if rotates != [int((i + 1) % INTERVAL != 0) for i in layers]:
            raise FormatError(
                f"config.json: in smollm3 llama.cpp leaves every {INTERVAL}th layer unrotated, and no other"
            )


def _context(config: HfConfig) -> int:
    length = _size(config, "max_position_embeddings")
    types = config.get("layer_types")
    slides = config.get("use_sliding_window", config.get("model_type") == "mistral")
    if isinstance(types, list):
        slides = "sliding_attention" in types
    if slides and config.get("sliding_window") is not None:
        window = _size(config, "sliding_window")
        if window < length:
            log.warning("llama.cpp has no sliding window here: the context length is the window, %d tokens", window)
        return min(length, window)
    return length


def _rope_data(config: HfConfig) -> JsonObject:
    """Of both spellings, ``rope_parameters`` (transformers 5) and ``rope_scaling``."""
    out: JsonObject = {}
    for key in ("rope_parameters", "rope_scaling"):
        data = config.get(key) or {}
        if not isinstance(data, Mapping):
            raise CheckpointError(f"config.json: {key} is {str(data)[:100]!r}, not an object")
        out |= data
    return out


def _rope(config: HfConfig, arch: str, head_dim: int) -> tuple[JsonObject, np.ndarray | None]:
    data = _rope_data(config)
    theta = data.get("rope_theta") or config.get("rope_theta") or THETA.get(arch, 1e4)
    kind = data.get("rope_type") or data.get("type") or "default"
    keys: JsonObject = {"freq_base": _number({"rope_theta": theta}, "rope_theta")}
    freqs = None
    if kind == "linear":
        keys |= {"scaling.type": "linear", "scaling.factor": _number(data, "factor")}
    elif kind == "yarn":
        keys |= _yarn(config, data)
    elif kind == "llama3":
        if arch != "llama":
            raise FormatError(f"config.json: llama.cpp has no rope scaling 'llama3' in {arch} models")
        freqs, constants = _llama3(config, data, keys["freq_base"], head_dim)
        keys |= {f"scaling.llama3.{k}": v for k, v in constants.items()}
    elif kind not in ("default", "dynamic"):  # dynamic scales only beyond max_position_embeddings
        raise FormatError(
            f"config.json: rope scaling {str(kind)[:50]!r} is not written; default, dynamic, linear, yarn, llama3 are"
        )
    return {f"rope.{k}": v for k, v in keys.items()}, freqs


def _yarn(config: HfConfig, data: HfConfig) -> JsonObject:
    """llama.cpp has the constants of the paper; only the stretch is given."""
    factor = _number(data, "factor")
    usual: dict[str, float | None] = {
        "attention_factor": 0.1 * math.log(factor) + 1,
        "beta_fast": 32,
        "beta_slow": 1,
        "truncate": True,
    }
    usual |= {"mscale": None, "mscale_all_dim": None}
    for key, value in usual.items():
        given = data.get(key)
        number = isinstance(given, bool | int | float)
        if given is not None and (value is None or not number or not math.isclose(given, value, rel_tol=1e-4)):
            raise FormatError(f"config.json: yarn with {key} {str(given)[:50]} is not what llama.cpp computes")
    original = data.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    original = _size({"original_max_position_embeddings": original}, "original_max_position_embeddings")
    return {"scaling.type": "yarn", "scaling.factor": factor, "scaling.original_context_length": original}


def _llama3(config: HfConfig, data: HfConfig, theta: float, head_dim: int) -> tuple[np.ndarray, dict[str, float]]:
    """The divisors of the frequencies, and the constants they come from, which only our reader looks at."""
    outside = {k: config[k] for k in LLAMA3 if k in config}
    constants = {k: _number({**outside, **data}, k) for k in LLAMA3}
    return llama3_divisors(theta, head_dim // 2, **constants), constants


def _size(config: HfConfig, key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 2**31:
        raise CheckpointError(f"config.json: {key} must be a positive integer; got {str(value)[:100]!r}")
    return value


def _number(config: HfConfig, key: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise CheckpointError(f"config.json: {key} must be a positive number; got {str(value)[:100]!r}")
    return float(value)
