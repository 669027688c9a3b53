"""What a task says of generation, as `awq_jax.serve.sampling` has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from awq_jax.errors import ConfigError

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # of which the first given counts
PASSED = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
HARMLESS: dict[str, object] = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "early_stopping": False}


class Generation(NamedTuple):
    """How one group of requests is continued: by at most ``length`` tokens, up to one of the strings ``until``."""

    length: int
    until: tuple[str, ...]
    sampling: dict[str, Any]


def generation(given: Mapping[str, Any], length: int) -> Generation:
    """From a task's ``generation_kwargs``, as lm-eval's models read them.

    ``do_sample: false`` is greedy whatever the temperature, and so is no temperature.

    Args:
      given: of the task, or of ``--gen_kwargs``.
      length: where they do not say one.

    Raises:
      ConfigError: naming one that is not known, rather than scoring something else.
    """
    left = dict(given)
    lengths = [left.pop(name, None) for name in LENGTHS]
    until = left.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    temperature = float(left.pop("temperature", None) or 0.0)
    if left.pop("do_sample", None) is False:
        temperature = 0.0
    sampling = {name: left.pop(name) for name in PASSED if left.get(name) is not None}
    for name, value in left.items():
        if value is not None and HARMLESS.get(name, ...) != value:
            known = ", ".join(("until", "do_sample", "temperature", *LENGTHS, *PASSED))
            raise ConfigError(f"generation_kwargs has {name}={value!r}, which awq-jax has not; known are {known}")
    most = next((int(n) for n in lengths if n is not None), length)
    return Generation(most, tuple(s for s in until if s), {"temperature": temperature, **sampling})
