"""What an engine tells of its work, for metrics; this one listens to nothing."""

from __future__ import annotations

from awq_jax.serve.engine.request import Request


class Watch:
    """Called in the engine's thread; to be overridden in part."""

    def started(self, request: Request) -> None:
        """The reading of a prompt begins."""

    def read(self, tokens: int, seconds: float) -> None:
        """Tokens of a prompt were read, in so many seconds."""

    def looked(self, seconds: float) -> None:
        """An image was looked at, in so many seconds."""

    def stepped(self, seconds: float) -> None:
        """A step has made the next token of every answer, in so many seconds."""

    def wrote(self, request: Request) -> None:
        """A token of an answer was made."""

    def finished(self, request: Request) -> None:
        """An answer is complete, or was cancelled."""

    def failed(self, request: Request) -> None:
        """A request ended with an error."""

    def turn(self, running: int, waiting: int) -> None:
        """A turn of the engine is done."""
