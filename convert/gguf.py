"""GGUF files as float sources: llama.cpp's names, row order and metadata turned into Hugging Face's.

Block formats are dequantized to float32 by ``gguf.quants``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax.convert.gguf_config import ARCHITECTURES, hf_config
from awq_jax.convert.gguf_file import GgufFile
from awq_jax.errors import CheckpointError, FormatError

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q6_K", "Q4_K")

_LAYER = {
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
_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_RECOMPUTED = ("rope_freqs.weight",)  # constants of the rope scaling; see gguf_config


class GgufSource:
    """A GGUF file of the Llama family; every tensor reads as float32.

    Raises:
      FormatError: a tensor's type or name is not supported; the message gives both.
      UnsupportedModelError: another architecture.
      CheckpointError: the file is truncated or its metadata incomplete.
    """

    format = "gguf"

    def __init__(self, path: Path) -> None:
        import gguf

        self.file = GgufFile(path)
        self.config: dict[str, Any] = hf_config(self.file)
        self.generation_config: dict[str, Any] = {}
        self._arch = str(self.file.metadata["general.architecture"])
        self._names: dict[str, str] = {}
        for name, info in self.file.tensors.items():
            if name in _RECOMPUTED:
                continue
            kind = gguf.GGMLQuantizationType(info.type_id).name
            if kind not in TYPES:
                raise FormatError(
                    f"{path}: tensor {name!r} has ggml type {kind}; read are {', '.join(TYPES)}: get or make a file in "
                    "one of those (llama-quantize)"
                )
            hf_name = to_hf_name(name)
            if hf_name is None:
                raise FormatError(f"{path}: tensor {name!r} is not one a {self._arch} model is known to have")
            self._names[hf_name] = name

    def names(self) -> list[str]:
        """Hugging Face tensor names, sorted."""
        return sorted(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in PyTorch's orientation."""
        return self.file.tensors[self._stored(name)].shape

    def read(self, name: str) -> np.ndarray:
        """The tensor as float32, rows in Hugging Face's order.

        Raises:
          CheckpointError: if it is absent or the file was cut meanwhile.
        """
        import gguf

        info = self.file.tensors[self._stored(name)]
        kind = gguf.GGMLQuantizationType(info.type_id)
        raw = self.file.raw(info.name)
        rows = raw.reshape(-1, raw.size // max(1, int(np.prod(info.shape[:-1]))))
        weight = np.asarray(gguf.quants.dequantize(rows, kind), np.float32).reshape(info.shape)
        heads = self._rotated_heads(name)
        return unpermute(weight, heads) if heads else weight

    def tokenizer(self) -> Any:
        """A transformers ``PreTrainedTokenizerFast`` built from the metadata; None if it has no vocabulary."""
        from awq_jax import tokenizer  # transformers takes seconds to import

        return tokenizer.from_gguf(self.file.metadata, self.file.path)

    def companions(self) -> list[Path]:
        """None: the tokenizer is inside the file."""
        return []

    def _stored(self, name: str) -> str:
        if name not in self._names:
            raise CheckpointError(f"no tensor {name!r} in {self.file.path}")
        return self._names[name]

    def _rotated_heads(self, name: str) -> int:
        """Heads of a query or key projection whose rows llama.cpp reordered; 0 for the others."""
        match = re.search(r"\.self_attn\.([qk])_proj\.", name)
        if not match or not ARCHITECTURES[self._arch].interleaved_rope:
            return 0
        return self.config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]


def to_hf_name(name: str) -> str | None:
    """llama.cpp's tensor name to Hugging Face's, or None."""
    if name in _GLOBAL:
        return _GLOBAL[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if not match or match[2] not in _LAYER:
        return None
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q/k from pairs (2i, 2i+1), as llama.cpp rotates them, to halves (i, i + d/2)."""
    rows = weight.shape[0]
    paired = weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(weight.shape)
