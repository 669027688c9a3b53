"""`Source`: any checkpoint as Hugging Face tensor names, a config and a tokenizer."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from awq_jax.convert import tokenizer
from awq_jax.convert.config_json import JsonObject
from awq_jax.convert.files import companions, slices
from awq_jax.convert.files.safetensors import Entry, SafetensorsDir, TensorFiles, read_json
from awq_jax.convert.files.slices import Tensor
from awq_jax.dtypes import FLOATS
from awq_jax.errors import CheckpointError, WeightError
from awq_jax.qtensor import QuantizedTensor

if TYPE_CHECKING:
    from awq_jax.convert.text import TokenizerLike

# What formats call a tensor that every packed weight of theirs has, and no float one.
MARKS = ("qweight", "weight_packed", "biases")
# Buffers that old checkpoints store and every reader recomputes: frequencies, and masks.
RECOMPUTED = re.compile(r"\.rotary_emb\.inv_freq$|(^|\.)(attn|attention)\.(masked_)?bias$")


def is_recomputed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor need not be kept: it follows from the config. A vector that is called a bias may be one."""
    return RECOMPUTED.search(name) is not None and not (name.endswith(".bias") and len(shape) == 1)


@dataclasses.dataclass(frozen=True)
class Packed:
    """What a checkpoint's header says of a packed weight.

    Attributes:
      bits, group_size: as in `QuantizedTensor`.
      symmetric: no zero points are stored (or all are the middle of the range).
      scale_dtype: dtype of the scales as stored.
      offsets, act_order: it has float offsets; its rows are permuted.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: str
    offsets: bool = False
    act_order: bool = False


@dataclasses.dataclass(frozen=True)
class Info:
    """What is known of a tensor without reading it.

    Attributes:
      shape: in PyTorch's orientation.
      dtype: name of the dtype of a float tensor; of a packed one, the dtype it dequantizes to.
      nbytes: bytes it occupies in the file.
      packed: how it is quantized, or None if it is float.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    packed: Packed | None = None


class Source(Protocol):
    """A checkpoint opened for reading; tensors are read when asked for.

    Attributes:
      format: name in `awq_jax.convert.registry.FORMATS`, or ``"gguf"``.
      config: content of ``config.json`` (synthesised for GGUF).
      generation_config: content of ``generation_config.json``, or ``{}``.
    """

    format: str
    config: JsonObject
    generation_config: JsonObject

    def names(self) -> list[str]:
        """Hugging Face tensor names; a packed linear appears once, as ``<module>.weight``."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in PyTorch's orientation (a linear is ``[out, in]``)."""

    def info(self, name: str) -> Info:
        """What the headers say of a tensor."""

    def read(self, name: str) -> Tensor:
        """The tensor, in host memory.

        A packed linear is a `QuantizedTensor` of NumPy arrays with ``axes="nk"``. Where a layout does
        not say what dtype a weight stands for, it is ``"float32"``: exact.

        Raises:
          CheckpointError: if it is absent or damaged.
        """

    def tokenizer(self) -> TokenizerLike | None:
        """That of its files, see `awq_jax.convert.tokenizer`; None if the checkpoint has none."""

    def companions(self) -> list[Path]:
        """Files to copy along with the weights (tokenizer, generation config)."""


class DirectorySource:
    """What directory formats share: config, tokenizer, and float tensors from safetensors."""

    format = "float"
    container: ClassVar[type[TensorFiles]] = SafetensorsDir

    def __init__(self, directory: Path, config: JsonObject) -> None:
        self.directory = directory
        self.config = config
        generation = directory / "generation_config.json"
        self.generation_config: JsonObject = read_json(generation) if generation.is_file() else {}
        self.files = self.container(directory)

    def names(self) -> list[str]:
        return self.files.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def info(self, name: str) -> Info:
        entry = self.files.entry(name)
        return Info(entry.shape, entry.dtype.name, entry.nbytes)

    def read(self, name: str) -> Tensor:
        return self.files.read(name)

    def read_slice(self, name: str, index: slices.Index) -> Tensor | None:
        """``tensor[index]``, a slice for each axis of its shape; None if this format has to read all of it.

        Raises:
          CheckpointError: as `read`.
        """
        return self.files.read_slice(name, index)

    def tokenizer(self) -> TokenizerLike | None:
        return tokenizer.from_directory(self.directory)

    def companions(self) -> list[Path]:
        return companions.found(self.directory)


