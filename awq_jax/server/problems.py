"""What can go wrong with a request, in OpenAI's JSON."""

from __future__ import annotations

import dataclasses

from starlette.responses import JSONResponse

from awq_jax.errors import AwqError, BusyError, ContextLengthError, EngineError, MissingPackageError

RETRY_AFTER = 1  # seconds


@dataclasses.dataclass
class Problem(Exception):
    """A request that is refused, or that failed.

    Attributes:
      message: names the culprit and the remedy.
      status: of HTTP.
      type, code: as the OpenAI API has them.
      param: the field of the body that is wrong.
    """

    message: str
    status: int = 400
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None

    def body(self) -> dict[str, object]:
        """The JSON object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """What is sent."""
        headers = {}
        if self.status == 429:
            headers["Retry-After"] = str(RETRY_AFTER)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in (401, 408, 413):  # the body was not read
            headers["Connection"] = "close"
        return JSONResponse(self.body(), self.status, headers)


def of(error: Exception) -> Problem:
    """What an error means for the one who asked."""
    if isinstance(error, Problem):
        return error
    text = str(error)
    if isinstance(error, ContextLengthError):
        return Problem(text, code="context_length_exceeded", param="messages")
    if isinstance(error, BusyError):
        return Problem(text, 429, "rate_limit_error", "rate_limit_exceeded")
    if isinstance(error, EngineError):
        return Problem(text, 503, "server_error", "unavailable")
    if isinstance(error, TimeoutError):
        return Problem("the request took longer than the server allows", 504, "server_error", "timeout")
    if isinstance(error, MissingPackageError):
        return Problem(text, 501, "server_error", "not_installed")
    if isinstance(error, AwqError):
        return Problem(text)
    return Problem("an error of the server's own; its log has it", 500, "server_error")
