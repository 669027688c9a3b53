"""Everything that needs a CUDA card, in one command of under ten minutes.

    python benchmarks/gpu.py --out benchmarks/results/

In this order: checks each kernel on fresh random data against float64, with its gradients; decodes a model of Llama 3's
shape with packed weights (memory first, while the allocator's peak is its own); tunes the tile sizes of the shapes the
targets are about and of those that this model decodes with, and uses what it found; measures products against XLA in
bfloat16 and other libraries; decodes again with the tuned sizes, and with bfloat16 weights; then other
shapes. No piece of this may take more than two minutes, and a run that hangs all the same ends itself 54 seconds after
``--minutes``. Results are written after every row, so that a run cut short keeps what it has: ``gpu_<chip>.json``,
whose ``running`` says at what it was, the same as a table in ``gpu_<chip>.md``, and ``tuned_<chip>.json``, to be copied
to ``kernels/tuned/<chip>.json``. ``--dry-run`` rehearses all of it in small on a CPU, with the kernels' place taken by
XLA.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from shared import running

from awq_jax import kernels
from awq_jax.bench import decoding, products, random_models, timing
from awq_jax.bench.peers import deadline
from awq_jax.kernels import triton_matmul, tuned, xla
from awq_jax.qtensor import QuantizedTensor

# Torch needs room on the card too; JAX reads this when it first looks for devices.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

Row = dict[str, Any]  # numbers and words, as they go into a JSON file
Shapes = Sequence[tuple[int, int]]

LONGEST = 120.0  # seconds for one piece: a model made, compiled and timed takes longest
GRACE, OVER = 40.0, 54.0  # seconds after --minutes: no piece runs longer, and the process ends
FIRST = ((8192, 8192), (4096, 14336))  # what the targets are about
THEN = ((14336, 4096), (8192, 28672))
# (kernel, rows): odd numbers too, and several tiles.
KERNELS = (("mma", (1, 5, 16, 33, 130)), ("gemv", (1, 3)), ("dequantize", (7, 260)))
WEIGHTS = (  # k, n, group size, bits, dtype
    (1024, 512, 128, 4, "bfloat16"), (576, 200, 64, 4, "float16"), (1056, 264, 32, 4, "bfloat16"),
    (640, 256, 640, 8, "bfloat16"), (512, 136, 64, 8, "float16"),
)  # fmt: skip


FORMS = ("symmetric", "offsets", "bias", "two weights", "gradient")


def correctness(seed: int, many: int | None) -> Iterator[Row]:
    """Each kernel over groups, bits, dtypes and odd numbers of rows, against float64 in NumPy; then `FORMS`.

    Args:
      seed: of the data.
      many: cases at most, None for all.

    Yields:
      One dict per case.
    """
    chip = tuned.local_chip()
    cases: list[tuple[int, int, int, int, int, str, tuned.Config | None, str]] = []
    for m, kernel in ((m, kernel) for kernel, rows in KERNELS for m in rows):
        tile = 8 if m <= 8 else 16 if m <= 16 else 64
        own = tuned.Config(kernel, block_m=tile, block_n=64, late=m <= 16, stages=3)
        cases += [(m, *weight, own, "plain") for weight in WEIGHTS]
    cases += [(m, 1024, 1024, 128, 4, "bfloat16", None, "plain") for m in tuned.BUCKETS[: None if chip else 4]]
    cases += [(5, 576, 200, 64, 4, "bfloat16", None, form) for form in FORMS]

    def product(
        x: jax.Array, q: QuantizedTensor, bias: jax.Array | None = None, *, config: tuned.Config | None
    ) -> jax.Array:
        if chip is None:
            y = xla.dequantize(x, q, x.dtype)
            return y if bias is None else y + bias.astype(y.dtype)
        return triton_matmul.matmul(x, q, x.dtype, chip=chip, config=config, bias=bias)

    for i, (m, k, n, g, bits, dtype, config, form) in enumerate(cases if many is None else cases[-many:]):
        row = {"m": m, "k": k, "n": n, "group_size": g, "bits": bits, "dtype": dtype, "form": form,
               "kernel": config.kernel if config else "of the table"}  # fmt: skip
        try:
            w = products.weight(seed + i, k, n, g, bits)
            x = jax.random.normal(jax.random.key(seed + i), (m, k), dtype)
            wrong = form_error(functools.partial(product, config=config), x, w, form, seed)
            row |= {"error": wrong, "correct": wrong < products.LIMIT}
        except TimeoutError:  # of this piece
            raise
        except Exception as e:  # the next kernel may work
            row |= {"error": f"{type(e).__name__}: {str(e)[:300]}", "correct": False}
        yield row


def form_error(product: Callable[..., jax.Array], x: jax.Array, w: QuantizedTensor, form: str, seed: int) -> float:
    """The relative error of ``product(x, w)``, or of what ``form`` makes of it."""
    if form == "symmetric":
        w = dataclasses.replace(w, zeros=None)
    elif form == "offsets":
        assert w.zeros is not None
        w = dataclasses.replace(w, zeros=None, offsets=-w.zeros.astype(w.scales.dtype) * w.scales * 0.9)
    ready, run = kernels.prepare(w), jax.jit(product)
    if form == "bias":
        bias = jax.random.normal(jax.random.key(seed), (w.n,), jnp.float32) * 2
        return products.error(run(x, ready, bias=bias).astype(jnp.float32) - bias, x, w, seed)
    if form == "two weights":
        other = dataclasses.replace(w, qweight=w.qweight ^ jnp.uint32(0x5A5A5A5A))
        both = jax.tree.map(lambda *a: jnp.stack(a), w, other)
        y = run(jnp.stack([x, -x]), kernels.prepare(dataclasses.replace(both, axes="bkn")))
        return max(products.error(y[0], x, w, seed), products.error(y[1], -x, other, seed))
    if form == "gradient":
        t = jax.random.normal(jax.random.key(seed + 1), (x.shape[0], w.n), x.dtype)
        dx = jax.jit(jax.grad(lambda x: (product(x, ready) * t).sum(dtype=jnp.float32)))(x)
        whole = products.expected(np.eye(w.k), w, np.arange(w.n))
        return products.distance(np.asarray(dx, np.float64), np.asarray(t, np.float64) @ whole.T)
    return products.error(run(x, ready), x, w, seed)


@contextlib.contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """End the process, saying where it was, if this takes longer, even in a call that never comes back to Python."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class Run:
    """Time, results and files of one run."""

    def __init__(self, out: Path, minutes: float, slug: str, result: Row) -> None:
        self.start, self.seconds = time.monotonic(), 60 * minutes
        self.out, self.slug, self.result = out, slug, result

    def left(self, share: float = 1.0) -> bool:
        """Whether less than ``share`` of the time is over."""
        return time.monotonic() - self.start < self.seconds * share

    def save(self) -> None:
        """Write what there is; each file at once, so that none is ever half a file."""
        self.result["seconds"] = round(time.monotonic() - self.start, 1)
        self.write(f"gpu_{self.slug}.json", json.dumps(self.result, indent=1) + "\n")
        self.write(f"gpu_{self.slug}.md", table(self.result))

    def write(self, name: str, text: str) -> None:
        part = self.out / f".{name}.part"
        part.write_text(text)
        part.replace(self.out / name)

    def part(self, name: str, until: float, key: str, rows: Iterator[Row]) -> None:
        """Append ``rows`` to results; none is begun once a share ``until`` of the time is over."""
        self.result["running"] = name
        self.save()
        try:
            while self.left(until):
                left = self.start + self.seconds + GRACE - time.monotonic()
                with deadline(min(LONGEST, max(left, 1.0))):
                    row = next(rows, None)
                if row is None:
                    break
                self.result[key].append(row)
                self.save()
            else:
                print(f"{name}: stopped for time", flush=True)
        except Exception:  # one part that fails must not cost the others
            self.result["failures"].append({"part": name, "error": traceback.format_exc()[-2000:]})
            print(f"{name} FAILED: {self.result['failures'][-1]['error'][-300:]}", flush=True)
        self.result["running"] = None
        self.save()
        print(f"-- {name}: {time.monotonic() - self.start:.0f} s", flush=True)


