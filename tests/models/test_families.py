"""Every model family: logits as transformers', an exact plan, and packed weights that come back."""

from __future__ import annotations

import dataclasses
import functools
import math

import family_cases
import jax
import jax.numpy as jnp
import model_table
import multimodal
import numpy as np
import peer_mappings
import pytest
import torch
from flax import nnx
from tiny_checkpoints import close, randomized

import awq_jax
from awq_jax import models, paths
from awq_jax.cli import quantizable
from awq_jax.config import AwqConfig
from awq_jax.convert import conversion, registry, writing
from awq_jax.models.layers.moe import by_expert
from awq_jax.models.weights import params as model_params
from awq_jax.plan import verify
from awq_jax.qtensor import QuantizedTensor, is_quantized, split_shape
from awq_jax.quantizer.targets import select
from awq_jax.serve.sampling import Sampling

PROMPT, STEPS = 10, 2
LENGTHS = np.array([PROMPT, 6])
TOKENS = np.random.default_rng(0).integers(3, 64, (2, PROMPT + STEPS)).astype(np.int32)


@dataclasses.dataclass
class Pair:
    """The same random model in transformers and here."""

    theirs: torch.nn.Module
    source: registry.Source
    config: models.ModelConfig
    graphdef: nnx.GraphDef
    params: nnx.State

    def apply(self, params, tokens):
        return nnx.merge(self.graphdef, params)(tokens)

    @functools.cached_property
    def run(self):
        return jax.jit(self.apply)

    @functools.cached_property
    def plan(self):
        return awq_jax.discover(self.apply, self.params, jax.ShapeDtypeStruct((1, 4), np.int32))


def _param(case):
    return pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.name in family_cases.SLOW else [])


@pytest.fixture(scope="module", params=map(_param, family_cases.CASES))
def case(request):
    return request.param


@pytest.fixture(scope="module")
def pair(case, tmp_path_factory):
    theirs = randomized(case.family, family_cases.config_of(case), case.attention)
    directory = tmp_path_factory.mktemp(case.name)
    theirs.save_pretrained(directory)
    source = registry.open_source(directory)
    config = models.config_from_hf(source.config)
    graphdef, state = model_params.abstract(config)
    return Pair(theirs, source, config, graphdef, model_params.load(source, config, state))


@pytest.fixture(autouse=True)
def _exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


def test_logits_equal_transformers(pair):
    """Rows of two lengths: whole and padded, then prefill and single steps with the cache."""
    mask = np.arange(TOKENS.shape[1]) < (LENGTHS + STEPS)[:, None]
    with torch.no_grad():
        whole = pair.theirs(torch.tensor(TOKENS), attention_mask=torch.tensor(mask).long()).logits.numpy()
        rows = [
            pair.theirs(torch.tensor(t[None, : n + STEPS])).logits[0].numpy()
            for t, n in zip(TOKENS, LENGTHS, strict=True)
        ]
    ours = np.asarray(pair.run(pair.params, TOKENS))
    close(ours[mask], whole[mask])

    @functools.partial(jax.jit, donate_argnums=3)
    def run(params, tokens, positions, cache):
        decoder = nnx.merge(pair.graphdef, params)
        hidden, cache = decoder.hidden(tokens, positions, cache)
        return decoder.head(hidden), cache

    cache = models.init_cache(pair.config, 2, 16, jnp.float32)
    positions = np.minimum(np.arange(PROMPT), LENGTHS[:, None] - 1)
    logits, cache = run(pair.params, TOKENS[:, :PROMPT], positions, cache)
    for b, n in enumerate(LENGTHS):
        close(logits[b, :n], rows[b][:n])
    for step in range(STEPS):
        at = LENGTHS + step
        logits, cache = run(pair.params, TOKENS[[0, 1], at][:, None], at[:, None], cache)
        for b in (0, 1):
            close(logits[b, 0], rows[b][at[b]])


def test_names_come_back(pair):
    """What is written has the names, shapes and bytes of what was read."""
    back = dict(model_params.tensors(pair.params, pair.config))
    assert set(back) == set(pair.source.names())
    for name, value in back.items():
        np.testing.assert_array_equal(value, pair.source.read(name), err_msg=name)


def test_plan_is_exact_and_complete(pair, case):
    """Random scales on all groups leave the logits alone, and only the groups the case lists have none."""
    plan = pair.plan
    weights = {s.path for _, s in plan.sites()}
    linears = {p for p in paths.flatten(pair.params) if p.endswith("/kernel")}
    assert linears <= weights | set(plan.skipped)
    unscaled = {
        g.name.removeprefix("layers/1/") for g in plan.groups if not g.absorbers and g.name.startswith("layers/1/")
    }
    assert unscaled == set(case.unscaled)
    proven = verify.verify(plan, pair.apply, pair.params, TOKENS[:1, :6])
    assert [g.reason for g in proven.groups] == [g.reason for g in plan.groups]


def test_every_family_has_a_case():
    cases = (*family_cases.CASES, *multimodal.CASES, *multimodal.CARRIED)
    assert {c.name for c in cases} >= family_cases.SLOW
    assert {c.family for c in cases if c.name not in family_cases.SLOW} == set(models.supported())


def test_the_table_of_families_is_current():
    assert model_table.PAGE.read_text() == model_table.page(), "run python docs/_build/model_table.py"


@pytest.mark.parametrize("peer", peer_mappings.PEERS)
def test_what_the_peers_scale_is_scaled(peer):
    """Every group of theirs lies in one of ours, but for those that are explained."""
    for family, theirs in peer_mappings.PEERS[peer].items():
        ours, _ = quantizable.rows(model_table.groups_of(family))
        lacking = set(peer_mappings.lacking(ours, theirs))
        explained = set(peer_mappings.EXPLAINED) & set(theirs)
        assert lacking == explained, family


