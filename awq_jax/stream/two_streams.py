"""Blocks entered and left in two streams: that of the float model, and that of the model as it is quantized so far."""

import math
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.devices.pool import Pool
from awq_jax.plan.plan import ScaleGroup
from awq_jax.stream import folds
from awq_jax.stream.cut_blocks import Programs, key_of
from awq_jax.stream.decoder_blocks import EMBED, HEAD, REST, Chain, DecoderBlock, Leaves
from awq_jax.stream.hidden_states import Hidden
from awq_jax.stream.lockstep import Lockstep


class TwoStreams:
    """What both streams need of a decoder.

    Args:
      chain: its blocks.
      pool: devices that share the work.
    """

    def __init__(self, chain: Chain, pool: Pool) -> None:
        self._chain, self._pool = chain, pool
        self._programs: dict[Hashable, Programs] = {}

    def enter(
        self,
        block: DecoderBlock,
        groups: Sequence[ScaleGroup],
        leaves: Leaves,
        hidden: Hidden,
        quantized: Hidden,
        activations: str | None,
    ) -> Lockstep | None:
        """Both streams at the entrance of a block; None if nothing there depends on them.

        Args:
          groups: that are quantized in the block, with names within it.
          leaves: its float parameters.
          hidden, quantized: what goes in.
          activations: the dtype in which it does.
        """
        if block.kind == REST or not hidden.batches or (not groups and block.kind in (EMBED, HEAD)):
            return None

        def entering(stream: Hidden) -> dict[int, list[np.ndarray]]:
            given = {i: stream.get(i) for i in range(hidden.batches) if self._pool.mine(i)}
            if block.kind != EMBED:
                given = {i: x.astype(activations or x.dtype, copy=False) for i, x in given.items()}
            return {i: [x] for i, x in given.items()}

        def programs(shape: tuple[int, int]) -> Programs:
            x = jax.ShapeDtypeStruct(shape, np.dtype(np.int32))
            if block.kind != EMBED:
                size = self._chain.config.hidden_size
                x = jax.ShapeDtypeStruct((*shape, size), jnp.dtype(activations or "float32"))
            key = block.kind, tuple(g.name for g in groups), key_of(leaves, x)
            if key not in self._programs:
                self._programs[key] = Programs(self._chain.apply(block), leaves, x, groups)
            return self._programs[key]

        every = list(map(programs, hidden.shapes))
        fold_of = folds.of_batches([rows for rows, _ in hidden.shapes])
        both = entering(hidden), entering(quantized)
        alone = math.prod(hidden.shapes[0]) if hidden.batches == 1 else 0
        return Lockstep(every, block.prefix, leaves, *both, alone, fold_of, self._pool)

    def leave(self, block: DecoderBlock, steps: Lockstep | None, hidden: Hidden, quantized: Hidden) -> str:
        """Keep what comes out of the block in both streams; without ``steps`` the same, which is in ``hidden``.

        Returns:
          The dtype of what came out, "" if nothing did.
        """
        if block.kind in (REST, HEAD) or not hidden.batches:
            return ""
        if steps is None:
            out = {i: hidden.get(i) for i in range(hidden.batches) if self._pool.mine(i)}
        else:
            floats, out = steps.finish()
            _keep(hidden, floats)
        _keep(quantized, out)
        return next((y.dtype.name for y in out.values()), "")


def _keep(stream: Hidden, out: dict[int, np.ndarray]) -> None:
    for i, y in out.items():
        stream.put(i, y)
    stream.advance()
