"""Find the parameters upstream of an activation that can absorb a scale per channel, exactly."""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from awq_jax.plan import channel_labels
from awq_jax.plan.channel_labels import UNIT, UNREAD, Blocked, SharedChannels, in_leaf_order, site_labels
from awq_jax.plan.followers import Followers
from awq_jax.plan.plan import Absorber
from awq_jax.trace.jaxpr import Val
from awq_jax.trace.scopes import OUTPUT, Node, Scope
from awq_jax.trace.uses import Program

CHOICES = 8  # products with two candidate factors that one search may meet
FILLS = channel_labels.SAME_SHAPE | {"broadcast_in_dim", "reshape"}
REARRANGEMENTS = FILLS | {"transpose", "squeeze"}
COMPARISONS = frozenset(("gt", "ge", "lt", "le", "eq", "ne"))


@dataclasses.dataclass(frozen=True, eq=False)
class Absorbers:
    """Absorbers of a group, the channels that must share one scale, or the reason why there are none.

    ``followers``: the groups that must take this one's scale, each with the channel here of each of its own.
    """

    absorbers: tuple[Absorber, ...] = ()
    shared_channels: np.ndarray | None = None
    reason: str = ""
    followers: Mapping[Hashable, np.ndarray] = dataclasses.field(default_factory=dict)


def find_absorbers(
    program: Program,
    scope: Scope,
    sites: Sequence[Node],
    others: Mapping[Hashable, Sequence[Node]] = MappingProxyType({}),
) -> Absorbers:
    """Absorbers for the activation that ``sites`` (all of one scope) read.

    A product carries the scale in one factor. Factors made of parameters are taken first; where two
    others are possible, each is tried until one leads to an exact answer. What nobody reads, such as the rows that a
    kernel pads to its tiles, is left as it is at first, and if that is in the way scaled with the rest.

    ``others``: groups that may take this one's scale where that is in the way (see `awq_jax.plan.followers`).
    """
    reasons: list[str] = []
    for unread_too in (False, True):
        stack: list[tuple[int, ...]] = [()]
        while stack:
            walk = _Walk(program, scope, sites, stack.pop(), unread_too, Followers(scope, others))
            try:
                return walk.run()
            except Blocked as e:
                if len(walk.choices) < walk.asked <= CHOICES:
                    stack += [(*walk.choices, 1), (*walk.choices, 0)]
                elif str(e) not in reasons:
                    reasons.append(str(e))
    return Absorbers(reason="; or ".join(reasons[:2]))


