"""Finished blocks on disk, and the checkpoint made of them.

A block is written as it is in memory (our own format, which holds everything), and the format of the
result is chosen when all are there, as `awq_jax.serve.model.Model.save` chooses it: by what holds every weight.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax.convert import pipeline, writing
from awq_jax.convert.files.manifest import Manifest
from awq_jax.convert.files.safetensors import INDEX
from awq_jax.convert.files.shards import ShardWriter, part_name, write_file, write_json
from awq_jax.convert.format import Destination, Record
from awq_jax.convert.formats import native
from awq_jax.convert.source import Source, copy_companions
from awq_jax.errors import FormatError
from awq_jax.qtensor import QuantizedTensor

log = logging.getLogger(__name__)

Tensors = Iterable[tuple[str, np.ndarray | QuantizedTensor]]


def write_tensors(work: Path, number: int, tensors: Tensors) -> tuple[list[Record], list[str]]:
    """A block's tensors in the file of its part, on the disk: what was made of them, and their names."""
    encoder = native.NativeEncoder()
    arrays: dict[str, np.ndarray] = {}
    metadata: dict[str, str] = {}
    records: list[Record] = []
    for name, value in tensors:
        encoded = pipeline.encode(encoder, name, value, lossy=False)
        arrays |= encoded.arrays
        metadata |= encoded.metadata
        records.append(encoded.record)
    write_file(work / part_name(number), arrays, metadata)
    return records, list(arrays)


def write_part(manifest: Manifest, work: Path, number: int, tensors: Tensors, note: dict[str, Any]) -> None:
    """A block's tensors, and its line in the manifest once they are on the disk."""
    records, names = write_tensors(work, number, tensors)
    manifest.add(number, records, names, note)
    take(manifest, records, names, note)


def take(manifest: Manifest, records: list[Record], names: list[str], note: dict[str, Any]) -> None:
    """A part that has its line in the manifest."""
    manifest.records += records
    manifest.shards.append(names)
    manifest.notes.append(note)


def assemble(
    manifest: Manifest,
    work: Path,
    out: Path,
    format: str,
    destination: Destination,
    source: Source,
) -> str:
    """Make the checkpoint ``out`` of all parts.

    Args:
      format: a name, or ``"auto"``.
      destination: the config that it is made for, and the settings.
      source: its tokenizer files and generation config are copied.

    Returns:
      The format written.

    Raises:
      FormatError: the format cannot hold a tensor.
    """
    files = {name: part_name(i) for i, names in enumerate(manifest.shards) for name in names}
    write_json(work / INDEX, {"weight_map": files})
    parts = native.NativeSource(work, {"quantization_config": {"format_version": native.VERSION}})
    reasons = []
    for choice in writing.AUTO if format == "auto" else (format,):
        try:
            _write(choice, parts, [r.name for r in manifest.records], out, destination, source, strict=format == "auto")
        except FormatError as e:
            if format != "auto" or choice == writing.AUTO[-1]:
                raise
            reasons.append(f"not {choice}: {e}")
        else:
            log.info("wrote %s: %s", choice, "; ".join([*reasons, "it holds every weight"]))
            return choice
    raise AssertionError("the last format holds everything")


def _write(
    format: str,
    parts: native.NativeSource,
    names: list[str],
    out: Path,
    destination: Destination,
    source: Source,
    strict: bool,
) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    encoder = writing.encoder_of(format, destination)
    records: list[Record] = []
    writer = ShardWriter(out, writing.SHARD, spool=True)
    for name in names:
        value = parts.read(name)
        encoded = pipeline.encode(encoder, name, value, lossy=False)
        if strict and isinstance(value, QuantizedTensor) and not encoded.record.bits:
            raise FormatError(f"{name} is packed, and {format} would hold it as float")
        writer.add(encoded.arrays, encoded.metadata)
        records.append(encoded.record)
        del value, encoded
    changes = encoder.config(records)
    writer.close()
    write_json(out / "config.json", writing.final_config(destination.config, changes, records))
    copy_companions(out, None, source)
