"""How much of what matmuls read is packed, and why the largest weights are not: in the plan, the report, a warning."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awq_jax
from awq_jax.plan.discover import discover
from awq_jax.plan.plan import Plan

K = 64
SIZES = {"up": (K, 2 * K), "odd": (2 * K, K), "table": (8, K), "router": (K, 4), "unread": (K, K), "head": (K, 8)}


def model(p, x):
    chosen = jax.lax.top_k(x @ p["router"], 1)[1]
    _ = x @ p["unread"]
    x = jnp.tanh(x @ p["up"]) @ jnp.round(p["odd"]) + jax.nn.one_hot(chosen[:, 0], 8) @ p["table"]
    return jnp.tanh(x) @ p["head"]


def params():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SIZES.items()}


def test_bytes_and_reasons_by_hand(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    p, x = params(), np.ones((4, K), np.float32)
    plan = discover(model, p, x)
    up, odd, router, head = (p[name].nbytes for name in ("up", "odd", "router", "head"))
    # The unread one, and the one that is only looked up, are not counted.
    assert plan.sizes == {"up": up, "odd": odd, "router": router, "head": head}, (
        "unread, and only looked up: not counted"
    )
    assert plan.share.packed == up
    assert [(path, n, chosen) for path, n, _, chosen in plan.share.left] == [
        ("odd", odd, False),
        ("head", head, True),
        ("router", router, True),
    ]
    lines = str(plan).splitlines()
    assert "(router)" in next(line for line in lines if "reads  router" in line)
    assert lines[-1].startswith(f"packed by default: {up / (up + odd + router + head):.1%} of ")
    assert lines[-1].index("odd (") < lines[-1].index("head (") < lines[-1].index("router (")
    assert Plan.from_dict(plan.to_dict()).share == plan.share

    with caplog.at_level(logging.WARNING):
        _, report = awq_jax.quantize(p, plan, method="rtn", bits=4, group_size=32, return_report=True)
    (warning,) = [r.getMessage() for r in caplog.records if "matmuls read" in r.getMessage()]
    assert "odd (" in warning
    assert "round" in warning
    assert "head" not in warning, "left float by a setting"
    assert report.share.packed == up
    assert report.share.of_meant == up / (up + odd)
    assert "quantize_head=True" in str(report.share)
    assert f"packed           {report.share}" in str(report)

    caplog.clear()
    awq_jax.quantize(p, plan, method="rtn", bits=4, group_size=32, quantize_head=True, skip=("odd",))
    assert not caplog.records, "what a skip pattern names is left float on purpose"
    total = up + odd + router + head
    assert f"packed {(up + head) / total:.1%} of" in capsys.readouterr().err


def test_a_tied_head_is_left_float_by_rule(caplog: pytest.LogCaptureFixture) -> None:
    p = {"table": np.ones((256, 32), np.float32), "up": np.ones((32, 32), np.float32)}

    def tied(p, ids):
        return jnp.tanh(p["table"][ids] @ p["up"]) @ p["table"].T

    plan = discover(tied, p, jnp.ones((2, 3), jnp.int32))
    assert plan.share.of_meant == 1
    awq_jax.quantize(p, plan, method="rtn", group_size=32, progress=False)
    assert not caplog.records
    awq_jax.quantize(p, plan, method="rtn", group_size=32, quantize_head=True, progress=False)
    assert "table (88.9%: it is also read by a lookup" in caplog.text


def test_experts_that_make_the_output_are_no_head() -> None:
    def layer(p, x, sizes):
        return jax.lax.ragged_dot(x, p["down"], sizes)

    p = {"down": np.ones((2, 32, 8), np.float32)}
    plan = discover(layer, p, np.ones((6, 32), np.float32), np.array([4, 2], np.int32))
    assert [site.head for _, site in plan.sites()] == [False]
    assert plan.share.of_all == 1
