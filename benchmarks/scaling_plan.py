"""What the devices and the host hold at each step of quantizing one layer of a large model.

A step is what the package has in memory there by itself (weights, sums, the Gram at work, packed blocks not yet
written) and one compiled program. Only the fullest device is listed: the first, which has the weights while they are
rounded, cuts the pieces for all, and gathers the Grams.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import scaling_flops
from scaling_programs import Compiler, Need, nbytes

from awq_jax import models
from awq_jax.calibration import accumulate
from awq_jax.calibration.calibration import Wanted
from awq_jax.config import AwqConfig
from awq_jax.devices.pool import HERE, Pool
from awq_jax.models import ModelConfig
from awq_jax.plan import fold
from awq_jax.plan.plan import Plan
from awq_jax.quantizer import column_pieces, scale_groups, scale_search
from awq_jax.stream.session import BATCH_TOKENS_ELSEWHERE, Session, _within

SAMPLES, LENGTH = 128, 512
BF16 = 2  # bytes


def _llama(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 5e5, "vocab_size": 128256,
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    }  # fmt: skip


MODELS = {"70b": _llama(8192, 28672, 80, 64), "405b": _llama(16384, 53248, 126, 128)}


@dataclasses.dataclass(frozen=True)
class Step:
    """A moment.

    Attributes:
      name: what is going on.
      holds: what is on the fullest device -> bytes.
    """

    name: str
    holds: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.holds.values())


class Plans:
    """The steps of one layer.

    Args:
      config: architecture.
      count: devices.
      device_bytes: of each; the compiler is told.
    """

    def __init__(self, config: ModelConfig, count: int, device_bytes: int) -> None:
        self.compiler = Compiler(count, device_bytes)
        self.config, self.count = config, count
        self.settings = AwqConfig.from_dict({"explicit_scale": False})
        self.pool = Pool(self.compiler.devices) if count > 1 else HERE
        self.session = Session(config, self.settings, self.pool)
        self.block = self.session.blocks[1]
        self.work = self.session.work(self.block)
        self.leaves = {p: self.compiler.array(s, jnp.bfloat16) for p, s in self.block.leaves.items()}
        self.shapes = scaling_flops.shapes(self.work, lambda site: self.compiler.array(site.shape, jnp.bfloat16))
        self._cut: dict[int, tuple[column_pieces.Columns, dict[str, int], Need]] = {}
        self.wanted = [Wanted(_within(g, self.block)) for g, _ in self.work]

    @property
    def tokens(self) -> int:
        """Of the calibration set."""
        return SAMPLES * LENGTH

    @property
    def packed(self) -> int:
        """Bytes of a layer's packed weights: codes, a float16 scale and a byte of zero point for each group."""
        c = self.settings
        return int(sum(s.k * s.n for s in self.shapes) * (c.bits / 8 + 3 / c.group_size))

    def steps(self) -> list[Step]:
        """In the order in which they come."""
        found = [self._load(), *self._calibrate(), self._prove()]
        with jax.default_matmul_precision("highest"):
            for i in range(len(self.work)):
                found += self._search(i)
            for i in range(len(self.work)):
                found += self._round(i)
        return found

    def _step(self, name: str, parts: dict[str, int], program: Need | None = None) -> Step:
        # Packed: the layer before, until it is written, and this one's as it is made.
        packed = self.packed * (2 if name.startswith("round") else 1)
        held = {"weights": nbytes(self.leaves), "packed": packed, **parts}
        return Step(name, {k: n for k, n in held.items() if n} | ({"program": program.made} if program else {}))

    def _load(self) -> Step:
        largest = max(nbytes(a) for a in self.leaves.values())
        # A tensor as stored is turned round on the device, after a look for what is not a number.
        return self._step("load", {"tensor as stored": largest + largest // BF16})

    def _calibrate(self) -> list[Step]:
        a, step = self.compiler.array, self.session._step(self.block, self.wanted, True)
        batch = (BATCH_TOKENS_ELSEWHERE // LENGTH, LENGTH, self.config.hidden_size)
        x = a(batch, jnp.bfloat16)
        # One batch's states come in (in the program: its arguments) and one's go out.
        made = self.compiler.need(step, self.leaves, x, a((), jnp.int32))
        parts = {"sums": self._sums(), "batch": nbytes(x)}
        first = self._step("calibrate: a batch", parts, made)
        added = dict(parts) | {"statistics of the batch": nbytes(self._new()), "batch": 2 * nbytes(x)}
        return [first, self._step("calibrate: add", added, self._adding())]

    def _new(self) -> dict[str, Any]:
        """A batch's statistics, with their leading axis of 1."""
        made = {w.group.name: w.shapes() for w in self.wanted}
        return jax.tree.map(lambda s: self.compiler.array((1, *s.shape), s.dtype), made)

    def _sums(self, alive: slice = slice(None)) -> int:
        """Bytes on one device of what is summed up, of some of the groups."""
        d = self.count
        return sum(4 * -(-s.k // d) * s.k + 4 * s.k for s in self.shapes[alive])

    def _adding(self) -> Need:
        """The program that adds statistics to the sums."""
        shapes = {w.group.name: w.shapes() for w in self.wanted}
        if self.count == 1:
            return self.compiler.need(accumulate._add, self.compiler.tree(shapes), self._new())
        mesh, d = self.pool.mesh, self.count
        filled = {
            n: dataclasses.replace(
                s, gram=jax.ShapeDtypeStruct((-(-s.gram.shape[0] // d) * d, s.gram.shape[1]), jnp.float32)
            )
            for n, s in shapes.items()
        }
        lies = {n: accumulate._specs(0) for n in shapes}
        row = jax.tree.map(lambda s: jax.ShapeDtypeStruct((d, *s.shape), s.dtype), shapes)
        every = jax.tree.map(lambda s: jax.sharding.PartitionSpec(accumulate.AXIS), row)
        count = self.compiler.tree(jax.ShapeDtypeStruct((), jnp.int32), mesh, jax.sharding.PartitionSpec())
        tree = self.compiler.tree
        return self.compiler.need(accumulate._adder(self.pool), tree(filled, mesh, lies), tree(row, mesh, every), count)

    def _prove(self) -> Step:
        """The layer with and without scales folded in, on few tokens: `awq_jax.plan.verify`."""
        plan = Plan(tuple(w.group for w in self.wanted))
        apply = self.session.chain.apply(self.block)
        ones = {g.name: self.compiler.array((g.channels,)) for g in plan.groups if g.absorbers}
        x = self.compiler.array((1, 64, self.config.hidden_size), jnp.bfloat16)
        run = jax.jit(lambda leaves, scales, x: apply(fold.apply(plan, leaves, scales), x))
        return self._step("prove the plan", {"sums": self._sums()}, self.compiler.need(run, self.leaves, ones, x))

    def _name(self, i: int) -> str:
        return self.shapes[i].name.removeprefix(self.block.prefix).removesuffix("/kernel").rpartition("/")[2]

    def _gathered(self, i: int) -> dict[str, int]:
        """The whole Gram on the first device, where sums lie on several."""
        return {"Gram gathered": 4 * self.shapes[i].k ** 2} if self.count > 1 else {}

    def _gather(self, name: str, i: int, before: int | None) -> list[Step]:
        """The Gram brought to the first device, and cut to its rows; ``before``: the group that is let go then."""
        if self.count == 1:
            return []
        k, d = self.shapes[i].k, self.count
        rows = self.compiler.need(accumulate._rows, self.compiler.array((-(-k // d) * d, k)), k=k)
        parts = {"sums": self._sums(), **self._gathered(i)}
        if before is not None:
            parts["Gram of the group before"] = 4 * self.shapes[before].k ** 2
        return [self._step(f"{name}: gather", parts, rows)]

    def _pieces(self, i: int) -> tuple[column_pieces.Columns, dict[str, int], Need]:
        """The columns of a group; what is cut out of them at once; and the program that cuts."""
        if i in self._cut:
            return self._cut[i]
        ones = {g.name: np.ones((g.channels,), np.float32) for g, _ in self.work}
        folder = fold.Folder(Plan(tuple(g for g, _ in self.work)), ones)
        parts = []
        for t in self.work[i][1]:
            leaf = self.compiler.array(t.site.shape, jnp.bfloat16)
            parts.append(column_pieces.Part(leaf, t.site.canonical_axes, factors=folder.factors(t.site.path)))
        cut, first = column_pieces.Columns(parts, self.work[i][1][0].rows), parts[0]
        size = min(cut.size, first.columns)
        take = jax.jit(lambda leaf: dataclasses.replace(first, leaf=leaf).take(0, 0, 0, size))
        # Each is cut from its weights, and a second time where it comes from several.
        piece = 4 * cut.rows * cut.size * (1 + (len(parts) > 1))
        self._cut[i] = cut, {"pieces": piece * min(self.count, cut.pieces)}, self.compiler.need(take, first.leaf)
        return self._cut[i]

    def _search(self, i: int) -> list[Step]:
        a, s, name = self.compiler.array, self.shapes[i], self._name(i)
        cut, pieces, take = self._pieces(i)
        damping, leaf = self.settings.damping, self.work[i][1][0].leaf
        energies = self.compiler.need(scale_groups._energy, (a((s.k, s.k)), a(())), rows=cut.rows, damping=damping)
        scales = a((1 + 2 * self.settings.n_grid, cut.rows))
        piece = a((cut.rows, cut.size))
        losses = self.compiler.need(scale_search._losses, piece, a((cut.rows,)), scales, leaf=leaf, dtype="float16")
        held = {"sums": self._sums(), **self._gathered(i)}
        worst = max(losses, take, key=lambda n: n.made)
        return [
            *self._gather(f"search {name}", i, None),
            self._step(f"search {name}: energies", held, energies),
            self._step(f"search {name}: losses", held | pieces, worst),
        ]

    def _round(self, i: int) -> list[Step]:
        a, s, name = self.compiler.array, self.shapes[i], self._name(i)
        cut, pieces, take = self._pieces(i)
        once = self.count == 1 and cut.rows == s.k  # as `awq_jax.quantizer.scale_groups.round_group` decides
        prepare = scale_groups._prepare_in_place if once else scale_groups._prepare
        args = (a((s.k, s.k)), a(()), a((s.k,)))
        need = self.compiler.need(prepare, *args, rows=cut.rows, damping=self.settings.damping)
        given = jax.eval_shape(lambda *x: prepare(*x, rows=cut.rows, damping=self.settings.damping), *args)
        piece, leaf = a((cut.rows, cut.size)), self.work[i][1][0].leaf
        options = {"leaf": leaf, "nearest": False, "clip": self.settings.clip, "dtype": "float16"}
        program = self.compiler.need(scale_groups._round_piece, piece, self.compiler.tree(given), **options)
        # On one device the Grams of earlier groups have been used up.
        left = slice(i, None) if once else slice(None)
        before = {"sums": self._sums(left), **self._gathered(i)}
        kept = {"sums": self._sums(left), **self._gathered(i), "prepared": nbytes(given) - need.shared}
        worst = max(program, take, key=lambda n: n.made)
        return [
            *self._gather(f"round {name}", i, i - 1 if i else None),
            self._step(f"round {name}: prepare", before, need),
            self._step(f"round {name}: a piece", kept | pieces, worst),
        ]


def host(plan: Plans) -> dict[str, int]:
    """Bytes of the host's memory, Python and libraries not counted."""
    outer = plan.session.blocks[0].elements * BF16
    return {
        "block read ahead": max(nbytes(plan.leaves), outer),
        "packed blocks": 2 * max(plan.packed, outer),
        "hidden states": plan.tokens * plan.config.hidden_size * BF16,
        # What is gathered from several devices passes through the host, where JAX keeps it as long as the sums.
        "Grams gathered": sum(4 * s.k**2 for s in plan.shapes) if plan.count > 1 else 0,
    }


def disk(plan: Plans) -> dict[str, int]:
    """Bytes that are written: parts, and the result made of them."""
    outer = sum(b.elements for b in plan.session.blocks if b.kind in ("embed", "head")) * BF16
    packed = plan.packed * len(plan.config.layers) + outer
    source = sum(b.elements for b in plan.session.blocks) * BF16
    return {"parts": packed, "result": packed, "source (read)": source}


def make(name: str, count: int, device_bytes: int) -> Plans:
    """For a model of `MODELS`, with pieces of the size that accelerators work on."""
    mock.patch.dict(column_pieces.PIECE, clear=True).start()
    return Plans(models.config_from_hf(MODELS[name]), count, device_bytes)
