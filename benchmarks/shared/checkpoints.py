"""Synthetic checkpoints in Llama's shape, and tokens; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from awq_jax import convert

if TYPE_CHECKING:
    from awq_jax.serve.model import Model


def config(
    layers: int, hidden: int, inner: int, vocab: int, *, heads: int = 0, kv_heads: int = 0, dtype: str = "float32"
) -> dict[str, str | int | float | bool | list[str]]:
    """``config.json`` of a Llama; by default heads are 64 wide, and each has keys of its own."""
    heads = heads or hidden // 64
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "vocab_size": vocab,
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "torch_dtype": dtype,
    }  # fmt: skip


def linears(hidden: int, inner: int) -> Iterator[tuple[str, int, int]]:
    """Name, outputs and inputs of each linear of a layer."""
    for name in "qkvo":
        yield f"self_attn.{name}_proj", hidden, hidden
    yield "mlp.gate_proj", inner, hidden
    yield "mlp.up_proj", inner, hidden
    yield "mlp.down_proj", hidden, inner


def make(
    directory: Path,
    layers: int = 1,
    hidden: int = 64,
    inner: int = 224,
    vocab: int = 256,
    dtype: str = "float32",
) -> Path:
    """Write a checkpoint of random weights; every hundredth channel of the norms is ten times the others."""
    rng = np.random.default_rng(0)
    kind = np.dtype(np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    made: dict[tuple[int, ...], list[np.ndarray]] = {}

    def tensor(*shape: int) -> np.ndarray:
        """Three different tensors of a shape, in turn: random numbers take longer than all the rest."""
        values = made.setdefault(shape, [])
        if len(values) < 3:
            value = rng.standard_normal(shape, np.float32)
            if len(shape) == 1:
                value = 1 + 0.1 * value
                value[::100] *= 10
            else:
                value *= shape[1] ** -0.5
            values.append(value.astype(kind))
        values.append(values.pop(0))
        return values[-1]

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        yield "model.embed_tokens.weight", tensor(vocab, hidden)
        for i in range(layers):
            for name, rows, columns in linears(hidden, inner):
                yield f"model.layers.{i}.{name}.weight", tensor(rows, columns)
            for name in ("input", "post_attention"):
                yield f"model.layers.{i}.{name}_layernorm.weight", tensor(hidden)
        yield "model.norm.weight", tensor(hidden)
        yield "lm_head.weight", tensor(vocab, hidden)

    described = config(layers, hidden, inner, vocab, dtype=dtype)
    convert.write_checkpoint(directory, tensors(), described, "float", max_shard_bytes=512 << 20)
    return directory


def hf_config(directory: Path) -> dict[str, int]:
    """The numbers of a checkpoint's ``config.json``."""
    found = json.loads((directory / "config.json").read_text())
    return {name: value for name, value in found.items() if isinstance(value, int)}


def random_tokens(vocab: int, samples: int, length: int) -> np.ndarray:
    """int32 ``[samples, length]``."""
    return np.random.default_rng(1).integers(0, vocab, (samples, length)).astype(np.int32)


def token_file(checkpoint: Path, where: Path, samples: int, length: int) -> Path:
    """Random tokens of a checkpoint's vocabulary as a file for ``--calib``."""
    numbers = hf_config(checkpoint)
    length = min(length, numbers["max_position_embeddings"])
    path = where / f"tokens-{samples}x{length}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, random_tokens(numbers["vocab_size"], samples, length))
    return path


def split(model: Model, text: Path, samples: int, length: int, scored: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The first tokens of a text to calibrate on, int32 ``[samples, length]``, and its last ``scored`` ones.

    Args:
      model: whose tokenizer to use.
      text: a text, or a ``.npy`` file of token ids.
      samples, length: of the calibration set.
      scored: tokens at the end.
    """
    ids = token_ids(model, text)
    if len(ids) < samples * length + scored:
        raise SystemExit(f"{text} has {len(ids)} tokens: {samples} x {length} and {scored} more do not fit into it")
    return ids[: samples * length].reshape(samples, length), ids[len(ids) - scored :]


def token_ids(model: Model, text: Path) -> np.ndarray:
    """All tokens of a text, int32 ``[T]``; a ``.npy`` file has them already."""
    if text.suffix == ".npy":
        return np.load(text).reshape(-1)
    if model.tokenizer is None:
        raise SystemExit(f"the model has no tokenizer: give the ids of {text} as a .npy file")
    return np.asarray(model.tokenizer([text.read_text()])["input_ids"][0], np.int32)
