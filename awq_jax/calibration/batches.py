"""Batches as users pass them: what is refused, what a model is called with, how many tokens."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from awq_jax.errors import CalibrationError

Args = tuple[object, ...]
Kwargs = dict[str, Any]
PROVEN = 64  # tokens that a plan is proven on


def check_batches(batches: object) -> None:
    """Refuse what is easily taken for batches.

    Raises:
      CalibrationError: naming what was passed, and what to pass.
    """
    if isinstance(batches, str | Mapping):
        raise CalibrationError(f"batches is a {type(batches).__name__}: pass a list of batches, [batch] if it is one")
    if hasattr(batches, "shape"):
        raise CalibrationError(
            f"batches is one array of shape {tuple(batches.shape)}, whose rows would be taken for batches: pass "
            "[array] if it is one batch, list(array) if its first axis counts batches"
        )
    if not isinstance(batches, Iterable) or (isinstance(batches, list) and batches and np.isscalar(batches[0])):
        raise CalibrationError(f"batches is {str(batches)[:60]}: pass a list of arrays, each of them a batch")


def arguments(batch: object) -> tuple[Args, Kwargs]:
    """What a model is called with for one batch."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, tuple) else ((batch,), {})


def few_tokens(apply_fn: Callable[..., object], params: object, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """The first `PROVEN` tokens of the first row of a batch, or the batch if that is not of token ids ``[B, T]``.

    What else goes by row, or by row and token, is cut likewise. A model that does not take fewer gets the batch.
    """
    arrays = [x for x in jax.tree.leaves((args, kwargs)) if hasattr(x, "shape")]
    if not arrays or len(arrays[0].shape) != 2 or not np.issubdtype(arrays[0].dtype, np.integer):
        return args, kwargs
    rows, tokens = arrays[0].shape

    def cut(x: Any) -> Any:
        shape = getattr(x, "shape", ())
        if shape[:2] == (rows, tokens):
            return x[:1, :PROVEN]
        return x[:1] if shape[:1] == (rows,) else x

    few, named = jax.tree.map(cut, (args, kwargs))
    try:
        jax.eval_shape(lambda p: apply_fn(p, *few, **named), params)
    except Exception:  # whatever a model raises that is made for one shape
        return args, kwargs
    return few, named


def count_tokens(args: Args, kwargs: Kwargs) -> int:
    """Rows of the first array: ``[B, T]`` integer tokens, or ``[..., K]`` float features."""
    for x in jax.tree.leaves([*args, *kwargs.values()]):
        if hasattr(x, "shape") and len(x.shape):
            dims = x.shape if np.issubdtype(x.dtype, np.integer) else x.shape[:-1]
            return int(np.prod(dims))
    return 0