class _Walk:
    """One walk upstream from the sites, for one sequence of choices of factors."""

    def __init__(
        self,
        program: Program,
        scope: Scope,
        sites: Sequence[Node],
        choices: tuple[int, ...],
        unread_too: bool,
        followers: Followers,
    ):
        self.program, self.scope, self.sites, self.choices = program, scope, sites, choices
        self.unread_too, self.followers = unread_too, followers
        self.asked = 0
        self.pending: dict[Val, np.ndarray] = {}
        self.offsets: dict[Val, float] = {}
        self.touched: dict[Val, np.ndarray] = {}
        self.passed: set[tuple[int, int]] = set()
        self.heap: list[tuple[int, int, Val]] = []
        self.counter = itertools.count()
        self.found: dict[str, Absorber] = {}
        use = sites[0].use
        assert use is not None
        self.root = use.experts
        # Where rows choose experts, labels are the channels of any expert, in what follows those of each.
        self.experts = math.prod(site_batch(program, sites[0])) if self.root is not None else 1
        self.channels = int(site_labels(sites[0]).max()) + 1
        self.tied = self.moved = False

    def run(self) -> Absorbers:
        first = site_labels(self.sites[0])
        n = int(first.max()) + 1
        if len({node.use.experts for node in self.sites if node.use}) > 1:
            raise Blocked("its matmuls choose experts in different ways")
        self.shared = SharedChannels(n)
        for node in self.sites:
            self.passed.add((node.index, node.op.x))
            self.push(node.x, site_labels(node))
        while self.heap:
            v = heapq.heappop(self.heap)[-1]
            lab = self.pending.pop(v)
            if self.unread_too and self.passed.issuperset(self.scope.readers.get(v, ())):
                lab = channel_labels.with_unread(lab)
            lab = np.where(lab == UNREAD, UNIT, lab)
            if (lab >= 0).any():
                self.touched[v] = lab
                self.visit(v, lab)
        for v, lab in self.touched.items():
            self.check_readers(v, lab)
        shared = self.shared.groups()
        if self.experts > 1:
            first_of = np.arange(self.experts, dtype=np.int32)[:, None] * (0 if self.tied else n)
            shared = (shared[None] + first_of).reshape(-1)
            n *= self.experts
        if not self.found:
            raise Blocked("no parameter upstream")
        if n > 1 and (shared == shared[0]).all():
            raise Blocked("all channels would have to share one scale")
        order = {path: i for i, path in enumerate(self.program.leaves)}
        absorbers = tuple(self.found[p] for p in sorted(self.found, key=order.__getitem__))
        found = None if (shared == np.arange(n)).all() else shared
        return Absorbers(absorbers, found, followers=self.followers.channels())

    def push(self, v: object, lab: np.ndarray, offset: float = 0.0) -> None:
        constant = self.constant(v)
        if not isinstance(constant, Val):
            if (lab >= 0).any() and not channel_labels.is_zero(constant):
                raise Blocked("a constant is added to it")
            return
        assert isinstance(v, Val)
        if v in self.pending:
            self.pending[v] = self.shared.join(self.pending[v], lab)
            if self.offsets.get(v, 0.0) != offset:
                raise Blocked("a parameter is used with two offsets")
            return
        self.pending[v] = lab
        if offset:
            self.offsets[v] = offset
        # Latest first: all readers that carry the scale are done before the value itself.
        made = self.scope.made_by.get(v)
        heapq.heappush(self.heap, (-made[0].index if made else 1, next(self.counter), v))

    def constant(self, v: object) -> object:
        """The constant that ``v`` is filled with (``jnp.where(mask, x, 0)``), or a value that is none.

        Also one that is filled outside of the loop, as the caches of stacked layers are.
        """
        scope = self.scope
        while isinstance(v, Val):
            if v in scope.made_by:
                node = scope.made_by[v][0]
                if node.name not in FILLS or len(node.ins) != 1:
                    break
                v = node.ins[0]
            elif (given := scope.given(v)) is not None:
                scope, v = given
            else:
                break
        return v

    def visit(self, v: Val, lab: np.ndarray) -> None:
        offset = self.offsets.get(v, 0.0)
        if v not in self.scope.made_by or self.picked(v):
            self.absorb(v, lab, offset)
            return
        node, k = self.scope.made_by[v]
        if offset and node.name not in REARRANGEMENTS:
            raise Blocked("an offset is added to a value that is not a plain parameter")
        if node.bodies:
            raise Blocked(f"it is the result of a {node.name}, not of one matmul")
        if self.root is not None and _moves(node, k, lab):
            self.moved = True
        if node.op.grouped is not None:
            self.through_grouped(node, lab)
            return
        if node.name in ("mul", "div", "dot_general"):
            pos = self.choose(node)
            self.pass_on(node, pos, channel_labels.through_product(node, pos, lab, self.shared))
            return
        constant = self.offset_of(node)
        filled = [self.constant(v) for v in node.ins]
        zeros = [i for i, v in enumerate(filled) if not isinstance(v, Val) and channel_labels.is_zero(v)]
        for pos, part in channel_labels.back(node, k, lab, self.shared, zeros):
            if constant is not None:
                if isinstance(node.ins[pos], Val):
                    self.pass_on(node, pos, part, constant)
            else:
                self.pass_on(node, pos, part, offset)

    def picked(self, v: Val) -> bool:
        """Whether ``v`` is the slice of a parameter that a loop's counter picks."""
        view, sources = self.program.views.get(v), self.scope.made_by[v][0].vals()
        before = next((self.program.views[x] for x in sources if x in self.program.views), None)
        if view is None or before is None:
            return False
        return view.scanned != before.scanned or view.choice != before.choice

    def through_grouped(self, node: Node, lab: np.ndarray) -> None:
        """Into the weights of the experts of a ragged matmul."""
        rows, weight = node.op.grouped, node.ins[node.op.weight]
        assert rows is not None
        view = self.program.views.get(weight) if isinstance(weight, Val) else None
        if node.use is None or view is None or self.root not in (None, node.use.experts):
            raise Blocked("it passes through a matmul of other experts")
        lab = self.shared.along(lab, 0)
        n = iter(range(1, lab.ndim))
        sizes = [
            1 if d == rows.group or d in rows.contract[1] else lab.shape[next(n)] for d in range(len(weight.shape))
        ]
        self.passed.add((node.index, node.op.weight))
        self.touched[weight] = lab.reshape(sizes)
        self.absorb(weight, lab.reshape(sizes), 0.0, None if self.root is None else view.axes[rows.group][0].axis)

    def pass_on(self, node: Node, pos: int, lab: np.ndarray, offset: float = 0.0) -> None:
        self.passed.add((node.index, pos))
        self.push(node.ins[pos], lab, offset)

    def choose(self, node: Node) -> int:
        can = [p for p in ((0,) if node.name == "div" else (0, 1)) if isinstance(node.ins[p], Val)]
        can = [p for p in can if self.is_weight(node.ins[p])] or can
        if not can:
            raise Blocked(f"it passes through {node.op.describe()} of a constant")
        if len(can) == 1:
            return can[0]
        self.asked += 1
        if self.asked > len(self.choices):
            raise Blocked("it is a product of many factors")
        return can[self.choices[self.asked - 1]]

    def is_weight(self, v: Val) -> bool:
        """Made of parameters alone, and more than one number that is broadcast."""
        if v not in self.scope.derived:
            return False
        while v in self.scope.made_by and len(vals := self.scope.made_by[v][0].vals()) == 1:
            v = vals[0]
        return math.prod(v.shape) > 1

    def offset_of(self, node: Node) -> float | None:
        """``c`` of ``c + parameter`` (norms that store their weight less one)."""
        if node.name != "add" or len(node.vals()) != 1 or node.vals()[0] not in self.scope.derived:
            return None
        literal = next(v for v in node.ins if not isinstance(v, Val))
        return float(literal) if np.ndim(literal) == 0 and not channel_labels.is_zero(literal) else None

    def absorb(self, v: Val, lab: np.ndarray, offset: float, experts: int | None = None) -> None:
        """Divide the parameter ``v``; ``experts``: its axis of the experts that the rows choose."""
        view = self.program.views.get(v)
        if view is None:
            where = "the model's input" if self.scope.outer is None else "the state or input of a loop"
            raise Blocked(f"it comes straight from {where}")
        if not view.full or view.problem:
            raise Blocked(f"{view.path} is sliced by a loop in an unusual way")
        if view.shards:
            raise Blocked(f"a shard_map splits {view.path} over several devices")
        if not v.is_float:
            raise Blocked(f"{view.path} is not a float parameter")
        mine = self.program.views[self.sites[0].ins[self.sites[0].op.weight]]
        if view.loops != mine.loops:
            raise Blocked(f"{view.path} is shared between the iterations of a loop, the weights are not")
        self.check_outer(v, view.path)
        index = in_leaf_order(view, lab.astype(np.int32))
        if view.choice is not None and self.root is not None:
            if view.choice.root != self.root:
                raise Blocked(f"{view.path} is read for experts that are chosen in another way")
            experts = view.choice.axis
        if experts is not None:
            if self.moved:
                raise Blocked("rows are put into another order on the way")
            at = experts - sum(d < experts for d in view.scanned)
            first = np.arange(view.shape[experts], dtype=np.int32) * self.channels
            first = first.reshape([-1 if d == at else 1 for d in range(index.ndim)])
            index = np.where(index >= 0, index + first, index)
        elif self.root is not None:
            self.tied = True
        scanned = view.scanned if view.scanned != tuple(range(len(view.scanned))) else ()
        new = Absorber(view.path, index, offset, scanned)
        self.found[view.path] = merged(self.found[view.path], new) if view.path in self.found else new

    def check_outer(self, v: Val, path: str) -> None:
        """Outside the loop too, the parameter must go nowhere but into it."""
        scope = self.scope
        v = _origin(scope, v, path, "read in another way, too")
        while scope.outer is not None:
            outer, node = scope.outer
            if node.name == "cond":
                raise Blocked(f"{path} is used inside a cond")
            i = scope.graph.ins.index(v)
            operands = node.op.body_inputs(scope.graph)
            pos = next(p for p, o in enumerate(node.op.ins) if o is operands[i])
            v = node.ins[pos]
            if len(outer.readers[v]) != 1:
                raise Blocked(f"{path} is also used outside the loop")
            v = _origin(outer, v, path, "also used outside the loop")
            scope = outer

    def check_readers(self, v: Val, lab: np.ndarray) -> None:
        for index, pos in self.scope.readers.get(v, []):
            if (index, pos) in self.passed:
                continue
            if index == OUTPUT:
                raise Blocked("the scaled value is also an output")
            node = self.scope.nodes[index]
            if not _indifferent(node, pos, lab) and not self.followers.take(index, pos, lab):
                view = self.program.views.get(v)
                what = view.path if view else "the scaled value"
                raise Blocked(f"{what} is also used by {_reader(node)}")


