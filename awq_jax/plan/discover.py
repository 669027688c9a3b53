"""`discover`: the scale groups of any JAX model, read off its jaxpr."""

import contextlib
import dataclasses
import logging
import math
import re
from collections.abc import Callable, Hashable

import numpy as np

from awq_jax.errors import PlanError
from awq_jax.plan import absorb, channel_labels
from awq_jax.plan.plan import TIED, Follows, Plan, ScaleGroup, Site
from awq_jax.plan.validate import overlap
from awq_jax.trace.jaxpr import Use, Val
from awq_jax.trace.rearranged import SAME_SHAPE
from awq_jax.trace.scopes import OUTPUT, Node, Scope, flatten
from awq_jax.trace.uses import Program, trace

log = logging.getLogger(__name__)

# Operations that may hide a matmul from us.
OPAQUE = frozenset(
    (
        *("conv_general_dilated", "pallas_call", "custom_partitioning", "ffi_call", "pure_callback"),
        *("io_callback", "custom_call", "triton_kernel_call", "tpu_custom_call"),
    )
)
PRODUCTS = frozenset(("dot_general", "ragged_dot_general", "ragged_dot", "conv_general_dilated"))
CHOOSERS = frozenset(("top_k", "approx_top_k", "argmax", "argmin", "sort"))
FEW = 512  # a matrix of more columns, or of more than a quarter as many as rows, chooses no experts
UNUSED, EMBEDDING = "its result is not used", "it is an embedding: the matmul only looks rows up"
CONVOLUTION = "it is read by a convolution"
_NUMBER = re.compile(r"\d+")
VIEWS = SAME_SHAPE | {"reshape", "transpose", "squeeze"}


def discover(fn: Callable[..., object], params: object, *args: object, **kwargs: object) -> Plan:
    """Scale groups of ``fn(params, *args, **kwargs)``; nothing is computed.

    Sites that read the same activation form a group. Its absorbers are found by walking upstream
    from that activation; where the walk meets anything a scale per channel cannot cross exactly, or
    a value something else reads too, the group has no absorber and says why.

    Args:
      fn: the model: any function that `jax.jit` can trace. For decoders, the forward pass without a
        key-value cache (a cache update hides where values come from).
      params: its parameters, or `jax.ShapeDtypeStruct` leaves.
      *args, **kwargs: example inputs (real or abstract); their sizes do not matter for the result.

    Raises:
      PlanError: if no matmul with a parameter is found.
    """
    program = trace(fn, params, *args, **kwargs)
    top = flatten(program)
    if not program.uses:
        raise PlanError(
            "no matmul with a parameter found: pass the parameters as the first argument of the function "
            "(a closure over them hides them)"
        )
    if program.graph.draws():
        log.warning(
            "the model draws random numbers in this call, as dropout does in training: what is calibrated on is not "
            "what is served; call model.eval() (NNX) or pass deterministic=True or train=False (Linen)"
        )
    where = [(scope, node) for scope in top.all() for node in scope.nodes if node.use]
    where.sort(key=lambda t: t[1].use.index if t[1].use else 0)
    unused = [node.use.path for _, node in where if node.use and node.unused]
    where = [(scope, node) for scope, node in where if not node.unused]
    used = {node.use.path for _, node in where if node.use}
    skipped = {path: UNUSED for path in unused if path not in used} | _skipped(program, where)
    skipped |= {path: why for path, why in _computed(program, top).items() if path not in skipped}
    by_name: dict[str, list[tuple[Scope, Node]]] = {}
    for scope, node in where:
        if node.use and node.use.path not in skipped:
            by_name.setdefault(_site(program, node.use).name, []).append((scope, node))

    shared: dict[Hashable, list[tuple[Scope, Node]]] = {}
    for name, uses in by_name.items():
        roots = {(scope, *_activation(scope, node)) for scope, node in uses}
        experts = uses[0][1].use.experts if uses[0][1].use else None
        key = (*roots.pop(), _extent(program, uses[0][1]), experts) if len(roots) == 1 else name
        shared.setdefault(key, []).extend(uses)
    feeds_site = _flows_into_matmul(top)
    absorbers, follows = _absorbers(program, shared)
    groups = [
        dataclasses.replace(_group(program, uses, feeds_site, absorbers[key]), follows=follows.get(key))
        for key, uses in shared.items()
    ]
    return Plan(tuple(groups), skipped, _sizes(program, groups, skipped))


