"""Checkpoint files: read, written and converted. Of models it knows the names of tensors and ``config.json`` only."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "Conversion": "conversion",
    "apply_search": "formats.awq.search_results",
    "checkpoint": "conversion",
    "from_state": "trees",
    "open_source": "registry",
    "restore": "formats.orbax",
    "store": "formats.orbax",
    "to_state": "trees",
    "write_checkpoint": "writing",
}
__all__ = [
    "Conversion",
    "apply_search",
    "checkpoint",
    "from_state",
    "open_source",
    "restore",
    "store",
    "to_state",
    "write_checkpoint",
]

if TYPE_CHECKING:
    from awq_jax.convert.conversion import Conversion as Conversion
    from awq_jax.convert.conversion import checkpoint as checkpoint
    from awq_jax.convert.formats.awq.search_results import apply_search as apply_search
    from awq_jax.convert.formats.orbax import restore as restore
    from awq_jax.convert.formats.orbax import store as store
    from awq_jax.convert.registry import open_source as open_source
    from awq_jax.convert.trees import from_state as from_state
    from awq_jax.convert.trees import to_state as to_state
    from awq_jax.convert.writing import write_checkpoint as write_checkpoint


def __getattr__(name: str) -> Any:
    # PEP 562: a submodule may be imported without all the others.
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"awq_jax.convert.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
