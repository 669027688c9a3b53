"""Which formats there are: opening any checkpoint, and writing one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from awq_jax.config import AwqConfig
from awq_jax.convert import hf, linear
from awq_jax.convert.autoawq import GemmEncoder, GemmSource
from awq_jax.convert.native import METHOD, NativeEncoder, NativeSource
from awq_jax.convert.safetensors_io import read_json
from awq_jax.convert.shards import ShardWriter, atomic_directory, refuse_existing, write_json
from awq_jax.convert.source import COMPANIONS, Source, read_config
from awq_jax.errors import CheckpointError, FormatError
from awq_jax.qtensor import QuantizedTensor

# quant_method of config.json -> reader.
READERS: Mapping[str, Callable[[Path, dict[str, Any]], Source]] = {"awq": GemmSource, METHOD: NativeSource}


class Encoder(Protocol):
    """How a format stores tensors. One instance per checkpoint written."""

    def accept(self, name: str, value: np.ndarray | QuantizedTensor) -> None:
        """Take note of a tensor before it is written; FormatError (tensor, remedy) if it does not fit."""

    def encode(self, name: str, q: QuantizedTensor) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """What to store for a packed weight: arrays by name, and metadata for the header of their file."""

    def config(self) -> dict[str, Any] | None:
        """``quantization_config`` once all tensors are known; FormatError if they do not go together."""


class FloatEncoder:
    """Plain float: packed weights are stored dequantized, in their dtype."""

    def accept(self, name: str, value: np.ndarray | QuantizedTensor) -> None:
        """Everything fits."""

    def encode(self, name: str, q: QuantizedTensor) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        return {name: np.asarray(q.dequantize())}, {}

    def config(self) -> dict[str, Any] | None:
        return None


WRITERS: Mapping[str, Callable[[AwqConfig | None], Encoder]] = {
    "gemm": lambda _: GemmEncoder(),
    "awq-jax": NativeEncoder,
    "float": lambda _: FloatEncoder(),
}


def open_source(path: str | Path) -> Source:
    """Open a checkpoint directory, a ``.gguf`` file, or a hub id (``owner/name``, ``owner/name@revision``).

    Raises:
      FormatError: the quantization method is unknown, or the weights are pickles.
      CheckpointError: nothing is there, or it is damaged.
    """
    text = os.fspath(path)
    local = Path(text).expanduser()
    if not os.path.lexists(local) and isinstance(path, str) and hf.HUB_ID.fullmatch(text) and local.suffix != ".gguf":
        local = hf.download(text)
    if local.is_file():
        if local.suffix.lower() != ".gguf":
            raise CheckpointError(f"{local} is not a .gguf file; for safetensors pass the directory they are in")
        from awq_jax.convert.gguf import GgufSource

        return GgufSource(local)
    if not local.is_dir():
        raise CheckpointError(f"{local} does not exist; pass a checkpoint directory, a .gguf file or a hub id")
    return _open_directory(local)


def _open_directory(directory: Path) -> Source:
    ggufs = sorted(directory.glob("*.gguf"))
    if ggufs and not any(directory.glob("*.safetensors")):
        raise CheckpointError(f"{directory} holds GGUF files; pass one of them, e.g. {ggufs[0]}")
    hf.refuse_pickles(directory)
    config = read_config(directory)
    legacy = directory / "quant_config.json"  # AutoAWQ before quantization_config was moved to config.json
    if "quantization_config" not in config and "quantization" not in config and legacy.is_file():
        old = read_json(legacy)
        config["quantization_config"] = {
            "quant_method": "awq",
            "bits": old.get("w_bit"),
            "group_size": old.get("q_group_size"),
            "zero_point": old.get("zero_point"),
            "version": old.get("version", "gemm"),
        }
    quant = config.get("quantization_config")
    if quant is None:
        if config.get("quantization") is not None:
            raise FormatError(f"{directory} was quantized by MLX ('quantization' in config.json); {_known()}")
        return hf.HfSource(directory, config)
    method = quant.get("quant_method") if isinstance(quant, dict) else None
    reader = READERS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise FormatError(f"{directory} has quant_method {str(method)[:100]!r}, which is not readable; {_known()}")
    return reader(directory, config)


def _known() -> str:
    return "known are float checkpoints, .gguf files, 'awq' (version gemm) and 'awq-jax'"


def unfit(format: str, tensors: Iterable[tuple[str, np.ndarray | QuantizedTensor]]) -> str | None:
    """Why ``format`` cannot hold these tensors (with the remedy), or None if it can. Writes nothing.

    Raises:
      FormatError: for an unknown format.
    """
    encoder = _encoder(format, None)
    try:
        for name, value in tensors:
            encoder.accept(name, linear.as_linear(value) if isinstance(value, QuantizedTensor) else value)
        encoder.config()
    except FormatError as e:
        return str(e)
    return None


def write_checkpoint(
    dst: str | Path,
    tensors: Iterable[tuple[str, np.ndarray | QuantizedTensor]],
    config: Mapping[str, Any],
    format: str,
    settings: AwqConfig | None = None,
    tokenizer: Any = None,
    extra: Source | None = None,
    max_shard_bytes: int = 4 << 30,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint directory: all of it or nothing.

    The files are written to a hidden sibling of ``dst`` which is renamed at the end. Memory: one shard.

    Args:
      dst: directory to create.
      tensors: Hugging Face names and tensors in PyTorch's orientation. A packed weight that is one
        matrix may have any ``axes``; it is stored as ``[out, in]``.
      config: the source's ``config.json``; its quantization and dtype entries are replaced.
      format: ``"gemm"``, ``"awq-jax"`` or ``"float"``.
      settings: recorded by ``"awq-jax"``.
      tokenizer: saved with ``save_pretrained`` if ``extra`` brings no tokenizer files.
      extra: its tokenizer files and generation config are copied.
      max_shard_bytes: bound on the tensor bytes of one file.
      overwrite: replace ``dst`` if it is empty or a checkpoint.

    Raises:
      FormatError: the format is unknown or cannot hold a tensor; named, with the remedy.
      CheckpointError: ``dst`` exists, or the disk refuses.
    """
    encoder = _encoder(format, settings)
    target = Path(os.path.abspath(Path(dst).expanduser()))
    refuse_existing(target, overwrite)
    source = getattr(extra, "directory", None)
    if source is not None and Path(source).resolve() == target.resolve():
        raise CheckpointError(f"{target} is where the weights come from; choose another target")
    if isinstance(tensors, list | tuple) and (why := unfit(format, tensors)):
        raise FormatError(why)  # before anything is written
    floats: dict[str, int] = {}
    with atomic_directory(target, overwrite) as directory:
        writer = ShardWriter(directory, max_shard_bytes)
        for name, value in tensors:
            arrays, metadata = _encode(encoder, name, value)
            writer.add(arrays, metadata)
            dense = arrays.get(name)
            if dense is not None and jnp.issubdtype(dense.dtype, jnp.floating):
                floats[dense.dtype.name] = floats.get(dense.dtype.name, 0) + dense.nbytes
            del value, arrays, dense  # only the writer's shard stays in memory
        writer.close()
        write_json(directory / "config.json", _config(config, encoder.config(), floats))
        _companions(directory, tokenizer, extra)