def _sizes(program: Program, groups: list[ScaleGroup], skipped: dict[str, str]) -> dict[str, int]:
    """Bytes of every float parameter that a matmul reads."""
    values = dict(zip(program.leaves, program.graph.ins, strict=False))
    read = {s.path for g in groups for s in g.sites} | {
        p for p, why in skipped.items() if why not in (UNUSED, EMBEDDING, CONVOLUTION)
    }
    return {
        p: math.prod(program.leaves[p]) * np.dtype(v.dtype).itemsize
        for p, v in values.items()
        if p in read and v.is_float
    }


def _skipped(program: Program, where: list[tuple[Scope, Node]]) -> dict[str, str]:
    """Leaves read by a matmul that must stay float, with the reason."""
    values = dict(zip(program.leaves, program.graph.ins, strict=False))
    out: dict[str, str] = {}
    axes: dict[str, object] = {}
    sites: dict[str, dict[str, Site]] = {}
    for scope, node in where:
        use = node.use
        assert use is not None
        if use.path in out:
            continue
        if use.reason:
            out[use.path] = use.reason
        elif not values[use.path].is_float:
            out[use.path] = f"it is {values[use.path].dtype}, not float"
        elif program.readers.get(use.path):
            out[use.path] = f"it is also read by {_plain(program.readers[use.path][0])}"
        elif (
            axes.setdefault(use.path, use.axes.replace("s", "b")) != use.axes.replace("s", "b")
            or axes.setdefault(f"{use.path} {use.part}", read := (use.axes, use.scanned)) != read
        ):
            out[use.path] = "two matmuls contract different axes of it"
        elif _one_hot(scope, node.x):
            out[use.path] = EMBEDDING
        else:
            site, others = _site(program, use), sites.setdefault(use.path, {})
            if site.name not in others and any(overlap(site, other) for other in others.values()):
                out[use.path] = "matmuls read parts of it that overlap"
            others[site.name] = site
    used = {node.use.path for _, node in where if node.use}
    for path, readers in program.readers.items():
        kinds = [r for r in readers if "dot" in r or r in OPAQUE or r.startswith("the state of")]
        if kinds and path not in used:
            out[path] = f"it is read by {_plain(kinds[0])}"
    return out


def _computed(program: Program, top: Scope) -> dict[str, str]:
    """Weights of which something is computed before they are multiplied, with what it is."""
    used = {use.path for use in program.uses}
    out: dict[str, str] = {}
    for scope in top.all():
        for node in scope.nodes:
            if node.name not in PRODUCTS:
                continue
            for v in (x for x in node.vals() if x in scope.derived):
                for path, maker in _parameters(program, scope, v).items():
                    if path not in used:
                        out.setdefault(path, f"its matmul reads what {maker} makes of it")
    return out


def _parameters(program: Program, scope: Scope, v: Val) -> dict[str, str]:
    """The matrices that ``v`` is computed from, each with the operation that reads it."""
    found: dict[str, str] = {}
    todo, seen = [(scope, v, "")], {v}
    while todo:
        scope, v, reader = todo.pop()
        view = program.views.get(v)
        new: list[tuple[Scope, Val, str]] = []
        if view is not None and reader and len([n for n in view.shape if n > 1]) > 1:
            found.setdefault(view.path, reader)
        elif v in scope.made_by:
            node = scope.made_by[v][0]
            maker = node.op.describe()
            new = [(scope, x, maker) for x in node.vals()]
        elif (outside := scope.outside(v)) is not None:
            new = [(*outside, reader)]
        new = [entry for entry in new if entry[1] not in seen]
        seen.update(x for _, x, _ in new)
        todo += new
    return found


def _plain(reader: str) -> str:
    return {
        "gather": TIED.removeprefix("it is also read by "),
        "dot_general": "a matmul with another parameter",
        "ragged_dot_general": "a ragged matmul",
        "ragged_dot": "a ragged matmul",
        "conv_general_dilated": CONVOLUTION.removeprefix("it is read by "),
    }.get(reader, reader)


