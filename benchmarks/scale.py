"""What quantizing one layer costs: counted at the true shapes of large models, and measured at small ones.

    python benchmarks/scale.py count 70b --devices 1
    python benchmarks/scale.py count 405b --devices 8
    python benchmarks/scale.py cost DIR --out benchmarks/results/scaling_cost_cpu.json

`count` takes the groups of the real architecture and says what the device that does most computes and what is moved,
with the time that it takes at rates which are assumptions: ``--products``, ``--bf16-products``, ``--numbers``,
``--row``, ``--disk-rate``. Nothing of the model's size is allocated.

`cost` quantizes a layer of Llama's proportions at several sizes on this machine: the first layer of each compiles the
programs, the second is measured group by group. Rates are fitted to the smaller sizes, and the last is predicted from
its counts alone: some minutes.

The counts, for a group of K channels whose weights have N columns together, T calibration tokens, groups of g,
``G = K / g``:

- calibrate: the forward pass ``2 T (parameters of the linears) + 4 T S (heads x head size)`` (attention of S tokens),
  and the Gram ``2 T K^2``.
- search: the Cholesky factor ``K^3 / 3`` and its inverse ``K^3``; then the candidates of
  `awq_jax.quantizer.scale_search`, each rounding all ``K N`` numbers (`OPS` operations a number).
- round: the factor once more on every device that has a piece, unless search has kept it
  (`awq_jax.quantizer.group_inputs`: of small groups, on one device); and ``38 K^2 N`` in products:
  in each of 3 rounds 2 of compensation, 4 of two losses, 4 of refitting scales; 4 of the losses of plain and clipped
  rounding; 4 of the energy and of plain rounding's loss. Besides, for each number: 100 clipping pairs, the
  compensation within blocks of 128 rows (``3 x 2 x 128``), ``3 x 2 G`` of refitting, and ``2/3 G^3`` a column
  in the systems of the refitting.
"""

import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, TypeVar
from unittest import mock

import jax
import numpy as np
from shared import checkpoints, running

from awq_jax import models
from awq_jax.algorithm.compensation import INNER, OUTER
from awq_jax.algorithm.round_matrix import ROUNDS
from awq_jax.config import AwqConfig
from awq_jax.data import BATCH_TOKENS_ELSEWHERE
from awq_jax.models.weights import params as model_params
from awq_jax.plan.plan import ScaleGroup
from awq_jax.quantizer import column_pieces as columns
from awq_jax.quantizer import group_inputs, scale_search
from awq_jax.quantizer import quantize as quantizer
from awq_jax.quantizer.targets import Target
from awq_jax.stream import parts
from awq_jax.stream.decoder_blocks import DecoderBlock, Leaves
from awq_jax.stream.job import Options, prepare
from awq_jax.stream.session import Session

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of the processes that are started here

