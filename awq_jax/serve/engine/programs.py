"""The compiled programs of an engine: each for a few sizes, all compiled before the first request.

Whatever requests come, the sizes are among those of `awq_jax.serve.engine.sizes.Sizes`; a program that was not there is
compiled and counted.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec, Sharding

from awq_jax.kernels.adapted import of_rows
from awq_jax.models.decoder import Decoder
from awq_jax.models.layers.cache import Cache
from awq_jax.models.vision import singly
from awq_jax.models.vision.config import QwenVision
from awq_jax.models.vision.features import Features
from awq_jax.models.vision.towers import Looked
from awq_jax.serve import alike_layers
from awq_jax.serve.engine import drawing, slots
from awq_jax.serve.engine.looking import Pictures
from awq_jax.serve.engine.sizes import Sizes, fitting
from awq_jax.serve.generate import Generator


class Scores(NamedTuple):
    """Of T tokens of a prompt: float32 ``[T]``; int32 and float32 ``[T, drawing.LIKELY]`` of the most likely ones."""

    logprobs: jax.Array
    likely: jax.Array
    likely_logprobs: jax.Array


class Programs:
    """The programs of one model for one cache.

    Args:
      generator, params: see `awq_jax.serve.served_weights.ServedWeights.serving`.
      sizes: what to compile for.
      kv_bits: see `awq_jax.serve.engine.slots.empty`.
      image_tokens: of one image at most, where a model takes them of any size.
      adapters: those that a request may have, by the places that ``params`` have them in.

    Attributes:
      features: shapes of what a model that looks at images makes of one; else None.
      most_features: tokens of one image.
      compiled: programs that were compiled.
      late: of those, since `warm_up` was done: 0, or something is wrong.
      seconds: that compiling took.
    """

    def __init__(
        self,
        generator: Generator,
        params: nnx.State,
        sizes: Sizes,
        kv_bits: int | None,
        image_tokens: int = 0,
        adapters: tuple[str, ...] = (),
    ):
        self.generator, self.params, self.sizes, self.kv_bits = generator, params, sizes, kv_bits
        self.adapters = adapters
        self.graphdef, self.config, self.place = generator.graphdef, generator.config, generator.place
        self.vocabulary = self.config.vocab_size
        platforms = {device.platform for device in jax.tree.leaves(params)[0].devices()}
        self._compiled = self.place is None and platforms == {"cpu"}
        self.shapes = jax.eval_shape(
            lambda: slots.empty(row_of(generator, params), sizes.slots, sizes.allocated, kv_bits)
        )
        self.compiled, self.late, self.seconds, self.warm = 0, 0, 0.0, False
        self._programs: dict[Any, jax.stages.Compiled] = {}
        xla: dict[str, Any] = {"compiler_options": generator.options}
        self.most_features, self.pictures, self.features = 0, list[singly.Shapes](), None
        if (vision := self.config.vision) is not None:
            self.most_features = singly.largest(vision) or min(image_tokens, sizes.length)
            self.pictures = list(singly.shapes(vision, self.most_features))
            self.features = jax.eval_shape(self._look, params, self.pictures[-1])
        self._functions: dict[str, Any] = {
            "step": jax.jit(self._step, static_argnames=("rows", "read"), donate_argnames="cache", **xla),
            "read": jax.jit(self._read, static_argnames="read", donate_argnames="cache", **xla),
            "copy": jax.jit(slots.copied, static_argnames="length", donate_argnames="cache"),
            "look": jax.jit(self._look, **xla),
            "head": jax.jit(self._head, **xla),
            "score": jax.jit(self._score, **xla),
            "draw": jax.jit(drawing.drawn),
            "draw_seen": jax.jit(drawing.drawn_seen, donate_argnames="seen"),
            "begin": jax.jit(drawing.begun, donate_argnames="seen"),
            "cache": jax.jit(self._cache),
            "seen": jax.jit(lambda: drawing.Seen.empty(sizes.slots, self.vocabulary)),
        }

    def _cache(self) -> Cache:
        made = slots.empty(row_of(self.generator, self.params), self.sizes.slots, self.sizes.allocated, self.kv_bits)
        return self._kept(made)

    def _kept(self, cache: Cache) -> Cache:
        if self.place is None:
            return cache
        return jax.lax.with_sharding_constraint(cache, slots.shardings(cache, self.place))

    def _everywhere(self, x: jax.Array, cut: bool) -> jax.Array:
        """On a mesh every device has all of ``x [..., V]``, which is made in parts if it can be ``cut``."""
        if self.place is None:
            return x
        if cut and x.shape[-1] % self.place.size == 0:
            spec = PartitionSpec(*[None] * (x.ndim - 1), self.place.axis)
            x = jax.lax.with_sharding_constraint(x, self.place.sharding(spec))
        return jax.lax.with_sharding_constraint(x, self.place.sharding(PartitionSpec()))

    def _step(
        self, params: nnx.State, cache: Cache, first: jax.Array, tokens: jax.Array, positions: jax.Array,
        row: jax.Array | None = None, *, rows: int, read: int,
    ) -> tuple[jax.Array, Cache]:  # fmt: skip
        """Logits ``[rows, V]``, and zeros up to a number of rows that is drawn from, after ``tokens [rows]`` at
        ``positions [rows]``; a row that is not at work has the slot's whole length as its position, and leaves
        everything as it was. ``row [rows]``: their adapters, see `awq_jax.kernels.adapted.Adapted`."""
        decoder = self._decoder(params, row)
        window = slots.opened(cache, first, rows, read, compiled=self._compiled)
        hidden, seen = decoder.hidden(tokens[:, None], positions[:, None], window, None, alike_layers.call)
        logits = self._everywhere(decoder.head(hidden[:, 0]), True)
        logits = jnp.pad(logits, ((0, fitting(self.sizes.draws, rows) - rows), (0, 0)))
        return logits, self._kept(slots.closed(cache, seen, first, positions < self.sizes.allocated))

    def _read(
        self, params: nnx.State, cache: Cache, slot: jax.Array, tokens: jax.Array, start: jax.Array, length: jax.Array,
        looked: Looked | None = None, row: jax.Array | None = None, *, read: int,
    ) -> tuple[jax.Array, Cache]:  # fmt: skip
        """Hidden states ``[T, hidden]`` of ``tokens [T]``, of which the first ``length`` continue a prompt of which
        ``start`` tokens are in the slot; ``looked``: what they have of images; ``row [1]``: see
        `_step`."""
        decoder = self._decoder(params, row)
        width = tokens.shape[0]
        positions = start + jnp.minimum(jnp.arange(width), length - 1)
        if looked is not None and looked.shift is not None:
            assert cache.shift is not None
            cache = dataclasses.replace(cache, shift=cache.shift.at[slot].set(looked.shift))
        window = slots.opened(cache, slot, 1, read, fresh=start == 0)
        hidden, seen = decoder.hidden(tokens[None], positions[None], window, looked, alike_layers.call)
        return self._everywhere(hidden[0], False), self._kept(slots.closed(cache, seen, slot, jnp.ones(1, bool)))

    def _look(self, params: nnx.State, images: Mapping[str, jax.Array]) -> Features:
        """What the tower makes of one image, of one of the shapes that `awq_jax.models.vision.singly` has."""
        decoder = nnx.merge(self.graphdef, params)
        assert self.config.vision is not None
        dtype = jax.eval_shape(decoder.embed_tokens, jax.ShapeDtypeStruct((1,), jnp.int32)).dtype
        given = {**images, "pixel_values": images["pixel_values"].astype(dtype)}
        found = decoder.vision(given, singly.largest(self.config.vision) or 0)
        return jax.tree.map(lambda a: self._everywhere(a.astype(dtype), False), found)

    def _decoder(self, params: nnx.State, row: jax.Array | None) -> Decoder:
        decoder: Decoder = nnx.merge(self.graphdef, of_rows(params, row))
        return decoder

    def _head(self, params: nnx.State, hidden: jax.Array, index: jax.Array, row: jax.Array | None = None) -> jax.Array:
        """Logits ``[1, V]`` of one of ``hidden [T, hidden]``."""
        one = jax.lax.dynamic_slice_in_dim(hidden, index, 1)
        return self._everywhere(self._decoder(params, row).head(one), True)

    def _score(self, params: nnx.State, hidden: jax.Array, targets: jax.Array, row: jax.Array | None = None) -> Scores:
        """Log probabilities of the tokens ``targets [T]`` that follow ``hidden [T, hidden]``."""
        logits = self._everywhere(self._decoder(params, row).head(hidden), True)
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        most, likely = jax.lax.top_k(logprobs, min(drawing.LIKELY, self.vocabulary))
        return Scores(jnp.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0], likely, most)

    def row(self, adapters: Sequence[int]) -> np.ndarray | None:
        """The adapters of rows, -1 for none, as programs take them; None for a model without."""
        return np.asarray(adapters, np.int32) if self.adapters else None

    def looked_at(self, prompt: Sequence[int], images: Mapping[str, np.ndarray]) -> Pictures | None:
        """The images of a prompt; None for a model that looks at none.

        Raises:
          ShapeError: they do not fit the prompt, or one is too large.
        """
        vision, shapes = self.config.vision, self.features
        if vision is None or shapes is None:
            return None
        return Pictures(vision, prompt, singly.singly(vision, images, self.most_features) if images else [], shapes)

    def nothing(self, width: int) -> Looked | None:
        """What tokens of a text have of images; None for a model that does not look at any."""
        found = self.looked_at([-1] * width, {})
        return None if found is None else found.piece(0, width, width)

    def __call__(self, name: str, *arguments: Any, **static: Any) -> Any:
        """Run a program by its name."""
        return self.program(name, *arguments, **static)(*arguments)

    def program(self, name: str, *arguments: Any, **static: Any) -> jax.stages.Compiled:
        """The program for arguments of these shapes; compiled if there is none."""
        own = [a for a in arguments if not isinstance(a, nnx.State | Cache | drawing.Seen)]  # these are always alike
        leaves, tree = jax.tree.flatten(own)
        key = name, tree, tuple(np.shape(a) for a in leaves), tuple(static.items())
        found = self._programs.get(key)
        if found is None:
            start = time.perf_counter()
            found = self._programs[key] = self._functions[name].lower(*arguments, **static).compile()
            self.compiled += 1
            self.late += self.warm
            self.seconds += time.perf_counter() - start
        return found

    def warm_up(self, told: Callable[[int, int], object] = lambda done, of: None) -> None:
        """Compile everything; ``told`` hears how many programs are done, and how many there are."""
        jobs = list(self._jobs())
        for i, (name, arguments, static) in enumerate(jobs):
            told(i, len(jobs))
            self.program(name, *arguments, **static)
        told(len(jobs), len(jobs))
        self.warm = True

    def _jobs(self) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
        s, one, params, place = self.sizes, np.int32(0), self.params, self.place
        everywhere = None if place is None else place.sharding(PartitionSpec())
        cache = self.shapes
        if place is not None:
            cache = jax.tree.map(_shape, cache, slots.shardings(cache, place))
        marks = jax.tree.map(lambda a: _shape(a, everywhere), jax.eval_shape(self._functions["seen"]))
        share = all(slots.is_store(layer) for layer in self.shapes.layers)
        for read in s.reads:
            for rows in s.rows:
                own = np.zeros(rows, np.int32)
                yield "step", (params, cache, one, own, own, self.row([-1] * rows)), {"rows": rows, "read": read}
            for width in s.chunks:
                if width <= read:
                    tokens, looked = np.zeros(width, np.int32), self.nothing(width)
                    yield "read", (params, cache, one, tokens, one, one, looked, self.row([-1])), {"read": read}
            if share:
                yield "copy", (cache, one, one), {"length": read}
        for picture in self.pictures:
            yield "look", (params, picture), {}
        for width in s.chunks:
            tokens = np.zeros(width, np.int32)
            read_whole = functools.partial(self._read, read=s.allocated)
            shapes = jax.eval_shape(read_whole, params, cache, one, tokens, one, one, self.nothing(width))
            hidden = _shape(shapes[0], everywhere)
            yield "head", (params, hidden, one, self.row([-1])), {}
            yield "score", (params, hidden, tokens, self.row([-1])), {}
        settings = drawing.Settings(s.slots, self.vocabulary)
        for rows in s.draws:
            logits = jax.ShapeDtypeStruct((rows, self.vocabulary), jnp.float32, sharding=everywhere)
            for kind in drawing.KINDS:
                given = settings.of(kind, 0, 1, rows)
                if kind == "all":
                    yield "draw_seen", (logits, marks, one, one, given), {}
                else:
                    yield "draw", (logits, given), {}
        yield "cache", (), {}
        yield "seen", (), {}
        yield "begin", (marks, one, np.zeros(drawing.packed_width(self.vocabulary), np.uint8)), {}


def row_of(generator: Generator, params: nnx.State) -> Cache:
    """The shapes of the cache of one token, as the model makes it."""
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def make(params: nnx.State, tokens: jax.Array) -> Cache:
        cache: Cache = nnx.merge(generator.graphdef, params).hidden(tokens, jnp.zeros_like(tokens), None)[1]
        if isinstance(generator.config.vision, QwenVision):  # what images shift later tokens by
            cache = dataclasses.replace(cache, shift=jnp.zeros(1, jnp.int32))
        return cache

    return jax.eval_shape(make, params, one)


def _shape(a: jax.ShapeDtypeStruct, sharding: Sharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
