"""Models to serve, with random weights, and ways to ask an engine for answers."""

from __future__ import annotations

import asyncio
from typing import Any

import random_decoders
import tiny_checkpoints

from awq_jax.convert.text import Tokenizer
from awq_jax.serve import Sampling
from awq_jax.serve.engine.engine import Engine
from awq_jax.serve.engine.request import Piece
from awq_jax.serve.model import Model


class Nowhere:
    """What an engine asks of the source of a checkpoint."""

    format = "float"
    generation_config = {"eos_token_id": 257}  # noqa: RUF012


def model(family: str = "llama", packed: bool = True, **changes: Any) -> Model:
    """A random model with a byte tokenizer."""
    config, graphdef, params = random_decoders.decoder(family, packed, **changes)
    fast = tiny_checkpoints.tokenizer()
    tokenizer = Tokenizer(fast.backend_tokenizer, fast.special_tokens_map, fast.chat_template)
    return Model(config, {}, graphdef, params, tokenizer, Nowhere())  # type: ignore[arg-type]


async def pieces(engine: Engine, prompt: Any, sampling: Sampling | None = None, **settings: Any) -> list[Piece]:
    """All that an engine says to one prompt."""
    return [piece async for piece in engine.submit(prompt, sampling, **settings)]


def answers(engine: Engine, prompts: list[Any], sampling: Any = None, **settings: Any) -> list[list[int]]:
    """New token ids of prompts that are all asked for at once."""

    async def one(i: int) -> list[int]:
        own = sampling[i] if isinstance(sampling, list) else sampling
        stream = engine.submit(prompts[i], own, **settings)
        await stream.text()
        return stream.request.ids

    async def run() -> list[list[int]]:
        return await asyncio.gather(*map(one, range(len(prompts))))

    return asyncio.run(run())
