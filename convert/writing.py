"""Writing a checkpoint from tensors in memory."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from awq_jax.config import AwqConfig
from awq_jax.convert import card, float_form, folded_scales, head, pipeline, registry
from awq_jax.convert.config_json import HfConfig, JsonObject, without_quantization
from awq_jax.convert.files.shards import ShardWriter, atomic_directory, install, refuse_existing, write_json
from awq_jax.convert.format import Destination, Encoder, Format, Record
from awq_jax.convert.formats import joined_linears
from awq_jax.convert.formats.awq import scaled_activations
from awq_jax.convert.source import Source, copy_companions, path_of
from awq_jax.errors import CheckpointError, ConfigError, FormatError
from awq_jax.qtensor import QuantizedTensor

if TYPE_CHECKING:
    from awq_jax.convert.text import TokenizerLike

SHARD = 4 << 30  # bytes of a file, if nothing else is asked for
AUTO = ("gemm", "compressed-tensors", "awq-jax")  # the first that holds the weights as they are: most engines read it
# ... of families of which no gemm file is read by both vLLM and transformers.
AUTO_ACTIVATIONS = ("compressed-tensors", "gemm", "awq-jax")
log = logging.getLogger(__name__)

Tensors = Iterable[tuple[str, np.ndarray | QuantizedTensor]]


def unfit(format: str, tensors: Tensors, allow_lossy: bool = False) -> str | None:
    """Why ``format`` cannot hold these tensors as they are (with the remedy), or None. Writes nothing.

    Raises:
      FormatError: for an unknown format.
    """
    encoder = encoder_of(format, Destination())
    records = []
    try:
        for name, value in tensors:
            records.append(pipeline.encode(encoder, name, value, allow_lossy).record)
            if isinstance(value, QuantizedTensor) and not records[-1].bits:
                return f"{name} is packed, and {format} would hold it as float"
        encoder.config(records)
    except FormatError as e:
        return str(e)
    return None


def auto_formats(config: HfConfig) -> tuple[str, ...]:
    """What ``"auto"`` tries in turn for a family; the last holds everything."""
    return AUTO_ACTIVATIONS if scaled_activations.are_in(config) else AUTO


def first_that_holds(tensors: Callable[[], Tensors], config: HfConfig) -> tuple[str, str]:
    """The format that most engines read of those that hold these tensors as they are, and the reason (see `because`).

    Args:
      tensors: they, anew at each call.
      config: the model's ``config.json``.
    """
    reasons: list[str] = []
    *formats, last = auto_formats(config)
    for format in formats:
        problem = unfit(format, tensors())
        if problem is None:
            return format, because(reasons)
        reasons.append(problem)
    return last, because(reasons)


def because(refusals: Sequence[str]) -> str:
    """Why formats before the one taken were not, from what they said: ``", because w has 3 bits, gemm holds 4"``."""
    return f", because {'; '.join(r.partition(';')[0] for r in refusals)}" if refusals else ""


def write_checkpoint(
    dst: str | Path,
    tensors: Tensors,
    config: HfConfig,
    format: str,
    settings: AwqConfig | None = None,
    made: Mapping[str, Any] | None = None,
    scales: folded_scales.FoldedScales | None = None,
    tokenizer: TokenizerLike | None = None,
    extra: Source | None = None,
    max_shard_bytes: int = SHARD,
    overwrite: bool = False,
    allow_lossy: bool = False,
) -> list[Record]:
    """Write a checkpoint: all of it or nothing.

    The files are written to a hidden sibling of ``dst`` which is renamed at the end. Memory: one shard.

    Args:
      dst: directory to create (for GGUF: a file that ends in ``.gguf``).
      tensors: Hugging Face names and tensors in PyTorch's orientation. A packed weight that is one
        matrix may have any ``axes``; it is stored as ``[out, in]``.
      config: the source's ``config.json``; its quantization and dtype entries are replaced. Where it says that
        the head is the embedding, one among ``tensors`` is left out if it is, and kept with a warning if it differs.
      format: a name in `awq_jax.convert.registry.FORMATS`.
      settings: the quantizer's; recorded by ``"awq-jax"``.
      made: how the weights were quantized, for the model card (see `awq_jax.convert.card.of_report`).
      scales: what was folded into them since they were those of ``extra``, by module;
        None: they were not quantized here.
      tokenizer: saved with ``save_pretrained`` if ``extra`` brings no tokenizer files.
      extra: its tokenizer files and generation config are copied (GGUF: its tokenizer goes into the file).
      max_shard_bytes: bound on the tensor bytes of one file.
      overwrite: replace ``dst`` if it is empty or a checkpoint.
      allow_lossy: store weights the format cannot hold exactly as near as it can.

    Returns:
      What was written, tensor by tensor.

    Raises:
      FormatError: the format is unknown or cannot hold a tensor; named, with the remedy.
      CheckpointError: ``dst`` exists, or the disk refuses.
    """
    encoder = encoder_of(format, Destination(config=config, settings=settings, made=made or {}, scales=scales))
    path = Path(os.path.abspath(Path(dst).expanduser()))
    check_path(path, registry.get(format), overwrite)
    refuse_source(path, extra)
    tensors = head.without_copies(config, tensors)
    if format == "float":
        tensors = float_form.FloatForm(config).all_of(tensors)
    if registry.get(format).sink is not None:
        if extra is None:
            raise FormatError(f"{format} is made from a checkpoint's own files (its tokenizer): pass it as extra")
        all_of_it = (pipeline.encode(encoder, name, value, allow_lossy) for name, value in tensors)
        return into_sink(registry.get(format), path, extra, encoder, all_of_it, overwrite)
    records = []
    with atomic_directory(path, overwrite) as directory:
        writer = ShardWriter(directory, max_shard_bytes)
        for name, value in tensors:
            encoded = pipeline.encode(encoder, name, value, allow_lossy)
            writer.add(encoded.arrays, encoded.metadata)
            records.append(encoded.record)
            del value, encoded  # only the writer's shard stays in memory
        finish(format, directory, writer, encoder, records, tokenizer, extra)
    return records


def finish(
    format: str,
    directory: Path,
    writer: ShardWriter,
    encoder: Encoder,
    records: Sequence[Record],
    tokenizer: TokenizerLike | None,
    extra: Source | None,
) -> None:
    """After the last tensor: the files get their names, and ``config.json``, tokenizer and card are put beside them.

    Raises:
      FormatError: the tensors do not go together in this format.
    """
    changes = encoder.config(records)
    writer.close()
    write_json(directory / "config.json", final_config(encoder.destination.config, changes, records))
    copy_companions(directory, tokenizer, extra)
    folded_scales.keep(directory, extra, encoder.destination.scales)
    card.write(directory, format, encoder.destination, records, extra)


def into_sink(
    format: Format,
    path: Path,
    source: Source,
    encoder: Encoder,
    encoded: Iterable[pipeline.EncodedTensor],
    overwrite: bool,
) -> list[Record]:
    """Write a container of its own beside ``path``, and rename it.

    Raises:
      CheckpointError: if the disk refuses.
    """
    assert format.sink is not None
    work = path.parent / f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        work.mkdir(parents=True)
        sink = format.sink(work, encoder.destination, source)
        records = []
        for one in encoded:
            sink.add(one.arrays, one.metadata)
            records.append(one.record)
            del one
        finished = sink.close(final_config(encoder.destination.config, encoder.config(records), records))
        if format.suffix:
            refuse_existing(path, overwrite, file=True)
            os.replace(finished, path)
            folded_scales.keep(path, source, encoder.destination.scales)
            card.write_beside(path, format.name, encoder.destination, records, source)
        else:
            folded_scales.keep(work, source, encoder.destination.scales)
            card.write(work, format.name, encoder.destination, records, source)
            install(work, path, overwrite)
    except OSError as e:
        raise CheckpointError(f"cannot write {path}: {e}") from e
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return records


def check_path(path: Path, format: Format, overwrite: bool) -> None:
    """Refuse a path that cannot become a checkpoint of this format.

    Raises:
      ConfigError: if the format is a single file and ``path`` is not called like one.
      CheckpointError: if it exists and may not be replaced.
    """
    if not path.name.endswith(format.suffix):
        raise ConfigError(f"{format.name} is a single file; give a target like {path}{format.suffix}")
    refuse_existing(path, overwrite, file=bool(format.suffix))


def encoder_of(format: str, destination: Destination) -> Encoder:
    """A fresh encoder.

    Raises:
      FormatError: if the format is unknown or only read.
    """
    make = registry.get(format).encoder
    if make is None:
        raise FormatError(f"{format} can be read, not written")
    return make(destination)


def refuse_source(path: Path, source: Source | None) -> None:
    """Raise `CheckpointError` if ``path`` is where the weights come from."""
    where = None if source is None else path_of(source)
    if where is not None and where.resolve() == path.resolve():
        raise CheckpointError(f"{path} is the source, where the weights come from; choose another target")


def final_config(config: HfConfig, changes: HfConfig | None, records: Sequence[Record]) -> JsonObject:
    """The source's config with this checkpoint's quantization, the dtype most float bytes have, both spellings
    of the rotary constants, and no claim that a head that is stored is the embedding.

    Warns of linears that vLLM would join and that are not packed alike.
    """
    for line in joined_linears.mismatches(records) if changes and "quantization_config" in changes else ():
        log.warning("%s", line)
    config = without_quantization(head.told(config, [r.name for r in records]))
    out = {k: v for k, v in config.items() if k not in ("torch_dtype", "dtype")}
    floats: dict[str, int] = {}
    for r in records:
        if not r.bits and jnp.issubdtype(r.dtype, jnp.floating):
            floats[r.dtype] = floats.get(r.dtype, 0) + r.nbytes
    dtype = max(sorted(floats), key=lambda d: floats[d]) if floats else "float16"
    out["torch_dtype"] = out["dtype"] = dtype  # transformers before and since version 5
    if isinstance(out.get("text_config"), Mapping):
        out["text_config"] = with_rope_scaling(out["text_config"])
    return {**with_rope_scaling(out), **(changes or {})}


def with_rope_scaling(config: HfConfig) -> JsonObject:
    """``config`` whose ``rope_parameters`` (transformers 5) are also there as transformers 4 had them.

    Readers that know only ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor`` (mlx-lm, vLLM with
    transformers 4, llama.cpp's converter) would take their own defaults without a word. Parameters per kind of
    layer had no common spelling, and stay as they are.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or any(isinstance(v, Mapping) for v in rope.values()):
        return dict(config)
    old = {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if rope.get(k) is not None}
    if rope.get("rope_type", "default") != "default":
        old["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return {**config, **{k: v for k, v in old.items() if config.get(k) is None}}
