"""The reference decoder as a chain of blocks: the embedding, each layer, the head; their functions and scale groups."""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from awq_jax import paths
from awq_jax.models import ModelConfig
from awq_jax.models.config import LayerConfig
from awq_jax.models.decoder import Layer
from awq_jax.models.layers import rope
from awq_jax.models.layers.attention import Step
from awq_jax.models.vision.config import TOWER
from awq_jax.models.weights import params as model_params
from awq_jax.plan.discover import discover
from awq_jax.plan.plan import Plan, ScaleGroup
from awq_jax.qtensor import Weight

Leaves = Mapping[str, Weight]  # float parameters by path within the block
Read = Callable[["DecoderBlock"], Leaves]  # a block's float parameters, all that it reads
Apply = Callable[[Leaves, jax.Array], jax.Array]

EMBED, HEAD, REST = "embed", "head", "rest"
EMBEDDING = ("embed_tokens", "project_in", "embed_positions", "embed_norm")
ELSEWHERE = "what could absorb its scale is in another block"
HEADS = ("norm", "project_out", "lm_head")


@dataclasses.dataclass(frozen=True, eq=False)
class DecoderBlock:
    """One block of a decoder.

    Attributes:
      name: ``"embed"``, ``"layers/0"`` ..., ``"head"``, or ``"rest"`` (parameters that text does not pass through).
      kind: blocks of the same kind run the same program on parameters of the same shapes.
      prefix: what the paths of its parameters begin with.
      leaves: shape of every parameter it reads, by path within the block.
      owned: those of them that no earlier block has.
    """

    name: str
    kind: Hashable
    prefix: str
    leaves: dict[str, tuple[int, ...]]
    owned: tuple[str, ...]

    def count_elements(self) -> int:
        """Numbers in its own parameters."""
        return sum(math.prod(self.leaves[p]) for p in self.owned)


