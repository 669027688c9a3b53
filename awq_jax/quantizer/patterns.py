"""Patterns of settings that do nothing: which they are, and what they might have meant."""

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence

from awq_jax.config import AwqConfig
from awq_jax.errors import ConfigError

HEAD = "lm_head/kernel"  # as users call it who leave it float, also where the embedding is the head
SHOWN = 3


def check(config: AwqConfig, targets: Collection[str], skipped: Mapping[str, str], others: Collection[str]) -> None:
    """Refuse a pattern without effect.

    Args:
      config: with the patterns.
      targets: paths of the weights to be quantized.
      skipped: path -> reason, of the weights left float.
      others: paths of parameters that are no weights; a skip pattern may match them.

    Raises:
      ConfigError: a skip pattern matches no parameter, or an override no weight that is to be quantized, or none
        that an earlier one has not matched; with the closest paths, or a pattern that matches some.
    """
    weights = [*targets, *skipped]
    floats = [*skipped, *others, *([] if config.quantize_head else [HEAD])]
    for pattern in config.skip:
        if not _matching(pattern, floats):
            raise ConfigError(f"skip {pattern!r} matches no weight{_meant(pattern, weights)}")
    taken: set[str] = set()
    for pattern, _ in config.overrides:
        hits = _matching(pattern, targets)
        if not hits:
            left = next((f"{p}: {why}" for p, why in skipped.items() if re.search(pattern, p)), None)
            told = f" but some left float ({left})" if left else _meant(pattern, weights)
            raise ConfigError(f"override {pattern!r} matches no weight{told}")
        if taken.issuperset(hits):
            raise ConfigError(
                f"override {pattern!r} changes nothing: each of its {len(hits)} weights (such as {hits[0]}) is matched "
                "by an earlier one, and the first match wins; put it first"
            )
        taken.update(hits)


def _matching(pattern: str, paths: Collection[str]) -> list[str]:
    return [p for p in paths if re.search(pattern, p)]


def _meant(pattern: str, paths: Sequence[str]) -> str:
    """What to write instead: the pattern in our spelling if that matches, else paths that look like it."""
    text = pattern
    for repair in _REPAIRS:
        text = repair(text)
        try:
            hits = _matching(text, paths)
        except re.error:
            continue
        if hits and text:
            return f": paths are spelled {hits[0]}; {text!r} matches {len(hits)}"
    alike = {re.sub(r"\d+", "0", p): p for p in reversed(paths)}
    words = re.sub(r"[^\w/]", "", text)
    close = difflib.get_close_matches(words, alike, SHOWN, 0.0)
    return f"; the closest are {', '.join(alike[c] for c in close)}" if close else ""


# From what other tools write (`re:` of llm-compressor, names of modules and files) to paths, one step after another.
_REPAIRS: tuple[Callable[[str], str], ...] = (
    lambda p: re.sub(r"^([-+]:)?(re:)?", "", p),
    lambda p: re.sub(r"(\\?\.weight)?\$?$", "", p),
    lambda p: re.sub(r"\\\.|\.(?![*+?{])", "/", p),
    lambda p: re.sub(r"^\^?(\w+/)+?(?=layers/)", "", p),
)
