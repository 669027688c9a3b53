"""The reference decoder against transformers on tiny random checkpoints."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints
import torch
from flax import nnx
from tiny_checkpoints import close

from awq_jax import errors, models
from awq_jax.convert.source import Info
from awq_jax.models.weights import params as model_params
from awq_jax.qtensor import QuantizedTensor

PROMPT, STEPS = 10, 3
LENGTHS = np.array([PROMPT, 6])


class Memory:
    """A checkpoint in memory, in the shape of `awq_jax.convert.source.Source`."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        tied = model.config.tie_word_embeddings
        self.tensors = {k: v.numpy() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}

    def names(self):
        return list(self.tensors)

    def info(self, name):
        return Info(self.tensors[name].shape, str(self.tensors[name].dtype), 0)

    def read(self, name):
        return self.tensors[name]


def build(model: torch.nn.Module, source: Memory | None = None, **kwargs):
    config = models.config_from_hf(model.config.to_dict())
    graphdef, state = model_params.abstract(config)
    return config, graphdef, model_params.load(source or Memory(model), config, state, **kwargs)


@pytest.fixture(autouse=True)
def _exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("case", tiny_checkpoints.CASES, ids=lambda c: c.name)
def test_logits_equal_transformers(case):
    """Batch of two, one row padded: whole sequence at once, then prefill and single steps with the cache."""
    torch_model = tiny_checkpoints.torch_model(case.family, **case.changes)
    config, graphdef, params = build(torch_model)
    assert config.family == case.family
    rng = np.random.default_rng(0)
    total = PROMPT + STEPS
    tokens = rng.integers(0, 256, (2, total)).astype(np.int32)

    @jax.jit
    def run(params, tokens, positions, cache):
        decoder = nnx.merge(graphdef, params)
        hidden, cache = decoder.hidden(tokens, positions, cache)
        return decoder.head(hidden), cache

    with torch.no_grad():
        # transformers remembers the longest sequence for dynamic rope: score the steps first, shortest first
        theirs = {}
        for b, n in enumerate(LENGTHS):
            past = None
            out = torch_model(torch.tensor(tokens[b : b + 1, :n]), use_cache=True)
            theirs[b, n - 1], past = out.logits[0, -1], out.past_key_values
            for i in range(n, n + STEPS):
                out = torch_model(torch.tensor(tokens[b : b + 1, i : i + 1]), past_key_values=past, use_cache=True)
                theirs[b, i] = out.logits[0, -1]
        mask = torch.tensor(np.arange(total) < LENGTHS[:, None] + STEPS)
        if "dynamic" in case.name:  # there its frequencies depend on the batch's longest row, ours on each row's
            whole = [torch_model(torch.tensor(tokens[b : b + 1])).logits[0] for b in (0, 1)]
            mask = torch.ones_like(mask)
        else:
            whole = torch_model(torch.tensor(tokens), attention_mask=mask.long()).logits

    ours = jax.jit(lambda p, t: nnx.merge(graphdef, p)(t))(params, tokens)
    assert ours.shape == (2, total, config.vocab_size)
    assert ours.dtype == jnp.float32
    for b in (0, 1):
        close(ours[b][mask[b].numpy()], whole[b][mask[b]])

    cache = models.init_cache(config, 2, 16, jnp.float32)
    positions = np.minimum(np.arange(PROMPT), LENGTHS[:, None] - 1)
    logits, cache = run(params, tokens[:, :PROMPT], positions, cache)
    for b, n in enumerate(LENGTHS):
        close(logits[b, n - 1], theirs[b, n - 1])
    for step in range(STEPS):
        at = LENGTHS + step
        logits, cache = run(params, tokens[[0, 1], at][:, None], at[:, None], cache)
        for b in (0, 1):
            close(logits[b, 0], theirs[b, at[b]])


def test_load_keeps_or_casts_the_dtype():
    source = Memory(tiny_checkpoints.torch_model("llama"))
    for dtype in (None, "bfloat16"):
        _, graphdef, params = build(source.model, source, dtype=dtype)
        assert {str(a.dtype) for a in jax.tree.leaves(params)} == {dtype or "float32"}
        assert nnx.merge(graphdef, params)(np.ones((1, 3), np.int32)).dtype == jnp.float32
    source.tensors = {k: v.astype(np.float16) for k, v in source.tensors.items()}
    assert {str(a.dtype) for a in jax.tree.leaves(build(source.model, source)[2])} == {"float16"}


