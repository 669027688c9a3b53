"""GGUF architectures: what llama.cpp's converter changes and its graphs imply; how their metadata are read.

Sources: ``conversion/`` (what is stored) and ``src/models/`` (defaults that no key tells) of llama.cpp.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from awq_jax.convert.config_json import HfConfig, JsonObject
from awq_jax.convert.formats.gguf.file import GgufFile
from awq_jax.errors import CheckpointError, UnsupportedModelError


class Keys:
    """Numbers of the metadata under ``<architecture>.``."""

    def __init__(self, file: GgufFile, arch: str) -> None:
        self._file, self._arch = file, arch

    def __call__(self, key: str, default: float) -> float:
        value = self._file.metadata.get(f"{self._arch}.{key}", default)
        if isinstance(value, np.ndarray):  # one value per layer
            if len(set(value.tolist())) != 1:
                raise UnsupportedModelError(f"{self._file.path}: {self._arch}.{key} differs between layers")
            value = value.tolist()[0]
        if not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise CheckpointError(f"{self._file.path}: metadata {self._arch}.{key} is {value!r}, not a number >= 0")
        return value

    def text(self, key: str) -> str | None:
        value = self._file.metadata.get(f"{self._arch}.{key}")
        return value if isinstance(value, str) else None

    def number(self, key: str, default: float) -> float:
        """As stored in float32, in its shortest decimal."""
        return shortest(self(key, default))

    def flags(self, key: str) -> list[bool] | None:
        """One for each layer; None if the key is absent or a single number."""
        value = self._file.metadata.get(f"{self._arch}.{key}")
        return [bool(v) for v in value.tolist()] if isinstance(value, np.ndarray) else None

    def has(self, tensor: str) -> bool:
        return tensor in self._file.tensors

    def positive(self, key: str, default: int = 0) -> int:
        """A whole number from 1 up; an absent or zero one is ``default``."""
        value = self(key, 0) or default
        if not isinstance(value, int) or not 0 < value < 2**31:
            raise CheckpointError(
                f"{self._file.path}: metadata {self._arch}.{key} must be a positive integer, got {value!r}; "
                "download the file again"
            )
        return value


def shortest(value: float) -> float:
    """The shortest decimal of a float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What the metadata does not say.

    Attributes:
      hf_class: name in ``architectures``.
      interleaved_rope: llama.cpp rotates pairs (2i, 2i+1), so its converter reordered the q and k rows.
      extra: further config keys.
      model_type: of ``config.json``; None for the GGUF architecture's own name.
      layer: llama.cpp's names inside a layer -> Hugging Face's, where they are not Llama's.
      whole: the same outside of layers.
      norm_eps: key of the norms' epsilon; another than RMSNorm's is of LayerNorm.
      norm_offset: what the converter added to norms that Hugging Face stores less that.
      partial_rope: a part of each head's channels may rotate.
      keys: config keys from the metadata and those that all families share.
    """

    hf_class: str
    interleaved_rope: bool = False
    extra: HfConfig = dataclasses.field(default_factory=dict)
    model_type: str | None = None
    layer: Mapping[str, str] = dataclasses.field(default_factory=dict)
    whole: Mapping[str, str] = dataclasses.field(default_factory=dict)
    norm_eps: str = "rms_norm_eps"
    norm_offset: float = 0.0
    partial_rope: bool = False
    keys: Callable[[Keys, HfConfig], JsonObject] | None = None


def _sliding(get: Keys, common: HfConfig, period: int, window: int) -> JsonObject:
    """``sliding_window`` and ``layer_types``: the last layer of each ``period`` sees everything, or as listed."""
    count = common["num_hidden_layers"]
    slides = get.flags("attention.sliding_window_pattern")
    if slides is None:
        period = get.positive("attention.sliding_window_pattern", period)
        slides = [bool((i + 1) % period) for i in range(count)]
    if len(slides) < count:
        raise CheckpointError(f"attention.sliding_window_pattern has {len(slides)} entries for {count} layers")
    window = get.positive("attention.sliding_window", window)
    types = ["sliding_attention" if s else "full_attention" for s in slides[:count]]
    return {"sliding_window": window, "layer_types": types}


def _gemma_attention(common: HfConfig, largest: int) -> JsonObject:
    """The divisor of the scores: the one model of ``largest`` layers has another than the head size."""
    per_head = common["hidden_size"] // common["num_attention_heads"]
    scalar = per_head if common["num_hidden_layers"] == largest else common["head_dim"]
    return {"query_pre_attn_scalar": scalar, "hidden_activation": "gelu_pytorch_tanh"}


def _gemma2(get: Keys, common: HfConfig) -> JsonObject:
    caps = {k: get.number(k, 0.0) or None for k in ("attn_logit_softcapping", "final_logit_softcapping")}
    return _sliding(get, common, 2, 4096) | caps | _gemma_attention(common, 46)


def _gemma3(get: Keys, common: HfConfig) -> JsonObject:
    out = {"final_logit_softcapping": get.number("final_logit_softcapping", 0.0) or None}
    out |= {"rope_local_base_freq": get.number("rope.freq_base_swa", 10000.0)} | _gemma_attention(common, 62)
    if get("attention.sliding_window", 0):
        return out | _sliding(get, common, 6, 0)
    return out | {"layer_types": ["full_attention"] * common["num_hidden_layers"]}


def _phi3(get: Keys, common: HfConfig) -> JsonObject:
    return {
        "sliding_window": int(get("attention.sliding_window", 0)) or None,
        "original_max_position_embeddings": get.positive(
            "rope.scaling.original_context_length", common["max_position_embeddings"]
        ),
    }


def _starcoder2(get: Keys, common: HfConfig) -> JsonObject:
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": common["attention_bias"],
        "sliding_window": int(get("attention.sliding_window", 0)) or None,
    }


def _granite(get: Keys, common: HfConfig) -> JsonObject:
    return {
        "attention_multiplier": get.number("attention.scale", common["head_dim"] ** -0.5),
        "embedding_multiplier": get.number("embedding_scale", 1.0),
        "residual_multiplier": get.number("residual_scale", 1.0),
        "logits_scaling": get.number("logit_scale", 1.0),
    }


def _olmo2(get: Keys, common: HfConfig) -> JsonObject:
    if not get("attention.sliding_window", 0):
        return {}
    return _sliding(get, common, 4, 0) | {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"]}


def _cohere(get: Keys, common: HfConfig) -> JsonObject:
    return {
        "logit_scale": get.number("logit_scale", 1.0),
        "use_qk_norm": get.has("blk.0.attn_q_norm.weight"),
    }


def _cohere2(get: Keys, common: HfConfig) -> JsonObject:
    return _cohere(get, common) | _sliding(get, common, 4, 4096)


_AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_AROUND = _AFTER | {"ffn_norm": "pre_feedforward_layernorm"}

READ_ONLY: Mapping[str, Architecture] = {
    "gemma": Architecture("GemmaForCausalLM", norm_offset=1.0, extra={"hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": Architecture("Gemma2ForCausalLM", norm_offset=1.0, layer=_AROUND, keys=_gemma2),
    "gemma3": Architecture("Gemma3ForCausalLM", model_type="gemma3_text", norm_offset=1.0, layer=_AROUND, keys=_gemma3),
    "phi3": Architecture(
        "Phi3ForCausalLM",
        layer={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        partial_rope=True,
        keys=_phi3,
    ),
    "starcoder2": Architecture(
        "Starcoder2ForCausalLM",
        layer={"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        whole={"output_norm.bias": "model.norm.bias"},
        norm_eps="norm_epsilon",
        keys=_starcoder2,
    ),
    "granite": Architecture("GraniteForCausalLM", interleaved_rope=True, keys=_granite),
    "olmo2": Architecture("Olmo2ForCausalLM", layer=_AFTER, keys=_olmo2),
    "command-r": Architecture("CohereForCausalLM", model_type="cohere", norm_eps="layer_norm_eps", keys=_cohere),
    "cohere2": Architecture("Cohere2ForCausalLM", norm_eps="layer_norm_eps", keys=_cohere2),
}