R = TypeVar("R")
OPS = 14  # of rounding a number on its grid and taking the error: counted in `quantize_dequantize`, `column_loss`
PAIRS = 33  # of clipping factors
SAMPLES, LENGTH = 128, 512  # calibration of `count`
PHASES = ("round", "search", "calibrate")
KINDS = ("products", "factors", "numbers")  # of operations
MODELS = {  # layers, hidden size, inner size, vocabulary, heads
    "70b": (80, 8192, 28672, 128256, 64),
    "405b": (126, 16384, 53248, 128256, 128),
    "small": (2, 256, 512, 512, 8),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A group: K channels, N columns of all its weights, and the pieces they are cut into."""

    name: str
    k: int
    n: int
    pieces: int


def shape(group: ScaleGroup, targets: Sequence[Target], piece: int) -> Shape:
    """Of a group; its weights are cut into pieces of ``piece`` numbers, as `awq_jax.quantizer.column_pieces` does."""
    n = sum(math.prod(t.site.shape) // group.channels for t in targets)
    most = max(columns.ALIGNED, piece // targets[0].rows // columns.ALIGNED * columns.ALIGNED)
    return Shape(targets[0].site.path, group.channels, n, -(-n // most))


def operations(products: float = 0.0, factors: float = 0.0, numbers: float = 0.0) -> np.ndarray:
    """In products of matrices, in factorizations, and in what goes number by number; see `KINDS`."""
    return np.array([products, factors, numbers])


def calibrating(groups: Iterable[Shape], tokens: int, length: int, heads_size: int) -> np.ndarray:
    """Of all tokens in one pass."""
    return operations(tokens * (sum(2.0 * g.k * (g.n + g.k) for g in groups) + 4.0 * length * heads_size))


def searching(g: Shape, config: AwqConfig, share: float = 1.0) -> np.ndarray:
    """Of one group on a device that does this share of it, with the elimination that makes the inverse factor."""
    first = scale_search.coarse(config.n_grid)
    tried = len(first)
    if tried < 1 + 2 * config.n_grid:
        tried += scale_search.neighbours(first[-1:], config.n_grid).size
    return operations(factors=2 / 3 * g.k**3, numbers=share * tried * OPS * float(g.k) * g.n)


def rounding(g: Shape, config: AwqConfig, share: float = 1.0) -> np.ndarray:
    """The same of rounding."""
    kn, groups = share * g.k * g.n, g.k / config.group_size
    products = ((4.25 * ROUNDS + 6) * g.k + 2 * ROUNDS * OUTER) * kn
    numbers = kn * (PAIRS * OPS + ROUNDS * (2 * INNER + 2 * groups) + (ROUNDS + 3) * OPS)
    systems = 2 * ROUNDS * share * groups**3 * g.n
    kept = share == 1 and 8 * g.k**2 <= group_inputs.KEPT
    return operations(products, 0.0 if kept else 2 / 3 * g.k**3, numbers + systems)


def named(work: np.ndarray) -> dict[str, float]:
    """For a result."""
    return dict(zip(KINDS, work.tolist(), strict=True))


def count(
    model: Literal["70b", "405b", "small"],
    *,
    devices: int = 1,
    products: float = 30e12,
    bf16_products: float = 300e12,
    numbers: float = 2e12,
    row: float = 20e-6,
    disk_rate: float = 1e9,
) -> running.Row:
    """Operations and bytes of a layer, on the device that does most, and seconds at the assumed rates.

    ``--products`` and ``--numbers`` are operations in float32 per second, ``--bf16-products`` those of calibration,
    ``--row`` seconds of a row's step, ``--disk-rate`` bytes per second.
    """
    layers, hidden, inner, vocab, heads = MODELS[model]
    settings, tokens = AwqConfig.from_dict({"explicit_scale": False}), SAMPLES * LENGTH
    config = models.config_from_hf(checkpoints.config(2, hidden, inner, vocab, heads=heads, kv_heads=8))
    session = Session(config, settings)
    block = session.blocks[1]
    groups = [shape(g, targets, columns.PIECE_ELSEWHERE) for g, targets in session.work(block)]
    batch = min(BATCH_TOKENS_ELSEWHERE, tokens)
    pairs = [(g, math.ceil(g.pieces / devices)) for g in groups]
    rows = sum(ROUNDS * g.k * n for g, n in pairs)
    work = {
        "calibrate": calibrating(groups, math.ceil(tokens / batch / devices) * batch, LENGTH, hidden),
        "search": sum((searching(g, settings, n / g.pieces) for g, n in pairs), operations()),
        "round": sum((rounding(g, settings, n / g.pieces) for g, n in pairs), operations()),
    }
    rates = np.array([products, products, numbers])
    weights = sum(g.k * g.n for g in groups)
    moved = {
        "weights read": 2 * block.count_elements(),
        # Codes, a float16 scale and a byte of zero point for each group.
        "packed weights written": int(weights * (settings.bits / 8 + 3 / settings.group_size)),
        "Grams on a device": sum(4 * math.ceil(g.k / devices) * g.k for g in groups),
        "hidden states on the host": 2 * tokens * hidden,
    }
    seconds = {
        "calibrate": work["calibrate"][0] / bf16_products,
        "search": float((work["search"] / rates).sum()),
        "round": float((work["round"] / rates).sum()),
        "rows one after another": rows * row,
    }
    read = moved["weights read"] / disk_rate
    return {
        "command": f"python benchmarks/scale.py count {model} --devices {devices}",
        "devices": devices,
        "calibration": f"{SAMPLES} x {LENGTH} tokens",
        "layers": layers,
        "groups": [dataclasses.asdict(g) for g in groups],
        "operations": {phase: named(w) for phase, w in work.items()},
        "rows": rows,
        "bytes": moved,
        "assumed": {"products": products, "bf16_products": bf16_products, "numbers": numbers, "row": row,
                    "disk_rate": disk_rate},
        "seconds_per_layer": seconds,
        "seconds_reading_a_layer": read,
        "hours": max(sum(seconds.values()), read) * layers / 3600,
    }  # fmt: skip


@dataclasses.dataclass
class Spent:
    """A phase of one group: its counted work, and the processor seconds it took and was predicted to take."""

    phase: str
    group: Shape
    work: np.ndarray
    cpu_s: float
    predicted_s: float | None = None

    def row(self) -> running.Row:
        """For a result; the prediction is there where the rates are those of other sizes."""
        said = {} if self.predicted_s is None else {"predicted_s": self.predicted_s}
        return {"phase": self.phase, **dataclasses.asdict(self.group), **named(self.work), "cpu_s": self.cpu_s, **said}


@dataclasses.dataclass(frozen=True)
class Size:
    """A layer of one size: phases of its groups, and processor seconds of reading and writing with their bytes."""

    hidden: int
    inner: int
    tokens: int
    rows: list[Spent]
    files: dict[str, dict[str, float]]

    def total(self, phase: str) -> float:
        """Processor seconds of a phase."""
        return sum(row.cpu_s for row in self.rows if row.phase == phase)


def measure(directory: Path, hidden: int, inner: int, samples: int, length: int, group_size: int) -> Size:
    """Quantize a checkpoint of two layers; in a process of its own, whose compiled programs are all new."""
    checkpoint, part, vocab = directory / "model", directory / "part", 1024
    shutil.rmtree(checkpoint, ignore_errors=True)
    checkpoints.make(checkpoint, layers=2, hidden=hidden, inner=inner, vocab=vocab, dtype="float32")
    part.mkdir(exist_ok=True)
    tokens = checkpoints.random_tokens(vocab, samples, length)
    job = prepare(checkpoint, directory / "out", tokens, Options(seq_len=length), {"group_size": group_size})
    session, ((states, *_), _) = job.session, job.open_hidden(0)
    piece = columns.PIECE.get(jax.default_backend(), columns.PIECE_ELSEWHERE)
    rows: list[Spent] = []

    def timed(
        phase: str, step: Callable[..., R], work: Callable[[Shape, AwqConfig], np.ndarray]
    ) -> AbstractContextManager[object]:
        """``step`` of `quantize_groups`, which leaves a row."""

        def instead(group: ScaleGroup, targets: Sequence[Target], *rest: object, **more: object) -> R:
            out, cost = running.measured(step, group, targets, *rest, **more)
            g = shape(group, targets, piece)
            rows.append(Spent(phase, g, work(g, job.settings), cost.cpu))
            return out

        return mock.patch.object(quantizer, step.__name__, instead)

    # Not by `BlockReader`, whose thread reads the next block while this one is at work.
    def read(block: DecoderBlock) -> Leaves:
        return {p: job.weights.leaf(block.prefix + p, list(job.weights.read(block.prefix + p))) for p in block.leaves}

    with timed("search", quantizer.find_scale, searching), timed("round", quantizer.round_group, rounding):
        for block in session.blocks[:3]:  # the embedding, a layer that compiles, and the one that counts
            rows.clear()
            leaves, reading = running.measured(read, block)
            fetch, calibration = running.measured(session.calibrate, block, leaves, states)
            done = session.quantize(block, leaves, fetch)
    counted = calibrating([row.group for row in rows if row.phase == "round"], tokens.size, length, hidden)
    rows.append(Spent("calibrate", Shape("all", 0, 0, 0), counted, calibration.cpu))
    ready = list(model_params.tensors(done.leaves, session.chain.config))
    _, writing = running.measured(parts.write_tensors, part, 0, ready)
    files = {
        "read": {"bytes": block.count_elements() * 4, "cpu_s": reading.cpu},
        "write": {"bytes": sum(f.stat().st_size for f in part.iterdir()), "cpu_s": writing.cpu},
    }
    shutil.rmtree(part)
    shutil.rmtree(checkpoint)
    return Size(hidden, inner, tokens.size, rows, files)


def fit(rows: Sequence[Spent]) -> np.ndarray:
    """Operations per processor second of each kind, in search and rounding together.

    Least squares of relative errors; in logarithms of the rates, which keeps them positive.
    """
    counts = np.array([r.work / max(r.cpu_s, 1e-6) for r in rows if r.phase != "calibrate"])
    rates = np.full(len(KINDS), np.log(counts.sum(axis=1).mean()))
    for _ in range(200):  # Gauss-Newton, damped
        parts = counts * np.exp(-rates)
        rates += np.linalg.solve(parts.T @ parts + 1e-3 * np.eye(len(KINDS)), parts.T @ (parts.sum(axis=1) - 1))
    return np.exp(rates)


def cost(
    directory: Path,
    *,
    sizes: tuple[int, ...] = (1024, 1536),
    ratio: float = 3.5,
    samples: int = 8,
    seq_len: int = LENGTH,
    group_size: int = 128,
) -> running.Row:
    """All hidden sizes, each in a process of its own; the last is held out of the fit, and predicted.

    Checkpoints of up to 0.3 GB are written into the directory, and deleted again. The inner size is ``--ratio`` times
    the hidden one: 3.5 in Llama 2 and 3, 70B.
    """
    measured: list[Size] = []
    directory.mkdir(parents=True, exist_ok=True)
    for hidden in sizes:
        measured.append(running.apart(measure, directory, hidden, int(hidden * ratio), samples, seq_len, group_size)[0])
        print(hidden, {phase: round(measured[-1].total(phase), 2) for phase in PHASES}, flush=True)
    first, held = measured[0], measured[-1]
    known = measured[:-1] or measured
    rates = fit([row for size in known for row in size.rows])
    passes = [row for size in known for row in size.rows if row.phase == "calibrate"]
    calibration = sum(row.work[0] for row in passes) / sum(row.cpu_s for row in passes)
    for row in held.rows:
        row.predicted_s = float(row.work[0] / calibration if row.phase == "calibrate" else (row.work / rates).sum())
    phases: dict[str, running.Row] = {}
    for phase in PHASES:
        took, said = held.total(phase), sum(row.predicted_s or 0.0 for row in held.rows if row.phase == phase)
        phases[phase] = {"cpu_s": took, "predicted_s": said, "predicted_over_cpu": said / took,
                         "ratio_to_smallest": took / first.total(phase)}  # fmt: skip
    return {
        "command": f"python benchmarks/scale.py cost DIR --sizes {' '.join(map(str, sizes))}",
        **running.machine(),
        "rates": {f"{kind}_per_s": rate for kind, rate in (named(rates) | {"calibration": calibration}).items()},
        "held_out": held.hidden,
        "phases": phases,
        "sizes": [vars(size) | {"rows": [row.row() for row in size.rows]} for size in measured],
    }


def smoke(directory: Path) -> Iterator[list[str]]:
    out = ["--out", str(directory / "r.json")]
    yield ["count", "small", "--devices", "2", *out]
    tiny = ["--sizes", "64", "--ratio", "1", "--samples", "2", "--seq-len", "16", "--group-size", "64"]
    yield ["cost", str(directory), *tiny, *out]


main = functools.partial(running.run, (count, cost), smoke)

if __name__ == "__main__":
    main()
