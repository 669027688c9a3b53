"""What search hands to rounding: the factor of a scaled input against NumPy in float64, and when it is used."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import awq_jax
from awq_jax.calibration.calibration import Stats
from awq_jax.config import AwqConfig
from awq_jax.quantizer import group_inputs
from awq_jax.quantizer.group_inputs import How, KeptInputs, of_sums, scaled

K, ROWS = 48, 64
draw = np.random.default_rng(0)


def sums() -> tuple[jax.Array, np.float32]:
    x = draw.normal(size=(300, K)) @ (np.eye(K) + 0.3 * draw.normal(size=(K, K)))
    return jnp.asarray(x.T @ x, jnp.float32), np.float32(300)


def test_the_factor_of_a_scaled_input_is_that_of_its_gram() -> None:
    made = of_sums(*sums(), How.of(AwqConfig(shrinkage=0.2), ROWS))
    s = np.exp(draw.normal(size=K)).astype(np.float32)
    got = scaled(made, s)
    assert made.gram is not None
    assert got.gram is not None
    assert got.factor is not None
    by = np.append(s, np.ones(ROWS - K)).astype(np.float64)
    gram = np.asarray(made.gram, np.float64) / np.outer(by, by)
    np.testing.assert_allclose(got.gram, gram, rtol=1e-5, atol=1e-5 * np.abs(gram).max())
    order = np.asarray(got.factor.order)
    damped = (gram + np.diag(np.asarray(got.factor.damping, np.float64)))[np.ix_(order, order)]
    u = np.asarray(got.factor.inverse, np.float64)
    assert not np.tril(u, -1).any()
    np.testing.assert_allclose(u @ damped @ u.T, np.eye(ROWS), atol=2e-3)
    own = np.diagonal(gram)[:K]
    assert (np.asarray(got.factor.damping)[:K] >= AwqConfig().damping * own * (1 - 1e-5)).all()


def test_an_input_is_kept_for_the_same_sums_in_the_same_way_while_there_is_room(monkeypatch) -> None:
    how = How.of(AwqConfig(), ROWS)
    made = of_sums(*sums(), how)
    stats = Stats(*(np.zeros(1) for _ in range(4)))
    size = sum(a.nbytes for a in jax.tree.leaves(made))
    monkeypatch.setattr(group_inputs, "KEPT", size)
    kept = KeptInputs()
    kept.put("a", stats, 0, how, made)
    assert kept.get("a", stats, 0, how) is made
    assert kept.get("a", dataclasses.replace(stats), 0, how) is None
    assert kept.get("a", stats, 1, how) is None
    assert kept.get("a", stats, 0, How.of(AwqConfig(method="rtn"), ROWS)) is None
    kept.put("b", stats, 0, how, made)
    assert kept.get("b", stats, 0, how) is None
    kept.drop("a")
    kept.put("b", stats, 0, how, made)
    assert kept.get("b", stats, 0, how) is made
    nothing = KeptInputs(wanted=False)
    nothing.put("a", stats, 0, how, made)
    assert nothing.get("a", stats, 0, how) is None


def test_bits_do_not_depend_on_what_is_kept(monkeypatch) -> None:
    params = {"w": draw.normal(size=(K, 16)).astype(np.float32), "v": draw.normal(size=(16, K)).astype(np.float32)}
    batches = [draw.normal(size=(200, K)).astype(np.float32)]
    calib = awq_jax.calibrate(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], params, batches, include_head=True,
                              progress=False)  # fmt: skip

    def packed() -> list[np.ndarray]:
        tree = awq_jax.quantize(params, calib, group_size=16, quantize_head=True, progress=False)
        return [np.asarray(a) for a in jax.tree.leaves(tree)]

    with_kept = packed()
    monkeypatch.setattr(group_inputs, "KEPT", 0)
    for a, b in zip(with_kept, packed(), strict=True):
        np.testing.assert_array_equal(a, b)
