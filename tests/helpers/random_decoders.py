"""Reference decoders with random weights, packed or float."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import tiny_checkpoints
from quant_helpers import random_like

from awq_jax import models, paths
from awq_jax.models.weights import params as model_params

MOE = {
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def decoder(family="llama", packed=True, seed=0, **changes):
    """Config, static part and random parameters; kernels of layers are packed."""
    config = models.config_from_hf({"model_type": family} | tiny_checkpoints.SIZES | changes)
    graphdef, state = model_params.abstract(config)
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        if path.startswith("layers") and path.endswith("kernel") and "/gate/" not in path and packed:
            like = jax.ShapeDtypeStruct(shape.shape, jnp.float32)
            axes = "bkn" if len(shape.shape) == 3 else "kn"
            return random_like(like, axes, group_size=16, seed=int(rng.integers(1 << 30)))
        return jnp.asarray(rng.normal(size=shape.shape) * 0.2, jnp.float32)

    return config, graphdef, paths.map_with_path(leaf, state)


TOKENS = np.random.default_rng(0).integers(0, 258, (2, 9)).astype(np.int32)
