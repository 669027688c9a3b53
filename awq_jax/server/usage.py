"""What responses have in common: who they are of, and what was counted."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from awq_jax.serve.engine.stream import Stream


def head(kind: str, prefix: str, model: str) -> dict[str, object]:
    """The fields that every response, and every chunk of one, begins with."""
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def counts(streams: Sequence[Stream], choices: int) -> dict[str, object]:
    """Tokens of a request; a prompt counts once, whatever the number of its choices."""
    prompts = streams[::choices]
    asked = sum(len(s.request.prompt) for s in prompts)
    made = sum(s.request.made for s in streams)
    reused = sum(s.request.reused for s in prompts)
    return {
        "prompt_tokens": asked,
        "completion_tokens": made,
        "total_tokens": asked + made,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


def awaited(usage: bool) -> dict[str, object]:
    """What the chunks of a stream have before the last one, where the counts are asked for."""
    return {"usage": None} if usage else {}
