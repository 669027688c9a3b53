"""The decode measurement: its weights are a working model, its numbers fit each other."""

from __future__ import annotations

import numpy as np
import pytest

from awq_jax import bench_decode, paths
from awq_jax.errors import ConfigError
from awq_jax.models import config_from_hf
from awq_jax.qtensor import is_quantized


def test_a_tiny_model_is_measured():
    row = bench_decode.decode("tiny", batch=2, context=5, steps=3, repeats=1, dtype="float32", bandwidth=1e9)
    np.testing.assert_allclose(row["tokens_per_second"] * row["ms_per_step"], 2e3)
    np.testing.assert_allclose(row["floor_share"], row["floor_ms"] / row["ms_per_step"])
    hidden, inner, vocab, kv, layers = 128, 256, 256, 64, 2
    per_layer = hidden * (2 * hidden + 2 * kv) + 3 * hidden * inner + 2 * hidden
    served = 4 * (layers * per_layer + hidden + 2 * vocab * hidden)  # on CPU, from a float32 copy
    assert row["weight_bytes"] == served
    cache = 2 * layers * 2 * 64 * kv * 4
    assert row["bytes_per_step"] == served - 4 * vocab * hidden + cache
    assert row["floor_ms"] == row["bytes_per_step"] / 1e9 * 1e3
    assert "copy" in row["served"]


def test_weights_are_packed_as_awq_packs_them():
    config = config_from_hf(bench_decode.SHAPES["tiny"])
    _, params = bench_decode.random_params(config, "bfloat16", bits=4, group_size=64)
    flat = paths.flatten(params)
    packed = {path for path, leaf in flat.items() if is_quantized(leaf)}
    assert len(packed) == 14
    assert {path.split("/")[0] for path in packed} == {"layers"}
    w = np.asarray(flat["layers/0/mlp/down_proj/kernel"].dequantize("float32"))
    assert 0.5 < w.std() * 256**0.5 < 2
    assert len(np.unique(w)) == 16
    _, floats = bench_decode.random_params(config, "bfloat16", packed=False)
    assert not any(map(is_quantized, paths.flatten(floats).values()))


def test_published_shapes_and_refusals():
    for name, billions in (("llama-2-7b", 6.74), ("llama-3-8b", 8.03)):
        config = config_from_hf(bench_decode.SHAPES[name])
        leaves = paths.flatten(bench_decode.model_params.abstract(config)[1]).values()
        assert abs(sum(np.prod(leaf.shape, dtype=float) for leaf in leaves) / 1e9 - billions) < 0.01
    for options, why in (({"shape": "llama-9"}, "llama-2-7b"), ({"shape": "tiny", "steps": 0}, "at least 1")):
        with pytest.raises(ConfigError, match=why):
            bench_decode.decode(**options)
    with pytest.raises(ConfigError, match="context of 4096"):
        bench_decode.decode("tiny", context=5000)
    with pytest.raises(ConfigError, match="groups of 96"):
        bench_decode.decode("tiny", group_size=96, bandwidth=1.0)
    assert bench_decode.copy_bandwidth(2**20) > 0
