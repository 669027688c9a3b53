"""The library's own layout, ``awq-jax``: everything a `QuantizedTensor` can be, stored as it is in memory.

A packed weight ``w`` becomes ``w.qweight`` (uint32, LSB first along K), ``w.scales``, and where present
``w.zeros`` (uint8), ``w.offsets``, ``w.perm`` (int32) and
``w.inv_scale``, all in one file. What the arrays do not say (bits, group size,
sizes, axes, dtype) is JSON under the key ``awq-jax:w`` of that file's header metadata.
``config.json`` has ``quantization_config: {"quant_method": "awq-jax", "format_version": 1, "settings"}``.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from awq_jax import pack
from awq_jax.convert.arrays import linear
from awq_jax.convert.config_json import HfConfig, JsonObject
from awq_jax.convert.files import slices
from awq_jax.convert.format import BaseEncoder, Format, Record, Stored, quant_method
from awq_jax.convert.source import DirectorySource, Info, Packed
from awq_jax.dtypes import FLOATS
from awq_jax.errors import CheckpointError, FormatError, WeightError
from awq_jax.qtensor import QuantizedTensor

QUANT_METHOD = "awq-jax"
VERSION = 1
KEY = "awq-jax:"
OPTIONAL = ("zeros", "offsets", "perm", "inv_scale")
FIELDS = ("bits", "group_size", "axes", "k_dims", "n_dims", "dtype", *OPTIONAL)


class NativeSource(DirectorySource):
    """Reader; see the module.

    Raises:
      FormatError: if a newer version of the library wrote it.
      CheckpointError: if metadata and arrays do not fit each other.
    """

    format = "awq-jax"

    def __init__(self, directory: Path, config: JsonObject) -> None:
        version = config["quantization_config"].get("format_version")
        if version != VERSION:
            raise FormatError(f"{directory} has awq-jax format version {version!r}; this library reads {VERSION}")
        super().__init__(directory, config)
        self.packed: dict[str, JsonObject] = {}
        parts: set[str] = set()
        for metadata in self.files.metadata.values():
            for key, text in metadata.items():
                if key.startswith(KEY):
                    name = key.removeprefix(KEY)
                    self.packed[name] = self._check(name, text)
                    parts.update(_tensor_names(name, self.packed[name]))
        self._names = sorted((set(self.files.names()) - parts) | set(self.packed))
        lost = next((n for n in self._names if n.endswith(".qweight") and n not in self.packed), None)
        if lost:
            raise CheckpointError(f"{directory}: {lost} has no metadata; download the checkpoint again")

    def _check(self, name: str, text: str) -> JsonObject:
        where = f"{self.directory}: the metadata of packed weight {name!r}"
        try:
            info = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise CheckpointError(f"{where} is not JSON; download the checkpoint again") from e
        if isinstance(info, dict):
            info = {"offsets": False, "perm": False} | info  # the first files had neither
        if not isinstance(info, dict) or set(info) != set(FIELDS) or not _sane(info):
            raise CheckpointError(f"{where} is incomplete or out of range; download the checkpoint again")
        absent = [f"{name}.{p}" for p in OPTIONAL if not info[p]]
        for other in (name, *absent):
            if other in self.files.entries:
                raise CheckpointError(f"{where} says there is no {other!r}, but it is stored; download it again")
        q, s = (self.files.entry(f"{name}.{p}") for p in ("qweight", "scales"))
        k, n = math.prod(info["k_dims"]), math.prod(info["n_dims"])
        groups = -(-k // info["group_size"])
        batch = s.shape[:-2]
        want = {
            "qweight": ((*batch, pack.words(groups * info["group_size"], info["bits"]), n), ("uint32",)),
            "scales": ((*batch, groups, n), FLOATS),
            "zeros": ((*batch, groups, n), ("uint8",)),
            "offsets": ((*batch, groups, n), FLOATS),
            "perm": ((*batch, k), ("int32",)),
            "inv_scale": ((*batch, k), FLOATS),
        }
        for part in _tensor_names(name, info):
            shape, dtypes = want[part.removeprefix(f"{name}.")]
            entry = self.files.entry(part)
            if entry.shape != shape or entry.dtype.name not in dtypes or len(batch) != info["axes"].count("b"):
                raise CheckpointError(
                    f"{where} implies that {part} is {'/'.join(dtypes)} {shape}; it is {entry.dtype} {entry.shape}"
                )
        return {**info, "batch": batch, "file": q.file}

    def names(self) -> list[str]:
        return list(self._names)

    def info(self, name: str) -> Info:
        if name not in self.packed:
            return super().info(name)
        known = self.packed[name]
        sizes = {"b": iter(known["batch"]), "k": iter(known["k_dims"]), "n": iter(known["n_dims"])}
        shape = tuple(next(sizes[a]) for a in known["axes"])
        nbytes = sum(self.files.entry(p).nbytes for p in _tensor_names(name, known))
        symmetric = not known["zeros"] and not known["offsets"]
        scales = self.files.entry(f"{name}.scales").dtype.name
        packed = Packed(known["bits"], known["group_size"], symmetric, scales, known["offsets"], known["perm"])
        return Info(shape, known["dtype"], nbytes, packed)

    def read(self, name: str) -> slices.Tensor:
        if name not in self.packed:
            return super().read(name)
        info = self.packed[name]
        arrays = {p.removeprefix(f"{name}."): self.files.read(p) for p in _tensor_names(name, info)}
        return self._built(name, arrays, tuple(info["k_dims"]), tuple(info["n_dims"]))

    def read_slice(self, name: str, index: slices.Index) -> slices.Tensor | None:
        if name not in self.packed:
            return super().read_slice(name, index)
        info = self.packed[name]
        plain = len(info["k_dims"]) == len(info["n_dims"]) == 1
        parts = dict(zip(info["axes"], index, strict=True)) if plain and info["axes"].count("b") < 2 else {}
        if not parts or (info["perm"] and parts["k"] != slice(0, info["k_dims"][0])):
            return None
        lead = (parts["b"],) if "b" in parts else ()
        k, n = info["k_dims"][0], info["n_dims"][0]
        arrays = {}
        for whole in _tensor_names(name, info):
            part, shape = whole.removeprefix(f"{name}."), self.files.entry(whole).shape
            across = part not in ("perm", "inv_scale")
            rows = slices.scaled(parts["k"], k, shape[-2 if across else -1])
            if rows is None or (k % info["group_size"] and rows != slice(0, shape[-2 if across else -1])):
                return None
            array = self.files.read_slice(whole, (*lead, rows, parts["n"]) if across else (*lead, rows))
            if array is None:
                return None
            arrays[part] = array
        (k0, k1), (n0, n1) = slices.bounds(parts["k"], k), slices.bounds(parts["n"], n)
        return self._built(name, arrays, (k1 - k0,), (n1 - n0,))

    def _built(
        self, name: str, arrays: Mapping[str, np.ndarray], k_dims: tuple[int, ...], n_dims: tuple[int, ...]
    ) -> QuantizedTensor:
        info = self.packed[name]
        for part, array in arrays.items():
            if part in ("scales", "offsets", "inv_scale") and not np.isfinite(array).all():
                raise WeightError(f"{name}.{part} of {self.directory} holds NaN or inf; download it again")
        if "perm" in arrays and not linear.is_permutation(arrays["perm"]):
            raise CheckpointError(f"{name}.perm of {self.directory} is not a permutation; download it again")
        return QuantizedTensor(
            qweight=arrays["qweight"],
            scales=arrays["scales"],
            zeros=arrays.get("zeros"),
            inv_scale=arrays.get("inv_scale"),
            offsets=arrays.get("offsets"),
            perm=arrays.get("perm"),
            bits=info["bits"],
            group_size=info["group_size"],
            axes=info["axes"],
            k_dims=k_dims,
            n_dims=n_dims,
            dtype=info["dtype"],
        )


class NativeEncoder(BaseEncoder):
    """Writer; see `awq_jax.convert.format.Encoder`."""

    def fit(self, name: str, q: QuantizedTensor) -> QuantizedTensor | None:
        """``q``: everything fits."""
        return q

    def encode(self, name: str, q: QuantizedTensor) -> Stored:
        """Arrays to store and the header metadata that describes them."""
        info = {
            "bits": q.bits,
            "group_size": q.group_size,
            "axes": q.live_axes,
            "k_dims": list(q.k_dims),
            "n_dims": list(q.n_dims),
            "dtype": str(q.dtype),
            **{part: getattr(q, part) is not None for part in OPTIONAL},
        }
        arrays = {part: np.asarray(getattr(q, part.removeprefix(f"{name}."))) for part in _tensor_names(name, info)}
        return arrays, {KEY + name: json.dumps(info)}

    def config(self, records: Sequence[Record]) -> JsonObject:
        """The ``quantization_config`` that `NativeSource` looks for."""
        settings = None if self.destination.settings is None else self.destination.settings.to_dict()
        return {"quantization_config": {"quant_method": QUANT_METHOD, "format_version": VERSION, "settings": settings}}


def _tensor_names(name: str, info: HfConfig) -> list[str]:
    optional = [p for p in OPTIONAL if info[p]]
    return [f"{name}.{p}" for p in ("qweight", "scales", *optional)]


def _sane(info: HfConfig) -> bool:
    def sizes(value: object) -> bool:
        return isinstance(value, list) and bool(value) and all(type(v) is int and 0 < v < 2**40 for v in value)

    axes = info["axes"]
    return (
        type(info["bits"]) is int
        and 2 <= info["bits"] <= 8
        and type(info["group_size"]) is int
        and 0 < info["group_size"] < 2**40
        and sizes(info["k_dims"])
        and sizes(info["n_dims"])
        and isinstance(axes, str)
        and not set(axes) - set("bkn")
        and axes.count("k") == len(info["k_dims"])
        and axes.count("n") == len(info["n_dims"])
        and isinstance(info["dtype"], str)
        and info["dtype"] in FLOATS
        and all(isinstance(info[f], bool) for f in OPTIONAL)
        and not (info["zeros"] and info["offsets"])
    )


FORMAT = Format(
    name=QUANT_METHOD,
    title="awq_jax's own: as in memory",
    holds="everything awq_jax has: 2 to 8 bits, explicit scales, stacks, padding, act-order, offsets",
    matches=lambda config, names: quant_method(config) == QUANT_METHOD,
    reader=NativeSource,
    encoder=NativeEncoder,
)
