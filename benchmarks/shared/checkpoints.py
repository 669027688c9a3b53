"""Synthetic checkpoints in Llama's shape, and tokens; nothing is downloaded."""

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from awq_jax import convert, data
from awq_jax.bench import random_models
from awq_jax.convert.config_json import HfConfig
from awq_jax.convert.text import TextTokenizer
from awq_jax.data import tokens
from shared.running import Row

T = TypeVar("T")


def config(
    layers: int, hidden: int, inner: int, vocab: int, *, heads: int = 0, kv_heads: int = 0, dtype: str = "float32"
) -> HfConfig:
    """``config.json`` of a Llama; by default heads are 64 wide, and each has keys of its own."""
    heads = heads or hidden // 64
    llama = random_models.llama(vocab, hidden, inner, layers, heads, kv_heads or heads)
    return {**llama, "architectures": ["LlamaForCausalLM"], "torch_dtype": dtype}


def named(
    layers: int, hidden: int, inner: int, vocab: int, tensor: Callable[..., T], linear: Callable[[int, int], T]
) -> Iterator[tuple[str, T]]:
    """All tensors of a Llama: ``linear(outputs, inputs)`` makes the linears of layers, ``tensor(*shape)`` the rest."""
    linears = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    linears |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    yield "model.embed_tokens.weight", tensor(vocab, hidden)
    for i in range(layers):
        for name, shape in linears.items():
            yield f"model.layers.{i}.{name}.weight", linear(*shape)
        for name in ("input", "post_attention"):
            yield f"model.layers.{i}.{name}_layernorm.weight", tensor(hidden)
    yield "model.norm.weight", tensor(hidden)
    yield "lm_head.weight", tensor(vocab, hidden)


def make(
    directory: Path,
    *,
    layers: int = 116,
    hidden: int = 1024,
    inner: int = 2816,
    vocab: int = 32000,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> Row:
    """Write a checkpoint of random weights; every hundredth channel of the norms is ten times the others."""
    rng = np.random.default_rng(0)

    @functools.cache
    def some(*shape: int) -> Iterator[np.ndarray]:
        """Three different tensors of a shape, in turn: random numbers take longer than all the rest."""
        values = rng.standard_normal((3, *shape), np.float32)
        if len(shape) == 1:
            values = 1 + 0.1 * values
            values[:, ::100] *= 10
        else:
            values *= shape[1] ** -0.5
        return itertools.cycle(values.astype(dtype))

    def tensor(*shape: int) -> np.ndarray:
        return next(some(*shape))

    tensors = named(layers, hidden, inner, vocab, tensor, tensor)
    described = config(layers, hidden, inner, vocab, dtype=dtype)
    convert.write_checkpoint(directory, tensors, described, "float", max_shard_bytes=512 << 20)
    return {"made": str(directory), "checkpoint_bytes": size(directory)}


def tiny(directory: Path) -> tuple[str, str]:
    """A checkpoint, and a file of tokens, that take no time."""
    make(directory / "model", layers=1, hidden=64, inner=64, vocab=128, dtype="float32")
    return str(directory / "model"), str(token_file(directory / "model", directory, 4, 16))


def size(directory: Path) -> int:
    """Bytes of a checkpoint's tensors."""
    return sum(f.stat().st_size for f in directory.glob("*.safetensors"))


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


def split(
    tokenizer: TextTokenizer | None, text: Path, samples: int, length: int, scored: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The first tokens of a text to calibrate on, int32 ``[samples, length]``, and its last ``scored`` ones.

    The rows begin as the model's input does, as the windows of `awq_jax.evaluate` do.

    Args:
      tokenizer: of the model.
      text: a text, or a ``.npy`` file of token ids.
      samples, length: of the calibration set.
      scored: tokens at the end.
    """
    ids = np.load(text).reshape(-1) if text.suffix == ".npy" else data.encode(text.read_text(), tokenizer)
    begin = tokens.beginning(tokenizer)
    ids, own = begin.strip(ids), length - len(begin.ids)
    if len(ids) < samples * own + scored:
        raise SystemExit(f"{text} has {len(ids)} tokens: {samples} x {length} and {scored} more do not fit into it")
    return begin.put(ids[: samples * own].reshape(samples, own)), ids[len(ids) - scored :]
