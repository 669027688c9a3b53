"""Random packed weights, with a NumPy float64 oracle that shares no code with the library."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax import pack
from awq_jax.qtensor import QuantizedTensor, is_quantized


def pack_columns(codes: np.ndarray, bits: int) -> np.ndarray:
    """``codes [K, N]`` to uint32 words, one LSB-first stream of bits per column, as Python integers."""
    k, n = codes.shape
    words = -(-k * bits // 32)
    out = np.zeros((words, n), np.uint32)
    for col in range(n):
        stream = sum(int(c) << (bits * i) for i, c in enumerate(codes[:, col]))
        out[:, col] = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(words)]
    return out


def random_packed(
    k: int,
    n: int,
    *,
    bits: int = 4,
    group_size: int = 16,
    symmetric: bool = False,
    inv_scale: bool = False,
    batch: tuple[int, ...] = (),
    dtype: str = "float32",
    axes: str | None = None,
    k_dims: tuple[int, ...] | None = None,
    n_dims: tuple[int, ...] | None = None,
    seed: int = 0,
) -> tuple[QuantizedTensor, np.ndarray]:
    """A packed weight and its float64 value ``[*batch, K, N]`` (``inv_scale`` applied)."""
    rng = np.random.default_rng(seed)
    g = k if group_size == -1 else group_size
    groups = -(-k // g)
    lead = int(np.prod(batch, dtype=int))
    codes = rng.integers(0, 2**bits, (lead, groups * g, n))
    zeros = np.full((lead, groups, n), 2 ** (bits - 1)) if symmetric else rng.integers(0, 2**bits, (lead, groups, n))
    codes[:, k:] = 0
    scales = np.asarray(jnp.asarray(rng.uniform(0.5, 1.5, (lead, groups, n)) / 2**bits).astype(dtype))
    inv = rng.uniform(0.5, 2.0, (lead, k)).astype(np.float32)
    w = (codes - zeros.repeat(g, axis=1)) * scales.astype(np.float64).repeat(g, axis=1)
    w = w[:, :k] * (inv.astype(np.float64)[..., None] if inv_scale else 1.0)
    q = QuantizedTensor(
        qweight=jnp.asarray(np.stack([pack_columns(c, bits) for c in codes]).reshape(*batch, -1, n)),
        scales=jnp.asarray(scales.reshape(*batch, groups, n)),
        zeros=None if symmetric else jnp.asarray(zeros.reshape(*batch, groups, n).astype(np.uint8)),
        inv_scale=jnp.asarray(inv.reshape(*batch, k)) if inv_scale else None,
        bits=bits,
        group_size=g,
        axes=axes or "b" * len(batch) + "kn",
        k_dims=k_dims or (k,),
        n_dims=n_dims or (n,),
        dtype=dtype,
    )
    return q, w.reshape(*batch, k, n)


def random_like(leaf: jax.Array, axes: str = "kn", *, seed: int = 0, **options: object) -> QuantizedTensor:
    """A random packed weight that can stand where ``leaf`` stood."""
    dims = {r: tuple(d for d, a in zip(leaf.shape, axes, strict=True) if a == r) for r in "bkn"}
    q, _ = random_packed(
        int(np.prod(dims["k"])),
        int(np.prod(dims["n"])),
        batch=dims["b"],
        axes=axes,
        k_dims=dims["k"],
        n_dims=dims["n"],
        dtype=str(leaf.dtype),
        seed=seed,
        **options,  # type: ignore[arg-type]
    )
    return q


@jax.jit
def dense(params: object) -> object:
    """The tree with every packed leaf as the float array it stands for."""
    return jax.tree.map(lambda x: x.dequantize() if is_quantized(x) else x, params, is_leaf=is_quantized)


def assert_bitwise(a: object, b: object) -> None:
    """Same structure (static fields too), dtypes, shapes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def error(y: jax.Array, want: np.ndarray) -> float:
    """Largest deviation relative to the largest expected value."""
    return float(np.abs(np.asarray(y, np.float64) - want).max() / np.abs(want).max())


def random_tensor(
    k: int, n: int, g: int, bits: int, batch: tuple[int, ...] = (), offsets: bool = False, seed: int = 0
) -> tuple[QuantizedTensor, np.ndarray]:
    """A packed weight made by the library's `pack`, and its codes ``[*batch, K, N]``, padded to whole groups."""
    rng = np.random.default_rng(seed)
    g = k if g == -1 else g
    groups = -(-k // g)
    codes = rng.integers(0, 2**bits, (*batch, groups * g, n)).astype(np.uint8)
    scales = (rng.random((*batch, groups, n)) * 0.02 + 0.005).astype(np.float32)
    zeros = rng.integers(0, 2**bits, (*batch, groups, n)).astype(np.uint8)
    q = QuantizedTensor(
        pack.pack(jnp.asarray(codes), bits), jnp.asarray(scales), None if offsets else jnp.asarray(zeros), None,
        bits, g, "b" * len(batch) + "kn", (k,), (n,), "float32",
        offsets=jnp.asarray(-scales * zeros) if offsets else None,
    )  # fmt: skip
    return q, codes
