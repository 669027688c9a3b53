"""`load` and `Model`: a checkpoint with its tokenizer, ready to quantize, save and generate."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike

from awq_jax import models, paths
from awq_jax.adapters import files
from awq_jax.adapters.attach import Attached
from awq_jax.adapters.base import fitted
from awq_jax.adapters.base import of as base_of
from awq_jax.config import SAMPLES, SEQ_LEN, AwqConfig, Budget
from awq_jax.convert import card, folded_scales, registry
from awq_jax.convert.source import Source
from awq_jax.convert.text import TokenizerLike
from awq_jax.dtypes import name_of
from awq_jax.errors import ConfigError, ShapeError
from awq_jax.models.mesh import sharding
from awq_jax.models.vision import inputs as vision
from awq_jax.models.weights import modules
from awq_jax.models.weights import params as model_params
from awq_jax.placement import Placement
from awq_jax.progress import Progress
from awq_jax.qtensor import is_quantized
from awq_jax.report import FoldedScale, Report, size
from awq_jax.serve import alike_layers, saving
from awq_jax.serve.answer import DEFAULT, Answering, Scored
from awq_jax.serve.generate import check_tokens
from awq_jax.serve.served_weights import ServedWeights

if TYPE_CHECKING:
    from awq_jax import data

ONLY = "adapter"  # the name of one that is given without


def load(
    path: str | Path,
    dtype: DTypeLike | None = None,
    *,
    revision: str | None = None,
    merge: bool | None = None,
    resident: bool | None = None,
    mesh: Mesh | int | None = None,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    terms: str = "auto",
) -> Model:
    """Load a model for the reference decoder.

    Args:
      path: a directory in Hugging Face's layout (float or quantized), a ``.gguf`` file, or a hub id.
      dtype: of floating-point tensors and activations, ``"float32"``, ``"bfloat16"`` or
        ``"float16"``, or a type such as ``jnp.bfloat16``; None keeps what is stored (GGUF: float32).
      revision: branch, tag or commit of a hub id.
      merge: while generating, linears that read the same activation are one (exact, and undone when
        the parameters are asked for); None: if any is packed.
      resident: generate with a float32 copy of packed weights; None: on CPU, for more than a few tokens, if the
        copy takes at most half of the free memory. `Model.explain` says what is done.
      mesh: devices to spread the weights over (see `awq_jax.models.mesh.sharding`): a mesh of one axis, or how
        many of JAX's devices. Each device's part of each tensor is read from the files straight to it.
      adapter: a directory of PEFT's with a LoRA adapter, which then runs beside the weights, packed or not; or several
        by name, one of which `Model.generate` takes for each prompt. One that was trained on the float model is
        rescaled by the scales that are folded into these weights.
      terms: on whose inputs the adapters were trained, ``"float"`` or ``"base"``; ``"auto"``: as they say (see
        `awq_jax.lora.load`).

    Raises:
      UnsupportedModelError: the architecture is not one of `awq_jax.models.supported`.
      CheckpointError: the files cannot be read, or an adapter is for another base.
      FormatError: an adapter is none that can be served; named, with the remedy.
      WeightError: a tensor is missing, unexpected, or holds NaN or inf.
      ShapeError: a tensor has not the shape that ``config.json`` implies.
      ConfigError: unknown ``dtype``, a broken ``config.json``, or a ``revision`` of a local path.
    """
    name = name_of(dtype)
    source = registry.open_source(path, revision=revision)
    given = {} if adapter is None else adapter if isinstance(adapter, Mapping) else {ONLY: adapter}
    base = base_of(source)
    adapters = {key: fitted(files.read(where), base, terms) for key, where in given.items()}
    model = from_source(source, name or ("float32" if source.format == "gguf" else None), merge, resident, mesh)
    if adapters:
        model.attach(adapters, ONLY if not isinstance(adapter, Mapping) else None)
    return model


def from_source(
    source: Source,
    dtype: str | None = None,
    merge: bool | None = None,
    resident: bool | None = None,
    mesh: Mesh | int | None = None,
) -> Model:
    """As `load`, from an open `awq_jax.convert.source.Source`."""
    config = models.config_of(source)
    graphdef, state = model_params.abstract(config)
    place = None if mesh is None else sharding.on(mesh)
    if place is None:
        params = model_params.load(source, config, state, dtype)
    else:
        from awq_jax.models.mesh import sharded_loading

        params = sharded_loading.load(source, config, state, place, dtype)
    return Model(config, dict(source.config), graphdef, params, source.tokenizer(), source, merge, resident, place)


class Model(Answering, saving.Pushed):
    """A reference decoder with its weights and tokenizer.

    Attributes:
      config: architecture.
      hf_config: content of the checkpoint's ``config.json``.
      params: ``nnx.State``; leaves are arrays or `QuantizedTensor`. Short for `take_params`, and for
        replacing them by assignment.
      tokenizer: `awq_jax.convert.text.Tokenizer`, which has the methods of transformers' for texts and chats, and
        splits as ``tokenizer.json`` says; None if the checkpoint has none. One of transformers may be set instead.
      source: where it was loaded from.
      apply: ``apply(params, input_ids [B, T] int32) -> logits [B, T, vocab] float32``: pure, without a
        cache; what calibration and evaluation trace. A model that looks at images takes them as further
        keyword arguments (see `inputs`).
      forward: as ``apply``, of compiled programs: what evaluation calls.
      generator: `awq_jax.serve.generate.Generator` of this model, for token ids without text.
    """

    def __init__(
        self,
        config: models.ModelConfig,
        hf_config: dict[str, Any],
        graphdef: nnx.GraphDef,
        params: nnx.State,
        tokenizer: TokenizerLike | None,
        source: Source,
        merge: bool | None = None,
        resident: bool | None = None,
        place: Placement | None = None,
    ):
        self.config, self.hf_config = config, hf_config
        self._weights = ServedWeights(graphdef, config, params, merge, resident, place)
        self.tokenizer, self.source = tokenizer, source
        self.settings: AwqConfig | None = None
        self._made: dict[str, Any] | None = None  # for the model card
        self._scales: dict[str, FoldedScale] | None = None  # folded since it was loaded
        self._adapters: Attached | None = None
        self._always: str | None = None

        def apply(params: nnx.State, input_ids: jax.Array, **images: jax.Array) -> jax.Array:
            return nnx.merge(graphdef, params)(input_ids, call=alike_layers.call, **images)

        self.apply: Callable[..., jax.Array] = apply
        self.generator = self._weights.as_held()[0]
        self.forward: Callable[..., jax.Array] = self.generator.forward

    def __repr__(self) -> str:
        leaves = paths.flatten(self._weights.as_held()[1]).values()
        bits = sorted({q.bits for q in leaves if is_quantized(q)})
        kind = "packed to " + " and ".join(map(str, bits)) + " bits" if bits else "float"
        tokenizer = "no tokenizer" if self.tokenizer is None else "with tokenizer"
        return (
            f"Model({self.config.family}, {len(self.config.layers)} layers, {kind}, {size(self.nbytes)}, {tokenizer})"
        )

    def take_params(self) -> nnx.State:
        """The parameters as they were loaded, quantized or assigned, to the bit.

        `generate` may replace packed weights by a form that is faster to read (see `explain`). Then they are
        rebuilt here, once, and the next `generate` converts them again. Before that, this costs nothing.

        Raises:
          WeightError: an error, as for want of memory, ended that conversion; they are lost.
        """
        return self._weights.take_params()

    @property
    def params(self) -> nnx.State:
        return self.take_params()

    @params.setter
    def params(self, params: nnx.State) -> None:
        self._weights.replace(params)

    def explain(self) -> str:
        """One line on the form in which the weights generate: copied, merged, how many bytes."""
        return self._weights.explain()

    def __call__(self, tokens: ArrayLike | Sequence[Sequence[int]] | Mapping[str, Any]) -> jax.Array:
        """Logits of every position; compiled once per shape.

        On a CPU, activations of a packed model are float32 once it has generated without a copy (see `explain`).

        Args:
          tokens: integers ``[B, T]``, or what a processor returned for text and images (see `inputs`).

        Returns:
          float32 ``[B, T, vocab]``.

        Raises:
          ShapeError: on another rank, or ids outside the vocabulary.
          ConfigError, ShapeError: see `inputs`.
        """
        if isinstance(tokens, Mapping):
            generator, params = self._weights.as_held()
            return generator.forward(self._beside(generator, params, DEFAULT, 1), **self.inputs(tokens))
        tokens = np.asarray(tokens)
        if tokens.ndim != 2:
            raise ShapeError(f"tokens must be [batch, length]; got shape {tokens.shape}")
        check_tokens(tokens, self.config.vocab_size, "tokens")
        generator, params = self._weights.as_held()
        params = self._beside(generator, params, DEFAULT, len(tokens))
        return generator.forward(params, jnp.asarray(tokens, jnp.int32))

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Arguments of `apply` from what the checkpoint's transformers processor returned.

        ``awq_jax.calibrate(model.apply, model.params, map(model.inputs, batches))`` takes them, as do
        `quantize`, `generate` and calling the model, which do this by themselves.

        Args:
          batch: ``input_ids``, and with images ``pixel_values``, ``image_grid_thw`` (Qwen) or
            ``image_sizes`` (LLaVA-NeXT); rows that ``attention_mask`` pads on the left are moved.

        Raises:
          ConfigError, ShapeError: see `awq_jax.models.vision.inputs.inputs`.
        """
        arrays, _ = vision.inputs(self.config, batch)
        check_tokens(vision.of_images(self.config, arrays["input_ids"]), self.config.vocab_size, "input_ids")
        return arrays

    def attach(self, adapters: Mapping[str, files.Adapter], always: str | None = None) -> None:
        """Put adapters, by name and in the terms of these weights, beside them; ``always``: used unless another is
        asked for. Those that were there are gone."""
        self._adapters, self._always = Attached(adapters, self.config, self._weights.place), always

    def detach(self) -> None:
        """Take the adapters away."""
        self._adapters = self._always = None

    def folded_scales(self) -> dict[str, FoldedScale]:
        """The scales that are folded into these weights, by path, as far as the checkpoint kept them (see
        `awq_jax.convert.folded_scales`)."""
        return modules.by_path(self._folded(), self.config)

    def folded_digest(self) -> str:
        """What tells them from others; "" for none."""
        return folded_scales.digest(both) if (both := self._folded()) else ""

    def _folded(self) -> dict[str, FoldedScale]:
        """By module."""
        kept = folded_scales.of(self.source) or {}
        return folded_scales.composed(kept, modules.folded_scales(self._scales or {}, self.config))

    @property
    def mesh(self) -> Mesh | None:
        """The devices that the weights are spread over."""
        return None if self._weights.place is None else self._weights.place.mesh

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters beside the weights."""
        return () if self._adapters is None else self._adapters.names

    def adapted(self, adapter: str | None = None) -> Scored:
        """The model with one adapter for `awq_jax.evaluate`: its ``params`` have the factors beside the weights.

        Raises:
          ConfigError: there is no adapter of that name.
        """
        name = adapter or self._always or next(iter(self.adapters), None)
        params = self.take_params() if self._adapters is None else self._adapters.one(self.take_params(), name)
        return Scored(params, self.apply, self.forward, self.config, self.tokenizer)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters as held in memory."""
        return self._weights.nbytes()

    def quantize(
        self,
        calib: data.CalibrationSource | Sequence[Mapping[str, Any]] | None = None,
        *,
        samples: int = SAMPLES,
        seq_len: int = SEQ_LEN,
        batch_size: int | None = None,
        seed: int = 0,
        column: str | None = None,
        bos: str = "auto",
        target_bits: float | Budget | None = None,
        mesh: Mesh | None = None,
        progress: Progress = True,
        **settings: Any,
    ) -> Report:
        """Quantize the weights in place.

        Args:
          calib: what `awq_jax.data.load` takes: a dataset's name, a file, texts, rows, conversations or token
            ids; or a list of what a processor returned for texts and images, each of rows of one length. None:
            the built-in text, or nothing where the method needs no statistics (``"rtn"``).
          samples, seq_len: calibration sequences, and tokens of each, at most the model's context.
          batch_size: sequences per forward pass of the calibration; None takes as many as make about
            512 tokens on a CPU and 8192 elsewhere. It changes memory and time, not the result (beyond the
            rounding of sums).
          seed: picks the calibration texts.
          column, bos: of the calibration data, if they are rows or text (see `awq_jax.data.load`).
          target_bits: mean bits per packed weight, or a `Budget`: bits are chosen weight by weight, so that all
            together lose the least (see `awq_jax.allocate`). None: all get the bits of the settings.
          mesh: devices that share the work (see `awq_jax.quantize_checkpoint`), each with a copy of the block at
            work; they do not change the result. Calibration with images uses one.
          progress: show progress bars on stderr, or a function that is called (see `awq_jax.progress`).
          **settings: fields of `AwqConfig`. ``explicit_scale`` is False unless given, so that every
            checkpoint format can hold the result.

        Returns:
          What was done, weight by weight.

        Raises:
          ConfigError: on a bad setting, or if the model is quantized already.
          ShapeError: listing the weights that the group size does not divide, before any work.
          CalibrationError: if the calibration data are empty or do not fit the model.
          ProcessError: another process of this run has ended.
        """
        # What only quantizing needs: half of what loading would import otherwise.
        from awq_jax import data
        from awq_jax.algorithm.methods import METHODS
        from awq_jax.devices.pool import pool_of
        from awq_jax.devices.team import team
        from awq_jax.serve import calibrate_images, calibration_batches
        from awq_jax.stream import budgeted
        from awq_jax.stream.session import Session

        budget = None if target_bits is None else Budget.of(target_bits)
        config = AwqConfig.from_dict({"explicit_scale": False} | settings)
        config = config if budget is None else budget.base(config)
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, or None; got {batch_size}")
        if self._weights.place is not None:
            raise ConfigError("the model is on a mesh; load it without mesh=, quantize and save it, and load that")
        if self._adapters is not None:
            raise ConfigError("the model has adapters beside its weights; load it without them to quantize it")
        if self._weights.packed():
            raise ConfigError("the model is already quantized; load the float checkpoint")
        with team() as processes:
            start = time.perf_counter()
            pool = pool_of(mesh, processes)
            # What cannot be done is refused before the long work.
            session = Session(self.config, config, pool)
            planned = time.perf_counter() - start
            calib = data.default(METHODS[config.method].needs_statistics) if calib is None else calib
            if calibration_batches.are_images(calib):
                if budget is not None:
                    raise ConfigError("target_bits needs calibration data of text; or give overrides")
                seen = [calibration_batches.unpadded(self.config, b, i) for i, b in enumerate(calib[:samples])]
                params, report = calibrate_images.quantize(
                    self.apply, self.take_params(), self.config, seen, config, progress
                )
            else:
                given = calib, samples, seq_len, seed, column, bos
                read = calibration_batches.of_text(self.config, self.tokenizer, *given)
                shown = progress if pool.rank == 0 else False
                batches = read.batches(batch_size)
                if budget is not None:
                    config = budgeted.in_memory(session, budget, self.take_params(), batches, shown).config
                    session = Session(self.config, config, pool)
                params, report = session.run_in_memory(self.take_params(), batches, shown)
                report.calibration = read.description
            self._weights.replace(params)
        report.seconds["calibrate"] += planned
        self.settings, self._made, self._scales = config, card.of_report(report), report.scales
        return report

    def save(self, dst: str | Path, format: str = "auto", overwrite: bool = False, allow_lossy: bool = False) -> str:
        """Write a checkpoint, with tokenizer and generation config; atomic.

        Args:
          dst: directory to create (for GGUF: a file that ends in ``.gguf``).
          format: a name in `awq_jax.convert.registry.FORMATS` (``awq-jax convert --list``); ``"auto"``
            takes AutoAWQ's ``"gemm"`` (vLLM, transformers) if it can hold the weights, else
            ``"compressed-tensors"`` (which comes first for families whose activations AutoAWQ scales), else our own
            ``"awq-jax"``, which holds everything.
          overwrite: replace an existing checkpoint.
          allow_lossy: store weights the format cannot hold exactly as near as it can.

        Returns:
          The format written.

        Raises:
          FormatError: the format is unknown or cannot hold these weights.
          CheckpointError: ``dst`` exists and ``overwrite`` is not set.
        """
        settings = self.settings, self._made, self._scales
        what = saving.Saved(self.config, self.hf_config, self.source, self.tokenizer, *settings)
        return saving.save(self.take_params, what, dst, format, overwrite, allow_lossy)
