"""The headers of a checkpoint on the hub, as a directory that can be opened but holds no weights."""

from __future__ import annotations

import contextlib
import json
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from awq_jax.convert import hf, registry
from awq_jax.convert.safetensors_io import INDEX, read_json
from awq_jax.convert.source import Source
from awq_jax.errors import CheckpointError


@contextlib.contextmanager
def headers(hub_id: str) -> Iterator[Source]:
    """A source whose `info` is right and whose values are zeros: config and headers only are fetched.

    Raises:
      CheckpointError: the repository cannot be reached, or has no safetensors.
      FormatError: its format is not readable.
    """
    match = hf.HUB_ID.fullmatch(hub_id)
    if match is None:
        raise CheckpointError(f"{hub_id!r} is not a hub id like owner/name")
    with tempfile.TemporaryDirectory() as directory:
        _fetch(Path(directory), match["repo"], match["revision"])
        yield registry.open_source(directory)


def _fetch(directory: Path, repo: str, revision: str | None) -> None:
    import huggingface_hub

    try:
        for name in hf.CONFIGS:
            if name == "config.json" or huggingface_hub.file_exists(repo, name, revision=revision):
                path = huggingface_hub.hf_hub_download(repo, name, revision=revision)
                (directory / name).write_bytes(Path(path).read_bytes())
        found = huggingface_hub.get_safetensors_metadata(repo, revision=revision)
    except Exception as e:  # its errors share no base class with those of its HTTP library
        raise CheckpointError(
            f"the headers of {repo!r} could not be fetched from the hub: {type(e).__name__}: {str(e)[:300]} Check the "
            "spelling, the connection and `hf auth login`"
        ) from e
    bits = _bits(read_json(directory / "config.json"))
    for name, file in found.files_metadata.items():
        if Path(name).name != name:
            raise CheckpointError(f"{repo!r} names a file {name!r} outside of its top folder, which is not read")
        _stub(directory / name, file, bits)
    if found.sharded:
        (directory / INDEX).write_text(json.dumps({"metadata": found.metadata, "weight_map": found.weight_map}))


def _stub(path: Path, file: Any, bits: int) -> None:
    """A sparse file of the full length: the header, and zeros that take no space.

    The one kind of tensor that readers look into for a shape, compressed-tensors' ``weight_shape``, is
    filled in from the shape of the codes.
    """
    header: dict[str, Any] = {"__metadata__": file.metadata} if file.metadata else {}
    for name, info in file.tensors.items():
        header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": list(info.data_offsets)}
    text = json.dumps(header).encode()
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, info in file.tensors.items():
            codes = file.tensors.get(name.removesuffix("_shape") + "_packed")
            if name.endswith(".weight_shape") and codes is not None and info.dtype == "I64" and len(codes.shape) == 2:
                f.seek(8 + len(text) + info.data_offsets[0])
                f.write(struct.pack("<2q", codes.shape[0], codes.shape[1] * 32 // bits))
        f.truncate(8 + len(text) + max((i.data_offsets[1] for i in file.tensors.values()), default=0))


def _bits(config: Mapping[str, Any]) -> int:
    """Of compressed-tensors' first config group; 4 if it does not say."""
    quant = config.get("quantization_config")
    groups = quant.get("config_groups") if isinstance(quant, dict) else None
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = first.get("weights") if isinstance(first, dict) else None
    bits = weights.get("num_bits") if isinstance(weights, dict) else None
    return bits if type(bits) is int and 2 <= bits <= 8 else 4
