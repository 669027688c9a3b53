"""Models with random weights in the shapes of known ones; nothing is downloaded."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from awq_jax import models, paths
from awq_jax.convert.config_json import HfConfig
from awq_jax.errors import ConfigError
from awq_jax.models.config import ModelConfig
from awq_jax.models.weights import params as model_params
from awq_jax.qtensor import QuantizedTensor


def llama(vocab: int, size: int, inner: int, layers: int, heads: int, kv: int, **more: float) -> HfConfig:
    """``config.json`` of a Llama of these sizes."""
    sizes = {"vocab_size": vocab, "hidden_size": size, "intermediate_size": inner, "num_hidden_layers": layers}
    others = {"num_attention_heads": heads, "num_key_value_heads": kv, "max_position_embeddings": 4096}
    fixed = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e4}
    return fixed | {"tie_word_embeddings": False} | sizes | others | more


# Published configs, and a small one for CPUs.
SHAPES: dict[str, HfConfig] = {
    "llama-3-8b": llama(128256, 4096, 14336, 32, 32, 8, rope_theta=5e5, max_position_embeddings=8192),
    "llama-2-7b": llama(32000, 4096, 11008, 32, 32, 32),
    "smollm2-135m": llama(49152, 576, 1536, 30, 9, 3, rope_theta=1e5, tie_word_embeddings=True),
    "small": llama(1024, 256, 512, 2, 4, 2, max_position_embeddings=512),
}


def config(name: str, layers: int | None = None) -> ModelConfig:
    """A shape's architecture, with fewer layers if asked.

    Raises:
      ConfigError: unknown name.
    """
    if name not in SHAPES:
        raise ConfigError(f"no model shape {name!r}; choose from {', '.join(SHAPES)}")
    return models.config_from_hf({**SHAPES[name], **({"num_hidden_layers": layers} if layers else {})})


def products(name: str) -> tuple[tuple[int, int], ...]:
    """(inputs, outputs) of the linears of one layer as `generate` serves them: q/k/v and gate/up merged."""
    c = SHAPES[name]
    hidden, inner, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    kv = 2 * c["num_key_value_heads"] * (hidden // heads)
    return (hidden, hidden + kv), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)


def random_model(
    c: ModelConfig, dtype: str, bits: int | None = 4, group_size: int = 128, seed: int = 0
) -> tuple[nnx.GraphDef, nnx.State]:
    """A decoder with random weights, made on the default device one leaf at a time.

    Args:
      c: the architecture.
      dtype: of activations, float weights and scales.
      bits: of the layers' linears, or None for float ones; embedding, head and routers are float, as in AWQ
        checkpoints.
      group_size: of packed weights; -1: the whole column.
      seed: of the weights.

    Returns:
      The decoder's static part, and its parameters.

    Raises:
      ConfigError: the group size does not divide a layer, or does not fill words.
    """
    graphdef, state = model_params.abstract(c)
    numbers = iter(range(seed, seed + (1 << 30)))

    def leaf(path: str, like: jax.ShapeDtypeStruct) -> jax.Array | QuantizedTensor:
        key, shape = jax.random.key(next(numbers)), tuple(like.shape)
        if path.endswith(("norm/scale", "layernorm/scale")):
            return jnp.ones(shape, dtype)
        if bits is None or not path.startswith("layers/") or not path.endswith("/kernel") or "/gate/" in path:
            return _normal(key, shape, dtype, shape[-2] ** -0.5 if len(shape) > 1 else 0.02)
        *lead, k, n = shape
        g = k if group_size == -1 else group_size
        if k % g or g * bits % 32:
            raise ConfigError(f"groups of {g} do not divide the {k} rows of {path} into words; choose another")
        return QuantizedTensor(
            qweight=_bits(key, (*lead, k * bits // 32, n)),
            scales=jnp.full((*lead, k // g, n), k**-0.5 / 2 ** (bits - 2), dtype),  # codes span four deviations
            zeros=jnp.full((*lead, k // g, n), 2 ** (bits - 1), jnp.uint8),
            inv_scale=None,
            bits=bits,
            group_size=g,
            axes="b" * len(lead) + "kn",
            k_dims=(k,),
            n_dims=(n,),
            dtype=dtype,
        )

    return graphdef, paths.map_with_path(leaf, state)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))  # one program per shape, and no float32 copy
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: str, std: float) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.float32) * std).astype(dtype)


@functools.partial(jax.jit, static_argnums=1)
def _bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.bits(key, shape, jnp.uint32)
