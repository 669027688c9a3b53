"""Many requests: nothing is compiled, memory stays, and slots are all free at the end."""

from __future__ import annotations

import asyncio
import gc
import random
from pathlib import Path

import pytest
import served

from awq_jax.serve import Engine, Sampling

KINDS = (
    {},
    {"temperature": 0.8},
    {"temperature": 1.2, "top_k": 5, "top_p": 0.9},
    {"repetition_penalty": 1.2, "logprobs": 3},
    {"logit_bias": {5: 3.0}, "stop": ("z",)},
)


def mixed(engine, count, seed=0):
    """So many requests of all kinds, as many at once as may wait."""
    rng = random.Random(seed)

    async def one():
        prompt = [rng.randrange(256) for _ in range(rng.choice((1, 5, 17, 40)))]
        given = {"max_new_tokens": rng.randint(1, 9), "scored": rng.random() < 0.2}
        stream = engine.submit(prompt, Sampling(**rng.choice(KINDS)), **given)
        if rng.random() < 0.1:
            return await stream.aclose()
        await stream.text()

    async def run():
        left = count
        while left > 0:
            await asyncio.gather(*[one() for _ in range(min(left, 20))])
            left -= 20

    asyncio.run(run())


def resident():
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.fixture(scope="module")
def engine():
    made = Engine(served.model(num_hidden_layers=1), slots=4, length=64, chunk=16)
    yield made
    made.stop()


def test_twenty_mixed_requests(engine):
    mixed(engine, 20)
    assert engine.programs.late == 0


@pytest.mark.slow
def test_two_thousand_mixed_requests(engine):
    mixed(engine, 400)
    before = resident()
    mixed(engine, 2000, seed=1)
    assert resident() < 1.02 * before
    assert engine.programs.late == 0
    assert engine.load == (0, 0)
