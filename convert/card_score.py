"""A measured perplexity in the model card beside a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from awq_jax.convert import card
from awq_jax.convert.files.shards import write_text
from awq_jax.errors import CheckpointError


def card_of(place: str | Path) -> Path:
    """The card of ours, as we wrote it, beside a checkpoint.

    Args:
      place: checkpoint directory, or a .gguf file.

    Raises:
      CheckpointError: if there is none, it was edited, or it is of another file.
    """
    path = Path(place)
    readme = (path if path.is_dir() else path.parent) / card.README
    if not path.exists() or not readme.is_file():
        raise CheckpointError(f"{path} has no {card.README} beside it: quantize, convert and save write one")
    if not card.untouched(card.text_of(readme)) or not (path.is_dir() or card.is_of(readme, path.name)):
        raise CheckpointError(f"{readme} was not written by awq_jax for this checkpoint, or was edited since")
    return readme


def add(place: str | Path, perplexity: str) -> Path:
    """Put a perplexity into the card, in place of one that is there.

    Args:
      place: see `card_of`.
      perplexity: in words, with what it was measured on.

    Returns:
      The card.

    Raises:
      CheckpointError: see `card_of`.
    """
    readme = card_of(place)
    text = card.text_of(readme)
    head = card.front_matter(text)
    head["quantization"] = {**head["quantization"], "perplexity": perplexity}
    rest = text[card.mark_of(text).end() :]
    lines = [line for line in rest.splitlines() if not line.startswith("| perplexity |")]
    made = next(i for i, line in enumerate(lines) if line.startswith("| made with |"))
    lines[made:made] = card.table([("perplexity", perplexity)])[2:]  # without the head of the table
    part = readme.with_name(f".{readme.name}.{os.getpid()}")
    try:
        write_text(part, card.marked(head, "\n".join(lines) + "\n"))
        part.replace(readme)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"{readme} could not be written: {e.strerror or e}") from e
    return readme
