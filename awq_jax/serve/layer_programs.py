"""A prompt read layer by layer: one small program for each kind of layer in place of one for the whole model.

Compiling takes as long as a program has instructions, and a decoder's layers are unrolled in one. Calling a layer costs
the host half a millisecond (14 to 18 ms for the 30 of SmolLM2), which a prompt hardly notices where a layer takes
milliseconds. A token of that model takes 23 to 41 ms in all, so decoding keeps its one program. Results are those of
the whole program but for the last bits, since XLA may join what adjoining layers do.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from awq_jax.models.config import ModelConfig
from awq_jax.models.decoder import Decoder
from awq_jax.models.layers.cache import Cache, LayerCache
from awq_jax.models.vision import towers
from awq_jax.serve import alike_layers
from awq_jax.serve.sampling import Drawn, Draws, draw

Images = Mapping[str, ArrayLike] | None


class Read(NamedTuple):
    """What reading a prompt left.

    Attributes:
      left: ``[B, T, hidden]``, of the last layer; not normalised.
      cache: the tokens'.
    """

    left: jax.Array
    cache: Cache


class LayerPrograms:
    """The programs of one model.

    Args:
      graphdef: the decoder's static part.
      config: its architecture.
    """

    def __init__(self, graphdef: nnx.GraphDef, config: ModelConfig):
        self.graphdef, self.config = graphdef, config
        self._begin = jax.jit(lambda params, *given: self._decoder(params).begin(*given))
        self._logits = jax.jit(self._logits_of)
        self.first = jax.jit(self._first_of)
        self._layers: list[nnx.GraphDef] = []
        self._compiled: set[object] = set()

    def _decoder(self, params: nnx.State) -> Decoder:
        decoder: Decoder = nnx.merge(self.graphdef, params)
        return decoder

    def _logits_of(self, params: nnx.State, left: jax.Array) -> jax.Array:
        decoder = self._decoder(params)
        return decoder.head(decoder.end(left))

    def _first_of(self, params: nnx.State, left: jax.Array, lengths: jax.Array, draws: Draws) -> tuple[Drawn, Draws]:
        decoder = self._decoder(params)
        return draw(decoder.head(decoder.end(left[jnp.arange(len(lengths)), lengths - 1])), draws)

    def logits(self, params: nnx.State, tokens: np.ndarray, images: Images = None) -> jax.Array:
        """Logits float32 ``[B, T, vocab]`` of tokens ``[B, T]``; see `awq_jax.models.decoder.Decoder`."""
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        read = self.read(
            params,
            tokens,
            positions,
            towers.pictures(self.config.vision, {k: jnp.asarray(a) for k, a in (images or {}).items()}),
        )
        return self._logits(params, read.left)

    def prompt(
        self,
        params: nnx.State,
        tokens: np.ndarray,
        lengths: np.ndarray,
        draws: Draws,
        images: Images = None,
        slots: int | None = None,
    ) -> tuple[Callable[[], tuple[Drawn, Draws, Cache]], float]:
        """First new tokens of right-padded ``tokens [B, T]``, of which ``lengths [B]`` count, and their cache with
        ``slots`` slots: a function that makes them, compiled, and the seconds that took."""
        positions = np.minimum(np.arange(tokens.shape[1], dtype=np.int32), lengths[:, None] - 1)
        given, start = (params, tokens, positions, images, slots), time.perf_counter()
        compiled = key(self.first, (params, tokens, lengths, draws, images), {"slots": slots})
        if compiled not in self._compiled:
            self.first.lower(params, self._compile(*given).left, lengths, draws).compile()
            self._compiled.add(compiled)
        took = time.perf_counter() - start

        def run() -> tuple[Drawn, Draws, Cache]:
            read = self.read(*given)
            return *self.first(params, read.left, lengths, draws), read.cache

        return run, took

    def read(
        self,
        params: nnx.State,
        tokens: np.ndarray,
        positions: np.ndarray,
        images: Images = None,
        slots: int | None = None,
    ) -> Read:
        """Read tokens ``[B, T]`` at ``positions [B, T]``.

        Args:
          slots: of the cache that is returned; None: as many as tokens.
        """
        begun = self._begin(params, tokens, positions, None, images)
        x, step, kept = begun.embedded, begun.step(self.config, positions, False), []
        for i, graphdef in enumerate(self._split(params)):
            x, own = alike_layers.call_split(graphdef, params["layers"][i], x, step, None)
            x = x + begun.deep[i] if i < len(begun.deep) else x
            kept.append(own if slots is None else _grown(own, slots))
        return Read(x, Cache(tuple(kept), begun.shift))

    def _compile(
        self, params: nnx.State, tokens: np.ndarray, positions: np.ndarray, images: Images, slots: int | None
    ) -> Read:
        """Compile what `read` runs, and return the shapes of what it returns."""
        self._begin.lower(params, tokens, positions, None, images).compile()
        begun = self._begin.eval_shape(params, tokens, positions, None, images)
        x, step, kept, kinds = begun.embedded, begun.step(self.config, positions, False), [], {}
        for i, graphdef in enumerate(self._split(params)):
            shapes, tree = jax.tree.flatten(jax.tree.map(jax.typeof, params["layers"][i]))
            kind = graphdef, tree, tuple(shapes)
            if kind not in kinds:
                lowered = alike_layers.lower(graphdef, params["layers"][i], x, step)
                lowered.compile()
                x, own = lowered.out_info
                kinds[kind] = own if slots is None else jax.eval_shape(functools.partial(_grown, slots=slots), own)
            kept.append(kinds[kind])
        return Read(x, Cache(tuple(kept), begun.shift))

    def _split(self, params: nnx.State) -> list[nnx.GraphDef]:
        """The static part of each layer."""
        if not self._layers:
            self._layers = [nnx.split(layer)[0] for layer in self._decoder(params).layers]
        return self._layers


def key(function: object, arguments: tuple[object, ...], static: Mapping[str, object]) -> tuple[object, ...]:
    """What a program of ``function`` is compiled for."""
    leaves, tree = jax.tree.flatten(arguments)
    shapes = tuple((a.shape, a.dtype, getattr(a, "sharding", None)) for a in leaves)
    return function, tree, shapes, tuple(static.items())


@functools.partial(jax.jit, static_argnames="slots")
def _grown(own: LayerCache, slots: int) -> LayerCache:
    return own.grown(slots)
