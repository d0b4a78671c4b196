"""What a request is refused with: a status and OpenAI's error object."""

from __future__ import annotations

from typing import Any

INVALID = "invalid_request_error"
BUSY = "rate_limit_error"
SERVER = "server_error"


class Refusal(Exception):
    """Ends a request; `param` names the field at fault, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def to_json(self) -> dict[str, Any]:
        """Return the body of the answer, in the shape that OpenAI's clients read."""
        kind = SERVER if self.status >= 500 else BUSY if self.status == 429 else INVALID
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def refuse(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """Return a 400 for what the request asks."""
    return Refusal(400, message, param=param, code=code)


def refuse_stopping() -> Refusal:
    """Return a 503 for what comes when the server is told to stop."""
    return Refusal(503, "this server is stopping", code="stopping")


class Gone(Exception):
    """The client is no longer there; nobody is to be told anything."""
