"""llm-awq's search results (``--dump_awq``, the files of its model zoo), applied to a float checkpoint.

``{"scale": [(before, (layers ...), s[K]) ...], "clip": [(layer, max[N, K/g, 1]) ...]}``: first, in order,
the columns of each layer are multiplied by s, and what comes before (a norm, or the last outputs of a
linear) is divided by it; then weights are clipped to ±max by group. Each step rounds to the weight's
dtype, as llm-awq's does.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from awq_jax.convert.files import torch_zip
from awq_jax.convert.source import Info, Source
from awq_jax.dtypes import FLOATS
from awq_jax.errors import FormatError, WeightError
from awq_jax.qtensor import QuantizedTensor
from awq_jax.report import FoldedScale

if TYPE_CHECKING:
    from awq_jax.convert.text import TokenizerLike

Change = Callable[[np.ndarray], np.ndarray]

ACTIVATIONS = ("act", "act_fn", "gelu_impl", "activation", "activation_fn")
# Models whose norms multiply by 1 + weight, and such whose linears are stored [in, out].
PLUS_ONE = ("gemma", "gemma2", "gemma3", "gemma3_text", "recurrent_gemma", "nemotron", "qwen3_next")
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt")


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """A search result, checked.

    Attributes:
      scale: ``(name of what comes before, names of the layers, s float [K])``, in order.
      clip: ``(name of a layer, max float [N, K/g])``.
    """

    scale: tuple[tuple[str, tuple[str, ...], np.ndarray], ...]
    clip: tuple[tuple[str, np.ndarray], ...]


def read_search(path: str | Path) -> SearchResult:
    """Read a search result, running nothing (see `awq_jax.convert.files.torch_zip`).

    Raises:
      FormatError: it is something else.
      CheckpointError: it is absent or damaged.
      WeightError: a scale is not positive and finite, or a bound NaN.
    """
    path = Path(path)
    data = torch_zip.load(path)
    if not isinstance(data, dict) or not {"scale", "clip"} <= set(data):
        raise FormatError(f'{path} is not a search result of llm-awq: that has the entries "scale" and "clip"')
    scale, clip = [], []
    for entry in _entries(path, data["scale"], "scale", 3):
        before, layers, s = entry
        names = isinstance(before, str) and isinstance(layers, tuple | list) and bool(layers)
        if not names or not all(isinstance(m, str) for m in layers) or not isinstance(s, np.ndarray):
            raise _unlike(path, "scale")
        s = s.reshape(-1)
        if not np.isfinite(s).all() or not (s > 0).all():
            raise WeightError(f"{path}: the scales after {before} are not all positive and finite")
        scale.append((before, tuple(layers), s))
    for name, bounds in _entries(path, data["clip"], "clip", 2):
        if not isinstance(name, str) or not isinstance(bounds, np.ndarray) or bounds.ndim not in (2, 3):
            raise _unlike(path, "clip")
        if bounds.shape[2:] not in ((), (1,)):
            raise _unlike(path, "clip")
        bounds = bounds.reshape(bounds.shape[:2])
        if not (bounds >= 0).all():
            raise WeightError(f"{path}: the bounds of {name} are negative or NaN")
        clip.append((name, bounds))
    return SearchResult(tuple(scale), tuple(clip))


def apply_search(source: Source, path: str | Path) -> SearchedSource:
    """A float checkpoint with a search result applied: ready to be quantized by plain rounding.

    The tensors are those of llm-awq's ``apply_awq``, bit for bit.

    Args:
      source: a float checkpoint.
      path: the ``.pt`` file.

    Returns:
      A source whose tensors are folded and clipped as they are read.

    Raises:
      FormatError: ``path`` is no search result, does not fit the checkpoint, or scales an activation.
      CheckpointError: it is absent or damaged.
      WeightError: a scale is not positive and finite.
    """
    return SearchedSource(source, Path(path))


class SearchedSource:
    """See `apply_search`; a `Source`.

    Attributes:
      folded: the scales by module, for `awq_jax.convert.folded_scales`.
    """

    format = "float"

    def __init__(self, source: Source, path: Path) -> None:
        self.source, self.path = source, path
        self.config, self.generation_config = source.config, source.generation_config
        model_type = str(self.config.get("model_type"))
        if model_type in TRANSPOSED:
            raise FormatError(f"{path}: linears of {model_type} are stored transposed, which llm-awq does not know")
        self._offset = float(model_type in PLUS_ONE)
        self._known = set(source.names())
        self._changes: dict[str, list[Change]] = {}
        self.folded: dict[str, FoldedScale] = {}
        result = read_search(path)
        for before, layers, s in result.scale:
            self._divide(before, s)
            for layer in layers:
                name, shape = self._linear(layer)
                if shape[1] != s.size:
                    raise self._misfit(f"{name} {shape}", f"{s.size} scales")
                self._add(name, functools.partial(_multiplied, s=s))
                self._note(name, "input", s)
        for layer, bounds in result.clip:
            name, (n, k) = self._linear(layer)
            if bounds.shape[0] != n or not bounds.shape[1] or k % bounds.shape[1]:
                raise self._misfit(f"{name} {(n, k)}", f"bounds {bounds.shape}")
            self._add(name, functools.partial(_clipped, bounds=bounds))

    @property
    def directory(self) -> Path | None:
        """Where the float weights are."""
        return getattr(self.source, "directory", None)

    @property
    def identity(self) -> str:
        """What distinguishes this source from its float checkpoint: the search result's hash."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def names(self) -> list[str]:
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def info(self, name: str) -> Info:
        return self.source.info(name)

    def read(self, name: str) -> np.ndarray | QuantizedTensor:
        value = self.source.read(name)
        if name not in self._changes:
            return value
        assert isinstance(value, np.ndarray)
        for change in self._changes[name]:
            with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
                value = change(value)
            if not np.isfinite(value).all():  # before a clip could hide it
                raise WeightError(f"{name} overflows {value.dtype} or holds NaN when {self.path} is applied")
        return value

    def tokenizer(self) -> TokenizerLike | None:
        return self.source.tokenizer()

    def companions(self) -> list[Path]:
        return self.source.companions()

    def _add(self, name: str, change: Change) -> None:
        self._changes.setdefault(name, []).append(change)

    def _note(self, name: str, kind: str, s: np.ndarray) -> None:
        """Scales of a linear's inputs or outputs, after those that it has."""
        module, s = name.removesuffix(".weight"), _rounded(s, np.dtype(self.source.info(name).dtype))
        found = self.folded.get(module, FoldedScale(None, None))
        before = getattr(found, kind)
        self.folded[module] = found._replace(**{kind: s if before is None else before * s})

    def _divide(self, before: str, s: np.ndarray) -> None:
        """Divide the norm's weight, or the last rows of the linear's, and the bias, by the scales."""
        name = self._find(before)
        shape = self.source.shape(name)
        if not (shape == (s.size,) or (len(shape) == 2 and shape[0] >= s.size)):
            raise self._misfit(f"{name} {shape}", f"{s.size} scales")
        if len(shape) == 2:
            self._add(name, functools.partial(_divided, s=s[:, None]))
            self._note(name, "output", np.concatenate([np.ones(shape[0] - s.size), s]))
        else:
            self._add(name, functools.partial(_divided, s=s, offset=self._offset))
        bias = f"{name.removesuffix('.weight')}.bias"
        if bias in self._known:
            if self.source.shape(bias) != (shape[0],):
                raise self._misfit(f"{bias} {self.source.shape(bias)}", f"{name} {shape}")
            self._add(bias, functools.partial(_divided, s=s))

    def _linear(self, module: str) -> tuple[str, tuple[int, int]]:
        name = self._find(module)
        shape = self.source.shape(name)
        if len(shape) != 2:
            raise self._misfit(f"{name} {shape}", "a linear")
        return name, (shape[0], shape[1])

    def _find(self, module: str) -> str:
        """The weight of a module; checkpoints saved without a head lack the first part of its name."""
        for name in (f"{module}.weight", f"{module.partition('.')[2]}.weight"):
            if name in self._known:
                info = self.source.info(name)
                if info.packed is not None or info.dtype not in FLOATS:
                    found = "packed" if info.packed is not None else info.dtype
                    raise FormatError(
                        f"{self.path} applies to float weights, but {name} is {found}; give the checkpoint that was "
                        "searched"
                    )
                return name
        if module.rpartition(".")[2] in ACTIVATIONS:
            raise FormatError(
                f"{self.path} scales the activation {module}, which a float checkpoint cannot hold; quantize with "
                "awq_jax's own search instead"
            )
        raise FormatError(f"{self.path} names {module}, which the checkpoint has not; it is of another model")

    def _misfit(self, found: str, wanted: str) -> FormatError:
        return FormatError(f"{self.path} does not fit the checkpoint: {found} against {wanted}; it is of another model")


