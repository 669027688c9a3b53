"""A checkpoint of MaxText, quantized as its own model computes, stored with Orbax and decoded with its cache.

python examples/maxtext_app.py OUT base.yml load_parameters_path=CHECKPOINT/0/items model_name=llama2-7b ...

What follows OUT is what MaxText's own programs take. Both layouts are read: layers stacked (scan_layers=true, the
default) and one by one, saved by Linen or by NNX. Random ids stand for texts: yours come from the model's tokenizer.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from maxtext.common.common_types import MODEL_MODE_AUTOREGRESSIVE
from maxtext.configs import pyconfig
from maxtext.utils import maxtext_utils, model_creation_utils

import awq_jax


def main(out: Path, arguments: Sequence[str], batches: Sequence[np.ndarray] = (), length: int = 16) -> list[int]:
    """Ids that the packed model continues the first 8 of the first batch with; ``batches`` are ids ``[B, T]``."""
    config: Any = pyconfig.initialize(["maxtext_app", *arguments])
    jax.set_mesh(mesh := maxtext_utils.get_mesh_from_config(config))
    model = model_creation_utils.from_pretrained(config, mesh=mesh, model_mode=MODEL_MODE_AUTOREGRESSIVE)
    graph, params, *others = nnx.split(model, nnx.Param, nnx.Cache, ...)
    cache, rest = others

    def forward(params: Any, ids: jax.Array) -> jax.Array:
        """All tokens at once, as in training; here the plan is found, and calibrated."""
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        merged = nnx.merge(graph, params, cache, rest, copy=True)
        return merged(ids, positions, jnp.ones_like(ids), enable_dropout=False)

    def step(params: Any, cache: Any, ids: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
        """One token ``[B, 1]`` with the keys and values of those before it."""
        merged = nnx.merge(graph, params, cache, rest, copy=True)
        positions = jnp.full(ids.shape, position)
        logits = merged(ids, positions, enable_dropout=False, model_mode=MODEL_MODE_AUTOREGRESSIVE)
        return logits, nnx.state(merged, nnx.Cache)

    if not batches:
        rng = np.random.default_rng(0)
        batches = [rng.integers(0, config.vocab_size, (8, config.max_target_length)) for _ in range(4)]
    calib = awq_jax.calibrate(forward, params, [jnp.asarray(b, jnp.int32) for b in batches])
    awq_jax.convert.store(out, awq_jax.quantize(params, calib, bits=4, group_size=32, on_indivisible="float"))

    packed = awq_jax.convert.restore(out, like=params)
    serve = jax.jit(awq_jax.bind(step))
    ids = [int(i) for i in batches[0][0][:8]]
    for position in range(len(ids) + length - 1):
        token = jnp.full((config.global_batch_size_to_load, 1), ids[position], jnp.int32)
        logits, cache = serve(packed, cache, token, jnp.asarray(position))
        if position + 1 == len(ids):  # the prompt is read
            ids.append(int(logits[0, -1].argmax()))
    return ids[8:]


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), sys.argv[2:]))
