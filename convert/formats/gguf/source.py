"""GGUF files as sources: llama.cpp's names, row order and metadata turned into Hugging Face's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from awq_jax.convert import tokenizer
from awq_jax.convert.config_json import JsonObject
from awq_jax.convert.formats.gguf.blocks import BLOCK, BLOCK_TYPES, from_blocks
from awq_jax.convert.formats.gguf.config import IN_CONFIG, READ, hf_config
from awq_jax.convert.formats.gguf.file import GgufFile
from awq_jax.convert.formats.gguf.names import rotated, to_hf_name, unpermute
from awq_jax.convert.source import Info, Packed
from awq_jax.dtypes import FLOATS
from awq_jax.errors import CheckpointError, FormatError, WeightError, needed
from awq_jax.qtensor import QuantizedTensor

if TYPE_CHECKING:
    from awq_jax.convert.text import Tokenizer

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q6_K", "Q4_K")
GGML_FLOATS = {"F32": FLOATS["float32"], "F16": FLOATS["float16"], "BF16": FLOATS["bfloat16"]}


class GgufSource:
    """A GGUF file of an architecture in `awq_jax.convert.formats.gguf.config.READ`.

    Args:
      path: the file.
      packed: read Q4_0, Q4_1 and Q8_0 matrices as they are, in groups of 32, and float tensors in
        their own dtype. Otherwise, and for the other block types, tensors are dequantized to float32
        by ``gguf.quants``.

    Raises:
      FormatError: a tensor's type or name is not supported; the message gives both.
      UnsupportedModelError: another architecture.
      CheckpointError: the file is truncated or its metadata incomplete.
    """

    format = "gguf"

    def __init__(self, path: Path, packed: bool = False) -> None:
        gguf = needed("gguf", "a GGUF file")  # which takes half a second where mistral_common is installed

        self.file = GgufFile(path)
        self.config = hf_config(self.file)
        self.generation_config: JsonObject = {}
        self._packed = packed
        self._arch = str(self.file.metadata["general.architecture"])
        self._spec = READ[self._arch]
        self._names: dict[str, tuple[str, str]] = {}  # Hugging Face's -> the file's, and its type
        for name, info in self.file.tensors.items():
            if name in IN_CONFIG:
                continue
            kind = gguf.GGMLQuantizationType(info.type_id).name
            if kind not in TYPES:
                raise FormatError(
                    f"{path}: tensor {name!r} has ggml type {kind}; read are {', '.join(TYPES)}: get or make a file in "
                    "one of those (llama-quantize)"
                )
            hf_name = to_hf_name(name, self._spec.layer, self._spec.whole)
            if hf_name is None:
                raise FormatError(f"{path}: tensor {name!r} is not one a {self._arch} model is known to have")
            self._names[hf_name] = name, kind

    def names(self) -> list[str]:
        """Hugging Face tensor names, sorted."""
        return sorted(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in PyTorch's orientation."""
        return self.file.tensors[self._stored(name)[0]].shape

    def info(self, name: str) -> Info:
        """What the header says of a tensor."""
        stored, kind = self._stored(name)
        tensor = self.file.tensors[stored]
        packed = None
        if self._is_packed(name):
            block = BLOCK_TYPES[kind]
            packed = Packed(block.bits, BLOCK, not block.offset, "float16", offsets=block.offset)
        dtype = GGML_FLOATS[kind].name if self._packed and kind in GGML_FLOATS else "float32"
        return Info(tensor.shape, dtype, tensor.nbytes, packed)

    def read(self, name: str) -> np.ndarray | QuantizedTensor:
        """The tensor, rows in Hugging Face's order.

        Raises:
          CheckpointError: if it is absent or the file was cut meanwhile.
          WeightError: if a packed one has a scale that is NaN or inf.
        """
        gguf = needed("gguf", "a GGUF file")  # which takes half a second where mistral_common is installed

        stored, kind = self._stored(name)
        shape = self.file.tensors[stored].shape
        raw = self.file.raw(stored)
        rows = raw.reshape(-1, raw.size // max(1, int(np.prod(shape[:-1]))))
        heads = self._rotated_heads(name)
        if self._is_packed(name):
            q = from_blocks(unpermute(rows, heads) if heads else rows, kind, *shape)
            if not np.isfinite(q.scales).all() or (q.offsets is not None and not np.isfinite(q.offsets).all()):
                raise WeightError(f"{self.file.path}: a scale of tensor {stored!r} is NaN or inf; download it again")
            return q
        if self._packed and kind in GGML_FLOATS:
            weight = raw.view(GGML_FLOATS[kind]).reshape(shape)
        else:
            weight = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
            weight = np.asarray(weight, np.float32).reshape(shape)
        if self._spec.norm_offset and name.endswith("norm.weight"):
            weight = weight - np.asarray(self._spec.norm_offset, weight.dtype)
        return unpermute(weight, heads) if heads else weight

    def tokenizer(self) -> Tokenizer | None:
        """Built from the metadata; None if they have no vocabulary."""
        return tokenizer.from_gguf(self.file.metadata, self.file.path)

    def companions(self) -> list[Path]:
        """None: the tokenizer is inside the file."""
        return []

    def _stored(self, name: str) -> tuple[str, str]:
        if name not in self._names:
            raise CheckpointError(f"no tensor {name!r} in {self.file.path}")
        return self._names[name]

    def _is_packed(self, name: str) -> bool:
        stored, kind = self._stored(name)
        return self._packed and kind in BLOCK_TYPES and len(self.file.tensors[stored].shape) == 2

    def _rotated_heads(self, name: str) -> int:
        """Heads of a query or key projection whose rows llama.cpp reordered; 0 for the others."""
        which = rotated(name)
        if not which or not self._spec.interleaved_rope:
            return 0
        return self.config["num_attention_heads" if which == "q" else "num_key_value_heads"]
