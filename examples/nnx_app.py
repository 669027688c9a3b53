"""An NNX model of your own, quantized from raw batches and served packed under jit.

python examples/nnx_app.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import awq_jax

PIXELS, CLASSES = 64, 10


class Classifier(nnx.Module):
    """An MLP on 8x8 images; LayerNorm, biases and a residual, as in a vision transformer's MLP."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Linear(PIXELS, 96, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(96, rngs=rngs) for _ in range(3)])
        self.up = nnx.List([nnx.Linear(96, 192, rngs=rngs) for _ in range(2)])
        self.down = nnx.List([nnx.Linear(192, 96, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(96, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.embed(images)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(nnx.gelu(up(norm(x))))
        return self.head(self.norms[-1](x))


def images(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Noisy copies of ten fixed patterns, and their classes."""
    patterns = jnp.asarray(np.random.default_rng(0).normal(size=(CLASSES, PIXELS)), jnp.float32)
    k1, k2 = jax.random.split(key)
    labels = jax.random.randint(k1, (count,), 0, CLASSES)
    return patterns[labels] + 1.5 * jax.random.normal(k2, (count, PIXELS)), labels


def main() -> tuple[float, float]:
    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model: Classifier, optimizer: nnx.Optimizer, key: jax.Array) -> None:
        x, y = images(key, 128)
        grads = nnx.grad(lambda m: optax.softmax_cross_entropy_with_integer_labels(m(x), y).mean())(model)
        optimizer.update(model, grads)

    for key in jax.random.split(jax.random.key(1), 100):
        step(model, optimizer, key)

    # The three lines. Batches go in as they are: `quantize` calibrates on the way.
    apply_fn, params = awq_jax.nnx.functional(model)
    qparams = awq_jax.quantize(params, [images(jax.random.key(2), 512)[0]], apply_fn=apply_fn, bits=3, group_size=32)
    serve = jax.jit(awq_jax.bind(apply_fn))

    x, y = images(jax.random.key(3), 2000)
    before, after = ((f.argmax(-1) == y).mean() for f in (apply_fn(params, x), serve(qparams, x)))
    print(f"accuracy: float {before:.3f}, 3-bit {after:.3f}")
    return float(before), float(after)


if __name__ == "__main__":
    main()
