"""What the quantization of one block computes, counted from its groups: products of matrices, and the rest.

For a group of K channels whose weights have N columns together, T calibration tokens, groups of g, ``G = K / g``:

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

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from awq_jax.algorithm.grid import BLOCK
from awq_jax.algorithm.round_matrix import ROUNDS
from awq_jax.config import AwqConfig
from awq_jax.quantizer.column_pieces import Columns, Part

OPS = 14  # of rounding a number on its grid and taking the error: counted in `quantize_dequantize`, `column_loss`
PAIRS = 100  # of clipping factors


@dataclasses.dataclass(frozen=True)
class Shape:
    """A group: K channels, N columns of all its weights, and the pieces they are cut into."""

    name: str
    k: int
    n: int
    pieces: int


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations: in products of matrices, in factorizations, and in what goes number by number."""

    products: float = 0.0
    factors: float = 0.0
    numbers: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.factors + other.factors, self.numbers + other.numbers)


def shapes(work: Any, leaf: Any = None) -> list[Shape]:
    """Of what `awq_jax.stream.session.Session.work` says; ``leaf`` makes an array of a path and a shape."""
    found = []
    for group, targets in work:
        parts = [Part(leaf(t.site), t.site.canonical_axes) for t in targets]
        columns = Columns(parts, targets[0].rows)
        found.append(Shape(targets[0].site.path, group.channels, columns.total, columns.pieces))
    return found


def calibrate(groups: Sequence[Shape], tokens: int, length: int, heads_size: int) -> Work:
    """Of all tokens in one pass."""
    forward = sum(2.0 * g.k * g.n for g in groups) + 4.0 * length * heads_size
    return Work(tokens * (forward + sum(2.0 * g.k**2 for g in groups)))


def factor(g: Shape) -> Work:
    """Cholesky, and the inverse of what it gives."""
    return Work(factors=4 / 3 * g.k**3)


def search(g: Shape, config: AwqConfig) -> Work:
    """Of one group, factor included."""
    return factor(g) + Work(numbers=(1 + 2 * config.n_grid) * OPS * float(g.k) * g.n)


def pieces(g: Shape, config: AwqConfig) -> Work:
    """Rounding of a group's columns; they are shared by the devices."""
    kn, groups = float(g.k) * g.n, g.k / config.group_size
    products = (10 * ROUNDS + 8) * g.k * kn + ROUNDS * 2 / 3 * groups**3 * g.n
    numbers = kn * (PAIRS * OPS + ROUNDS * (2 * BLOCK + 2 * groups) + (2 * ROUNDS + 4) * OPS)
    return Work(products=products, numbers=numbers)


def per_device(g: Shape, config: AwqConfig, devices: int) -> tuple[Work, Work]:
    """Search and rounding of a group as the device that does most of it: the first."""
    share = math.ceil(g.pieces / devices) / g.pieces
    find, rest = search(g, config), pieces(g, config)
    cut = Work(products=rest.products * share, numbers=rest.numbers * share)
    return factor(g) + Work(numbers=find.numbers * share), factor(g) + cut