def test_packed_weights_load_and_run():
    """A packed linear in PyTorch's orientation gives what its dequantized weight gives, to the bit of its bytes."""
    source = Memory(tiny_checkpoints.torch_model("qwen2"))
    name = "model.layers.1.mlp.down_proj.weight"
    rng = np.random.default_rng(1)
    packed = QuantizedTensor(
        qweight=rng.integers(0, 2**32, (48 * 4 // 32, 32), dtype=np.uint32),
        scales=rng.uniform(0.01, 0.05, (3, 32)).astype(np.float16),
        zeros=rng.integers(0, 16, (3, 32), dtype=np.uint8),
        inv_scale=None,
        bits=4,
        group_size=16,
        axes="nk",
        k_dims=(48,),
        n_dims=(32,),
        dtype="float16",
    )
    tokens = rng.integers(0, 256, (2, 5))
    source.tensors[name] = np.asarray(packed.dequantize("float32"))
    _, graphdef, params = build(source.model, source)
    want = nnx.merge(graphdef, params)(tokens)
    source.tensors[name] = packed
    config, graphdef, params = build(source.model, source)
    leaf = params["layers"][1]["mlp"]["down_proj"]["kernel"].get_value()
    assert (leaf.axes, leaf.shape, leaf.dtype) == ("kn", (48, 32), "float32")
    close(jax.jit(lambda p, t: nnx.merge(graphdef, p)(t))(params, tokens), want)
    back = dict(model_params.tensors(params, config))
    assert back[name].axes == "nk"
    np.testing.assert_array_equal(back[name].qweight, packed.qweight)


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_returns_what_load_read(tied):
    source = Memory(
        tiny_checkpoints.torch_model("smollm3", attention_bias=True, mlp_bias=True, tie_word_embeddings=tied)
    )
    config, _, params = build(source.model, source)
    back = dict(model_params.tensors(params, config))
    assert back.keys() == source.tensors.keys()
    for name, value in source.tensors.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def drop(t):
    del t["model.layers.1.self_attn.v_proj.weight"]


def add(t):
    t["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)


def misshape(t):
    t["model.layers.0.mlp.up_proj.weight"] = np.zeros((32, 48), np.float32)


def poison(t):
    t["model.norm.weight"] = np.full(32, np.nan, np.float32)


def overflow(t):
    t["lm_head.weight"] = np.full((288, 32), np.inf, np.float32)


def integers(t):
    t["model.layers.0.mlp.gate_proj.weight"] = np.zeros((48, 32), np.int32)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (drop, errors.WeightError, r"lacks model\.layers\.1\.self_attn\.v_proj\.weight; is it complete"),
        (add, errors.WeightError, r"holds model\.layers\.0\.self_attn\.q_proj\.bias, which a llama model"),
        (misshape, errors.ShapeError, r"layers\.0\.mlp\.up_proj\.weight has shape \(32, 48\).*\(48, 32\)"),
        (poison, errors.WeightError, r"model\.norm\.weight holds NaN or inf"),
        (overflow, errors.WeightError, r"lm_head\.weight holds NaN or inf"),
        (integers, errors.WeightError, r"layers\.0\.mlp\.gate_proj\.weight is int32"),
    ],
)
def test_bad_tensors_are_named(damage, error, message):
    source = Memory(tiny_checkpoints.torch_model("llama"))
    damage(source.tensors)
    with pytest.raises(error, match=message):
        build(source.model, source)


def test_old_buffers_and_a_tied_head_are_ignored():
    source = Memory(tiny_checkpoints.torch_model("llama", tie_word_embeddings=True))
    source.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    source.tensors["lm_head.weight"] = np.zeros((288, 32), np.float32)
    assert "lm_head" not in build(source.model, source)[2]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"model_type": "llama9"},
            errors.UnsupportedModelError,
            r"'llama9'.*relative is 'llama'.*docs/extending/family.md",
        ),
        ({"model_type": "qwen2_audio"}, errors.UnsupportedModelError, "relative is 'qwen2"),
        ({"model_type": None}, errors.UnsupportedModelError, "config.json has no model_type"),
        ({"hidden_act": "xielu"}, errors.UnsupportedModelError, "hidden_act 'xielu'"),
        ({"rope_parameters": {"rope_type": "spiral"}}, errors.UnsupportedModelError, "rope scaling 'spiral'"),
        ({"rope_scaling": {"type": "linear"}}, errors.ConfigError, "needs a factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, errors.ConfigError, "needs .*high_freq_factor"),
        ({"hidden_size": None}, errors.ConfigError, "hidden_size must be a positive integer; got None"),
        ({"num_key_value_heads": 3}, errors.ConfigError, "4 query heads over 3"),
        ({"model_type": "qwen2", "layer_types": ["linear_attention"] * 2}, errors.UnsupportedModelError, "linear_att"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, errors.ConfigError, "1 entries for 2 layers"),
    ],
)
def test_bad_configs_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        models.config_from_hf(tiny_checkpoints.SIZES | {"model_type": "llama"} | change)


def test_a_config_from_before_transformers_5_means_the_same():
    """``rope_theta`` and ``rope_scaling`` at the top level, ``type`` for ``rope_type``."""
    old = tiny_checkpoints.SIZES | {
        "model_type": "llama",
        "rope_theta": 5e5,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    new = tiny_checkpoints.SIZES | {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
    }
    assert models.config_from_hf(old) == models.config_from_hf(new)
    rope = models.config_from_hf(new).layers[0].rope
    assert rope == models.RopeConfig("linear", theta=5e5, factor=2.0, original_length=64)