def _activation(scope: Scope, node: Node) -> tuple[Val, bytes]:
    """The value a site reads, and which of its elements meets which row of the weight.

    Sites share statistics only if both are the same: the same value contracted over other axes, or
    over the same axes in another order, has a Gram of its own.
    """
    v, lab, shared = node.x, channel_labels.site_labels(node), channel_labels.SharedChannels(0)
    with contextlib.suppress(channel_labels.Blocked):
        while (source := _source(scope, v)) is not None:
            made, k = scope.made_by[v]
            _, lab = next(iter(channel_labels.back(made, k, lab, shared)))
            v = source
    v = _first_alike(scope, v)
    for axis in range(lab.ndim):
        if lab.size and (lab == lab.take([0], axis=axis)).all():
            lab = lab.take([0], axis=axis)
    return v, repr(lab.shape).encode() + lab.tobytes()


def _source(scope: Scope, v: Val) -> Val | None:
    """What ``v`` is a rearranged copy of; None if it is computed."""
    node, _ = scope.made_by.get(v, (None, 0))
    if node is None or node.name not in VIEWS or len(node.vals()) != 1 or len(node.outs) != 1:
        return None
    return node.vals()[0]


def _first_alike(scope: Scope, v: Val) -> Val:
    """Of values that are padded or cut alike the first: a kernel of experts pads its rows anew for every weight."""
    node, _ = scope.made_by.get(v, (None, 0))
    if node is None or node.name not in ("pad", "slice") or len(node.vals()) > 1 or not isinstance(node.ins[0], Val):
        return v
    for index, pos in scope.readers[node.ins[0]]:
        other = scope.nodes[index]
        if index == OUTPUT or pos != 0 or other.name != node.name or len(other.vals()) > 1:
            continue
        if other.params == node.params and np.array_equal(other.ins[1:], node.ins[1:]):
            return other.outs[0]
    return v


def _one_hot(scope: Scope, x: Val) -> bool:
    while (source := _source(scope, x)) is not None:
        x = source
    made = scope.made_by.get(x)
    return made is not None and made[0].name == "eq"


def _site(program: Program, use: Use) -> Site:
    order = use.scanned if list(use.scanned) != sorted(use.scanned) else ()
    return Site(use.path, use.axes, program.leaves[use.path], scanned=order, part=use.part)


def _extent(program: Program, node: Node) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """(scan, batch, K) of a site."""
    assert node.use is not None
    return _site(program, node.use).extent()


Uses = list[tuple[Scope, Node]]


def _absorbers(
    program: Program, shared: dict[Hashable, Uses]
) -> tuple[dict[Hashable, absorb.Absorbers], dict[Hashable, Follows]]:
    """What absorbs the scale of each group, and the groups that take the scale of another."""
    found: dict[Hashable, absorb.Absorbers] = {}
    follows: dict[Hashable, Follows] = {}
    in_order = sorted(shared, key=lambda key: _experts(shared[key]) is not None)  # a gate before its experts
    for key in in_order:
        others = {}
        if _experts(shared[key]) is not None:
            unscaled = [k for k in found if not found[k].absorbers and k not in follows and not _apart(k, shared[k])]
            others = {k: [node for _, node in shared[k]] for k in unscaled if _experts(shared[k]) is None}
        scope = shared[key][0][0]
        sites = [node for _, node in shared[key]]
        why = _apart(key, shared[key])
        found[key] = absorb.Absorbers(reason=why) if why else absorb.find_absorbers(program, scope, sites, others)
        _follow(program, shared, found, follows, key)
    for members in _siblings(program, shared):
        if len(members) < 2 or any(found[k].absorbers or k in follows or _apart(k, shared[k]) for k in members):
            continue
        free = [k for k in found if k not in members and not found[k].absorbers and k not in follows]
        others = {k: [node for _, node in shared[k]] for k in free if not _apart(k, shared[k])}
        leader, *rest = members
        sites = [node for k in members for _, node in shared[k]]
        joint = absorb.find_absorbers(program, shared[leader][0][0], sites, others)
        if joint.absorbers:
            _, batch, channels = _extent(program, shared[leader][0][1])
            same = {k: np.arange(math.prod(batch) * channels, dtype=np.int32) for k in rest}
            found[leader] = dataclasses.replace(joint, followers={**joint.followers, **same})
            _follow(program, shared, found, follows, leader)
    return found, follows


def _follow(
    program: Program,
    shared: dict[Hashable, Uses],
    found: dict[Hashable, absorb.Absorbers],
    follows: dict[Hashable, Follows],
    leader: Hashable,
) -> None:
    """Enter the groups that take the scale of ``leader``."""
    first = shared[leader][0][1].use
    assert first is not None
    for key, index in found[leader].followers.items():
        follows[key] = Follows(_site(program, first).name, index)
        found[key] = absorb.Absorbers()