def site_batch(program: Program, node: Node) -> tuple[int, ...]:
    """Sizes of the batch axes of a site's weight."""
    use = node.use
    assert use is not None
    return tuple(n for n, role in zip(program.leaves[use.path], use.axes, strict=True) if role == "b")


def _origin(scope: Scope, v: Val, path: str, otherwise: str) -> Val:
    """The value that ``v`` is a rearrangement or slice of, if nothing else reads what lies between."""
    while v in scope.made_by:
        node = scope.made_by[v][0]
        v = next((x for x in node.vals() if x in scope.derived), node.ins[0])
        if len(scope.readers[v]) != 1:
            raise Blocked(f"{path} is {otherwise}")
    return v


def merged(a: Absorber, b: Absorber) -> Absorber:
    """One absorber of two parts of a leaf."""
    x, y = np.broadcast_arrays(a.index, b.index)
    if a.offset != b.offset or a.scanned != b.scanned or ((x >= 0) & (y >= 0) & (x != y)).any():
        raise Blocked(f"{a.path} would be divided by two scales")
    return dataclasses.replace(a, index=np.maximum(x, y))


def _moves(node: Node, k: int, lab: np.ndarray) -> bool:
    """Whether an element of result ``k`` is, along an axis that is not of channels, elsewhere in the operand."""
    if node.name == "pad":
        return any(low or inner for low, _, inner in node.params["padding_config"])
    if node.name in ("slice", "split"):
        where = channel_labels.window_of(node, k)
        assert where is not None
        return any(n == 1 and (w.start or w.step not in (None, 1)) for n, w in zip(lab.shape, where, strict=True))
    return node.name in ("gather", "dynamic_slice", "concatenate", "rev", *channel_labels.WRITES)


def _reader(node: Node) -> str:
    return f"the matmul with {node.use.path}" if node.use else node.op.describe()


def _indifferent(node: Node, pos: int, lab: np.ndarray) -> bool:
    """True if the node's results do not change when its operand is scaled by ``lab``."""
    if node.name in COMPARISONS:
        other = node.ins[1 - pos]
        return not isinstance(other, Val) and channel_labels.is_zero(other)
    if node.name == "sign":
        return True
    for k in range(len(node.outs)):
        where = channel_labels.window_of(node, k)
        if where is None:
            return False
        if (lab[tuple(slice(None) if n == 1 else w for n, w in zip(lab.shape, where, strict=True))] >= 0).any():
            return False
    return True
