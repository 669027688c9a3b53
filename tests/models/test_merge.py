"""Weights in the form in which they are served: merged, copied, and taken back to the bit."""

from __future__ import annotations

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quant_helpers import assert_bitwise, dense, random_packed
from random_decoders import MOE, TOKENS, decoder

from awq_jax import paths
from awq_jax.errors import WeightError
from awq_jax.kernels import native
from awq_jax.models.weights import fuse
from awq_jax.qtensor import is_quantized
from awq_jax.serve import cpu_copy
from awq_jax.serve.sampling import Sampling
from awq_jax.serve.served_weights import ServedWeights


def answer(generator, params):
    return generator.run(params, [[3, 7, 1, 9], [5]], max_new_tokens=6, sampling=Sampling())


@pytest.mark.parametrize(
    ("family", "changes", "expected"), [("llama", {"attention_bias": True}, 4), ("qwen2_moe", MOE, 6)]
)
def test_merged_model_is_the_same_model(family, changes, expected):
    config, graphdef, params = decoder(family, **changes)
    weights = ServedWeights(graphdef, config, params, copy=False)
    before = jax.tree.map(np.asarray, params)
    generator, _ = weights.as_held()
    want = generator.forward(params, TOKENS)
    said = answer(generator, params) if family == "llama" else None

    served, fused = weights.serving()
    assert len(list(fuse.fusable(config))) == expected
    assert not list(fuse.fusable(served.config))
    flat = paths.flatten(fused)
    assert "layers/0/self_attn/qkv_proj/kernel" in flat
    assert not any("q_proj" in path.split("/") for path in flat)
    assert weights.nbytes() == paths.nbytes(before)
    # Columns are independent; only the order in which a processor sums may depend on how many there are.
    np.testing.assert_allclose(served.forward(fused, TOKENS), want, atol=3e-6 * float(jnp.abs(want).max()))
    assert said is None or answer(served, fused) == said
    assert f"{expected} of {expected} groups" in weights.explain()

    assert_bitwise(weights.take_params(), before)
    assert weights.as_held()[0] is generator


def test_packed_weights_are_held_once():
    config, graphdef, params = decoder()
    weights = ServedWeights(graphdef, config, params, copy=False)
    gone = paths.flatten(params)["layers/0/self_attn/q_proj/kernel"].qweight
    kept = paths.flatten(params)["layers/0/self_attn/o_proj/kernel"].qweight
    weights.serving()
    held = jax.tree.leaves(weights.as_held()[1])
    assert any(a is kept for a in held)
    assert weights._kept is None
    assert not any(a is gone for a in held)


def test_only_linears_that_fit_each_other_are_merged():
    a, w = random_packed(32, 8, seed=1)
    b, v = random_packed(32, 16, seed=2)
    both = fuse.join([a, b])
    np.testing.assert_array_equal(dense(both), np.concatenate([dense(a), dense(b)], axis=1))
    np.testing.assert_allclose(dense(both), np.concatenate([w, v], axis=1), rtol=1e-6)
    assert_bitwise(fuse.split(both, [8, 16]), [a, b])
    assert fuse.obstacle([a, b]) is None
    scale, _ = random_packed(32, 8, inv_scale=True)
    shift = dataclasses.replace(scale, inv_scale=scale.inv_scale * 2)
    order = dataclasses.replace(a, perm=jnp.arange(32))
    for others, why in (
        ([a, random_packed(32, 8, bits=8)[0]], "bits"),
        ([a, random_packed(32, 8, group_size=32)[0]], "group_size"),
        ([a, random_packed(32, 8, symmetric=True)[0]], "symmetric"),
        ([a, random_packed(32, 8, dtype="bfloat16")[0]], "dtype"),
        ([a, dense(b)], "some are packed"),
        ([dense(a), dense(b).astype(jnp.bfloat16)], "dtypes differ"),
        ([scale, shift], "differ in inv_scale"),
        ([a, scale], "some have inv_scale"),
        ([order, dataclasses.replace(a, perm=jnp.arange(31, -1, -1))], "differ in perm"),
        ([random_packed(32, 8, axes="nkn", n_dims=(2, 4))[0]] * 2, "axes are nkn"),
    ):
        assert why in fuse.obstacle(others)
    assert fuse.obstacle([scale, scale]) is None
    assert fuse.obstacle([dense(a), dense(b)]) is None


def test_a_layer_with_other_settings_stays_as_it_is():
    config, graphdef, params = decoder()
    odd = "layers/1/self_attn/v_proj/kernel"
    params = paths.map_with_path(lambda p, leaf: leaf.dequantize() if p == odd else leaf, params)
    weights = ServedWeights(graphdef, config, params, copy=False)
    served, fused = weights.serving()
    assert [layer.attention.fused for layer in served.config.layers] == ["concatenated", None]
    want = weights._generators[config, False].forward(weights.take_params(), TOKENS)
    np.testing.assert_allclose(served.forward(fused, TOKENS), want, atol=3e-6 * float(jnp.abs(want).max()))


