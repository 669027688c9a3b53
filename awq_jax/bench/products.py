"""Matrix products: the packed kernels, XLA in bfloat16, and other libraries', each against the floor."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from awq_jax import kernels
from awq_jax.bench import peers, random_models, timing
from awq_jax.bench.timing import Measurement
from awq_jax.kernels import dispatch, layout, triton_matmul, tuned
from awq_jax.pack import Array
from awq_jax.qtensor import QuantizedTensor

# What the targets are about, what Llama-3-8B decodes with (q/k/v and gate/up merged), and a larger one.
SHAPES = ((8192, 8192), (4096, 14336), *random_models.products("llama-3-8b"), (8192, 28672))
ROWS = (1, 4, 16, 64, 256, 2048)
CHECKED = 256  # columns compared with float64
LIMIT = 1e-2  # relative error of a product of bfloat16 numbers
Say = Callable[[str], None]
Product = Callable[[jax.Array, QuantizedTensor], jax.Array]
Prepare = Callable[[QuantizedTensor], QuantizedTensor]


def floor(m: int, k: int, n: int, group: int, bits: int, top: timing.Ceilings) -> float:
    """Seconds below which no kernel can be: each byte moved once, each multiplication done once.

    The weight's codes, a 16-bit scale and an 8-bit zero point per group and column, and 16-bit
    activations and results.
    """
    moved = k * n * bits / 8 + -(-k // group) * n * 3 + 2 * m * (k + n)
    return max(moved / top.bandwidth, 2 * m * k * n / top.flops)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _random(key: jax.Array, k: int, n: int, group: int, bits: int) -> tuple[jax.Array, ...]:
    a, b, c = jax.random.split(key, 3)
    groups = k // group
    scales = jax.random.uniform(b, (groups, n), jnp.float32, 0.005, 0.025).astype(jnp.bfloat16)
    zeros = jax.random.bits(c, (groups, n), jnp.uint8) >> (8 - bits)
    return jax.random.bits(a, (k * bits // 32, n), jnp.uint32), scales, zeros


def weight(seed: int, k: int, n: int, group: int, bits: int) -> QuantizedTensor:
    """Random codes, scales and zero points; every 32-bit word is a valid one."""
    words, scales, zeros = _random(jax.random.key(seed), k, n, group, bits)
    return QuantizedTensor(words, scales, zeros, None, bits, group, "kn", (k,), (n,), "bfloat16")


def expected(x: np.ndarray, q: QuantizedTensor, columns: np.ndarray) -> np.ndarray:
    """``x @ w[:, columns]`` in float64, unpacked here with NumPy."""
    words = np.asarray(q.qweight)[:, columns]
    shifts = np.arange(0, 32, q.bits, dtype=np.uint32)[:, None]
    codes = ((words[:, None] >> shifts) & np.uint32(2**q.bits - 1)).reshape(-1, len(columns))[: q.k]
    spread = functools.partial(np.repeat, repeats=q.group_size, axis=0)

    def table(a: Array) -> np.ndarray:
        return spread(np.asarray(a.astype(jnp.float32))[:, columns].astype(np.float64))

    w = codes.astype(np.float64) * table(q.scales)
    if q.offsets is not None:
        w += table(q.offsets)
    else:
        w -= (2.0 ** (q.bits - 1) if q.zeros is None else table(q.zeros)) * table(q.scales)
    return x.astype(np.float64) @ w


def error(y: jax.Array | np.ndarray, x: jax.Array, q: QuantizedTensor, seed: int) -> float:
    """Relative error of ``y [m, N]`` in some columns; infinite if any element is not finite."""
    y = np.asarray(y, np.float32) if not isinstance(y, jax.Array) else np.asarray(y.astype(jnp.float32))
    if not np.isfinite(y).all():
        return float("inf")
    columns = np.random.default_rng(seed).choice(q.n, min(CHECKED, q.n), replace=False)
    want = expected(np.asarray(x.astype(jnp.float32)), q, columns)
    return distance(y[:, columns], want)


def distance(y: np.ndarray, want: np.ndarray) -> float:
    """Of two arrays, relative to the second."""
    return float(np.linalg.norm(y - want) / np.linalg.norm(want))


def implementations(m: int, q: QuantizedTensor, dtype: DTypeLike) -> dict[str, tuple[Product, Prepare]]:
    """What can run here by name, and what brings a weight into the layout it reads."""
    out: dict[str, tuple[Product, Prepare]] = {}
    x = jax.ShapeDtypeStruct((m, q.k), dtype)
    for backend in dispatch.BACKENDS:
        prepare: Prepare = kernels.canonical if backend.layout == "canonical" else kernels.prepare
        if backend.obstacle(dispatch.request_for(x, prepare(q))) is None:
            out[backend.name] = (functools.partial(kernels.matmul, impl=backend.name), prepare)
    return out


def timed(
    run: Product,
    xs: Sequence[jax.Array],
    qs: Sequence[QuantizedTensor],
    w: QuantizedTensor,
    seed: int,
    seconds: float,
    times: int = 1,
) -> tuple[float, list[float]] | str:
    """Check and time a product.

    Args:
      run: the product.
      xs, qs: its arguments, so many that no cache holds them.
      w: the first of ``qs``, canonical.
      seed: see `error`.
      seconds: to measure for, about.
      times: how often to measure; each compiles.

    Returns:
      The relative error, and seconds of a call, the least first; or how it failed.

    Raises:
      TimeoutError: a caller's, who waits no longer.
    """
    try:
        wrong, sets = error(jax.jit(run)(xs[0], qs[0]), xs[0], w, seed), list(zip(xs, qs, strict=True))
        return wrong, sorted(timing.per_call(run, sets, seconds) for _ in range(times))
    except TimeoutError:
        raise
    except Exception as e:  # others may work
        return f"{type(e).__name__}: {str(e)[:300]}"


def measure(
    shapes: Iterable[tuple[int, int]],
    rows: Sequence[int],
    group: int,
    bits: int,
    top: timing.Ceilings,
    *,
    seconds: float = 0.2,
    seed: int = 0,
    with_peers: bool = True,
) -> Iterator[Measurement]:
    """One row per shape, number of rows and implementation; each is checked on fresh random data.

    Yields:
      Dicts with ``m``, ``k``, ``n``, ``group_size``, ``bits``, ``impl``, ``form``, ``us`` and
      ``us_again`` (two measurements), ``floor_us``, ``floor_share``, ``vs_bf16``, ``error``,
      ``correct``, ``peers_us`` (microseconds of other libraries, or why there are none); of an implementation
      that fails, only what it was asked, and ``failed``.
    """
    for k, n in shapes:
        count = timing.copies(k * n * bits // 8)
        weights = [weight(seed + i, k, n, group, bits) for i in range(count)]
        dense_count = timing.copies(2 * k * n, 16)
        normals = jax.jit(lambda key, k=k, n=n: jax.random.normal(key, (k, n), jnp.bfloat16) * 0.02)
        dense = [normals(jax.random.key(seed + i)) for i in range(dense_count)]
        for m in rows:
            xs = [jax.random.normal(jax.random.key(seed + 99 + i), (m, k), jnp.bfloat16) for i in range(count)]
            bf16 = timing.per_call(jnp.dot, list(zip(xs, dense, strict=False)), seconds)
            others = peers.measure(weights[0], xs[0], seed, error, seconds) if with_peers else {}
            least = floor(m, k, n, group, bits, top)
            for name, (run, prepare) in implementations(m, weights[0], jnp.bfloat16).items():
                qs = [prepare(w) for w in weights]
                asked = {"m": m, "k": k, "n": n, "group_size": group, "bits": bits, "impl": name}
                found = timed(run, xs, qs, weights[0], seed + m, seconds, times=2)
                if isinstance(found, str):
                    yield asked | {"failed": found}
                    continue
                wrong, (best, again) = found
                yield asked | {
                    "form": kernels.explain(xs[0], qs[0], impl=name),
                    "us": best * 1e6, "us_again": again * 1e6, "floor_us": least * 1e6,
                    "floor_share": least / best, "bf16_us": bf16 * 1e6, "vs_bf16": bf16 / best,
                    "error": wrong, "correct": wrong < LIMIT, "peers_us": others,
                }  # fmt: skip


def line(row: Measurement) -> str:
    """One row for people."""
    if "failed" in row:
        return f"{row['m']:5d} x {row['k']}x{row['n']} {row['impl']:7s} FAILED: {row['failed']}"
    others = ", ".join(f"{k} {v:.1f}" for k, v in row["peers_us"].items() if isinstance(v, float))
    return (
        f"{row['m']:5d} x {row['k']}x{row['n']} {row['impl']:7s} {row['us']:9.1f} us  floor {row['floor_share']:4.0%}  "
        f"bf16 x{row['vs_bf16']:.2f}  error {row['error']:.1e}{'' if row['correct'] else ' WRONG'}  {others}"
    )


def candidates(m: int, chip: tuned.Chip, bits: int, k: int, n: int) -> list[tuned.Config]:
    """At most six configurations worth timing for ``m`` rows, the tables' own choice first."""
    own = tuned.choose(chip, bits, m, k, n)
    mma = functools.partial(tuned.Config, "mma")
    bm = next((rows for rows in (8, 16, 32, 64) if m <= rows), 128)
    if bm <= 16:
        more = [
            mma(bm, 128, stages=6, resident=3), mma(bm, 64, warps=2, resident=8), mma(bm, 128, resident=8),
            mma(bm, 128, resident=2), tuned.Config("gemv", block_n=64, stages=1, resident=6),
        ]  # fmt: skip
    elif bm <= 64:
        more = [
            mma(bm, 128, late=True, resident=2), mma(bm, 128, late=False, resident=4), mma(bm, 64, resident=3),
            mma(bm, 256, warps=8, stages=3, late=False, resident=1), mma(16, 128, resident=4),
        ]  # fmt: skip
    else:
        wide = functools.partial(mma, warps=8, stages=3, late=False, resident=1)
        more = [
            tuned.Config("dequantize"), wide(128, 128, split=1), wide(128, 256, split=1), wide(256, 128, split=1),
            wide(64, 256), mma(64, 128, late=False),
        ]  # fmt: skip
    return list(dict.fromkeys([own, *more]))[:6]


