"""uvicorn, which ends by finishing what it has."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from awq_jax.errors import ConfigError
from awq_jax.server.service import Service

log = logging.getLogger(__name__)
GRACE = 10  # seconds that answers have to be sent once their requests have ended


class Server(uvicorn.Server):
    """On SIGTERM and SIGINT: takes no more requests, finishes those it has, and ends what is left with an error when
    the time to drain is up."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[str], object]):
        super().__init__(config)
        self.service, self.ready = service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        if self.started and self.servers and (bound := self.servers[0].sockets):
            host, port = bound[0].getsockname()[:2]
            self.ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End, as described."""
        self.service.draining = True
        drain = asyncio.create_task(self._drain())
        await super().shutdown(sockets)
        drain.cancel()

    async def _drain(self) -> None:
        await asyncio.sleep(self.service.settings.drain)
        log.warning("%s s are up: requests that are left are ended", self.service.settings.drain)
        await asyncio.to_thread(self.service.engine.stop, False)


def serve(app: Starlette, host: str, port: int, ready: Callable[[str], object]) -> None:
    """Serve until a signal comes.

    Args:
      app: see `awq_jax.server.app.app`.
      host, port: where to listen; port 0 takes one that is free.
      ready: called with the address.

    Raises:
      ConfigError: the address is taken, or none of this machine's.
    """
    service: Service = app.state.service
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except (OSError, OverflowError) as e:
            raise ConfigError(f"cannot listen on {host}:{port}: {e}; choose others with --host and --port") from None
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(service.settings.drain) + GRACE,
        )
        asyncio.run(Server(config, service, ready).serve([listening]))
