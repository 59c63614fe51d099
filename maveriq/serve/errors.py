"""Errors as an OpenAI client expects them: a status, and an object with message, type, param and code."""

from __future__ import annotations

from typing import Any

from maveriq.errors import MaveriqError


class ApiError(MaveriqError):
    """A request that is answered with an error; the message is for whoever sent it.

    `request_id` is that of a request which was accepted and then ended otherwise than completed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after_s: int | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.request_id = request_id

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Return the headers that belong to it."""
        said = {
            "Retry-After": self.retry_after_s,
            "X-Request-Id": self.request_id,
            "WWW-Authenticate": "Bearer" if self.status == 401 else None,
        }
        return {name: str(value) for name, value in said.items() if value is not None}


def bad_request(message: str, param: str | None = None, *, code: str = "invalid_value") -> ApiError:
    """Return the error of a body or parameter that cannot be used."""
    return ApiError(400, message, code=code, param=param)


def not_found(what: str, message: str) -> ApiError:
    """Return the error of a name that leads nowhere; `what` is the parameter."""
    return ApiError(404, message, code=f"{what}_not_found", param=what)
