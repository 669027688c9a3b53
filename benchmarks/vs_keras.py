"""One layer quantized by Keras's own AWQ and by ours: the error of its output on tokens that neither has seen.

    KERAS_BACKEND=jax python benchmarks/vs_keras.py          # in the environment `flax` of tests/zoo/make_envs.sh

An embedding whose channels differ in size, as the activations of language models do, and a Dense layer: 4 bits, groups
of 128, scales that are applied to the input at run time in both (Keras has no others). Writes results/vs_keras.json.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import keras
import numpy as np

import awq_jax

VOCAB, WIDTH, LENGTH, SEQUENCES, GROUP = 512, 512, 64, 32, 128
RESULTS = Path(__file__).parent / "results" / "vs_keras.json"


def parts(seed: int = 0) -> tuple[Any, Any]:
    """The embedding, and a block that is one Dense layer."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(size=WIDTH))
    embedding = keras.layers.Embedding(VOCAB, WIDTH)
    embedding.build((None, None))
    embedding.set_weights([rng.normal(size=(VOCAB, WIDTH)) * sizes])
    block = keras.Sequential([keras.Input((None, WIDTH)), keras.layers.Dense(WIDTH, use_bias=False, name="dense")])
    block.layers[-1].set_weights([rng.normal(size=(WIDTH, WIDTH)) / np.sqrt(WIDTH)])
    return embedding, block


def error(got: Any, want: Any) -> float:
    """Relative to the float layer's output."""
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def main() -> None:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, VOCAB, (SEQUENCES, LENGTH))
    held_out = jnp.asarray(rng.integers(0, VOCAB // 2, (8, LENGTH)), jnp.int32)

    embedding, block = parts()
    inputs, unseen = embedding(jnp.asarray(ids, jnp.int32)), embedding(held_out)
    fn, params = awq_jax.keras.functional(block)
    want = fn(params, unseen)
    rows: list[dict[str, Any]] = []
    calib = awq_jax.calibrate(fn, params, [inputs], include_head=True, progress=False)
    for method in ("rtn", "awq", "awq+gptq"):
        q = awq_jax.quantize(
            params, calib, group_size=GROUP, method=method, quantize_head=True, explicit_scale=True, progress=False
        )
        (packed,) = (a for a in jax.tree.leaves(q, is_leaf=awq_jax.qtensor.is_quantized) if hasattr(a, "inv_scale"))
        scaled = packed.inv_scale is not None and not bool((packed.inv_scale == 1).all())
        rows.append({"name": f"awq_jax {method}", "error": error(awq_jax.bind(fn)(q, unseen), want), "scaled": scaled})

    embedding, block = parts()
    structure = {"pre_block_layers": [embedding], "sequential_blocks": [block]}
    config = keras.quantizers.AWQConfig(
        dataset=list(ids), tokenizer=lambda x: x, num_samples=SEQUENCES, sequence_length=LENGTH, group_size=GROUP,
        quantization_layer_structure=structure,
    )  # fmt: skip
    outer = keras.Sequential([embedding, block])
    outer(held_out)
    outer.quantize("awq", config=config)
    scales = np.asarray(block.layers[-1].awq_scales)
    rows.append({"name": "keras awq", "error": error(block(unseen), want), "scaled": bool((scales != 1).any())})
    found = {
        "keras": keras.__version__, "jax": jax.__version__, "width": WIDTH, "bits": 4, "group_size": GROUP,
        "calibration_tokens": [SEQUENCES, LENGTH], "scored_tokens": held_out.size, "rows": rows,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
