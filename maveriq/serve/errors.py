"""API errors: an HTTP status and OpenAI's error object with message, type, param and code."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from maveriq.errors import MaveriqError


class ApiError(MaveriqError):
    """An error response; the message is for the client.

    Args:
        status: HTTP status.
        message: what is wrong and what to do about it.
        code: machine-readable name of the error.
        param: the field, parameter or header that caused it.
        retry_after_s: when the client may try again.
        request_id: the ID of an accepted request that did not complete; None if no request was accepted.
        challenge: how a client may authenticate; None where that is not the matter.
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
        challenge: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.request_id = request_id
        self.challenge = challenge

    def to_json(self) -> dict[str, Any]:
        """Return the body of the response."""
        if self.status == 429:
            error_type = "rate_limit_error"
        else:
            error_type = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": error_type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the headers of the response that belong to the error."""
        headers = {
            "Retry-After": self.retry_after_s,
            "X-Request-Id": self.request_id,
            "WWW-Authenticate": self.challenge,
        }
        return {name: str(value) for name, value in headers.items() if value is not None}


def bad_request(message: str, param: str | None = None, *, code: str = "invalid_value") -> ApiError:
    """Return the error for a body or parameter that is not valid."""
    return ApiError(400, message, code=code, param=param)


def not_found(what: str, message: str) -> ApiError:
    """Return the error for an unknown name or ID; `what` is the parameter."""
    return ApiError(404, message, code=f"{what}_not_found", param=what)


def raw_response(error: ApiError) -> bytes:
    """Return the whole HTTP response of an error after which the connection is closed."""
    body = json.dumps(error.to_json()).encode()
    headers = {"Content-Type": "application/json", "Content-Length": len(body), "Connection": "close"}
    lines = [f"{name}: {value}" for name, value in (headers | error.headers()).items()]
    head = "\r\n".join((f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", *lines))
    return f"{head}\r\n\r\n".encode("latin-1") + body
