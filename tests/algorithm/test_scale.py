"""The scale search against NumPy and against real activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_rounding import correlated, gram_of, plain

from awq_jax.algorithm import scale_candidates
from awq_jax.config import LeafConfig
from awq_jax.quantizer import column_pieces, scale_search
from awq_jax.quantizer.column_pieces import CanonicalWeight, Columns

K, G = 32, 16
LEAF = LeafConfig(3, G, False)
rng = np.random.default_rng(2)


def problem(seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    x = correlated(seed=seed)
    ws = [np.random.default_rng(seed + i).normal(size=(K, n)).astype(np.float32) for i, n in ((10, 5), (11, 8))]
    return x, ws[0], ws[1], np.abs(x).mean(axis=0)


def search(ws, gram, a, shared=None, **settings):
    """`scale.search` of stacked arrays: weights ``[E, K, N]``, Grams ``[E, K, K]`` or ``[E, K]``."""
    parts = [CanonicalWeight(jnp.asarray(w), "bkn", experts=len(w)) for w in ws]
    return scale_search.search([(LEAF, Columns(parts, K))], gram.__getitem__, a, shared, **settings)


def losses(ws, metric, scales) -> np.ndarray:
    """The loss of each of ``scales [T, K]`` for weights of one instance, as the search sums it up."""
    parts = [scale_candidates.scaled_losses(jnp.asarray(w), metric, jnp.asarray(scales), LEAF, "float16") for w in ws]
    return sum(np.asarray(part, np.float64).sum(axis=1) for part in parts)


def share_of(*ws: np.ndarray) -> jax.Array:
    return sum(scale_candidates.weight_share(jnp.asarray(w), G) for w in ws)[None] / sum(w.shape[1] for w in ws)


def numpy_candidate(a: np.ndarray, share: np.ndarray, r: float, with_weights: bool) -> np.ndarray:
    s = a**r / (share + 1e-4) ** (1 - r) if with_weights else a**r
    return s / np.sqrt(s.max() * s.min())


def numpy_share(*ws: np.ndarray) -> np.ndarray:
    w = np.abs(np.concatenate(ws, axis=1)).astype(np.float64)
    grouped = w.reshape(K // G, G, -1)
    return (grouped / grouped.max(axis=1, keepdims=True)).reshape(K, -1).mean(axis=1)


@pytest.mark.parametrize("with_weights", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 0.35, 0.95])
def test_candidates_follow_the_paper(ratio: float, with_weights: bool) -> None:
    _, w1, w2, a = problem()
    share = share_of(w1, w2)
    np.testing.assert_allclose(share[0], numpy_share(w1, w2), rtol=1e-5)
    got = scale_candidates.candidate(a[None], np.asarray(share), ratio, with_weights, None)
    np.testing.assert_allclose(got[0], numpy_candidate(a, numpy_share(w1, w2), ratio, with_weights), rtol=1e-4)


def test_dead_channels_keep_scale_one() -> None:
    _, w1, _, a = problem()
    a[[3, 17]] = 0.0
    share = share_of(w1)
    got = scale_candidates.candidate(a[None], np.asarray(share), 0.5, True, None)[0]
    assert got[3] == got[17] == 1.0
    assert np.isfinite(got).all()


def test_tied_channels_share_one_scale() -> None:
    _, w1, _, a = problem()
    shared = np.arange(K) % 8
    share = share_of(w1)
    got = np.asarray(scale_candidates.candidate(a[None], np.asarray(share), 0.5, True, shared)[0])
    for t in range(8):
        assert np.ptp(got[shared == t]) < 1e-6 * got.max()
    log = np.log(numpy_candidate(a, numpy_share(w1), 0.5, True))
    mean = np.array([log[shared == t].mean() for t in shared])
    np.testing.assert_allclose(np.diff(np.log(got)), np.diff(mean), atol=1e-4)


def test_search_returns_the_candidate_with_the_least_output_error() -> None:
    x, w1, w2, a = problem()
    gram = jnp.asarray(gram_of(x), jnp.float32)[None]
    found = search((w1[None], w2[None]), gram, a[None], n_grid=5, joint=False, dtype="float16")

    def error(s: np.ndarray) -> float:
        """Squared output error over the tokens themselves, in float64."""
        total = 0.0
        for w in (w1, w2):
            back = plain((w * s[:, None]).astype(np.float32), G, 3, False) / s[:, None]
            total += np.square(x.astype(np.float64) @ (back - w)).mean(axis=0).sum()
        return total

    share = numpy_share(w1, w2)
    trials = {(r / 5, d): error(numpy_candidate(a, share, r / 5, d)) for r in range(5) for d in (True, False)}
    best = min(trials.values())
    assert best < error(np.ones(K))
    chosen, rtn = losses((w1, w2), gram[0], np.stack([found.scale[0], np.ones(K, np.float32)]))
    np.testing.assert_allclose(rtn, error(np.ones(K)), rtol=1e-3)
    np.testing.assert_allclose(chosen, best, rtol=5e-3)
    np.testing.assert_allclose(error(np.asarray(found.scale[0], np.float64)), best, rtol=5e-3)


@pytest.mark.parametrize("seed", range(4))
def test_a_few_candidates_find_what_all_would(seed: int) -> None:
    """Of 41 candidates 19 are tried; the loss is that of the best of all within half a percent."""
    draw = np.random.default_rng(seed)
    a = np.exp(draw.normal(size=K)).astype(np.float32)
    w = (draw.normal(size=(K, 128)) * np.exp(0.3 * draw.normal(size=(K, 1)))).astype(np.float32)
    energy = jnp.asarray(np.square(a))
    every = scale_candidates.candidates(a[None], numpy_share(w)[None].astype(np.float32), None, 20)[:, 0]
    lost = losses((w,), energy, every)
    assert lost.min() < 0.8 * lost[0]
    assert len(scale_search.coarse(20)) + scale_search.neighbours(np.array([5]), 20).shape[1] == 19
    found = search((w[None],), energy[None], a[None], n_grid=20, joint=False, dtype="float16")
    assert losses((w,), energy, np.asarray(found.scale))[0] <= 1.005 * lost.min()


def test_some_columns_at_a_time_are_searched_like_all_at_once(monkeypatch) -> None:
    x, w1, w2, a = problem()
    gram = jnp.asarray(gram_of(x), jnp.float32)[None]
    args = {"n_grid": 4, "joint": False, "dtype": "float16"}
    whole = search((w1[None], w2[None]), gram, a[None], **args)
    monkeypatch.setattr(column_pieces, "PIECE", {jax.default_backend(): 4 * K})
    monkeypatch.setattr(column_pieces, "ALIGNED", 4)
    parts = search((w1[None], w2[None]), gram, a[None], **args)
    np.testing.assert_array_equal(parts.ratio, whole.ratio)
    np.testing.assert_allclose(parts.scale, whole.scale, rtol=1e-5)


def test_scale_one_wins_where_nothing_is_better() -> None:
    """Weights on the grid already: any scale loses."""
    grid = np.linspace(-1, 0.75, 8, dtype=np.float32)
    w = rng.choice(grid, size=(K, 4))
    w[::G], w[1::G] = grid[0], grid[-1]
    x = correlated()
    gram = jnp.asarray(gram_of(x), jnp.float32)[None]
    found = search((w[None],), gram, np.abs(x).mean(0)[None], n_grid=4, joint=False, dtype="float16")
    assert losses((w,), gram[0], np.ones((1, K), np.float32))[0] < 1e-6
    assert np.isnan(float(found.ratio[0]))
    assert (np.asarray(found.scale) == 1).all()


def test_experts_choose_apart_unless_joined() -> None:
    probs = [problem(1), problem(7)]
    w = tuple(jnp.stack([p[i] for p in probs]) for i in (1, 2))
    h = jnp.stack([jnp.asarray(gram_of(p[0]), jnp.float32) for p in probs])
    a = jnp.stack([p[3] for p in probs])
    kw = {"n_grid": 5, "dtype": "float16"}
    apart = search(w, h, a, joint=False, **kw)
    joint = search(w, h, a, joint=True, **kw)
    for e in range(2):
        alone = search(tuple(v[e : e + 1] for v in w), h[e : e + 1], a[e : e + 1], joint=False, **kw)
        np.testing.assert_allclose(apart.scale[e], alone.scale[0], rtol=1e-6)
    assert float(joint.ratio[0]) == float(joint.ratio[1])
    each = [losses((w[0][e], w[1][e]), h[e], np.stack([joint.scale[e], np.ones(K, np.float32)])) for e in range(2)]
    chosen, rtn = np.sum(each, axis=0)
    assert chosen <= rtn


def test_a_diagonal_metric_is_the_full_one_without_correlations() -> None:
    _, w1, _, a = problem()
    energy = jnp.asarray(np.square(a))[None]
    args = {"n_grid": 4, "joint": False, "dtype": "float16"}
    full = search((w1[None],), jax.vmap(jnp.diag)(energy), a[None], **args)
    diagonal = search((w1[None],), energy, a[None], **args)
    pairs = (diagonal, energy[0]), (full, jnp.diag(energy[0]))
    np.testing.assert_allclose(*(losses((w1,), metric, found.scale) for found, metric in pairs), rtol=1e-5)
    np.testing.assert_allclose(diagonal.scale, full.scale, rtol=1e-6)