class PackedSource(DirectorySource):
    """What the directory formats share that keep a packed linear as several tensors of one module.

    A subclass says which tensors make a module (``required``, the first of them being the mark of a
    packed module, and ``optional``), checks their shapes and dtypes (`describe`) and decodes them.

    Raises:
      CheckpointError: if a module's tensors are incomplete.
    """

    required: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    # What the axes of a part go along, ``n`` or ``k``, in equal units; empty: only whole modules are decoded.
    roles: ClassVar[Mapping[str, str]] = {}

    def __init__(self, directory: Path, config: JsonObject) -> None:
        super().__init__(directory, config)
        stored = set(self.files.names())
        mark = f".{self.required[0]}"
        self.packed: dict[str, tuple[str, Info]] = {}  # <module>.weight -> module, what it is
        parts: set[str] = set()
        for module in sorted(n.removesuffix(mark) for n in stored if n.endswith(mark)):
            name = f"{module}.weight"
            missing = [p for p in self.required if f"{module}.{p}" not in stored]
            if missing or (name in stored and "weight" not in self.required):
                problem = f"lacks {module}.{missing[0]}" if missing else f"holds both {name} and {module}{mark}"
                raise CheckpointError(f"{directory} {problem}; download the checkpoint again")
            present = [p for p in (*self.required, *self.optional) if f"{module}.{p}" in stored]
            entries = {p: self.files.entry(f"{module}.{p}") for p in present}
            with self._named():
                shape, packed = self.describe(module, entries)
            self.packed[name] = module, Info(shape, "float32", sum(e.nbytes for e in entries.values()), packed)
            parts.update(f"{module}.{p}" for p in present)
        self._refuse_stray(stored - parts)
        self._names = sorted((stored - parts) | set(self.packed))

    def _refuse_stray(self, rest: set[str]) -> None:
        """Refuse parts of packed modules without the mark of one: they would be taken for float tensors."""
        known = {*self.required, *self.optional, *MARKS} - {"bias"}
        for name in sorted(rest):
            module, _, part = name.rpartition(".")
            if part in known and (part != "weight" or self.files.entry(name).dtype.kind in "iu"):
                raise CheckpointError(
                    f"{self.directory} holds {name}, which belongs to no packed module of its format {self.format}: "
                    f"those have {module}.{self.required[0]}; download the checkpoint again"
                )

    @abc.abstractmethod
    def describe(self, module: str, entries: Mapping[str, Entry]) -> tuple[tuple[int, int], Packed]:
        """``([N, K], how it is packed)`` from the headers of a module's tensors.

        Raises:
          CheckpointError: if shapes or dtypes do not fit each other, naming the tensor (the caller adds the directory).
        """

    @abc.abstractmethod
    def decode(
        self, module: str, arrays: Mapping[str, np.ndarray], shape: tuple[int, int], packed: Packed
    ) -> QuantizedTensor:
        """The canonical weight (see `awq_jax.convert.arrays.linear.build`) from a module's tensors, or from blocks.

        Raises:
          CheckpointError: if a value makes no sense, naming the tensor (the caller adds the directory).
        """

    def names(self) -> list[str]:
        return list(self._names)

    def info(self, name: str) -> Info:
        return self.packed[name][1] if name in self.packed else super().info(name)

    def read(self, name: str) -> Tensor:
        if name not in self.packed:
            return super().read(name)
        module, info = self.packed[name]
        return self._decoded(module, info, (info.shape[0], info.shape[1]), self._arrays(module, None) or {})

    def read_slice(self, name: str, index: slices.Index) -> Tensor | None:
        if name not in self.packed:
            return super().read_slice(name, index)
        module, info = self.packed[name]
        packed, whole_k = info.packed, index[1] == slice(0, info.shape[1])
        assert packed is not None
        if (packed.act_order and not whole_k) or self.whole_only(module):
            return None
        arrays = self._arrays(module, (info.shape, index))
        if arrays is None:
            return None
        n, k = ((stop - start) for start, stop in map(slices.bounds, index, info.shape))
        return self._decoded(module, info, (n, k), arrays)

    def whole_only(self, module: str) -> bool:
        """Whether a module's tensors lie otherwise than `roles` says, so that no block can be read."""
        return False

    def _arrays(self, module: str, block: tuple[tuple[int, ...], slices.Index] | None) -> dict[str, np.ndarray] | None:
        """A module's tensors, or of each what makes a block of ``(shape, index)``; None if that cuts a unit."""
        stored = self.files.entries
        arrays: dict[str, np.ndarray] = {}
        for part in (p for p in (*self.required, *self.optional) if f"{module}.{p}" in stored):
            whole = f"{module}.{part}"
            if block is None or self.roles.get(part) == "":
                arrays[part] = self.files.read(whole)
                continue
            if part not in self.roles:
                return None
            sizes, index = dict(zip("nk", block[0], strict=True)), dict(zip("nk", block[1], strict=True))
            shape = stored[whole].shape
            roles = self.roles[part][: len(shape)]
            units = [slices.scaled(index[r], sizes[r], s) for r, s in zip(roles, shape, strict=True)]
            if None in units:
                return None
            if (cut := self.files.read_slice(whole, tuple(u for u in units if u is not None))) is None:
                return None
            arrays[part] = cut
        return arrays

    def _decoded(
        self, module: str, info: Info, shape: tuple[int, int], arrays: Mapping[str, np.ndarray]
    ) -> QuantizedTensor:
        for part, array in arrays.items():
            if array.dtype.name in FLOATS and not np.isfinite(array).all():
                raise WeightError(f"{module}.{part} of {self.directory} holds NaN or inf; download it again")
        assert info.packed is not None
        with self._named():
            return self.decode(module, arrays, shape, info.packed)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Puts the directory before the message of an error."""
        try:
            yield
        except CheckpointError as e:
            raise type(e)(f"{self.directory}: {e}", *e.settings) from e


class SliceReader:
    """Slices of a source's tensors; what its format cannot read in slices is decoded whole, one at a time."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._whole: tuple[str, Tensor] | None = None

    def read(self, name: str, index: Sequence[slice]) -> Tensor:
        """``tensor[index]``, one slice for each axis of its shape in PyTorch's orientation."""
        read_slice = getattr(self._source, "read_slice", None)
        index = tuple(index)
        shape = self._source.info(name).shape
        all_of_it = all(slices.bounds(p, s) == (0, s) for p, s in zip(index, shape, strict=True))
        if not all_of_it and read_slice is not None and (found := read_slice(name, index)) is not None:
            return found
        if self._whole is None or self._whole[0] != name:
            self._whole = None  # before the next is read
            self._whole = name, self._source.read(name)
        return self._whole[1] if all_of_it else slices.cut(self._whole[1], index)

    def forget(self) -> None:
        """Free what is kept."""
        self._whole = None


def path_of(source: Source) -> Path | None:
    """The directory or file that a source reads; None where it is none."""
    where = getattr(source, "directory", None) or getattr(getattr(source, "file", None), "path", None)
    return None if where is None else Path(where)


def read_config(directory: Path) -> JsonObject:
    """``config.json`` of a directory.

    Raises:
      CheckpointError: if it is absent or not a JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} has no config.json; is it a Hugging Face checkpoint directory?")
    return read_json(path)


def copy_companions(directory: Path, tokenizer: TokenizerLike | None, extra: Source | None) -> None:
    """The companions of ``extra`` into ``directory``; ``tokenizer``, or its own, if no tokenizer is among them.

    Says what is left behind, and takes out of the configs what names code.
    """
    files = {companions.name_of(p): p for p in (extra.companions() if extra is not None else ())}
    for name, path in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, directory / name)
    if not any(companions.matches(name, companions.VOCABULARIES) for name in files):
        if tokenizer is None and extra is not None:
            tokenizer = extra.tokenizer()
        if tokenizer is not None:
            tokenizer.save_pretrained(str(directory))
    where = None if extra is None else path_of(extra)
    if where is not None and where.is_dir():
        companions.name_what_is_left(where, directory)
    companions.forget_code(directory)
