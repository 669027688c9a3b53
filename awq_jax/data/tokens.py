"""Token ids: those a caller hands over, and those that a model's input begins with."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np

from awq_jax.convert.text import TextTokenizer, ids_of
from awq_jax.errors import CalibrationError, ConfigError, Setting

BOS = ("auto", "yes", "no")  # whether sequences begin with it: where the tokenizer puts it, always, never


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What sequences of a model's input begin with.

    Attributes:
      ids: BOS, or (of GLM, for instance) several tokens; empty: nothing.
      own: what the tokenizer puts before a text by itself.
      text: ``ids`` for the user; "" if there are none.
    """

    ids: tuple[int, ...] = ()
    own: tuple[int, ...] = ()
    text: str = ""

    def strip(self, document: np.ndarray) -> np.ndarray:
        """A document's tokens ``[T]`` without the beginning that it has of its own."""
        for head in (self.own, self.ids):
            if head and tuple(document[: len(head)].tolist()) == head:
                return document[len(head) :]
        return document

    def put(self, sequences: np.ndarray) -> np.ndarray:
        """Tokens ``[S, T]`` with ``ids`` in front of each row, in the dtype they have."""
        head = np.broadcast_to(np.asarray(self.ids, sequences.dtype), (len(sequences), len(self.ids)))
        return np.concatenate([head, sequences], axis=1)


def check_bos(bos: str) -> None:
    """Refuse what is none of `BOS`.

    Raises:
      ConfigError: naming them.
    """
    if bos not in BOS:
        raise ConfigError(f'bos must be "auto", "yes" or "no"; got {bos!r}')


def beginning(tokenizer: TextTokenizer | None, bos: str = "auto") -> Beginning:
    """What sequences are to begin with: what the tokenizer puts before every text, unless ``bos`` says otherwise.

    Args:
      tokenizer: a model's, or one of transformers; None: tokens are taken as they are.
      bos: one of `BOS`.

    Raises:
      ConfigError: on another ``bos``, or where one is asked for and there is none.
    """
    check_bos(bos)
    own: tuple[int, ...] = ()
    if tokenizer is not None:
        # What two texts have in common: a tokenizer may end texts, too.
        empty, some = ids_of(tokenizer, ["", "a"])
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(empty, some, strict=False))
        own = tuple(int(a) for a, _ in pairs)
    if bos == "no" or (bos == "auto" and not own):
        return Beginning(own=own)
    ids = own
    if not ids:
        known = getattr(tokenizer, "bos_token_id", None)
        if known is None:
            there = "there is no tokenizer" if tokenizer is None else "the tokenizer has no BOS"
            other = Setting("bos", "no")
            raise ConfigError(f"{there} for sequences to begin with; use {other}", other)
        ids = (int(known),)
    named = getattr(tokenizer, "bos_token", None)
    text = str(named) if named and ids == (getattr(tokenizer, "bos_token_id", None),) else f"token {_listed(ids)}"
    return Beginning(ids, own, text)


def _listed(ids: tuple[int, ...]) -> str:
    return ", ".join(map(str, ids))


def of_document(document: object, index: int) -> np.ndarray:
    """A document of token ids, int64 ``[T]``.

    Raises:
      CalibrationError: it is something else.
    """
    try:
        tokens = np.asarray(document)
    except ValueError:
        tokens = np.asarray(None)
    if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        kind = f"{tokens.dtype} array of shape {tokens.shape}" if tokens.ndim else type(document).__name__
        raise CalibrationError(f"document {index} is neither a text nor a list of tokens but {kind}")
    return tokens.astype(np.int64)


def read_npy(path: Path) -> np.ndarray:
    """The array of a file.

    Raises:
      CalibrationError: there is none.
    """
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise CalibrationError(f"{path} does not exist") from None
    except EOFError:
        raise CalibrationError(f"{path} is empty") from None
    except (OSError, ValueError) as e:
        raise CalibrationError(f"{path} is not a readable .npy file: {e}") from None


def check(tokens: np.ndarray, vocab_size: int | None, name: str) -> None:
    """Refuse what are no token ids of a model.

    Args:
      tokens: of any shape.
      vocab_size: they must lie in ``[0, vocab_size)``; None checks only the lower bound.
      name: what they are, for the message.

    Raises:
      CalibrationError: with the first of them and its position.
    """
    if not np.issubdtype(tokens.dtype, np.integer):
        raise CalibrationError(f"{name} has dtype {tokens.dtype}; tokens are integers")
    bad = tokens < 0 if vocab_size is None else (tokens < 0) | (tokens >= vocab_size)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        limit = "tokens are at least 0" if vocab_size is None else f"the model has tokens 0 ... {vocab_size - 1}"
        raise CalibrationError(
            f"{name} has token {int(tokens[where])} at position {where}, {int(bad.sum())} outside the vocabulary in "
            f"all; {limit}: use the tokenizer that belongs to the model"
        )
