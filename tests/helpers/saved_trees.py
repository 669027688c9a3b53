"""Packed trees of a Linen and an NNX model: saved in every way by one process, loaded by another.

``python saved_trees.py DIR``: load all and print ``{name: whether the result is the first process's}`` as JSON.
"""

import json
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx, serialization

import awq_jax
from awq_jax import convert

X = np.random.default_rng(0).standard_normal((2, 8, 32)).astype(np.float32)


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(32, name="down")(nn.silu(nn.Dense(48, name="up")(nn.RMSNorm()(x))))


class Blocks(nnx.Module):
    def __init__(self, rngs):
        def block():
            return nnx.Sequential(nnx.Linear(32, 32, rngs=rngs), nnx.Dropout(0.1, rngs=rngs))

        self.blocks = nnx.List([block() for _ in range(2)])

    def __call__(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def models():
    """name -> function, float parameters, what is given as ``like``."""
    model = Blocks(nnx.Rngs(0))
    model.eval()
    apply, state = awq_jax.nnx.functional(model)
    params = Dense().init(jax.random.key(0), X)
    return {"linen": (Dense().apply, params, params), "nnx": (apply, state, model)}


def save(root: Path) -> None:
    for name, (apply, params, _) in models().items():
        packed = awq_jax.quantize(params, [X], apply_fn=apply, group_size=16, progress=False)
        np.save(root / f"{name}.npy", awq_jax.bind(apply)(packed, X))
        convert.store(root / f"{name}-store", packed)
        with ocp.StandardCheckpointer() as c:
            c.save(root / f"{name}-orbax", packed)
            c.save(root / f"{name}-state", convert.to_state(packed))
        (root / f"{name}.msgpack").write_bytes(serialization.to_bytes(convert.to_state(packed)))
        if name == "linen":
            (root / "direct.msgpack").write_bytes(serialization.to_bytes(packed))


def load(root: Path) -> dict[str, bool]:
    out = {}
    for name, (apply, params, like) in models().items():
        want = np.load(root / f"{name}.npy")
        found = {
            "restore": convert.restore(root / f"{name}-store"),
            "restore like": convert.restore(root / f"{name}-store", like=like),
            "restore like shapes": convert.restore(root / f"{name}-store", like=jax.eval_shape(lambda p=params: p)),
        }
        target = jax.eval_shape(lambda p: p, found["restore like"])
        with ocp.StandardCheckpointer() as c:
            found["orbax target"] = c.restore(root / f"{name}-orbax", target)
            found["orbax"] = convert.from_state(c.restore(root / f"{name}-orbax"), target)
            found["orbax state"] = convert.from_state(c.restore(root / f"{name}-state"))
        raw = serialization.msgpack_restore((root / f"{name}.msgpack").read_bytes())
        found["bytes"] = convert.from_state(raw)
        found["bytes like"] = convert.from_state(raw, like)
        if name == "linen":
            data = (root / "direct.msgpack").read_bytes()
            found["direct"] = convert.from_state(serialization.from_bytes(params, data))
            found["direct target"] = serialization.from_bytes(found["bytes"], data)
        for way, tree in found.items():
            same = jax.tree.structure(tree) == jax.tree.structure(target) or not way.endswith(("like", "target"))
            out[f"{name} {way}"] = bool(same and np.array_equal(awq_jax.bind(apply)(tree, X), want))
    return out


if __name__ == "__main__":
    print(json.dumps(load(Path(sys.argv[1]))))