def cells(*values: object) -> str:
    """A row of a table."""
    return "".join(f"| {str(value).replace('|', '/').replace(chr(10), ' ')} " for value in values) + "|"


def table(result: Row) -> str:
    """The results as Markdown."""
    checked, decoded = result["correctness"], result["decode"]
    top = result.get("ceilings") or {"bandwidth": 0.0, "flops": 0.0}
    lines = [
        f"# {result['device']}", "",
        f"`python benchmarks/gpu.py`, {result.get('seconds', 0)} s, seed {result['seed']}; a copy moves "
        f"{top['bandwidth'] / 1e9:.0f} GB/s, XLA's bfloat16 product does {top['flops'] / 1e12:.0f} TFLOP/s. "
        f"{sum(c['correct'] for c in checked)} of {len(checked)} kernel checks correct.", "",
        "| m | k x n | impl | us | share of floor | vs bf16 | error | others, us |", "|" + "---|" * 8,
    ]  # fmt: skip
    for r in result["kernels"]:
        said: tuple[str, ...] = (f"failed: {r.get('failed')}", "", "", "", "")
        if "failed" not in r:
            others = (f"{k} {v:.1f}" if isinstance(v, float) else f"{k}: {v}" for k, v in r["peers_us"].items())
            error = f"{r['error']:.1e}{'' if r['correct'] else ' WRONG'}"
            said = f"{r['us']:.1f}", f"{r['floor_share']:.0%}", f"{r['vs_bf16']:.2f}", error, ", ".join(others)
        lines.append(cells(r["m"], f"{r['k']} x {r['n']}", r["impl"], *said))
    lines += ["", "| model | weights | tokens/s | share of floor | vs dense | prefill tokens/s | weights + cache + one "
              "tile, GiB | peak, GiB |", "|" + "---|" * 8]  # fmt: skip
    dense = {r["model"]: r["tokens_per_s"] for r in decoded if r["bits"] is None}
    for r in decoded:
        speed, peak = r["tokens_per_s"], r["peak_bytes"]
        lines.append(cells(
            r["model"], f"{r['bits']} bits, {r['tables']}" if r["bits"] else "bfloat16", f"{speed:.1f}",
            f"{r['floor_share']:.0%}", f"{speed / dense[r['model']]:.2f}" if r["model"] in dense else "",
            f"{r['prefill_tokens_per_s']:.0f}", f"{r['peak_allowed_bytes'] / 2**30:.2f}",
            "" if peak is None else f"{peak / 2**30:.2f}",
        ))  # fmt: skip
    lines += [f"\n{f['part']} failed:\n\n```\n{f['error'].strip()}\n```" for f in result["failures"]]
    return "\n".join(lines) + "\n"


