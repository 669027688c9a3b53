"""Models that look at images: logits as transformers', what is quantized and what is carried through."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import multimodal
import numpy as np
import pytest
import torch
from flax import nnx
from tiny import close

import awq_jax

STEPS = 2


@dataclasses.dataclass
class Pair:
    """The same random model in transformers and here, and its checkpoint."""

    theirs: Any
    ours: awq_jax.Model
    directory: Any


@pytest.fixture(scope="module", params=multimodal.CASES, ids=lambda c: c.name)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def pair(case, tmp_path_factory):
    directory = tmp_path_factory.mktemp(case.name)
    theirs = multimodal.model(case)
    theirs.save_pretrained(directory)
    return Pair(theirs, awq_jax.load(directory), directory)


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def _exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


def reference(theirs, row) -> np.ndarray:
    with torch.no_grad():
        theirs.model.rope_deltas = None
        return theirs(**row).logits[0].numpy()


def test_logits_equal_transformers(case, pair):
    """Rows of two lengths with one and two images, padded on either side; then prefill and single steps."""
    rows = multimodal.rows(case, STEPS)
    want = [reference(pair.theirs, row) for row in rows]
    lengths = np.array([len(w) for w in want])
    assert lengths[0] != lengths[1]
    for side in ("right", "left"):
        ours = np.asarray(pair.ours(multimodal.padded(rows, side)))
        for b, n in enumerate(lengths):
            close(ours[b, :n], want[b])

    config, graphdef = pair.ours.config, pair.ours.generator.graphdef

    @functools.partial(jax.jit, static_argnames="room")
    def run(params, tokens, positions, cache, images, room):
        decoder = nnx.merge(graphdef, params)
        hidden, cache = decoder.hidden(tokens, positions, cache, images)
        return decoder.head(hidden), cache.grown(room)

    images = pair.ours.inputs(multimodal.padded(rows))
    tokens = images.pop("input_ids")
    prompt, room = tokens.shape[1] - STEPS, 64
    before = lengths - STEPS
    positions = np.minimum(np.arange(prompt), before[:, None] - 1)
    logits, cache = run(pair.ours.params, tokens[:, :prompt], positions, None, images, room)
    for b, n in enumerate(before):
        close(logits[b, :n], want[b][:n])
    for step in range(STEPS):
        at = before + step
        logits, cache = run(pair.ours.params, tokens[[0, 1], at][:, None], at[:, None], cache, None, room)
        for b in (0, 1):
            close(logits[b, 0], want[b][at[b]])
    assert config.vision is not None
