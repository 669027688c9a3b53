"""A load on an OpenAI-compatible server, and what its clients see of it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence

import httpx

from awq_jax.errors import BackendError

POINTS = (50, 95, 99)


@dataclasses.dataclass(frozen=True)
class Load:
    """What is asked for.

    Attributes:
      requests: how many in all.
      concurrency: clients, each of which asks again as soon as it is answered; None with ``rate``.
      rate: requests a second that arrive by a Poisson process, whatever is answered; None with ``concurrency``.
      prompt, output: tokens of each.
      vocabulary: prompts are random token ids below it.
      shared: tokens at the beginning that all prompts have in common.
      seed: of prompts and arrivals.
    """

    requests: int
    concurrency: int | None = 16
    rate: float | None = None
    prompt: int = 128
    output: int = 64
    vocabulary: int = 1000
    shared: int = 0
    seed: int = 0

    def prompts(self) -> list[list[int]]:
        """Token ids; the same for the same seed."""
        rng = random.Random(self.seed)
        low = min(10, self.vocabulary - 1)  # the first few are often special
        first = [rng.randrange(low, self.vocabulary) for _ in range(self.shared)]
        own = self.prompt - self.shared
        return [first + [rng.randrange(low, self.vocabulary) for _ in range(own)] for _ in range(self.requests)]

    def arrivals(self) -> list[float]:
        """Seconds after the start at which requests arrive, for a ``rate``."""
        assert self.rate is not None
        rng, at, times = random.Random(self.seed + 1), 0.0, []
        for _ in range(self.requests):
            times.append(at)
            at += rng.expovariate(self.rate)
        return times


@dataclasses.dataclass
class Seen:
    """One request: seconds after the start, tokens, and what went wrong.

    Attributes:
      asked: when it was sent.
      pieces: when text arrived.
      tokens: that the server says it made.
      read: tokens of the prompt, by the server.
      error: "" for none.
    """

    asked: float
    pieces: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    read: int = 0
    error: str = ""


Ask = Callable[[Sequence[int]], Awaitable[None]]


async def run(url: str, load: Load, model: str | None = None, key: str = "none") -> dict[str, object]:
    """Put a load on a server and measure.

    Args:
      url: of the API, such as ``http://127.0.0.1:8000/v1``.
      model: what to ask for; None: the first that the server lists.
      key: of the API.

    Raises:
      BackendError: the server cannot be reached, or refuses everything.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=load.concurrency or 64)
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600, limits=limits) as client:
        try:
            listed = (await client.get("models")).raise_for_status().json()
            name = model or listed["data"][0]["id"]
        except (httpx.HTTPError, ValueError, LookupError) as e:
            raise BackendError(f"{url} is no OpenAI-compatible server that answers: {e}") from None
        seen: list[Seen] = []
        start = time.perf_counter()

        async def ask(prompt: Sequence[int]) -> None:
            one = Seen(time.perf_counter() - start)
            seen.append(one)
            body = {"model": name, "prompt": list(prompt), "max_tokens": load.output, "temperature": 0}
            body |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
            try:
                await _follow(client, body, one, start)
            except (httpx.HTTPError, ValueError, LookupError) as e:
                one.error = f"{type(e).__name__}: {e}"[:300]

        if load.rate is None:
            await _closed(load, ask)
        else:
            await _open(load, ask)
        seconds = time.perf_counter() - start
    if all(one.error for one in seen):
        raise BackendError(f"{url} answered no request: {seen[0].error}")
    return {"url": url, "model": name, "load": dataclasses.asdict(load)} | summary(seen, seconds)


async def _closed(load: Load, ask: Ask) -> None:
    left = load.prompts()[::-1]

    async def client() -> None:
        while left:
            await ask(left.pop())

    await asyncio.gather(*[client() for _ in range(load.concurrency or 1)])


async def _open(load: Load, ask: Ask) -> None:
    start = time.perf_counter()

    async def later(prompt: Sequence[int], at: float) -> None:
        await asyncio.sleep(start + at - time.perf_counter())
        await ask(prompt)

    await asyncio.gather(*map(later, load.prompts(), load.arrivals()))


async def _follow(client: httpx.AsyncClient, body: dict[str, object], one: Seen, start: float) -> None:
    async with client.stream("POST", "completions", json=body) as response:
        if response.status_code != 200:
            one.error = f"{response.status_code}: {(await response.aread())[:300].decode(errors='replace')}"
            return
        async for line in response.aiter_lines():
            if not line.startswith("data:") or (data := line[5:].strip()) == "[DONE]":
                continue
            now, chunk = time.perf_counter() - start, json.loads(data)
            if "error" in chunk:
                one.error = str(chunk["error"])[:300]
            if usage := chunk.get("usage"):
                one.tokens, one.read = usage["completion_tokens"], usage["prompt_tokens"]
            if any(choice.get("text") for choice in chunk.get("choices", ())):
                one.pieces.append(now)


def summary(seen: Sequence[Seen], seconds: float) -> dict[str, object]:
    """Tokens a second; seconds until the first text, between texts, and in all, by percentile.

    Args:
      seen: all requests.
      seconds: that they took together.
    """
    whole = [one for one in seen if not one.error and one.pieces]
    gaps = [b - a for one in whole for a, b in zip(one.pieces, one.pieces[1:], strict=False)]
    return {
        "seconds": seconds,
        "answered": len(whole),
        "failed": len(seen) - len(whole),
        "errors": sorted({one.error for one in seen if one.error})[:5],
        "requests_per_second": len(whole) / seconds,
        "output_tokens_per_second": sum(one.tokens for one in whole) / seconds,
        "prompt_tokens_per_second": sum(one.read for one in whole) / seconds,
        "time_to_first_token": percentiles([one.pieces[0] - one.asked for one in whole]),
        "inter_token_latency": percentiles(gaps),
        "request_latency": percentiles([one.pieces[-1] - one.asked for one in whole]),
    }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """The mean, and the smallest values that so many percent do not exceed; None of nothing."""
    if not values:
        return None
    rising = sorted(values)
    at = {f"p{p}": rising[max(-(-len(rising) * p // 100), 1) - 1] for p in POINTS}
    return {"mean": sum(rising) / len(rising)} | at


def table(result: dict[str, object]) -> str:
    """For a terminal."""
    lines = [
        f"{result['model']} at {result['url']}: {result['answered']} answered, {result['failed']} failed "
        f"in {result['seconds']:.1f} s",
        f"{result['output_tokens_per_second']:.1f} output tokens/s, {result['prompt_tokens_per_second']:.1f} prompt "
        f"tokens/s, {result['requests_per_second']:.2f} requests/s",
        f"{'seconds':22}{'mean':>10}" + "".join(f"{f'p{p}':>10}" for p in POINTS),
    ]
    for name in ("time_to_first_token", "inter_token_latency", "request_latency"):
        row = result[name]
        if isinstance(row, dict):
            lines.append(f"{name.replace('_', ' '):22}" + "".join(f"{v:10.4f}" for v in row.values()))
    errors = result["errors"]
    assert isinstance(errors, list)
    return "\n".join([*lines, *errors])
