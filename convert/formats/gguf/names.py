"""llama.cpp's tensor names and row order, and Hugging Face's."""

import re
from collections.abc import Mapping

import numpy as np

LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
NONE: Mapping[str, str] = {}
_LAYER_OF = {theirs: ours for ours, theirs in LAYER.items()}
_WHOLE_OF = {theirs: ours for ours, theirs in WHOLE.items()}


def to_hf_name(name: str, layer: Mapping[str, str] = NONE, whole: Mapping[str, str] = NONE) -> str | None:
    """llama.cpp's tensor name to Hugging Face's, or None.

    Args:
      name: of the tensor.
      layer, whole: what a family calls otherwise than `LAYER` and `WHOLE`.
    """
    if name in WHOLE or name in whole:
        return whole.get(name) or WHOLE[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    module = match and (layer.get(match[2]) or LAYER.get(match[2]))
    return f"model.layers.{match[1]}.{module}.{match[3]}" if match and module else None


def to_gguf_name(name: str) -> str | None:
    """Inverse of `to_hf_name`."""
    if name in _WHOLE_OF:
        return _WHOLE_OF[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)\.(weight|bias)", name)
    if not match or match[2] not in _LAYER_OF:
        return None
    return f"blk.{match[1]}.{_LAYER_OF[match[2]]}.{match[3]}"


def rotated(name: str) -> str | None:
    """``"q"`` or ``"k"`` if the rows of the tensor (Hugging Face name) are channels that rotate."""
    match = re.search(r"\.self_attn\.([qk])_proj\.", name)
    return match[1] if match else None


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q/k from pairs (2i, 2i+1), as llama.cpp rotates them, to halves (i, i + d/2)."""
    rows = weight.shape[0]
    paired = weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(weight.shape)


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Inverse of `unpermute`."""
    rows = weight.shape[0]
    halves = weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