def _encode(
    encoder: Encoder, name: str, value: np.ndarray | QuantizedTensor
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    value = linear.as_linear(value) if isinstance(value, QuantizedTensor) else np.asarray(value)
    encoder.accept(name, value)
    return encoder.encode(name, value) if isinstance(value, QuantizedTensor) else ({name: value}, {})


def _encoder(format: str, settings: AwqConfig | None) -> Encoder:
    if format not in WRITERS:
        raise FormatError(f"format must be one of {', '.join(WRITERS)}; got {format!r}")
    return WRITERS[format](settings)


def _config(
    config: Mapping[str, Any], quantization: Mapping[str, Any] | None, floats: Mapping[str, int]
) -> dict[str, Any]:
    """The source's config with this checkpoint's quantization and the dtype most float bytes have."""
    stale = ("quantization_config", "quantization", "torch_dtype", "dtype")
    out = {k: v for k, v in config.items() if k not in stale}
    dtype = max(sorted(floats), key=lambda d: floats[d]) if floats else "float16"
    out["torch_dtype"] = out["dtype"] = dtype  # transformers before and since version 5
    if quantization is not None:
        out["quantization_config"] = dict(quantization)
    return out


def _companions(directory: Path, tokenizer: Any, extra: Source | None) -> None:
    files = [] if extra is None else [p for p in extra.companions() if p.name in COMPANIONS]
    for path in files:
        shutil.copyfile(path, directory / path.name)
    if any(p.name.startswith(("tokenizer", "vocab")) for p in files):
        return
    if tokenizer is None and extra is not None:
        tokenizer = extra.tokenizer()
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
