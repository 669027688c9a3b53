"""Quantizes one layer, and prints a digest of what becomes of it: for processes with other numbers of threads."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

import awq_jax

K, N, TOKENS = 384, 96, 700


def layer(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.tanh((x * params["norm"]) @ params["w"])


def main() -> None:
    rng = np.random.default_rng(0)
    mix = np.eye(K) + 2 / np.sqrt(K) * rng.normal(size=(K, K))
    x = (rng.normal(size=(TOKENS, K)) @ mix * np.exp(rng.normal(size=K))).astype(np.float32)
    params = {"norm": np.ones(K, np.float32), "w": rng.normal(size=(K, N)).astype(np.float32)}
    packed = awq_jax.quantize(
        params, [x], apply_fn=layer, group_size=64, quantize_head=True, on_indivisible="error", progress=False
    )
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(packed):
        digest.update(np.asarray(leaf).tobytes())
    print(digest.hexdigest())


if __name__ == "__main__":
    main()
