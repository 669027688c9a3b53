"""Names of modules against the regular expressions of a ``config.json``, which nobody vouches for."""

import functools
import re

from awq_jax.errors import FormatError

LENGTH = 1000  # characters
REPEATS = 4  # `.*` and the like: each multiplies the time of a search by the length of the name


def match(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches ``name`` from its beginning.

    Raises:
      FormatError: if it is no regular expression, or one whose search could take forever.
    """
    return _compiled(pattern).match(name) is not None


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    shown = pattern[:100]
    literal = re.sub(r"\\.", "_", pattern)
    open_ended = len(re.findall(r"[*+]|\{\d*,\d*\}", literal))
    if len(pattern) > LENGTH or open_ended > REPEATS or re.search(r"\)[*+{]", literal):
        raise FormatError(
            f"config.json has the pattern {shown!r}, too complicated to search for safely (repeated groups, or more "
            f"than {REPEATS} repetitions); name the modules it stands for"
        )
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise FormatError(f"config.json has the pattern {shown!r}, which is not a regular expression: {e}") from e
