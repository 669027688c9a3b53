"""Convolutions that are matmuls are sites; against sums written out in NumPy, float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awq_jax.plan.discover import discover
from awq_jax.trace import interpret

# input sizes, window, stride, layout of input, kernel, result
MATMULS = {
    "one element": ((5, 6), (1, 1), (1, 1), ("NHWC", "HWIO", "NHWC")),
    "one element, strided": ((5, 6), (1, 1), (2, 3), ("NCHW", "OIHW", "NCHW")),
    "patches": ((6, 9), (2, 3), (2, 3), ("NHWC", "HWIO", "NHWC")),
    "patches and a rest": ((7, 4), (3, 2), (3, 2), ("NCHW", "HWIO", "NHWC")),
    "all of it": ((4, 3), (4, 3), (1, 1), ("NHWC", "OIHW", "NCHW")),
    "one axis": ((8,), (4,), (4,), ("NHC", "HIO", "NHC")),
}


def written_out(x: np.ndarray, w: np.ndarray, stride: tuple[int, ...], layout: tuple[str, str, str]) -> np.ndarray:
    """The sums of a convolution, result by result."""
    space = "HW"[: len(stride)]
    x = np.moveaxis(x, [layout[0].index(a) for a in f"N{space}C"], range(x.ndim))
    w = np.moveaxis(w, [layout[1].index(a) for a in f"{space}IO"], range(w.ndim))
    outs = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:], w.shape, stride, strict=False)]
    y = np.zeros((len(x), *outs, w.shape[-1]))
    for at in itertools.product(*map(range, outs)):
        for tap in itertools.product(*map(range, w.shape[:-2])):
            place = tuple(i * s + t for i, s, t in zip(at, stride, tap, strict=True))
            y[(slice(None), *at)] += x[(slice(None), *place)] @ w[tap]
    return np.moveaxis(y, range(y.ndim), [layout[2].index(a) for a in f"N{space}C"])


@pytest.mark.parametrize("case", MATMULS)
def test_a_convolution_that_is_a_matmul(case: str) -> None:
    sizes, window, stride, layout = MATMULS[case]
    rng, space = np.random.default_rng(0), "HW"[: len(sizes)]
    dims = dict(zip("NC" + space, (2, 8, *sizes), strict=True)), dict(zip("IO" + space, (8, 5, *window), strict=True))
    x, w = (rng.normal(size=[n[a] for a in names]) for n, names in zip(dims, layout, strict=False))

    def model(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, p["w"], stride, "VALID", dimension_numbers=layout)

    p, x32 = {"w": jnp.asarray(w, jnp.float32)}, jnp.asarray(x, jnp.float32)
    ((group, site),) = discover(model, p, x32).sites()
    assert group.channels == 8 * np.prod(window)
    assert site.axes == "".join("n" if a == "O" or n == 1 else "k" for a, n in zip(layout[1], w.shape, strict=True))
    y = interpret.run(interpret.trace(model, p, x32), p, x32)
    np.testing.assert_allclose(y, written_out(x, w, stride, layout), rtol=1e-4, atol=1e-4)


def test_others_stay_convolutions() -> None:
    def model(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        numbers = ("NHC", "HIO", "NHC")
        y = jax.lax.conv_general_dilated(x, p["wide"], (1,), "SAME", dimension_numbers=numbers)
        return (
            jax.lax.conv_general_dilated(y, p["deep"], (1,), "SAME", dimension_numbers=numbers, feature_group_count=8)
            @ p["head"]
        )

    p = {"wide": jnp.ones((3, 8, 8)), "deep": jnp.ones((1, 1, 8)), "head": jnp.ones((8, 8))}
    plan = discover(model, p, jnp.ones((1, 9, 8)))
    assert set(plan.sizes) == {"head"}
    assert plan.skipped == {"wide": "it is read by a convolution", "deep": "it is read by a convolution"}
