"""The model families: one function each, from ``config.json`` to `awq_jax.models.config.ModelConfig`.

A family is a file that is called as its ``model_type``. To add one, see docs/extending/family.md.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping

from awq_jax.models.hf.config import Family

# Files whose ``model_type`` is another word, as published before transformers had the family.
ALIASES = {"refined_web": ("RefinedWeb", "RefinedWebModel"), "yi": ("Yi",)}


class _Families(Mapping[str, Family]):
    """By ``model_type``; a family's file is imported when it is asked for."""

    def __init__(self) -> None:
        names = [file.name for file in pkgutil.iter_modules(__path__)]
        self._files = {model_type: name for name in names for model_type in ALIASES.get(name, (name,))}

    def __getitem__(self, model_type: str) -> Family:
        return importlib.import_module(f"{__name__}.{self._files[model_type]}").config

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, model_type: object) -> bool:
        return model_type in self._files


FAMILIES: Mapping[str, Family] = _Families()
