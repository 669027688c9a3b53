"""Correlations are shrunk as far as chance and another text would undo them: against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awq_jax
from awq_jax.calibration import shrinkage
from awq_jax.errors import ConfigError
from awq_jax.report import LayerReport

K = 96


def activations(tokens: int, seed: int, noise: float = 1.0) -> np.ndarray:
    """A few directions that all channels share, on channels of many sizes."""
    world, rng = np.random.default_rng(0), np.random.default_rng(seed)
    mix, sizes = world.normal(size=(4, K)), np.exp(world.normal(size=K))
    return ((rng.normal(size=(tokens, 4)) @ mix + noise * rng.normal(size=(tokens, K))) * sizes).astype(np.float32)


def by_hand(gram: np.ndarray, tokens: int) -> float:
    """The share of the module's docstring."""
    live = np.diag(gram) > 0
    d = np.sqrt(np.diag(gram)[live])
    c = gram[live][:, live] / d / d[:, None]
    m = live.sum()
    chance = min(1.0, m * (m - 1) / ((c**2).sum() - m) / tokens)
    kept = 0.9 * (1 - chance) / (1 - chance + 3 * chance)
    return 1 - kept


@pytest.mark.parametrize("tokens", [4, 64, 1024, 65536])
def test_share_is_the_chance_in_what_is_seen(tokens: int) -> None:
    x = activations(min(tokens, 2048), 1)
    x[:, 7] = 0  # a channel that is never active
    gram = x.T.astype(np.float64) @ x
    got = [float(shrinkage.share(jnp.asarray(g, jnp.float32), np.float32(tokens))) for g in (gram, gram / tokens)]
    assert got[0] == got[1]
    assert got[0] == pytest.approx(min(by_hand(gram, tokens), 63 / 64), abs=1 / 128 + 1e-6)


def test_shares_fall_with_tokens_and_with_what_channels_have_in_common() -> None:
    def share(x: np.ndarray, tokens: int) -> float:
        return float(shrinkage.share(jnp.asarray(x.T @ x), np.float32(tokens)))

    x = activations(2048, 2)
    falling = [share(x, n) for n in (3, 100, 1000, 10_000, 10**7)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == pytest.approx(shrinkage.DOMAIN, abs=1 / 64)
    assert share(activations(2048, 2, noise=3.0), 2048) > share(x, 2048)
    for nothing in (np.zeros((1, K), np.float32), np.eye(K, dtype=np.float32)):  # no channel, or none that go together
        assert np.isfinite(share(nothing, 10))


def test_only_what_is_off_the_diagonal_shrinks() -> None:
    gram = activations(64, 3)
    gram = gram.T @ gram
    got = np.asarray(shrinkage.shrunk(jnp.asarray(gram), 0.25))
    want = 0.75 * gram.astype(np.float64) + 0.25 * np.diag(np.diag(gram))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_array_equal(np.diag(got), np.diag(gram))


def quantized(x: np.ndarray, **settings: float | str | None) -> tuple[np.ndarray, LayerReport]:
    """A weight quantized on ``x``: what is stored less what it was."""
    w = np.random.default_rng(4).normal(size=(K, 64)).astype(np.float32)
    params = {"w": w}
    calib = awq_jax.calibrate(lambda p, x: jnp.tanh(x @ p["w"]), params, [x], include_head=True, progress=False)
    options = {"bits": 3, "group_size": 32, "progress": False, "return_report": True, "quantize_head": True, **settings}
    packed, report = awq_jax.quantize(params, calib, **options)
    q = packed["w"]
    return np.asarray(q.dequantize(jnp.float32), np.float64) - w, report.layers[0]


def test_few_tokens_do_not_mislead_compensation() -> None:
    seen, other = activations(128, 5, noise=2.0), np.float64(activations(4096, 6, noise=2.0))
    errors = {}
    for shrink in (0.0, None):
        delta, row = quantized(seen, shrinkage=shrink)
        errors[shrink] = np.square(other @ delta).mean()
        # The report is by the tokens as they were, whatever weighed the errors.
        w = np.random.default_rng(4).normal(size=(K, 64)).astype(np.float32)
        want = np.square(np.float64(seen) @ delta).sum() / np.square(np.float64(seen) @ w).sum()
        assert row.error == pytest.approx(want, rel=1e-3)
        assert row.shrinkage == (0.0 if shrink == 0 else pytest.approx(by_hand(seen.T @ seen, 128), abs=1 / 64))
    assert errors[None] < 0.9 * errors[0.0]


def test_plain_rounding_weighs_nothing() -> None:
    _, row = quantized(activations(32, 7), method="rtn")
    assert row.shrinkage == 0


def test_settings_are_checked() -> None:
    for bad in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="shrinkage"):
            awq_jax.AwqConfig(shrinkage=bad)
    assert awq_jax.AwqConfig.from_dict(awq_jax.AwqConfig(shrinkage=0.5).to_dict()).shrinkage == 0.5


def test_one_program_serves_all_devices_alike() -> None:
    gram = activations(256, 8)
    gram = jnp.asarray(gram.T @ gram)
    assert float(jax.jit(shrinkage.share)(gram, np.float32(256))) == float(shrinkage.share(gram, np.float32(256)))
