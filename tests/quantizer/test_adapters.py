"""Factors of adapters stay float by themselves."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import awq_jax
from awq_jax.quantizer.adapters import REASON, is_named_factor

X = jax.random.normal(jax.random.key(0), (8, 64))
RTN = {"method": "rtn", "group_size": 64, "quantize_head": True, "progress": False, "return_report": True}


@pytest.mark.parametrize(
    ("path", "factor"),
    [
        ("layers/0/q_proj/lora/lora_a", True),  # flax.nnx
        ("layers/0/attn/q_einsum/w_lora_b", True),  # tunix, qwix
        ("layer_0/mlp/linear/lora/a", True),  # gemma
        ("dense/lora_kernel_a", True),  # Keras
        ("q_proj/lora_A/default/kernel", True),
        ("layers/0/attn/q_a_proj/kernel", False),  # DeepSeek's low-rank queries are weights
        ("layers/0/attn/wq_b/kernel", False),
        ("flora/a", False),
        ("lora/kernel", False),
    ],
)
def test_names(path, factor):
    assert is_named_factor(path) == factor


@pytest.mark.parametrize("rank", [4, 64])
def test_lora_of_nnx_stays_float(rank):
    class Net(nnx.Module):
        def __init__(self):
            self.up = nnx.LoRALinear(64, 64, lora_rank=rank, use_bias=False, rngs=nnx.Rngs(0))
            self.left = nnx.LoRAParam(jnp.ones((64, rank)))

        def __call__(self, x):
            return self.up(x) + x @ self.left[...] @ jnp.ones((rank, 64))

    f, params = awq_jax.nnx.functional(Net())
    q, report = awq_jax.quantize(params, awq_jax.discover(f, params, X), **RTN)
    packed = [p for p, leaf in awq_jax.paths.flatten(q).items() if isinstance(leaf, awq_jax.QuantizedTensor)]
    assert packed == ["up/kernel"]
    assert report.skipped == dict.fromkeys(["up/lora/lora_a", "up/lora/lora_b", "left"], REASON)