def test_a_group_that_differs_from_the_peers_is_noticed():
    theirs = peer_mappings.LLAMA
    assert peer_mappings.compared("llama", theirs) == "AutoAWQ and llm-compressor: the same"
    assert peer_mappings.lacking(theirs[1:], theirs) == [theirs[0]]
    assert peer_mappings.lacking(["q k <- input_layernorm", *theirs[1:]], theirs) == [theirs[0]]
    assert peer_mappings.lacking(["q k v <- norm", *theirs[1:]], theirs) == [theirs[0]]
    more = ["q k v x <- input_layernorm", *theirs[1:], "x <- y"]
    assert peer_mappings.lacking(more, theirs) == []
    assert peer_mappings.beyond(more, theirs) == ["x <- input_layernorm", "x <- y"]


def packed_like(target, rng):
    """Random codes in place of a weight, with the axes that the quantizer would give it."""
    batch, k_dims, n_dims = split_shape(target.site.shape, target.site.canonical_axes)
    k, n, g = target.k, math.prod(n_dims), target.leaf.group_size
    return QuantizedTensor(
        qweight=jnp.asarray(rng.integers(0, 2**32, (*batch, k // 8, n), dtype=np.uint32)),
        scales=jnp.asarray(rng.uniform(0.01, 0.06, (*batch, k // g, n)), jnp.float16),
        zeros=jnp.asarray(rng.integers(5, 11, (*batch, k // g, n), dtype=np.uint8)),
        inv_scale=None,
        bits=4,
        group_size=g,
        axes=target.site.canonical_axes,
        k_dims=k_dims,
        n_dims=n_dims,
        dtype="float32",
    )


def unpacked(w):
    """The float32 array that a weight of `packed_like` stands for, in NumPy."""
    words, zeros = np.asarray(w.qweight), np.asarray(w.zeros).astype(np.float32)
    codes = words[..., None, :] >> np.arange(0, 32, 4, dtype=np.uint32)[:, None] & 15
    codes = codes.reshape(*words.shape[:-2], -1, words.shape[-1])
    scales, zeros = (np.repeat(a, w.group_size, axis=-2) for a in (np.asarray(w.scales, np.float32), zeros))
    value = ((codes - zeros) * scales).reshape(*words.shape[:-2], *w.k_dims, *w.n_dims)
    return value.transpose(np.argsort(sorted(range(len(w.axes)), key=lambda i: "bkn".index(w.axes[i]))))


def test_packed_weights_come_back(pair, tmp_path):
    """Logits are those of the dequantized weights, and what is saved is loaded to the bit."""
    targets, _ = select(pair.plan, AwqConfig(group_size=16, on_indivisible="float"))
    rng = np.random.default_rng(0)
    packed = paths.map_with_path(lambda p, w: packed_like(targets[p], rng) if p in targets else w, pair.params)
    dense = paths.map_with_path(lambda _, w: unpacked(w) if is_quantized(w) else w, packed)
    close(pair.run(packed, TOKENS), pair.run(dense, TOKENS))

    for format in ("gemm", "compressed-tensors"):
        tensors, config = model_params.tensors(packed, pair.config), pair.source.config
        writing.write_checkpoint(tmp_path / format, tensors, config, format, extra=pair.source)
        again = model_params.load(registry.open_source(tmp_path / format), pair.config, pair.params, "float32")
        for path, leaf in paths.flatten(again).items():
            want = by_expert(paths.flatten(packed)[path])
            assert is_quantized(leaf) == (path in targets)
            for a, b in zip(jax.tree.leaves(leaf), jax.tree.leaves(want), strict=True):
                np.testing.assert_array_equal(a, b, err_msg=path)

    # As float they are what transformers saves of the family, tensor by tensor.
    want = dict(model_params.tensors(dense, pair.config))
    conversion.checkpoint(tmp_path / "gemm", tmp_path / "converted", "float", dtype="float32")
    tensors = model_params.tensors(packed, pair.config)
    writing.write_checkpoint(tmp_path / "written", tensors, config, "float", extra=pair.source)
    for directory in ("converted", "written"):
        found = registry.open_source(tmp_path / directory)
        assert set(found.names()) == set(pair.source.names())
        for name in found.names():
            assert found.shape(name) == pair.source.shape(name)
            np.testing.assert_allclose(found.read(name), want[name], rtol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_mixture_of_experts_is_quantized_and_comes_back(tmp_path):
    """Through `Model.quantize`: routers stay float, experts share their inputs' scale with them."""
    case = next(c for c in family_cases.CASES if c.name == "mixtral")
    randomized(case.family, family_cases.config_of(case)).save_pretrained(tmp_path / "float")
    model = awq_jax.load(tmp_path / "float")
    report = model.quantize(TOKENS, seq_len=12, group_size=16, method="awq", progress=False)
    assert report.skipped["layers/1/mlp/gate/kernel"] == "routes tokens to experts"
    assert "layers/1/mlp/experts/down_proj/kernel" in {x.path for x in report.layers}
    assert model.save(tmp_path / "packed") == "gemm"
    again = awq_jax.load(tmp_path / "packed", dtype="float32")
    close(again(TOKENS), model(TOKENS), tol=2e-3)
    prompts = [[5, 6, 7], [8, 9]]  # two rows of two experts each: their weights are gathered
    greedy = Sampling(0.0, 0, 1.0)
    text = again.generator.run(again.params, prompts, max_new_tokens=3, sampling=greedy)
    for prompt, answer in zip(prompts, text, strict=True):
        for n in range(3):
            logits = again(np.array([prompt + answer[:n]]))[0, -1]
            assert logits[answer[n]] >= logits.max() - 1e-4
