"""An answer as it is written, for asyncio."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable

from awq_jax.serve.engine.request import Piece, Request, Tell


class Stream:
    """The answer to one request: an async iterator of `Piece`. It belongs to the event loop it was made in.

    Args:
      make: the request, whose pieces are told to a function.
      put: queues it.
      cancel: ends it.

    Attributes:
      request: what it has become so far (see `awq_jax.serve.engine.request.Request`).
    """

    def __init__(
        self, make: Callable[[Tell], Request], put: Callable[[Request], object], cancel: Callable[[Request], object]
    ):
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()

        def tell(piece: Piece | Exception) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        self.request = make(tell)
        self._pieces, self._cancel, self._over = pieces, cancel, False
        put(self.request)
        # Nobody waits for an answer that nobody can see any more.
        weakref.finalize(self, cancel, self.request).atexit = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Piece:
        if self._over:
            raise StopAsyncIteration
        piece = await self._pieces.get()
        if isinstance(piece, Exception):
            self._over = True
            raise piece
        self._over = piece.finish_reason is not None
        return piece

    async def text(self) -> str:
        """The rest of the answer."""
        return "".join([piece.text async for piece in self])

    def cancel(self) -> None:
        """Give the slot back; the last piece says ``"cancelled"``."""
        self._cancel(self.request)

    async def aclose(self) -> None:
        """As `cancel`, and nothing more is said."""
        self._over = True
        self.cancel()
