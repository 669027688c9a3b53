"""The GGUF container, written tensor by tensor.

The header of a GGUF file names every tensor, so it can only be written last: data goes to a file of its
own, which is copied after the header at the end. ``gguf.GGUFWriter`` makes the header. Its ``add_tensor`` is
not used: it spools to the temporary directory, often another disk, and on one that is full ``ndarray.tofile``
loses an array of up to 4 KiB (a norm) without an error (gguf 0.17 and 0.19 with numpy 2.4).
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from awq_jax.convert.config_json import JsonObject
from awq_jax.convert.files.shards import raw_bytes
from awq_jax.convert.format import Destination
from awq_jax.convert.formats.gguf import metadata, tokenizer
from awq_jax.convert.formats.gguf.config import ROPE
from awq_jax.convert.source import Source, path_of
from awq_jax.errors import CheckpointError, needed

QUANTIZATION_VERSION = 2  # of ggml's block layouts
COPY = 16 << 20
PUT = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}  # what llama.cpp expects
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class GgufSink:
    """Takes what `awq_jax.convert.formats.gguf.encoder` makes; one file. See `awq_jax.convert.format.Sink`.

    Everything that can be refused before there are tensors is refused when it is made. Memory: the
    tensors of one call.

    Args:
      directory: an empty one to work in, with room for twice the result.
      destination: its config is that of the source.
      source: its tokenizer goes into the file.
      file_type: ``general.file_type``, the commonest block type.

    Raises:
      FormatError: llama.cpp has no such architecture, rotation or tokenizer.
      CheckpointError: config or tokenizer lack something.
    """

    def __init__(self, directory: Path, destination: Destination, source: Source, file_type: int) -> None:
        gguf = needed("gguf", "a GGUF file")  # which takes half a second where mistral_common is installed

        self._path = directory / "model.gguf"
        self._config = destination.config
        self._writer = gguf.GGUFWriter(self._path, metadata.architecture(destination.config))
        keys, freqs = metadata.metadata(destination.config)
        self._keys: JsonObject = {
            "general.type": "model",
            "general.name": _name(source),
            "general.quantization_version": QUANTIZATION_VERSION,
            "general.file_type": file_type,
            **keys,
            **tokenizer.metadata(source.tokenizer(), destination.config),
        }
        for key, value in self._keys.items():
            getattr(self._writer, PUT.get(type(value), "add_array"))(key, value)
        self._data = (directory / "data").open("wb")
        if freqs is not None:
            self.add({ROPE: freqs})

    def add(self, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
        """Write tensors by their names in the file; ``metadata`` has the type of those that are blocks.

        Raises:
          CheckpointError: for a name given twice.
        """
        gguf = needed("gguf", "a GGUF file")  # as above

        for name, array in arrays.items():
            if name in self._writer.tensors[0]:
                raise CheckpointError(f"tensor {name!r} was given twice; every name is written once")
            kind = gguf.GGMLQuantizationType[(metadata or {}).get(name) or TYPES[array.dtype.name]]
            self._writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, kind)
            self._data.write(raw_bytes(array))
            self._writer.write_padding(self._data, array.nbytes)

    def close(self, config: JsonObject) -> Path:
        """Write the file.

        Returns:
          Its path.

        Raises:
          CheckpointError: a tensor is missing or does not fit the config.
          FormatError: llama.cpp does not know one.
        """
        self._data.close()
        shapes = {name: tuple(info.shape) for name, info in self._writer.tensors[0].items() if name != ROPE}
        metadata.check_tensors(self._config, self._keys, shapes)
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        self._writer.close()
        with self._path.open("ab") as out, Path(self._data.name).open("rb") as data:
            self._writer.write_padding(out, out.tell())
            shutil.copyfileobj(data, out, COPY)
            out.flush()
            os.fsync(out.fileno())
        Path(self._data.name).unlink()
        return self._path


def _name(source: Source) -> str:
    """What to call the model: its file or directory, or the repository of a snapshot in the hub's cache."""
    path = path_of(source)
    assert path is not None
    if path.parent.name == "snapshots":
        return path.parent.parent.name.rpartition("--")[2]
    return path.name.removesuffix(".gguf")
