"""The scales that AWQ folded into a checkpoint, kept beside its weights: ``folded_scales.npz``.

``x W = (x / s)(diag(s) W)``: where what produces x absorbed the 1/s, the checkpoint's linear reads x / s, and its
weights do not tell by what. An adapter that was trained on the float model reads x, so whoever serves it needs s. The
file is none that engines load (they take all ``.safetensors``, ``.bin`` and ``.pt``): a NumPy archive of
``MODULE.input`` float32 ``[K]``, the s that the module's inputs were divided by, and ``MODULE.output`` float32 ``[N]``,
the s of another linear that its outputs were divided by; ``[E, ...]`` where one module holds experts. Modules have
their Hugging Face names; scales of 1 are left out.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from awq_jax.convert.source import Source, path_of
from awq_jax.errors import CheckpointError
from awq_jax.report import FoldedScale

FILE = "folded_scales.npz"
KINDS = ("input", "output")

FoldedScales = Mapping[str, FoldedScale]  # by module: model.layers.0.self_attn.q_proj


def place(checkpoint: Path) -> Path:
    """Where a checkpoint's scales are: in its directory, or beside its single file."""
    return checkpoint / FILE if checkpoint.is_dir() else checkpoint.with_name(f"{checkpoint.stem}.{FILE}")


def of(source: Source | Path) -> dict[str, FoldedScale] | None:
    """The scales kept with a checkpoint, and those folded as it is read (``source.folded``, of search results).

    Returns:
      By module; None if there are none.

    Raises:
      CheckpointError: the file is damaged, or the two do not fit each other.
    """
    where = source if isinstance(source, Path) else path_of(source)
    path = None if where is None else place(where)
    kept = None if path is None or not path.is_file() else read(path)
    folded: FoldedScales | None = getattr(source, "folded", None)
    return kept if folded is None else composed(kept or {}, folded)


def read(path: Path) -> dict[str, FoldedScale]:
    """The scales of one file.

    Raises:
      CheckpointError: it is damaged.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                module, _, kind = name.rpartition(".")
                s = archive[name]
                if (
                    kind not in KINDS
                    or s.ndim not in (1, 2)
                    or s.dtype != np.float32
                    or not (np.isfinite(s) & (s > 0)).all()
                ):
                    raise ValueError(f"{name} is no table of positive scales")
                found.setdefault(module, {})[kind] = s
    except (ValueError, OSError, KeyError, zipfile.BadZipFile, EOFError) as e:
        raise CheckpointError(f"{path} is damaged ({e}); quantize again, or remove it to do without") from e
    return {module: FoldedScale(kinds.get("input"), kinds.get("output")) for module, kinds in found.items()}


def write(path: Path, scales: FoldedScales) -> None:
    """Write one file; the same scales make the same bytes."""
    with path.open("wb") as f:
        np.savez(f, allow_pickle=False, **dict(_arrays(scales)))


def keep(checkpoint: Path, source: Source | None, new: FoldedScales | None = None) -> None:
    """Put beside a checkpoint what was folded into it: into its source, and after that.

    Args:
      checkpoint: what was written; a directory or a file.
      source: what it was made from.
      new: scales folded since; {}: it was quantized and has none; None: it was not.

    Raises:
      CheckpointError: those of the source are damaged, or the two do not fit each other.
    """
    old = None if source is None else of(source)
    path = place(checkpoint)
    if old is not None or new is not None:
        write(path, composed(old or {}, new or {}))
    elif path.is_file():  # of a checkpoint that stood here before
        path.unlink()


def composed(first: FoldedScales, then: FoldedScales) -> dict[str, FoldedScale]:
    """Scales folded one after the other.

    Raises:
      CheckpointError: a module has two sizes.
    """

    def product(module: str, a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
        if a is None or b is None:
            return b if a is None else a
        if a.shape != b.shape:
            raise CheckpointError(
                f"{module} has {a.shape[-1]} channels in {FILE} of the source and {b.shape[-1]} here; remove it"
            )
        return a * b

    out = {}
    for module in dict.fromkeys([*first, *then]):
        a, b = (s.get(module, FoldedScale(None, None)) for s in (first, then))
        out[module] = FoldedScale(product(module, a.input, b.input), product(module, a.output, b.output))
    return out


def digest(scales: FoldedScales) -> str:
    """What tells one quantization's scales from another's: 16 hexadecimal digits."""
    total = hashlib.sha256()
    for name, s in _arrays(scales):
        total.update(f"{name} {s.shape}\n".encode() + s.astype("<f4").tobytes())
    return total.hexdigest()[:16]


def _arrays(scales: FoldedScales) -> list[tuple[str, np.ndarray]]:
    return [
        (f"{module}.{kind}", np.asarray(s, np.float32))
        for module in sorted(scales)
        for kind, s in zip(KINDS, scales[module], strict=True)
        if s is not None
    ]
