"""Kinds of caches: 8 bits, states that cannot be shared, windows, latents, ropes that depend on the length."""

from __future__ import annotations

import family_cases
import jax.numpy as jnp
import numpy as np
import pytest
import served

from awq_jax.models.layers.cache import Cache, Recurrent
from awq_jax.serve import Engine, Sampling
from awq_jax.serve.engine import sizes, slots

RNG = np.random.default_rng(1)
PROMPTS = [RNG.integers(0, 256, n).tolist() for n in (21, 2, 30)]


def test_eight_bits_round_to_nearest_of_each_head():
    x = RNG.normal(size=(2, 3, 4, 16)).astype(np.float32)
    x[0, 0, 0] = 0
    codes, scales = map(np.asarray, slots.rounded(jnp.asarray(x)))
    exact = x.astype(np.float64)
    step = np.abs(exact).max(-1) / 127
    assert np.allclose(scales, step, rtol=1e-6)
    assert np.abs(codes * scales[..., None].astype(np.float64) - exact).max() <= step.max() * 0.5001
    assert codes.dtype == np.int8


def test_eight_bits_take_less_and_say_nearly_the_same():
    model = served.model(packed=False, num_hidden_layers=1)
    plain, small = (Engine(model, slots=1, length=64, chunk=16, kv_bits=bits) for bits in (None, 8))
    assert small.nbytes / plain.nbytes == (8 + 4) / 32  # heads of 8 channels: 8 codes and a scale, or 8 floats
    logprobs = []
    for engine in (plain, small):
        streams = []

        async def run(engine=engine, streams=streams):
            streams.append(engine.submit(PROMPTS[2], Sampling(logprobs=0), max_new_tokens=1, scored=True))
            await streams[0].text()

        served.asyncio.run(run())
        logprobs.append(np.array([p.logprob for p in streams[0].request.prompt_logprobs]))
        engine.stop()
    assert 0 < np.abs(logprobs[0] - logprobs[1]).max() < 0.1
    assert "8 bits" in small.explain()


def cases(*names):
    return [pytest.param(c, id=c.name) for c in family_cases.CASES if c.name in names]


def check(case):
    config = {**case.config, "vocab_size": 288, "bos_token_id": 256, "eos_token_id": 257}
    if "num_local_experts" in config:
        config = {"num_experts_per_tok": 2} | config  # that transformers' class would fill in
    model = served.model(case.family, packed=False, **config)
    engine = Engine(model, slots=2, length=48, chunk=16)
    want = [list(model.answers([p], max_new_tokens=9)[0].ids) for p in PROMPTS]
    assert served.answers(engine, PROMPTS, max_new_tokens=9) == want
    assert served.answers(engine, PROMPTS[:1], max_new_tokens=9) == want[:1]
    assert engine.programs.late == 0
    said = engine.explain()
    engine.stop()
    return said


def test_a_state_is_changed_by_its_owner_only():
    before = RNG.normal(size=(4, 2, 3)).astype(np.float32), RNG.normal(size=(4, 1, 2, 2)).astype(np.float32)
    cache = Cache((Recurrent(*map(jnp.asarray, before)),))
    seen = slots.opened(cache, jnp.int32(1), 2, 8)
    after = Cache((Recurrent(*(a + 1 for a in (seen.layers[0].inputs, seen.layers[0].memory))),))
    closed = slots.closed(cache, after, jnp.int32(1), jnp.array([False, True])).layers[0]
    for old, new in zip(before, (closed.inputs, closed.memory), strict=True):
        want = old.copy()
        want[2] += 1
        assert np.array_equal(new, want)
    fresh = slots.opened(cache, jnp.int32(3), 1, 8, fresh=jnp.array(True)).layers[0]
    assert not np.any(fresh.inputs)
    assert np.array_equal(slots.opened(cache, jnp.int32(3), 1, 8).layers[0].memory, before[1][3:])


@pytest.mark.slow
@pytest.mark.parametrize("case", cases("qwen3_next"))
def test_states_are_of_one_request(case):
    assert "cannot be shared" in check(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name) for c in family_cases.CASES if c.family not in family_cases.SHARED_SIZES]
)
def test_every_family(case):
    assert "slots of 48 tokens" in check(case)


def test_sizes_are_few_and_enough():
    s = sizes.Sizes.of(16, 2000, 256)
    assert s.rows == (1, 2, 4, 8, 16)
    assert s.draws == (1, 4, 16)
    assert s.reads == (256, 1024, 2304)
    assert s.chunks == (16, 32, 64, 128, 256)
    assert s.window([9]) == (9, 1)
    assert s.window([3, 9]) == (3, 8)
    assert s.window([13, 15]) == (12, 4)
    assert sizes.Sizes.of(3, 40, 256).chunks == (16, 40)
    assert sizes.Sizes.of(3, 40, 256).rows == (1, 3)
    assert sizes.Sizes.of(1, 100, 16, whole=True).chunks[-1] == 100
