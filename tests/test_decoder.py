"""The reference decoder against transformers on tiny random checkpoints."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from flax import nnx

from awq_jax import models
from awq_jax.models import params as model_params

PROMPT, STEPS = 10, 3
LENGTHS = np.array([PROMPT, 6])


class Memory:
    """A checkpoint in memory, in the shape of `awq_jax.convert.source.Source`."""

    def __init__(self, model: torch.nn.Module):
        tied = model.config.tie_word_embeddings
        self.tensors = {k: v.numpy() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}

    def names(self):
        return list(self.tensors)

    def read(self, name):
        return self.tensors[name]


def build(model: torch.nn.Module, source: Memory | None = None, **kwargs):
    config = models.config_from_hf(model.config.to_dict())
    graphdef, state = model_params.abstract(config)
    return config, graphdef, model_params.load(source or Memory(model), config, state, **kwargs)


def close(ours, theirs, tol=1e-4):
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, atol=tol * np.abs(theirs).max(), rtol=0)


@pytest.fixture(autouse=True)
def _exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("case", tiny.CASES, ids=lambda c: c.name)
def test_logits_equal_transformers(case):
    """Batch of two, one row padded: whole sequence at once, then prefill and single steps with the cache."""
    torch_model = tiny.torch_model(case.family, **case.changes)
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
