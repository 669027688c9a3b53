"""Models whose weights a shard_map splits over simulated devices: run by test_shards in a process of its own."""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from stacked_models import norm

import awq_jax

D, F, E = 32, 128, 4
MESH = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
ROWS = np.random.default_rng(1).normal(size=(E, 8, D)).astype(np.float32)


def tensor_parallel(p: Any, x: Any, wrap: bool) -> Any:
    """Columns of up, rows of down: heads are split as the first of two axes."""

    def local(h: Any, up: Any, down: Any) -> Any:
        y = jnp.einsum("ethf,hfd->etd", jax.nn.silu(jnp.einsum("etd,dhf->ethf", h, up)), down)
        return jax.lax.psum(y, "a") if wrap else y

    up, down = p["up"].reshape(D, 4, F // 4), p["down"].reshape(4, F // 4, D)
    h = norm(x, p["norm"])
    specs = (P(None, "b"), P(None, "a"), P("a"))
    f = jax.shard_map(local, mesh=MESH, in_specs=specs, out_specs=P(None, "b")) if wrap else local
    return f(h, up, down) @ p["head"]


def expert_parallel(p: Any, x: Any, wrap: bool) -> Any:
    """Experts over one axis, their columns over the other."""

    def local(h: Any, up: Any, down: Any) -> Any:
        y = jnp.einsum("etf,efd->etd", jax.nn.silu(jnp.einsum("etd,edf->etf", h, up)), down)
        return jax.lax.psum(y, "b") if wrap else y

    specs = (P("a"), P("a", None, "b"), P("a", "b"))
    f = jax.shard_map(local, mesh=MESH, in_specs=specs, out_specs=P("a")) if wrap else local
    return f(norm(x, p["norm"]), p["ups"], p["downs"]) @ p["head"]


def layers(p: Any, x: Any, wrap: bool) -> Any:
    """A scan over layers within, as pipelines have it."""

    def local(h: Any, ups: Any, downs: Any) -> Any:
        def layer(h: Any, w: Any) -> Any:
            y = jax.nn.relu(h @ w[0]) @ w[1]
            return h + (jax.lax.psum(y, "a") if wrap else y), None

        return jax.lax.scan(layer, h, (ups, downs))[0]

    specs = (P(None, "b"), P(None, None, "a"), P(None, "a"))
    f = jax.shard_map(local, mesh=MESH, in_specs=specs, out_specs=P(None, "b")) if wrap else local
    return f(x, p["ups"], p["downs"]) @ p["head"]


def params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"up": (D, F), "down": (F, D), "ups": (E, D, F), "downs": (E, F, D), "head": (D, D)}
    return {k: rng.normal(size=s).astype(np.float32) / s[-2] ** 0.5 for k, s in shapes.items()} | {
        "norm": np.ones(D, np.float32)
    }


def case(fn: Any) -> dict[str, Any]:
    """A model on one device and split."""
    used = {"up", "down"} if fn is tensor_parallel else {"ups", "downs"}
    p = {k: v for k, v in params().items() if k in used | {"norm", "head"}}
    p = {k: v for k, v in p.items() if k != "norm" or fn is not layers}
    plain, split = (lambda p, x, wrap=wrap: fn(p, x, wrap) for wrap in (False, True))
    one, many = (awq_jax.calibrate(f, p, [ROWS], progress=False) for f in (plain, split))
    found = {site.name: many.stats[g.name] for g, site in many.plan.sites() if g.name in many.stats}
    apart = 0.0
    for name, stats in one.stats.items():
        for field in ("gram", "abs"):  # as means: devices that have the same tokens count them as often
            a, b = (np.asarray(getattr(s, field)).T / np.asarray(s.count).T for s in (stats, found[name]))
            apart = max(apart, float(np.abs(a - b).max() / np.abs(a).max()))
    q = awq_jax.quantize(p, many, group_size=16, method="rtn", progress=False)
    dense = {k: v.dequantize() if isinstance(v, awq_jax.QuantizedTensor) else v for k, v in q.items()}
    want, got = plain(dense, ROWS), awq_jax.bind(split)(q, ROWS)
    text = str(jax.make_jaxpr(awq_jax.bind(split, impl="xla"))(q, ROWS))
    local = {(D, F // 2): "columns", (F // 2, D): "rows"}
    return {
        "sites": sorted(s.path for _, s in many.plan.sites()),
        "skipped": dict(many.plan.skipped),
        "packed": sorted(k for k, v in q.items() if isinstance(v, awq_jax.QuantizedTensor)),
        "stats": apart,
        "output": float(np.abs(np.asarray(got - want)).max() / np.abs(np.asarray(want)).max()),
        "words": sorted(
            kind for (k, n), kind in local.items() if f"u32[{k // 8},{n}]" in text or f",{k // 8},{n}]" in text
        ),
    }


def arriving() -> dict[str, Any]:
    """Parameters that lie on a mesh: where their packed arrays lie, and what the model computes."""

    def fn(p: Any, x: Any) -> Any:
        h = jnp.einsum("etd,edf->etf", x, p["ups"])
        return jnp.einsum("etf,efd->etd", jax.nn.relu(h), p["downs"]) @ p["up"] @ p["down"] @ p["head"]

    specs = {
        "ups": P("a", None, "b"),
        "downs": P("a", "b"),
        "up": P(None, ("a", "b")),
        "down": P(("a", "b")),
        "head": P(),
    }
    p = {k: v for k, v in params().items() if k in specs}
    there = {k: jax.device_put(v, NamedSharding(MESH, specs[k])) for k, v in p.items()}
    settings: dict[str, Any] = {"group_size": 32, "method": "rtn", "progress": False}
    plan = awq_jax.discover(fn, p, ROWS)
    one, many = (awq_jax.quantize(x, plan, **settings) for x in (p, there))
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), one, many)
    got = jax.jit(awq_jax.bind(fn, impl="xla"))(many, ROWS)
    return {
        "same": all(jax.tree.leaves(same)),
        "apart": float(np.abs(np.asarray(got) - np.asarray(awq_jax.bind(fn)(one, ROWS))).max() / np.abs(got).max()),
        "shards": {
            k: [list(a.sharding.shard_shape(a.shape)) for a in (q.qweight, q.scales)]
            for k, q in many.items()
            if isinstance(q, awq_jax.QuantizedTensor)
        },
    }


if __name__ == "__main__":
    chosen = [fn for fn in (tensor_parallel, expert_parallel, layers) if fn.__name__ in sys.argv]
    found = {fn.__name__: case(fn) for fn in chosen}
    print(json.dumps(found | ({"arriving": arriving()} if "arriving" in sys.argv else {})))
