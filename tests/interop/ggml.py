"""llama.cpp's arithmetic on a CPU, by torch: what it computes from a file, but for the order of sums."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from peers import NEW_TOKENS, Reading
from torch.nn import functional
from transformers import AutoModelForCausalLM

from awq_jax import convert

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def as_llamacpp(file: Path, work: Path, ids: np.ndarray) -> Reading:
    """A GGUF file by torch, rounding activations as llama.cpp's CPU products do.

    Before a product with packed weights the activations become int8 in blocks of 32, with a float16 scale
    (ggml's Q8_0); before one with float16 or bfloat16 weights, that type. With Q4_1 the offsets meet a sum of
    each block that is rounded to float16 by itself (ggml's Q8_1).

    Args:
      file: of a family with the names of Llama's linears.
      work: directory to make, for the dequantized weights.
      ids: integers ``[T]``.
    """
    tensors = {t.name: t for t in GGUFReader(file).tensors}
    convert.checkpoint(file, work, to="float", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(work, dtype=torch.float32, attn_implementation="eager").eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            stored = tensors.get(ggml_name(name), tensors["token_embd.weight"])
            heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
            reordered = heads.get(name.rpartition(".")[2], 0) if model.config.model_type == "llama" else 0
            module.forward = functools.partial(_product, module, *_kind(stored, reordered))
    tokens = torch.from_numpy(ids)[None]
    with torch.no_grad():
        logits = model(tokens).logits[0].numpy()
        for _ in range(NEW_TOKENS):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    return Reading(logits, tokens[0, len(ids) :].tolist())


def ggml_name(module: str) -> str:
    """llama.cpp's name of the weight of one of Llama's linears."""
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    parts |= {f"{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")}
    *_, layer, _, linear = ["", "", "", *module.split(".")]
    return f"blk.{layer}.{parts[linear]}.weight" if linear in parts else "output.weight"


def _kind(stored: ReaderTensor, heads: int) -> tuple[str, torch.Tensor | None]:
    """Type of a tensor, and for Q4_1 its offsets ``[N, K/32]``, rows of q and k in transformers' order."""
    if stored.tensor_type.name != "Q4_1":
        return stored.tensor_type.name, None
    blocks = np.asarray(stored.data).reshape(len(stored.data), -1, 20)  # scale, offset, 16 bytes of codes
    offsets = blocks[:, :, 2:4].copy().view(np.float16)[..., 0].astype(np.float32)
    if heads:
        offsets = offsets.reshape(heads, -1, 2, offsets.shape[1]).swapaxes(1, 2).reshape(offsets.shape)
    return "Q4_1", torch.from_numpy(offsets)


def _product(linear: torch.nn.Linear, kind: str, offsets: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    if kind in FLOATS:
        return functional.linear(x.to(FLOATS[kind]).float(), linear.weight, linear.bias)
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    scale = largest / 127
    codes = (blocks * torch.where(largest > 0, 127 / largest, 0)).round()
    rounded = codes * scale.half().float()
    y = functional.linear(rounded.reshape(x.shape), linear.weight, linear.bias)
    if offsets is None:
        return y
    sums = (scale[..., 0] * codes.sum(-1)).half().float()
    return y + (sums - rounded.sum(-1)) @ offsets.T
