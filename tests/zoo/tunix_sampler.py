"""tunix's own sampler on a packed model: the tokens and logits, and those of the same weights dequantized."""

from __future__ import annotations

import importlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measure import tokens

import awq_jax

WIDTH = 128  # also of the vocabulary: the sampler makes room for logits as wide as Llama3's embeddings


class Letters:
    """A tokenizer of letters, as far as the sampler asks."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [3 + ord(letter) % 100 for letter in text]

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 1

    def eos_id(self) -> int:
        return 2

    def pad_id(self) -> int:
        return 0

    def dedup_bos_ids(self, ids: list[int]) -> list[int]:
        return ids


def main() -> None:
    llama3 = importlib.import_module("tunix.models.llama3.model")
    sampler = importlib.import_module("tunix.generate.sampler")
    adapters = importlib.import_module("tunix.generate.tokenizer_adapter")
    adapter = type("Adapter", (Letters, adapters.TokenizerAdapter), {"__init__": lambda self: None})()
    config = llama3.ModelConfig(
        num_layers=2, vocab_size=WIDTH, embed_dim=WIDTH, hidden_dim=256, num_heads=4, head_dim=32, num_kv_heads=2,
        rope_theta=10000, norm_eps=1e-5, weight_tying=True,
    )  # fmt: skip
    model = llama3.Llama3(config, rngs=nnx.Rngs(0))
    fn, params = awq_jax.nnx.functional(model)

    def forward(params: Any, ids: jax.Array) -> Any:
        b, t = ids.shape
        places = jnp.broadcast_to(jnp.arange(t), (b, t))
        return fn(params, ids, places, None, jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (b, t, t)))[0]

    q = awq_jax.quantize(params, [tokens(0) % WIDTH], apply_fn=forward, group_size=32, method="rtn", progress=False)
    dense = jax.tree.map(
        lambda a: a.dequantize() if awq_jax.qtensor.is_quantized(a) else a, q, is_leaf=awq_jax.qtensor.is_quantized
    )
    sizes = sampler.CacheConfig(cache_size=64, num_layers=2, num_kv_heads=2, head_dim=32)
    made: dict[str, Any] = {}
    logits = []
    for name, one in (
        ("packed", awq_jax.nnx.Packed(fn, q, config=config, num_embed=model.num_embed)),
        ("dense", nnx.merge(nnx.graphdef(model), dense)),
    ):
        out = sampler.Sampler(one, adapter, sizes)(
            ["hello world"], max_generation_steps=8, echo=False, return_logits=True
        )
        made[name] = [int(i) for i in out.tokens[0]]
        logits.append(np.asarray(out.logits[0], np.float64))
    made["difference"] = float(np.abs(logits[0] - logits[1]).max() / np.abs(logits[1]).max())
    made["shape"] = logits[0].shape
    print(json.dumps(made))


if __name__ == "__main__":
    main()
