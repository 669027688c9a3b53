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
- search: the Cholesky factor ``K^3 / 3`` and its inverse ``K^3``; then ``1 + 2 n_grid`` candidates, each rounding all
  ``K N`` numbers (`OPS` operations a number).
- round: the factor once more on every device that has a piece; and ``38 K^2 N`` in products:
  in each of 3 rounds 2 of compensation, 4 of two losses, 4 of refitting scales; 4 of the losses of plain and clipped
  rounding; 4 of the energy and of plain rounding's loss. Besides, for each number: 100 clipping pairs, the
  compensation within blocks of 128 rows (``3 x 2 x 128``), ``3 x 2 G`` of refitting, and ``2/3 G^3`` a column
  in the systems of the refitting.
"""

import argparse
import dataclasses
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from shared import checkpoints, running

from awq_jax import models
from awq_jax.algorithm.compensation import BLOCK
from awq_jax.algorithm.round_matrix import ROUNDS
from awq_jax.config import AwqConfig
from awq_jax.data import BATCH_TOKENS_ELSEWHERE
from awq_jax.models.weights import params as model_params
from awq_jax.plan import fold
from awq_jax.plan.plan import Plan, ScaleGroup
from awq_jax.qtensor import QuantizedTensor
from awq_jax.quantizer import column_pieces as columns
from awq_jax.quantizer.scale_groups import GroupScale, find_scale, round_group
from awq_jax.quantizer.targets import Target
from awq_jax.stream import parts
from awq_jax.stream.job import Options, prepare
from awq_jax.stream.run import BlockReader
from awq_jax.stream.session import Session

OPS = 14  # of rounding a number on its grid and taking the error: counted in `quantize_dequantize`, `column_loss`
PAIRS = 100  # of clipping factors
RATIO = 3.5  # Llama 2 and 3, 70B: inner size over hidden size
SAMPLES, LENGTH = 128, 512  # calibration of `count`
MEASURED = 8  # samples of `cost`, of LENGTH tokens
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
    """Of one group on a device that does this share of it, factor included: Cholesky, and the inverse of that."""
    return operations(factors=4 / 3 * g.k**3, numbers=share * (1 + 2 * config.n_grid) * OPS * float(g.k) * g.n)


def rounding(g: Shape, config: AwqConfig, share: float = 1.0) -> np.ndarray:
    """The same of rounding."""
    kn, groups = share * g.k * g.n, g.k / config.group_size
    products = (10 * ROUNDS + 8) * g.k * kn + share * ROUNDS * 2 / 3 * groups**3 * g.n
    numbers = kn * (PAIRS * OPS + ROUNDS * (2 * BLOCK + 2 * groups) + (2 * ROUNDS + 4) * OPS)
    return operations(products, 4 / 3 * g.k**3, numbers)


def named(work: np.ndarray) -> dict[str, float]:
    """For a result."""
    return dict(zip(KINDS, work.tolist(), strict=True))


def count(args: argparse.Namespace) -> running.Row:
    """Operations and bytes of a layer, on the device that does most, and seconds at the assumed rates."""
    layers, hidden, inner, vocab, heads = MODELS[args.model]
    settings, d, tokens = AwqConfig.from_dict({"explicit_scale": False}), args.devices, SAMPLES * LENGTH
    config = models.config_from_hf(checkpoints.config(2, hidden, inner, vocab, heads=heads, kv_heads=8))
    session = Session(config, settings)
    block = session.blocks[1]
    groups = [shape(g, targets, columns.PIECE_ELSEWHERE) for g, targets in session.work(block)]
    batch = min(BATCH_TOKENS_ELSEWHERE, tokens)
    pairs = [(g, math.ceil(g.pieces / d)) for g in groups]
    rows = sum(ROUNDS * g.k * n for g, n in pairs)
    work = {
        "calibrate": calibrating(groups, math.ceil(tokens / batch / d) * batch, LENGTH, hidden),
        "search": sum((searching(g, settings, n / g.pieces) for g, n in pairs), operations()),
        "round": sum((rounding(g, settings, n / g.pieces) for g, n in pairs), operations()),
    }
    rates = np.array([args.products, args.products, args.numbers])
    weights = sum(g.k * g.n for g in groups)
    moved = {
        "weights read": 2 * block.count_elements(),
        # Codes, a float16 scale and a byte of zero point for each group.
        "packed weights written": int(weights * (settings.bits / 8 + 3 / settings.group_size)),
        "Grams on a device": sum(4 * math.ceil(g.k / d) * g.k for g in groups),
        "hidden states on the host": 2 * tokens * hidden,
    }
    seconds = {
        "calibrate": work["calibrate"][0] / args.bf16_products,
        "search": float((work["search"] / rates).sum()),
        "round": float((work["round"] / rates).sum()),
        "rows one after another": rows * args.row,
    }
    read = moved["weights read"] / args.disk_rate
    assumed = {name: getattr(args, name) for name in ("products", "bf16_products", "numbers", "row", "disk_rate")}
    return {
        "command": f"python benchmarks/scale.py count {args.model} --devices {d}",
        "devices": d,
        "calibration": f"{SAMPLES} x {LENGTH} tokens",
        "layers": layers,
        "groups": [dataclasses.asdict(g) for g in groups],
        "operations": {phase: named(w) for phase, w in work.items()},
        "rows": rows,
        "bytes": moved,
        "assumed": assumed,
        "seconds_per_layer": seconds,
        "seconds_reading_a_layer": read,
        "hours": max(sum(seconds.values()), read) * layers / 3600,
    }


@dataclasses.dataclass
class Spent:
    """A phase of one group: its counted work, and the processor seconds it took and was predicted to take."""

    phase: str
    group: Shape
    work: np.ndarray
    cpu_s: float
    predicted_s: float = math.nan

    def row(self) -> running.Row:
        """For a result; the prediction is there where the rates are those of other sizes."""
        said = {} if math.isnan(self.predicted_s) else {"predicted_s": self.predicted_s}
        return {"phase": self.phase, **dataclasses.asdict(self.group), **named(self.work), "cpu_s": self.cpu_s, **said}


@dataclasses.dataclass(frozen=True)
class Size:
    """A layer of one size: phases of its groups, and processor seconds of reading and writing with their bytes."""

    hidden: int
    inner: int
    tokens: int
    rows: list[Spent]
    files: dict[str, dict[str, float]]

    def totals(self) -> dict[str, float]:
        """Processor seconds by phase."""
        found: dict[str, float] = {}
        for row in self.rows:
            found[row.phase] = found.get(row.phase, 0.0) + row.cpu_s
        return found


def measure(directory: Path, hidden: int, samples: int, length: int, group_size: int) -> Size:
    """Quantize a checkpoint of two layers; in a process of its own, whose compiled programs are all new."""
    inner, vocab = int(hidden * RATIO), 1024
    checkpoint, part = directory / "model", directory / "part"
    shutil.rmtree(checkpoint, ignore_errors=True)
    checkpoints.make(checkpoint, 2, hidden, inner, vocab)
    part.mkdir(exist_ok=True)
    tokens = checkpoints.random_tokens(vocab, samples, length)
    options, chosen = Options(seq_len=length), {"group_size": group_size}
    job = prepare(checkpoint, directory / "out", tokens, options, chosen)
    session, (states, _) = job.session, job.open_hidden(0)
    embed, first, block = session.blocks[:3]
    with BlockReader(job, [embed, first]) as reader:
        for each in (embed, first):
            leaves = reader(each)
            session.quantize(each, leaves, session.calibrate(each, leaves, states))
    # Not by `BlockReader`, whose thread reads the next block while this one is at work.
    tensors, reading = running.measured(
        lambda: {p: list(job.weights.read(block.prefix + p)) for p in session.read_by(block)}
    )
    leaves = {block.prefix + p: job.weights.leaf(block.prefix + p, t) for p, t in tensors.items()}
    inside = {path.removeprefix(block.prefix): leaf for path, leaf in leaves.items()}
    fetch, calibration = running.measured(session.calibrate, block, inside, states)
    work, settings = session.work(block), job.settings
    groups = [
        shape(g, targets, columns.PIECE.get(jax.default_backend(), columns.PIECE_ELSEWHERE)) for g, targets in work
    ]
    rows: list[Spent] = []
    folded = {g.name: np.ones(g.channels, np.float32) for g, _ in work}
    scales: list[GroupScale] = []
    packed: dict[str, QuantizedTensor] = {}
    with jax.default_matmul_precision("highest"):
        for (group, targets), g in zip(work, groups, strict=True):
            found, cost = running.measured(find_scale, group, targets, leaves, fetch(group.name), settings)
            rows.append(Spent("search", g, searching(g, settings), cost.cpu))
            scales.append(found)
            if found.scale is not None:
                folded[group.name] = found.scale
        folder = fold.Folder(Plan(tuple(group for group, _ in work)), folded)
        for (group, targets), g, found in zip(work, groups, scales, strict=True):
            sums = fetch(group.name)
            made, cost = running.measured(
                round_group, group, targets, leaves, folder, found, sums, settings, consume=True
            )
            rows.append(Spent("round", g, rounding(g, settings), cost.cpu))
            packed |= {path: q for path, (q, _) in made.items()}
    counted = calibrating(groups, tokens.size, length, hidden)
    rows.append(Spent("calibrate", Shape("all", 0, 0, 0), counted, calibration.cpu))
    ready = list(model_params.tensors(leaves | packed, session.chain.config))
    _, writing = running.measured(parts.write_tensors, part, 0, ready)
    written = sum(f.stat().st_size for f in part.iterdir())
    shutil.rmtree(part)
    shutil.rmtree(checkpoint)
    files = {
        "read": {"bytes": block.count_elements() * 4, "cpu_s": reading.cpu},
        "write": {"bytes": written, "cpu_s": writing.cpu},
    }
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


def cost(args: argparse.Namespace) -> running.Row:
    """All sizes, each in a process of its own; the last is held out of the fit."""
    sizes: list[Size] = []
    args.directory.mkdir(parents=True, exist_ok=True)
    start = running.measured if args.in_process else running.apart
    for hidden in args.sizes:
        sizes.append(start(measure, args.directory, hidden, args.samples, args.seq_len, args.group_size)[0])
        print(hidden, running.rounded(sizes[-1].totals(), 2), flush=True)
    known = [row for size in sizes[:-1] or sizes for row in size.rows]
    rates = fit(known)
    passes = [row for row in known if row.phase == "calibrate"]
    calibration = sum(row.work[0] for row in passes) / sum(row.cpu_s for row in passes)
    held, said = sizes[-1], dict.fromkeys(("search", "round", "calibrate"), 0.0)
    for row in held.rows:
        row.predicted_s = float(row.work[0] / calibration if row.phase == "calibrate" else (row.work / rates).sum())
        said[row.phase] += row.predicted_s
    took, before = held.totals(), sizes[0].totals()
    return {
        "command": f"python benchmarks/scale.py cost DIR --sizes {' '.join(map(str, args.sizes))}",
        **running.machine(),
        "rates": {f"{kind}_per_s": rate for kind, rate in (named(rates) | {"calibration": calibration}).items()},
        "held_out": held.hidden,
        "phases": {
            p: {"cpu_s": took[p], "predicted_s": said[p], "predicted_over_cpu": said[p] / took[p],
                "ratio_to_smallest": took[p] / before[p]} for p in took
        },
        "sizes": [vars(size) | {"rows": [row.row() for row in size.rows]} for size in sizes],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> running.Row:
    parser = running.parser(__doc__)
    sub = parser.add_subparsers(required=True)
    p = sub.add_parser("count", help="operations and bytes of a layer of a large model")
    p.add_argument("model", choices=MODELS)
    p.add_argument("--devices", type=int, default=1)
    p.add_argument("--products", type=float, default=30e12, help="float32 operations per second (default: %(default)g)")
    p.add_argument("--bf16-products", type=float, default=300e12, help="of calibration (default: %(default)g)")
    p.add_argument("--numbers", type=float, default=2e12, help="of what goes number by number (default: %(default)g)")
    p.add_argument("--row", type=float, default=20e-6, help="seconds of a row's step (default: %(default)g)")
    p.add_argument("--disk-rate", type=float, default=1e9, help="bytes per second (default: %(default)g)")
    p.set_defaults(run=count)
    c = sub.add_parser("cost", help="measure a layer at several sizes")
    c.add_argument("directory", type=Path, help="for checkpoints of up to 0.3 GB, which are deleted again")
    c.add_argument("--sizes", type=int, nargs="+", default=[1024, 1536], help="hidden sizes; the last is predicted")
    c.add_argument("--samples", type=int, default=MEASURED)
    c.add_argument("--seq-len", type=int, default=LENGTH)
    c.add_argument("--group-size", type=int, default=128)
    c.add_argument("--in-process", action="store_true", help="start no process for each size: quicker, not comparable")
    c.set_defaults(run=cost)
    for each in (p, c):
        each.add_argument("--out", type=Path, help="write JSON here")
    args = parser.parse_args(arguments)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return running.finish(args.run(args), args.out)


def smoke(directory: Path) -> Iterator[list[str]]:
    out = ["--out", str(directory / "r.json")]
    yield ["count", "small", "--devices", "2", *out]
    tiny = ["--sizes", "64", "--samples", "2", "--seq-len", "16", "--group-size", "32", "--in-process"]
    yield ["cost", str(directory), *tiny, *out]


if __name__ == "__main__":
    running.run(main, smoke)
