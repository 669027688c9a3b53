"""The headers of a checkpoint on the hub, as a directory that can be opened but holds no weights."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from awq_jax.convert import registry
from awq_jax.convert.config_json import HfConfig, with_quantization_on_top
from awq_jax.convert.files.safetensors import INDEX, read_json
from awq_jax.convert.formats import float_weights
from awq_jax.convert.source import Source
from awq_jax.errors import CheckpointError, needed

if TYPE_CHECKING:
    from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo


@contextlib.contextmanager
def headers(hub_id: str) -> Iterator[Source]:
    """A source whose `info` is right and whose values are zeros: config and headers only are fetched.

    Raises:
      CheckpointError: the repository cannot be reached, or has no safetensors.
      FormatError: its format is not readable.
    """
    match = float_weights.HUB_ID.fullmatch(hub_id)
    if match is None:
        raise CheckpointError(f"{hub_id!r} is not a hub id like owner/name")
    with tempfile.TemporaryDirectory() as directory:
        _fetch(Path(directory), match["repo"], match["revision"])
        yield registry.open_source(directory)


def _fetch(directory: Path, repo: str, revision: str | None) -> None:
    huggingface_hub = needed("huggingface_hub", f"{repo}, a hub id,")  # which takes a second, and only this needs

    try:
        for name in float_weights.CONFIGS:
            if name == "config.json" or huggingface_hub.file_exists(repo, name, revision=revision):
                path = huggingface_hub.hf_hub_download(repo, name, revision=revision)
                (directory / name).write_bytes(Path(path).read_bytes())
        found = huggingface_hub.get_safetensors_metadata(repo, revision=revision)
    except Exception as e:  # its errors share no base class with those of its HTTP library
        raise CheckpointError(
            f"the headers of {repo!r} could not be fetched from the hub: {type(e).__name__}: {str(e)[:300]} Check the "
            "spelling, the connection and `hf auth login`"
        ) from e
    config = with_quantization_on_top(read_json(directory / "config.json"))
    for name, file in found.files_metadata.items():
        if Path(name).name != name:
            raise CheckpointError(f"{repo!r} names a file {name!r} outside of its top folder, which is not read")
        _stub(directory / name, file, config)
    if found.sharded:
        (directory / INDEX).write_text(json.dumps({"metadata": found.metadata, "weight_map": found.weight_map}))


def _stub(path: Path, file: SafetensorsFileMetadata, config: HfConfig) -> None:
    """A sparse file of the full length: the header, and zeros that take no space."""
    header: dict[str, Any] = {"__metadata__": file.metadata} if file.metadata else {}
    for name, info in file.tensors.items():
        header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": list(info.data_offsets)}
    text = json.dumps(header).encode()
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, info in file.tensors.items():
            known = _known(name, file.tensors, config)
            if known is not None and known.nbytes == info.data_offsets[1] - info.data_offsets[0]:
                f.seek(8 + len(text) + info.data_offsets[0])
                f.write(known.tobytes())
        f.truncate(8 + len(text) + max((i.data_offsets[1] for i in file.tensors.values()), default=0))


def _known(name: str, tensors: Mapping[str, TensorInfo], config: HfConfig) -> np.ndarray | None:
    """Values that readers look into for a shape or an order, as they follow from other headers and the config."""
    quant = config.get("quantization_config")
    quant = quant if isinstance(quant, dict) else {}
    module, _, part = name.rpartition(".")
    if part == "weight_shape" and f"{module}.weight_packed" in tensors:
        codes = tensors[f"{module}.weight_packed"].shape
        return np.array([codes[0], codes[-1] * 32 // _weights(quant).get("num_bits", 4)], "<i8")
    scales = tensors.get(f"{module}.{'weight_scale' if part == 'weight_g_idx' else 'scales'}")
    if part in ("g_idx", "weight_g_idx") and scales is not None and len(scales.shape) == 2 and tensors[name].shape:
        (k,), groups = tensors[name].shape, scales.shape[0 if part == "g_idx" else 1]
        channels = np.arange(k, dtype="<i8" if tensors[name].dtype == "I64" else "<i4")
        in_order = not (quant.get("desc_act") if part == "g_idx" else _weights(quant).get("actorder"))
        return channels // -(-k // max(1, groups)) if in_order else channels % max(1, groups)
    return None


def _weights(quant: HfConfig) -> HfConfig:
    """The settings of compressed-tensors' first config group."""
    groups = quant.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = first.get("weights") if isinstance(first, dict) else None
    bits = weights.get("num_bits") if isinstance(weights, dict) else None
    return weights if isinstance(weights, dict) and type(bits) is int and 2 <= bits <= 8 else {}
