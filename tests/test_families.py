"""Every model family: logits as transformers', an exact plan, and packed weights that come back."""

from __future__ import annotations

import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tiny import close, randomized

import awq_jax
from awq_jax import models, paths, verify
from awq_jax.convert import registry
from awq_jax.models import params as model_params

PROMPT, STEPS = 10, 2
LENGTHS = np.array([PROMPT, 6])
TOKENS = np.random.default_rng(0).integers(3, 64, (2, PROMPT + STEPS)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same random model in transformers and here."""

    theirs: torch.nn.Module
    source: registry.Source
    config: models.ModelConfig
    graphdef: nnx.GraphDef
    params: nnx.State

    def apply(self, params, tokens):
        return nnx.merge(self.graphdef, params)(tokens)


@pytest.fixture(scope="module", params=families.CASES, ids=lambda c: c.name)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def pair(case, tmp_path_factory):
    theirs = randomized(case.family, families.config_of(case), case.attention)
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
    ours = np.asarray(jax.jit(pair.apply)(pair.params, TOKENS))
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
    plan = awq_jax.discover(pair.apply, pair.params, jax.ShapeDtypeStruct((1, 4), np.int32))
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
    assert {c.family for c in families.CASES} == set(models.supported())
