"""Parameters keep the dtype they are stored in, and activations have the embedding's: in every family and path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import family_cases
import jax
import jax.numpy as jnp
import multimodal
import numpy as np
import pytest
import random_files
from flax import nnx
from random_files import config_of

import awq_jax
from awq_jax import convert, models, paths
from awq_jax.models.layers import cache
from awq_jax.models.vision import inputs, towers
from awq_jax.models.weights import fuse
from awq_jax.models.weights import params as model_params

KINDS = ("float32", "float16", "bfloat16")
TOKENS = np.random.default_rng(1).integers(3, 40, (4, 12)).astype(np.int32)
FAST: dict[str, Any] = {"group_size": 16, "method": "rtn", "progress": False}
VISION = {c.name: c for c in (*multimodal.CASES, *multimodal.CARRIED)}
FAMILIES = list({c.family: c.name for c in reversed(family_cases.CASES)}.values())


def mixed(path: str) -> str:
    """The embedding in bfloat16, everything else in one dtype or another."""
    return "bfloat16" if path == model_params.EMBEDDING else KINDS[sum(map(ord, path)) % 3]


def wide(path: str) -> str:
    """What may be pinned: all but the embedding and the large linears."""
    pinned = path.endswith(("/scale", "/bias", "/gate/kernel", "A_log", "dt_bias", "sinks", "correction", "conv"))
    return "float32" if pinned else "bfloat16"


@pytest.mark.parametrize("name", [*FAMILIES, *VISION])
def test_activations_have_the_dtype_of_the_embedding(name: str) -> None:
    """Whatever the others are: of the residual stream, of what the layers keep, and of what images become."""
    config = models.config_from_hf(config_of(name))
    graphdef, state = model_params.abstract(config)
    params = paths.map_with_path(lambda p, a: jax.ShapeDtypeStruct(a.shape, jnp.dtype(mixed(p))), state)

    def run(params: Any, tokens: jax.Array, images: Mapping[str, jax.Array]) -> Any:
        decoder = nnx.merge(graphdef, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x, kept = decoder.hidden(tokens, positions, None, images)
        grown = kept.grown(64)
        again, _ = decoder.hidden(tokens[:, :1], positions[:, -1:] + 1, grown)
        seen = decoder.look(tokens, positions, images)
        return x, again, grown, decoder.head(x), (seen.embedded, *seen.deep)

    images: dict[str, Any] = {}
    tokens = jnp.zeros((1, 8), jnp.int32)
    if name in VISION and VISION[name] in multimodal.CASES:
        batch = {k: np.asarray(v) for k, v in multimodal.rows(VISION[name])[0].items()}
        images = inputs.inputs(config, batch)[0]
        tokens = jnp.asarray(images.pop("input_ids"))
        images = dict(towers.pictures(config.vision, images))
    x, again, kept, logits, seen = jax.eval_shape(run, params, tokens, images)
    assert (x.dtype, again.dtype, logits.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert {a.dtype for a in seen} == {jnp.dtype(jnp.bfloat16)}
    for layer in kept.layers:
        fields = (layer.inputs,) if isinstance(layer, cache.Recurrent) else (layer.keys, layer.values)
        assert {a.dtype for a in fields} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("dtype", [mixed, wide])
@pytest.mark.parametrize(
    "name", ["llama", "glm4_moe", "qwen3_next", "gpt_oss", "gpt2", "apertus", "qwen3_vl", "gemma3"]
)
def test_loaded_and_saved_as_stored(name: str, dtype: Callable[[str], str], tmp_path: Path) -> None:
    stored = random_files.write(tmp_path / "model", config_of(name), dtype)
    model = awq_jax.load(tmp_path / "model")
    if dtype is wide or name != "gpt_oss":  # of which gate and up are one tensor
        assert {p: str(a.dtype) for p, a in paths.flatten(model.params).items()} == {
            p: dtype(p) for p in paths.flatten(model.params)
        }
    model.save(tmp_path / "saved")
    convert.checkpoint(tmp_path / "model", tmp_path / "converted", "float", workers=1)
    for directory in ("saved", "converted"):
        again = random_files.read(tmp_path / directory)[1]
        assert again.keys() == stored.keys()
        assert all(again[n].dtype == a.dtype and again[n].tobytes() == a.tobytes() for n, a in stored.items())
    half = awq_jax.load(tmp_path / "model", dtype="float16")
    assert all(a.dtype == jnp.float16 for p, a in paths.flatten(half.params).items() if not p.endswith("correction"))


@pytest.mark.parametrize("name", ["glm4_moe", pytest.param("qwen3_next", marks=pytest.mark.slow)])
def test_quantized_both_ways(name: str, tmp_path: Path) -> None:
    """Streamed and in memory are the same bytes, and what stays float has the dtype it had."""
    stored = random_files.write(tmp_path / "model", config_of(name) | {"num_hidden_layers": 2}, wide)
    model = awq_jax.load(tmp_path / "model")
    model.quantize(TOKENS, **FAST)
    model.save(tmp_path / "whole", "awq-jax")
    awq_jax.quantize_checkpoint(tmp_path / "model", tmp_path / "out", TOKENS, format="awq-jax", **FAST)
    whole, out = (random_files.read(tmp_path / d)[1] for d in ("whole", "out"))
    assert {n: a.tobytes() for n, a in whole.items()} == {n: a.tobytes() for n, a in out.items()}
    floats = [n for n in stored if n in out]
    assert all(out[n].dtype == stored[n].dtype for n in floats)
    assert {n for n in floats if n.endswith(("A_log", "correction_bias", "dt_bias"))} <= {
        n for n in floats if out[n].tobytes() == stored[n].tobytes()
    }
    assert any(n.endswith("gate.weight") and out[n].dtype == np.float32 for n in floats)


def test_float32_biases_and_norms_of_a_packed_model_change_no_dtype(tmp_path: Path) -> None:
    """Merged, in both dtypes of activations, and with the values of a model all of which is float32."""
    hf = config_of("llama") | {"attention_bias": True, "mlp_bias": True}
    random_files.write(tmp_path / "model", hf, lambda p: "bfloat16" if p.endswith("q_proj/bias") else wide(p))
    awq_jax.quantize_checkpoint(tmp_path / "model", tmp_path / "out", TOKENS, format="awq-jax", **FAST)
    ours, wider = awq_jax.load(tmp_path / "out"), awq_jax.load(tmp_path / "out", dtype="float32")
    want = np.asarray(wider(TOKENS))
    np.testing.assert_allclose(ours(TOKENS), want, atol=0.03 * np.abs(want).max())
    served = awq_jax.load(tmp_path / "out", merge=True, resident=False)
    before = jax.tree.map(np.asarray, paths.flatten(served.params))
    assert "4 of 4 groups" in served.explain()
    config = fuse.merged(ours.config, paths.flatten(ours.params))
    assert len(list(fuse.fusable(config))) == 2  # where nothing is widened: one of three biases differs in dtype
    after = jax.tree.map(np.asarray, paths.flatten(served.params))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, before)


def test_onto_a_mesh_as_stored(tmp_path: Path) -> None:
    random_files.write(tmp_path, config_of("glm4_moe"), wide)
    alone, spread = awq_jax.load(tmp_path), awq_jax.load(tmp_path, mesh=1)
    jax.tree.map(np.testing.assert_array_equal, paths.flatten(alone.params), paths.flatten(spread.params))
    assert all(a.dtype == wide(p) for p, a in paths.flatten(spread.params).items())