def _siblings(program: Program, shared: dict[Hashable, Uses]) -> list[list[Hashable]]:
    """Groups of experts that are multiplied one by one: of one scope and size, with names that a number tells apart."""
    out: dict[Hashable, list[Hashable]] = {}
    for key, uses in shared.items():
        scope, node = uses[0]
        assert node.use is not None
        name = _site(program, node.use).name
        if (node.use.part or len(_NUMBER.findall(name)) > 1) and _experts(uses) is None:
            pattern = _NUMBER.sub("*", name[::-1], count=1)[::-1]  # the last
            out.setdefault((scope, pattern, _extent(program, node)), []).append(key)
    return list(out.values())


def _experts(uses: Uses) -> Hashable | None:
    """By what the rows of a group choose their experts, if they do."""
    return uses[0][1].use.experts if uses[0][1].use else None


def _apart(key: Hashable, uses: Uses) -> str:
    """Why no scale of a group can be absorbed, whatever is upstream; "" if one may be."""
    if isinstance(key, str):
        return f"{len(uses)} matmuls with different inputs share this weight"
    if any(node.use.split for _, node in uses if node.use):
        return "a shard_map splits its rows or its experts over several devices"
    if (outer := uses[0][0].outer) is not None and outer[1].name == "cond":
        return "it is inside a cond"
    return ""


def _group(program: Program, uses: Uses, feeds_site: dict[Node, bool], found: absorb.Absorbers) -> ScaleGroup:
    sites: dict[str, Site] = {}
    for scope, node in uses:
        use = node.use
        assert use is not None
        site = _site(program, use)
        old = sites.get(site.name)
        # What rows choose is no head, though a single layer of experts may make the output.
        head = not feeds_site.get(node, True) and (old is None or old.head) and use.experts is None
        router = _chooses(scope, node) or (old is not None and old.router)
        sites[site.name] = dataclasses.replace(site, head=head, router=router)
    scan, batch, channels = _extent(program, uses[0][1])
    name = next(iter(sites))
    return ScaleGroup(
        name, tuple(sites.values()), channels, found.absorbers, found.shared_channels, scan, batch, found.reason
    )


def _chooses(scope: Scope, node: Node) -> bool:
    """Whether what a matmul computes, with no other matmul between, decides a choice among its outputs.

    So may an operation that is not looked into; a matrix of few columns before one is taken for a router.
    """
    assert node.op.roles is not None
    columns, rows = (math.prod(f.size for f in part if f.axis >= 0) for part in (node.op.roles.n, node.op.roles.k))
    choosers = CHOOSERS | OPAQUE if columns <= FEW and 4 * columns <= rows else CHOOSERS
    todo = [(scope, v) for v in node.outs]
    seen = set(todo)
    while todo:
        where, v = todo.pop()
        new: list[tuple[Scope, Val]] = []
        for index, pos in where.readers.get(v, []):
            if index == OUTPUT:
                if where.outer is not None:
                    outer, loop = where.outer
                    places = [i for i, o in enumerate(where.outs) if o is v]
                    shift = len(loop.outs) - len(where.outs)  # a scan's body returns as much as the scan
                    new += [(outer, loop.outs[i + shift]) for i in places if 0 <= i + shift < len(loop.outs)]
                continue
            reader = where.nodes[index]
            if reader.name in choosers:
                return True
            for body in reader.bodies:
                inner = reader.op.body_inputs(body.graph)
                new += [(body, i) for i, o in zip(body.graph.ins, inner, strict=True) if o is reader.op.ins[pos]]
            if reader.name not in ("dot_general", "ragged_dot_general") and not reader.bodies and not reader.op.grouped:
                new += [(where, o) for o in reader.outs]
        fresh = [t for t in new if t not in seen]
        seen.update(fresh)
        todo += fresh
    return False


def _flows_into_matmul(top: Scope) -> dict[Node, bool]:
    """For each top-level matmul with a parameter: whether another one reads what it computes."""
    flows: set[Val] = set()
    out: dict[Node, bool] = {}
    for node in reversed(top.nodes):
        if node.unused:
            continue
        onward = any(v in flows for v in node.outs)
        if node.use:
            out[node] = onward
        if onward or node.use or any(n.use for b in node.bodies for s in b.all() for n in s.nodes):
            flows.update(node.vals())
    return out
