"""The model families: one function each, from ``config.json`` to `awq_jax.models.config.ModelConfig`.

A family is a file that is called as its ``model_type``. To add one, see docs/extending/family.md.
"""

import importlib
import pkgutil

from awq_jax.models.hf.config import Family

# Files whose ``model_type`` is another word, as published before transformers had the family.
ALIASES = {"refined_web": ("RefinedWeb", "RefinedWebModel"), "yi": ("Yi",)}

FAMILIES: dict[str, Family] = {
    model_type: importlib.import_module(f"{__name__}.{file.name}").config
    for file in pkgutil.iter_modules(__path__)
    for model_type in ALIASES.get(file.name, (file.name,))
}
