"""Packed weights in use: load, Model, generate, Engine; bind and dot for other people's models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from awq_jax.serve.engine.engine import Engine as Engine
    from awq_jax.serve.sampling import Sampling as Sampling

_PUBLIC = {"Engine": "engine.engine", "Sampling": "sampling"}


def __getattr__(name: str) -> object:
    # PEP 562: what imports a module of this room need not wait for the engine.
    if name in _PUBLIC:
        import importlib

        return getattr(importlib.import_module(f"awq_jax.serve.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'awq_jax.serve' has no attribute {name!r}")