def test_without_its_kernel_a_cpu_serves_a_copy_if_there_is_room(monkeypatch, caplog):
    config, graphdef, params = decoder()
    if not isinstance(native.target(), str):
        assert "multiplied as they are by compiled code" in ServedWeights(graphdef, config, params).explain()
    config, graphdef, params = decoder()
    monkeypatch.setattr(native, "target", lambda name="": "its code cannot be compiled here: for a test")
    weights = ServedWeights(graphdef, config, params)
    with caplog.at_level(logging.INFO, "awq_jax"):
        generator, copy = weights.serving()
    assert weights.take_params() is params
    assert weights.as_held()[1] is params
    assert not any(map(is_quantized, paths.flatten(copy).values()))
    floats = sum(np.prod(leaf.shape) * 4 for leaf in paths.flatten(params).values() if is_quantized(leaf))
    assert cpu_copy.nbytes(params) == floats
    assert f"copy of {floats / 1e6:,.1f} MB" in caplog.text
    want = weights._generators[config, False].forward(params, TOKENS)
    np.testing.assert_allclose(generator.forward(copy, TOKENS), want, atol=3e-6 * float(jnp.abs(want).max()))

    monkeypatch.setattr(cpu_copy, "room", lambda: int(floats / cpu_copy.SHARE) - 1)
    weights.replace(params)
    assert "copy would take" in weights.explain()
    assert any(map(is_quantized, paths.flatten(weights.serving()[1]).values()))
    monkeypatch.setattr(cpu_copy, "room", lambda: None)
    weights.replace(params)
    assert weights.explain().startswith("served as a float32 copy")
    forced = ServedWeights(graphdef, config, params, merge_linears=False, copy=False)
    assert forced.explain().endswith("as was asked for")
    assert forced.serving()[0].config is config


def test_floats_of_16_bit_models_are_served_as_float32_and_given_back(monkeypatch):
    config, graphdef, params = decoder()
    half = paths.map_with_path(lambda p, leaf: cpu_copy.narrowed(leaf, jnp.bfloat16), params)
    before = paths.map_with_path(lambda p, leaf: jax.tree.map(np.asarray, leaf), half)
    weights = ServedWeights(graphdef, config, half, copy=False)
    size = weights.nbytes()
    served = paths.flatten(weights.serving()[1])
    assert {jnp.dtype(leaf.dtype).name for leaf in served.values()} == {"float32"}
    assert sum(map(is_quantized, served.values())) > 0
    floats = sum(leaf.size for leaf in paths.flatten(half).values() if not is_quantized(leaf))
    assert cpu_copy.widening(half) == 2 * floats
    assert "16-bit floats as float32" in weights.explain()
    assert weights.nbytes() == size
    assert_bitwise(weights.take_params(), before)
    assert weights.nbytes() == size

    monkeypatch.setattr(cpu_copy, "room", lambda: 4 * floats - 1)  # of which half may be taken
    weights.replace(half)
    assert "bfloat16" in {jnp.dtype(leaf.dtype).name for leaf in paths.flatten(weights.serving()[1]).values()}


def test_weights_lost_in_their_conversion_say_so(monkeypatch):
    config, graphdef, params = decoder()
    weights = ServedWeights(graphdef, config, params, copy=False)

    def full(*_):
        raise MemoryError("full")

    monkeypatch.setattr(fuse, "merged", full)
    with pytest.raises(MemoryError, match="full"):
        weights.serving()
    for again in (weights.serving, lambda: weights.take_params()):
        with pytest.raises(WeightError, match="load the model again"):
            again()


def test_copy_of_16_bit_models_is_float32():
    tree = {"w": random_packed(32, 4, dtype="bfloat16")[0], "norm": jnp.ones(3, jnp.bfloat16), "ids": jnp.arange(3)}
    copy = cpu_copy.resident(tree)
    assert [a.dtype for a in (copy["w"], copy["norm"], copy["ids"])] == [jnp.float32, jnp.float32, jnp.int32]
    assert cpu_copy.nbytes(tree) == 4 * (32 * 4 + 3)
    assert cpu_copy.resident({"w": (plain := jnp.ones(3))})["w"] is plain
    assert cpu_copy.room() is None or cpu_copy.room() > 0


def test_float_models_are_served_as_they_are_unless_asked():
    config, graphdef, params = decoder(packed=False)
    weights = ServedWeights(graphdef, config, params)
    assert weights.explain().startswith("served as float weights")
    assert all(a is b for a, b in zip(jax.tree.leaves(weights.as_held()[1]), jax.tree.leaves(params), strict=True))
    asked = ServedWeights(graphdef, config, params, merge_linears=True)
    assert "4 of 4 groups" in asked.explain()
    assert_bitwise(asked.take_params(), params)