def _multiplied(w: np.ndarray, s: np.ndarray) -> np.ndarray:
    """``w * s`` by columns; ``s`` is rounded to the dtype of ``w`` first, as in llm-awq."""
    return (w.astype(np.float32) * _rounded(s, w.dtype)).astype(w.dtype)


def _divided(w: np.ndarray, s: np.ndarray, offset: float = 0.0) -> np.ndarray:
    """``w`` with its last ``len(s)`` rows divided by ``s``; ``offset`` is added before and taken off after."""
    out = w.copy()
    last = w[-s.shape[0] :].astype(np.float32)
    divisor = _rounded(s, w.dtype)
    last = (last + offset) / divisor - offset if offset else last / divisor
    out[-s.shape[0] :] = last.astype(w.dtype)
    return out


def _rounded(s: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32, NaN where ``dtype`` has no such positive number."""
    out = s.astype(dtype).astype(np.float32)
    return np.where((out > 0) & np.isfinite(out), out, np.float32(np.nan))


def _clipped(w: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    limit = bounds.astype(w.dtype)[:, :, None]
    return np.minimum(np.maximum(w.reshape(*bounds.shape, -1), -limit), limit).reshape(w.shape)


def _entries(path: Path, entries: object, part: str, length: int) -> list[Any]:
    if not isinstance(entries, list) or not all(isinstance(e, tuple | list) and len(e) == length for e in entries):
        raise _unlike(path, part)
    return entries


def _unlike(path: Path, part: str) -> FormatError:
    return FormatError(f'{path}: "{part}" is not what llm-awq writes')
