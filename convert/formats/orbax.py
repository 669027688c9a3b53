"""Orbax checkpoints for Flax apps: the tensors as a nested dict of arrays, one Orbax directory for all.

``DIR/params`` is a PyTree checkpoint of Orbax (zarr, an array each): a tensor ``a.b.weight`` is
``params["a"]["b"]["weight"]``, a float array in PyTorch's orientation, or, if it is packed, a dict of
the arrays of a `QuantizedTensor` (``qweight``, ``scales`` and, where present, ``zeros``, ``offsets``,
``perm``, ``inv_scale``). ``DIR/awq-jax.json`` holds what the arrays do not say, by the tensor's name:
bits, group size, axes, sizes, dtype. ``config.json`` and the tokenizer lie beside. Plain Orbax restores
``params`` as it is; `restore` gives the same dict with `QuantizedTensor` leaves.

Orbax's documentation: https://orbax.readthedocs.io/en/latest/guides/checkpoint/orbax_checkpoint_101.html
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

from awq_jax import paths
from awq_jax.convert.config_json import JsonObject
from awq_jax.convert.files.shards import atomic_directory, write_json
from awq_jax.convert.format import Destination, Format, Record, quant_method
from awq_jax.convert.formats.native import VERSION, NativeEncoder, NativeSource
from awq_jax.convert.formats.orbax_files import OrbaxFiles, Spool, nested, orbax
from awq_jax.convert.source import Source, copy_companions
from awq_jax.convert.trees import from_state, parameters
from awq_jax.errors import CheckpointError
from awq_jax.kernels.layout import to_canonical
from awq_jax.qtensor import is_quantized

QUANT_METHOD = "awq-jax-orbax"
T = TypeVar("T")


@overload
def restore(path: str | Path) -> dict[str, Any]: ...
@overload
def restore(path: str | Path, like: T) -> T: ...
def restore(path: str | Path, like: object = None) -> object:
    """The parameters of an Orbax checkpoint that `awq_jax` wrote.

    Args:
      path: its directory, as given to `store` or to ``awq-jax convert --to orbax``.
      like: see `awq_jax.convert.from_state`: a tree of the kind to return, or an NNX model.

    Returns:
      Nested dict (or what ``like`` is) of NumPy arrays and, for packed weights, `QuantizedTensor` of NumPy arrays
      (``jax.device_put`` moves the tree to devices or a mesh).

    Raises:
      CheckpointError: it is damaged, or not such a checkpoint.
      WeightError: its parameters are not those of ``like``.
      BackendError: Orbax is not installed.
    """
    directory = Path(path).expanduser()
    source = OrbaxSource(directory, {"quantization_config": {"format_version": VERSION}})
    tree = nested({name: source.read(name) for name in source.names()})
    return tree if like is None else from_state(tree, like)


def store(path: str | Path, params: object) -> None:
    """Write any parameter tree, with or without `QuantizedTensor` leaves, as an Orbax checkpoint.

    Keys become text: a list's index 0 the key ``"0"``.

    Args:
      path: directory to create; atomic.
      params: pytree of arrays and `QuantizedTensor`, or an NNX model. The disk holds the result twice for a while.

    Raises:
      CheckpointError: ``path`` exists, or a key holds a dot or a slash.
      BackendError: Orbax is not installed.
    """
    orbax()
    encoder = NativeEncoder()
    with atomic_directory(Path(os.path.abspath(Path(path).expanduser()))) as directory:
        spool = Spool(directory)
        for key, leaf in paths.flatten(parameters(params)).items():
            if "." in key:
                raise CheckpointError(f"the key {key!r} holds a dot, which separates keys in the file; rename it")
            name = key.replace("/", ".")
            leaf = to_canonical(leaf) if is_quantized(leaf) else leaf
            arrays, metadata = encoder.encode(name, leaf) if is_quantized(leaf) else ({name: np.asarray(leaf)}, {})
            spool.add(arrays, metadata)
        spool.close()


class OrbaxSource(NativeSource):
    """Reader; see the module.

    Raises:
      FormatError: if a newer version of the library wrote it.
      CheckpointError: if statics and arrays do not fit each other.
      BackendError: Orbax is not installed.
    """

    format = "orbax"
    container = OrbaxFiles


class OrbaxEncoder(NativeEncoder):
    """Writer; see `awq_jax.convert.format.Encoder`."""

    def config(self, records: Sequence[Record]) -> JsonObject:
        """The ``quantization_config`` that tells these checkpoints from others, float ones too."""
        return {"quantization_config": {**super().config(records)["quantization_config"], "quant_method": QUANT_METHOD}}


class OrbaxSink:
    """Writes the directory. Memory: a few tensors; disk: the result twice, until `close` returns.

    Orbax saves a tree at a time, so the arrays wait in one file that is mapped when all are there.
    """

    def __init__(self, directory: Path, destination: Destination, source: Source) -> None:
        orbax()  # missing is reported before the work
        self._directory, self._source = directory, source
        self._spool = Spool(directory)

    def add(self, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
        """See `awq_jax.convert.format.Sink`."""
        self._spool.add(arrays, metadata)

    def close(self, config: JsonObject) -> Path:
        """See `awq_jax.convert.format.Sink`."""
        self._spool.close()
        write_json(self._directory / "config.json", config)
        copy_companions(self._directory, None, self._source)
        return self._directory


FORMAT = Format(
    name="orbax",
    title="Orbax: Flax apps (awq_jax.convert.restore)",
    holds="everything awq_jax has, as a nested dict of arrays",
    matches=lambda config, names: quant_method(config) == QUANT_METHOD,
    reader=OrbaxSource,
    encoder=OrbaxEncoder,
    sink=OrbaxSink,
)
