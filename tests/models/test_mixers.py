"""Routing, the gated delta rule and long-context rope against their definitions in NumPy; experts in files."""

from __future__ import annotations

import json

import family_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quant_helpers import assert_bitwise, random_like
from safetensors.numpy import save_file
from tiny_checkpoints import close, randomized

from awq_jax import models, paths
from awq_jax.convert import registry
from awq_jax.convert.source import Info
from awq_jax.errors import ConfigError, FormatError, UnsupportedModelError, WeightError
from awq_jax.models.config import MLPConfig, MoEConfig, RopeConfig
from awq_jax.models.layers import cache, rope
from awq_jax.models.layers.delta_net import CHUNK, delta_rule
from awq_jax.models.layers.moe import route
from awq_jax.models.weights import params as model_params

RNG = np.random.default_rng(0)
EXPERT = MLPConfig(8)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def same(ours, theirs):
    """Weights and experts as `route` returns them, against a dictionary for each token."""
    for weights, chosen, want in zip(*map(np.asarray, ours), theirs, strict=True):
        assert sorted(chosen) == sorted(want)
        np.testing.assert_allclose(weights, [want[int(e)] for e in chosen], rtol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_experts_of_the_best_groups_by_softmax(normalize):
    """DeepSeek-V2: a group is as good as its best expert."""
    logits = RNG.normal(size=(32, 12))
    config = MoEConfig(12, 3, EXPERT, normalize=normalize, groups=4, top_groups=2, scale=1.5)
    want = []
    for row in logits:
        scores = softmax(row)
        best = np.argsort(-scores.reshape(4, 3).max(axis=1))[:2]
        inside = [e for e in np.argsort(-scores) if e // 3 in best][:3]
        total = sum(scores[e] for e in inside) if normalize else 1.0
        want.append({int(e): 1.5 * scores[e] / total for e in inside})
    same(route(jnp.asarray(logits, jnp.float32), config), want)


def test_a_correction_decides_the_choice_and_not_the_weight():
    """DeepSeek-V3: sigmoids; a group is as good as its two best experts together."""
    logits, bias = RNG.normal(size=(32, 12)), RNG.normal(size=12)
    config = MoEConfig(12, 3, EXPERT, score="sigmoid", correction=True, groups=3, top_groups=2, group_best=2)
    want = []
    for row in logits:
        scores = 1 / (1 + np.exp(-row))
        ranked = scores + bias
        pairs = np.sort(ranked.reshape(3, 4), axis=1)[:, -2:].sum(axis=1)
        best = np.argsort(-pairs)[:2]
        inside = [e for e in np.argsort(-ranked) if e // 4 in best][:3]
        total = sum(scores[e] for e in inside)
        want.append({int(e): scores[e] / total for e in inside})
    same(route(jnp.asarray(logits, jnp.float32), config, jnp.asarray(bias)), want)


def test_sparsemixer_weighs_only_against_what_is_close():
    """arXiv 2409.12136, at inference: experts further than twice the jitter behind do not count."""
    logits = RNG.normal(size=(64, 6)) + 3.0
    jitter = 0.05
    want = []
    for row in logits:
        left, out = row.copy(), {}
        for _ in range(2):
            pick = int(np.argmax(left))
            close_by = (left[pick] - row) / np.maximum(np.abs(row), left[pick]) <= 2 * jitter
            gates = np.where(close_by & np.isfinite(left), np.exp(left - left[pick]), 0.0)
            out[pick] = gates[pick] / gates.sum()
            left[pick] = -np.inf
        want.append(out)
    same(route(jnp.asarray(logits, jnp.float32), MoEConfig(6, 2, EXPERT, score="sparsemixer", jitter=jitter)), want)


def recurrent(q, k, v, log_decay, beta, memory):
    """The gated delta rule token by token, in float64 (arXiv 2412.06464, equation 10)."""
    unit = lambda x: x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + 1e-6)  # noqa: E731
    each = v.shape[2] // k.shape[2]
    q, k = (np.repeat(unit(x), each, axis=2) for x in (q, k))
    out = np.zeros(v.shape)
    for b, t, h in np.ndindex(v.shape[:3]):
        state = memory[b, h] * np.exp(log_decay[b, t, h])
        state = state + beta[b, t, h] * np.outer(k[b, t, h], v[b, t, h] - k[b, t, h] @ state)
        memory[b, h] = state
        out[b, t, h] = q[b, t, h] @ state / np.sqrt(q.shape[-1])
    return out, memory


@pytest.mark.parametrize("length", [1, CHUNK + 7])
def test_the_gated_delta_rule_by_chunks_is_that_by_tokens(length):
    q, k = RNG.normal(size=(2, 2, length, 2, 5))
    v = RNG.normal(size=(2, length, 4, 3))
    log_decay, beta = -RNG.exponential(size=(2, length, 4)), RNG.uniform(size=(2, length, 4))
    memory = RNG.normal(size=(2, 4, 5, 3))
    arrays = [jnp.asarray(a, jnp.float32) for a in (q, k, v, log_decay, beta, memory)]
    with jax.default_matmul_precision("highest"):
        ours, state = delta_rule(*arrays)
    want, final = recurrent(q, k, v, log_decay, beta, memory.copy())
    close(ours, want, tol=1e-5)
    close(state, final, tol=1e-5)


def test_longrope_changes_its_factors_beyond_the_original_context():
    """phimoe gives a factor for short rows and one for long rows."""
    config = RopeConfig(
        "longrope",
        original_length=4,
        short_factors=(1.0, 2.0),
        long_factors=(3.0, 5.0),
        attention_factor=1.1,
        long_attention_factor=1.3,
    )
    positions = np.array([[0, 1, 2, 3, 3, 3], [0, 1, 2, 3, 4, 5]])
    cos, sin = rope.cos_sin(config, 4, jnp.asarray(positions))
    plain = 10000.0 ** -(np.arange(2) / 2)
    for row, stretch, factor in ((0, [1.0, 2.0], 1.1), (1, [3.0, 5.0], 1.3)):
        angle = positions[row][:, None] * plain / stretch
        np.testing.assert_allclose(cos[row, :, 0], np.cos(angle) * factor, atol=1e-6)
        np.testing.assert_allclose(sin[row, :, 0], np.sin(angle) * factor, atol=1e-6)


class Stub:
    """A checkpoint of given tensors."""

    def __init__(self, tensors):
        self.tensors = tensors

    def names(self):
        return list(self.tensors)

    def info(self, name):
        return Info(self.tensors[name].shape, str(self.tensors[name].dtype), 0)

    def read(self, name):
        return self.tensors[name]


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """A tiny random checkpoint whose experts lie in one tensor."""
    case = next(c for c in family_cases.CASES if c.name == "gpt_oss")
    directory = tmp_path_factory.mktemp("gpt_oss")
    randomized(case.family, family_cases.config_of(case)).save_pretrained(directory)
    return directory


def test_experts_in_one_tensor_are_packed_one_by_one(gpt_oss):
    """As floats gate and up alternate in one tensor of all experts; packed each linear has its own, and its bias."""
    source = registry.open_source(gpt_oss)
    config = models.config_from_hf(source.config)
    state = model_params.load(source, config, model_params.abstract(config)[1])
    place = "layers/1/mlp/experts/up_proj/kernel"
    packed = paths.map_with_path(lambda p, w: random_like(w, "bkn") if p == place else w, state)
    stored = dict(model_params.tensors(packed, config))
    start = "model.layers.1.mlp.experts"
    names = {f"{start}.{e}.{h}_proj.{p}" for e in range(4) for h in ("gate", "up", "down") for p in ("weight", "bias")}
    assert {n for n in stored if n.startswith(start)} == names
    bias, kernel = (source.read(f"{start}.gate_up_proj{end}") for end in ("_bias", ""))
    for e in range(4):
        np.testing.assert_array_equal(stored[f"{start}.{e}.gate_proj.bias"], bias[e, 0::2])
        np.testing.assert_array_equal(stored[f"{start}.{e}.up_proj.bias"], bias[e, 1::2])
        np.testing.assert_array_equal(stored[f"{start}.{e}.gate_proj.weight"], kernel[e, :, 0::2].T)
        assert stored[f"{start}.{e}.up_proj.weight"].axes == "nk"
    again = model_params.load(Stub(stored), config, state)
    assert_bitwise(again, packed)


@pytest.mark.parametrize(("method", "remedy"), [("mxfp4", "Mxfp4Config"), ("fp8", "FineGrainedFP8Config")])
def test_published_low_precision_is_refused_with_a_remedy(gpt_oss, tmp_path, method, remedy):
    config = json.loads((gpt_oss / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=remedy):
        registry.open_source(tmp_path)


def test_what_chooses_experts_is_not_rounded_and_further_heads_are_dropped():
    """DeepSeek-V3 stores corrections as float32, and a layer after the last that predicts one more token."""
    case = next(c for c in family_cases.CASES if c.name == "deepseek_v3")
    hf = {"model_type": case.family} | family_cases.config_of(case)
    config = models.config_from_hf(hf)
    _, state = model_params.abstract(config)
    blank = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.bfloat16), state)
    tensors = dict(model_params.tensors(blank, config))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[name] = np.linspace(14, 14.01, 8, dtype=np.float32)
    tensors["model.layers.2.eh_proj.weight"] = np.zeros((2, 2), np.float32)
    loaded = model_params.load(Stub(tensors), config, state)
    flat = paths.flatten(loaded)
    assert flat["layers/1/mlp/gate/kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(flat["layers/1/mlp/correction"], tensors[name])
    tensors["model.layers.3.eh_proj.weight"] = np.zeros((2, 2), np.float32)
    with pytest.raises(WeightError, match=r"layers\.3\.eh_proj"):
        model_params.load(Stub(tensors), config, state)


def test_a_prefill_without_a_cache_is_continued():
    """As generation does it: what attention keeps gets more slots, the state of a delta net stays as it is."""
    case = next(c for c in family_cases.CASES if c.name == "qwen3_next")
    config = models.config_from_hf({"model_type": case.family} | family_cases.config_of(case))
    graphdef, params = nnx.split(models.Decoder(config, rngs=nnx.Rngs(0)))
    tokens = RNG.integers(0, 64, (2, 8))
    lengths = np.array([7, 4])

    @jax.jit
    def run(params):
        decoder = nnx.merge(graphdef, params)
        positions = jnp.minimum(jnp.arange(7), lengths[:, None] - 1)
        _, cache = decoder.hidden(tokens[:, :7], positions, None)
        hidden, _ = decoder.hidden(tokens[[0, 1], lengths][:, None], lengths[:, None], cache.grown(10))
        return decoder.head(hidden)[:, 0], decoder(tokens)[jnp.arange(2), lengths]

    close(*run(params))


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gemma3", "qwen3_next"])
def test_the_cache_grows_by_what_it_says(name):
    """Every kind of it: keys and values, out of latents, under a window, and the state of a delta net."""
    case = next(c for c in family_cases.CASES if c.name == name)
    config = models.config_from_hf({"model_type": case.family} | family_cases.config_of(case))

    def size(make):
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(make)))

    def made():
        return models.init_cache(config, 1, 8, jnp.bfloat16)

    per_token = cache.bytes_per_token(config, 1)
    assert size(lambda: models.init_cache(config, 1, 11, jnp.bfloat16)) == size(made) + 3 * per_token
    assert size(lambda: made().grown(11)) == size(made) + 3 * per_token
    assert cache.bytes_per_token(config, 7) == per_token  # heads that are not shared out


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("deepseek_v3", {"n_group": 3}, ConfigError, "8 experts in 3 groups"),
        ("deepseek_v3", {"num_experts_per_tok": 5}, ConfigError, "5 experts per token of 8 in 2 of 4 groups"),
        ("deepseek_v3", {"scoring_func": "softmax"}, UnsupportedModelError, "scoring_func 'softmax'"),
        ("deepseek_v2", {"norm_topk_prob": True}, UnsupportedModelError, "norm_topk_prob"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, UnsupportedModelError, "topk_method 'noaux_tc'"),
        ("phimoe", {"num_experts_per_tok": 1}, UnsupportedModelError, "2 experts per token"),
        ("phimoe", {"rope_scaling": {"rope_type": "longrope"}}, ConfigError, "short_mscale"),
        ("qwen3_next", {"layer_types": ["mamba", "mamba"]}, UnsupportedModelError, "mamba"),
    ],
)
def test_configs_that_make_no_sense_are_refused(name, change, error, message):
    case = next(c for c in family_cases.CASES if c.name == name)
    with pytest.raises(error, match=message):
        models.config_from_hf({"model_type": case.family} | family_cases.config_of(case) | change)