def everything(
    *,
    out: Path,
    minutes: float = 8.5,
    seed: int = int(time.time()) % 100_000,
    dry_run: bool = False,
    only: tuple[str, ...] = (),
    checks: int | None = None,
) -> Row:
    """All parts, the most wanted first; nothing is begun after so many minutes. ``--out`` is a directory for results.

    ``--only`` does some of the parts, as their names are printed; ``--checks`` only the last so many of correctness.
    """
    with ended_after(60 * minutes + OVER):
        chip, reason = tuned.local_chip(), triton_matmul.unavailable()
        if chip is None and not dry_run:
            raise SystemExit("no NVIDIA GPU here; --dry-run rehearses without one")
        if chip is not None and reason is not None:
            raise SystemExit(f"nothing to measure: {reason}; without a network see docs/guides/kernels.md")
        out.mkdir(parents=True, exist_ok=True)
        result: Row = timing.device() | {
            "seed": seed, "chip": dataclasses.asdict(chip) if chip else None, "triton": reason,
            "correctness": [], "kernels": [], "decode": [], "tuned": [], "failures": [],
        }  # fmt: skip
        run = Run(out, minutes, chip.slug if chip else "dry-run", result)
        for name, until, key, rows in parts(run, chip, checks or (None if chip else 8)):
            if not only or name in only:
                run.part(name, until, key, rows)
        print(table(result))
        return result