def tune(
    shapes: Iterable[tuple[int, int]],
    rows: Sequence[int],
    group: int,
    bits: int,
    chip: tuned.Chip,
    *,
    seconds: float = 0.1,
    seed: int = 0,
    say: Say = lambda line: None,
    product: Callable[..., jax.Array] = triton_matmul.matmul,
) -> Iterator[Measurement]:
    """Time the candidates; the fastest correct one for each shape and bucket of rows.

    Args:
      shapes, rows: of the products, (k, n) and m; each m stands for its bucket.
      group, bits: of the weights.
      chip: to tune for.
      seconds: per candidate, about.
      seed: of the data.
      say: told of each winner, and of candidates that do not compile.
      product: what is timed, called as `awq_jax.kernels.triton_matmul.matmul`.

    Yields:
      Entries of ``shapes`` in a table of `awq_jax.kernels.tuned` (see `table`).
    """
    for k, n in shapes:
        count = timing.copies(k * n * bits // 8)
        weights = [weight(seed + i, k, n, group, bits) for i in range(count)]
        ready = [layout.to_cuda(w) for w in weights]
        for m in sorted({tuned.bucket(m) or m for m in rows}):
            xs = [jax.random.normal(jax.random.key(seed + 99 + i), (m, k), jnp.bfloat16) for i in range(count)]
            ranked: list[tuple[float, tuned.Config]] = []
            for config in candidates(m, chip, bits, k, n):
                run = functools.partial(product, out_dtype=jnp.bfloat16, chip=chip, config=config)
                found = timed(run, xs, ready, weights[0], seed, seconds)
                if isinstance(found, str):  # what does not compile for this chip is no candidate
                    say(f"{m} x {k}x{n} {config}: {found.splitlines()[0]}")
                elif found[0] < LIMIT:
                    ranked.append((found[1][0], config))
            if ranked:
                best, config = min(ranked, key=lambda r: r[0])
                say(f"{m} x {k}x{n}: {best * 1e6:.1f} us with {config}")
                yield {"k": k, "n": n, "bits": bits, "rows": m} | dataclasses.asdict(config)


def table(chip: tuned.Chip, entries: Iterable[Measurement], before: Measurement | None = None) -> Measurement:
    """The content of ``kernels/tuned/<chip>.json``; ``before``: one whose other entries are kept."""

    def key(entry: Measurement) -> tuple[int, ...]:
        return entry["k"], entry["n"], entry.get("bits", 4), entry["rows"]

    before = before or {}
    kept = {key(e): e for e in [*before.get("shapes", ()), *entries]}
    rules, source = list(before.get("rules", ())), "measured by awq-jax bench tune"
    return {"chip": chip.kind, "source": source, "rules": rules, "shapes": list(kept.values())}
