"""The routes."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from awq_jax.errors import ConfigError
from awq_jax.serve.engine.engine import Engine
from awq_jax.serve.prompts import needed
from awq_jax.server import chat, completions, fields
from awq_jax.server.metrics import Metrics
from awq_jax.server.problems import Problem
from awq_jax.server.service import Service, Settings, problem_of

PAGE = Path(__file__).parent / "page" / "index.html"
Complete = Callable[[Service, HttpRequest, fields.Json], Awaitable[Response]]


def app(engine: Engine, settings: Settings, metrics: Metrics) -> Starlette:
    """The application.

    Args:
      engine: is stopped when the application ends; ``metrics`` watches it.
      settings: see there.
      metrics: what ``/metrics`` shows.

    Raises:
      ConfigError: the model has no tokenizer, or an adapter has its name.
    """
    service = Service(engine, settings)
    needed(engine.model.tokenizer)
    if settings.name in engine.adapters:
        raise ConfigError(f"an adapter has the model's name, {settings.name!r}: give one of them another (--name)")
    metrics.attach(engine)
    started = int(time.time())

    def entry(name: str) -> dict[str, object]:
        parent = None if name == settings.name else settings.name
        told = {"max_model_len": engine.sizes.length, "root": name, "parent": parent}
        return {"id": name, "object": "model", "created": started, "owned_by": "awq_jax"} | told

    async def models(_: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [entry(name) for name in service.models]})

    async def model(http: HttpRequest) -> Response:
        return JSONResponse(entry(service.model_of(http.path_params["name"])))

    async def health(_: HttpRequest) -> Response:
        if service.draining or not engine.alive:
            return JSONResponse({"status": "ending"}, 503)
        return JSONResponse({"status": "ok"})

    async def numbers(_: HttpRequest) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def explain(_: HttpRequest) -> Response:
        chats = bool(service.engine.model.tokenizer and service.tokenizer.chat_template)
        return JSONResponse({"model": settings.name, "explain": engine.explain().splitlines(), "chat": chats})

    async def page(_: HttpRequest) -> Response:
        return FileResponse(PAGE, media_type="text/html")

    def guarded(handler: Callable[[HttpRequest], Awaitable[Response]]) -> Callable[[HttpRequest], Awaitable[Response]]:
        async def run(http: HttpRequest) -> Response:
            _authorise(http, settings.api_keys)
            return await handler(http)

        return run

    def posted(complete: Complete) -> Callable[[HttpRequest], Awaitable[Response]]:
        async def run(http: HttpRequest) -> Response:
            return await complete(service, http, fields.parse(await _body(http, service.body_limit, settings.timeout)))

        return guarded(run)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.stop, False)

    routes = [
        Route("/v1/chat/completions", posted(chat.complete), methods=["POST"]),
        Route("/v1/completions", posted(completions.complete), methods=["POST"]),
        Route("/v1/models", guarded(models)),
        Route("/v1/models/{name:path}", guarded(model)),
        Route("/metrics", guarded(numbers)),
        Route("/explain", guarded(explain)),
        Route("/health", health),
        Route("/", page),
    ]
    made = Starlette(routes=routes, exception_handlers={HTTPException: _unrouted}, lifespan=lifespan)
    for route in routes:  # what Starlette does with an error of no known class is raise it again, for servers to log
        route.app = _caught(route.app)
    made.state.service = service
    return made


def _caught(inner: ASGIApp) -> ASGIApp:
    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await inner(scope, receive, sending)
        except HTTPException:
            raise
        except ClientDisconnect:
            return
        except Exception as e:
            if begun:
                raise
            await problem_of(e).response()(scope, receive, send)

    return run


async def _unrouted(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{http.method} {http.url.path}: {error.detail}"[:300]
    response = Problem(text, error.status_code, code=str(error.detail).lower().replace(" ", "_")).response()
    response.headers.update(error.headers or {})
    return response


def _authorise(http: HttpRequest, keys: tuple[str, ...]) -> None:
    """Refuse who has no key.

    Raises:
      Problem: 401.
    """
    if not keys:
        return
    kind, _, given = http.headers.get("authorization", "").partition(" ")
    # Every key is compared, and each in a time that says nothing of it.
    fits = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
    if kind.lower() != "bearer" or not any(fits):
        raise Problem("this server wants an API key: Authorization: Bearer KEY", 401, code="invalid_api_key")


async def _body(http: HttpRequest, limit: int, timeout: float) -> bytes:
    """The body of a request, of at most ``limit`` bytes.

    Raises:
      Problem: 413, or 408.
    """
    too_long = Problem(f"the body has more than {limit:,} bytes", 413, code="request_too_large")
    declared = http.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared[:18]) > limit:
        raise too_long
    parts, size = [], 0
    try:
        async with asyncio.timeout(timeout):
            async for part in http.stream():
                size += len(part)
                if size > limit:
                    raise too_long
                parts.append(part)
    except TimeoutError:
        raise Problem("the body did not arrive in time", 408, code="timeout") from None
    return b"".join(parts)