def parts(run: Run, chip: tuned.Chip | None, checks: int | None) -> Sequence[tuple[str, float, str, Iterator[Row]]]:
    """Name, share of the time after which it is not begun, key of the results, and work that yields them."""
    result, seed = run.result, run.result["seed"]
    own = chip or tuned.Chip("dry-run", 90, 132)
    sizes: dict[str, Any] = {"context": 512, "steps": 64} if chip else {"context": 16, "steps": 2, "layers": 1}

    def ceilings() -> Iterator[Row]:
        result["ceilings"] = dataclasses.asdict(timing.ceilings(1.0 if chip else 0.01))
        yield from ()

    def check() -> Iterator[Row]:
        for case in correctness(seed, checks):
            if not case["correct"]:
                print("WRONG", case, flush=True)
            yield case

    def decode(name: str, bits: int | None) -> Iterator[Row]:
        row = decoding.run(name if chip else "small", bits, timing.Ceilings(**result["ceilings"]), **sizes)
        print(decoding.line(row), flush=True)
        yield row | {"tables": "tuned here" if result["tuned"] else "tables as shipped"}

    def tune(shapes: Shapes, rows: Sequence[int]) -> Iterator[Row]:
        product = triton_matmul.matmul if chip else lambda x, q, out_dtype, **_: xla.dequantize(x, q, out_dtype)
        for shape, m in itertools.product(shapes, rows):  # one at a time, so that the most wanted come first
            for entry in products.tune([shape], [m], 128, 4, own, seconds=0.04, say=print, product=product):
                found = products.table(own, [*result["tuned"], entry])
                run.write(f"tuned_{run.slug}.json", json.dumps(found, indent=1) + "\n")
                tuned.use(own, found)
                yield entry

    def measure(shapes: Shapes, rows: Sequence[int]) -> Iterator[Row]:
        top = timing.Ceilings(**result["ceilings"])
        for row in products.measure(shapes, rows, 128, 4, top, seconds=0.06, seed=seed):
            print(products.line(row), flush=True)
            yield row

    first, then = (FIRST, THEN) if chip else (((256, 256),), ((256, 128),))
    rows = (1, 4, 16, 64, 256, 2048) if chip else (1, 16)
    served = random_models.products("llama-3-8b" if chip else "small")
    return (
        ("ceilings", 0.1, "ceilings", ceilings()),
        ("correctness", 0.2, "correctness", check()),
        ("packed decode", 0.27, "decode", decode("llama-3-8b", 4)),
        ("tuning", 0.37, "tuned", tune(first, (1, 16, 64) if chip else (1,))),
        ("tuning for decode", 0.45, "tuned", tune(served, (1, 512) if chip else (1,))),
        ("more tuning", 0.55, "tuned", tune(first, (256, 4, 2048) if chip else (4,))),
        ("products", 0.75, "kernels", measure(first, rows)),
        ("packed decode, tuned", 0.8, "decode", decode("llama-3-8b", 4)),
        ("dense decode", 0.85, "decode", decode("llama-3-8b", None)),
        ("packed decode, Llama 2", 0.9, "decode", decode("llama-2-7b", 4)),
        ("more products", 1.0, "kernels", measure(then, rows)),
    )


def smoke(directory: Path) -> Iterator[list[str]]:
    wanted = ["ceilings", "correctness", "packed decode"]
    yield ["--dry-run", "--out", str(directory), "--checks", "1", "--only", *wanted]


main = functools.partial(running.run, (everything,), smoke)

if __name__ == "__main__":
    main()