class Chain:
    """The blocks of a decoder; nothing is computed or read.

    Attributes:
      config: architecture.
      blocks: in the order that tokens go through them.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._outer_def, self._outer = model_params.abstract(dataclasses.replace(config, layers=()))
        self._inner = {layer: _abstract_layer(config, layer) for layer in dict.fromkeys(config.layers)}
        self._apply: dict[Hashable, Apply] = {EMBED: self._embed, HEAD: self._head}
        self._apply |= {layer: self._layer(layer) for layer in self._inner}
        self.blocks = self._blocks()

    def apply(self, block: DecoderBlock) -> Apply:
        """The block's function of its parameters and what goes in; the same object for all of a kind.

        In: int32 tokens ``[B, T]`` (embedding), or hidden states ``[B, T, hidden]``. Out: hidden states;
        of the head, logits.
        """
        return self._apply[block.kind]

    def plan(self) -> Plan:
        """The scale groups of the whole decoder: those of each kind of layer, found once.

        As `awq_jax.discover` finds them, except that a scale is absorbed in its own block or not at all.
        """
        short = dataclasses.replace(self.config, layers=tuple(self._inner))
        graphdef, state = model_params.abstract(short)

        def apply(params: nnx.State, tokens: jax.Array) -> jax.Array:
            return nnx.merge(graphdef, params)(tokens)

        found = discover(apply, state, jax.ShapeDtypeStruct((1, min(8, self.config.max_length)), jnp.int32))
        groups: dict[Hashable, list[ScaleGroup]] = {}
        skipped: dict[Hashable, dict[str, str]] = {}
        sizes: dict[Hashable, dict[str, int]] = {}
        kinds: dict[str, Hashable] = {EMBED: EMBED, HEAD: HEAD}
        kinds |= {f"layers/{i}": layer for i, layer in enumerate(self._inner)}
        for group in found.groups:
            block = owner(group.name)
            if any(owner(a.path) != block for a in group.absorbers):
                group = group.without_absorbers(ELSEWHERE)
            groups.setdefault(kinds[block], []).append(renamed(group, f"{block}/", ""))
        for path, why in found.skipped.items():
            block = owner(path)
            skipped.setdefault(kinds[block], {})[path.removeprefix(f"{block}/")] = why
        for path, size in found.sizes.items():
            block = owner(path)
            sizes.setdefault(kinds[block], {})[path.removeprefix(f"{block}/")] = size
        towers = {b.prefix + p: TOWER for b in self.blocks if b.kind == REST for p in b.leaves if p.endswith("/kernel")}
        return Plan(
            tuple(renamed(g, "", b.prefix) for b in self.blocks for g in groups.get(b.kind, ())),
            {b.prefix + p: why for b in self.blocks for p, why in skipped.get(b.kind, {}).items()} | towers,
            {b.prefix + p: size for b in self.blocks for p, size in sizes.get(b.kind, {}).items()},
        )

    def _blocks(self) -> list[DecoderBlock]:
        outer = {p: tuple(leaf.shape) for p, leaf in paths.flatten(self._outer).items()}
        tops = {p: p.split("/")[0] for p in outer}
        embed = {p: s for p, s in outer.items() if tops[p] in EMBEDDING}
        tied = {p: s for p, s in embed.items() if self.config.tied and tops[p] == "embed_tokens"}
        head = {p: s for p, s in outer.items() if tops[p] in HEADS}
        rest = {p: s for p, s in outer.items() if p not in embed and p not in head}
        blocks = [DecoderBlock(EMBED, EMBED, "", embed, tuple(embed))]
        for i, layer in enumerate(self.config.layers):
            shapes = {p: tuple(leaf.shape) for p, leaf in paths.flatten(self._inner[layer][1]).items()}
            blocks.append(DecoderBlock(f"layers/{i}", layer, f"layers/{i}/", shapes, tuple(shapes)))
        blocks.append(DecoderBlock(HEAD, HEAD, "", {**tied, **head}, tuple(head)))
        if rest:
            blocks.append(DecoderBlock(REST, REST, "", rest, tuple(rest)))
        return blocks

    def _embed(self, leaves: Leaves, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(self._outer_def, _filled(self._outer, leaves))
        return model.embed(tokens, _positions(tokens))

    def _head(self, leaves: Leaves, x: jax.Array) -> jax.Array:
        model = nnx.merge(self._outer_def, _filled(self._outer, leaves))
        return model.head(model.norm(x) if self.config.final_norm else x)

    def _layer(self, layer: LayerConfig) -> Apply:
        graphdef, state = self._inner[layer]

        def run(leaves: Leaves, x: jax.Array) -> jax.Array:
            positions = _positions(x)
            angles = {}
            if layer.rope is not None:
                angles[layer.rope] = rope.cos_sin(layer.rope, layer.attention.head_dim, positions)
            return nnx.merge(graphdef, _filled(state, leaves))(x, Step(positions, angles), None)[0]

        return run


def from_memory(leaves: Leaves) -> Read:
    """A reader of the parameters of a whole decoder, by full path."""
    return lambda block: {path: leaves[block.prefix + path] for path in block.leaves}


def from_checkpoint(weights: model_params.Weights) -> Read:
    """A reader of a checkpoint's parameters, block by block."""
    return lambda block: {path: weights.leaf(block.prefix + path) for path in block.leaves}


def shapes(blocks: Iterable[DecoderBlock]) -> dict[str, tuple[int, ...]]:
    """Of all parameters, by full path."""
    return {b.prefix + path: b.leaves[path] for b in blocks for path in b.owned}


def owner(path: str) -> str:
    """The name of the block that has a parameter, of those that text passes through."""
    top, _, inside = path.partition("/")
    if top == "layers":
        return f"{top}/{inside.partition('/')[0]}"
    return EMBED if top in EMBEDDING else HEAD


def renamed(group: ScaleGroup, old: str, new: str) -> ScaleGroup:
    """``group`` with paths that begin with ``new`` instead of ``old``."""

    def name(path: str) -> str:
        return new + path.removeprefix(old)

    return dataclasses.replace(
        group,
        name=name(group.name),
        sites=tuple(dataclasses.replace(s, path=name(s.path)) for s in group.sites),
        absorbers=tuple(dataclasses.replace(a, path=name(a.path)) for a in group.absorbers),
        follows=group.follows and dataclasses.replace(group.follows, group=name(group.follows.group)),
    )


def within(group: ScaleGroup, block: DecoderBlock) -> ScaleGroup:
    """A group with paths as they are within its block."""
    return renamed(group, block.prefix, "")


def refuse(group: ScaleGroup, why: str | None) -> ScaleGroup:
    """The group without absorbers, if there is a reason."""
    return group if why is None else group.without_absorbers(why)


def _abstract_layer(config: ModelConfig, layer: LayerConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Layer(config, layer, nnx.Rngs(0))))


def _filled(state: nnx.State, leaves: Leaves) -> nnx.State:
    """The abstract state with arrays in the places of ``leaves``; the block does not read the others."""
    return paths.map_with_path(lambda path, leaf: leaves.get(path, leaf), state)


def _positions(x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
