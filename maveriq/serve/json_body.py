"""Reads the JSON bodies of requests.

A member that is null counts as absent, at every place of a body. Text that cannot be encoded, bodies that are not
UTF-8, too deep, too wide or truncated are refused with the place of the fault. Long bodies are read in the background.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NoReturn, TypeAlias

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from maveriq.serve.background import in_background
from maveriq.serve.errors import ApiError, bad_request

MAX_DEPTH = 64
MAX_MEMBERS = 1_024
_MAX_INLINE_BYTES = 16 * 1024
_MAX_FIELD_CHARACTERS = 200

Path: TypeAlias = tuple[str, ...]

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_MAYBE_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")  # as JSON escapes it
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)

_DEPTH_CHANGES = {"[": 1, "{": 1, "]": -1, "}": -1}


class JsonRoute(APIRoute):
    """A route whose body is read by `read_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, called with the content of the body."""
        handle = super().get_route_handler()

        async def handle_parsed(request: Request) -> Response:
            body = await request.body() if self.body_field is not None else b""
            if not body:
                return await handle(request)
            max_items = request.app.state.service.settings.max_prompt_tokens
            if len(body) <= _MAX_INLINE_BYTES:
                content = read_json(body, max_items=max_items)
            else:
                content = await in_background(read_json, body, max_items=max_items)
            return await handle(_ParsedRequest(request, body, content))

        return handle_parsed


class _ParsedRequest(Request):
    """A request whose body has been read."""

    def __init__(self, request: Request, body: bytes, content: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._bytes = body
        self._content = content

    async def body(self) -> bytes:
        return self._bytes

    async def json(self) -> Any:
        return self._content


def read_json(body: bytes, *, max_items: int) -> Any:
    """Return the content of a JSON body, without the members that are null.

    Args:
        body: not empty.
        max_items: of an array, for example the tokens of a prompt.

    Raises:
        ApiError: the body cannot be read; the error says where.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fault = f"the body is not UTF-8: byte 0x{body[error.start]:02x} at position {error.start}"
        raise _invalid(fault) from None
    _check_depth(text)
    try:
        content = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        is_truncated = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        fault = "the body ends too early" if is_truncated else "the body is not valid JSON"
        raise _invalid(f"{fault}: {error.msg[:1].lower()}{error.msg[1:]} at {where}") from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits
        raise _invalid(f"the body is not valid JSON: {error}") from None
    _check_values(content, max_items=max_items, may_have_halves=_MAYBE_HALF_CHARACTER.search(body) is not None)
    return content


def field_name(path: Path) -> str:
    """Return the dotted name of a field, in ASCII and not longer than an error message should be."""
    name = ".".join(path).encode("ascii", "backslashreplace").decode()
    return name if len(name) <= _MAX_FIELD_CHARACTERS else f"{name[:_MAX_FIELD_CHARACTERS]}..."


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        depth += _DEPTH_CHANGES.get(match.group(), 0)
        if depth > MAX_DEPTH:
            raise _invalid(f"the body is nested too deep: more than {MAX_DEPTH} levels")


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(members) > MAX_MEMBERS:
        raise _invalid(f"an object of the body has {len(members)} members; the maximum is {MAX_MEMBERS}")
    content = dict(members)
    if len(content) < len(members):
        [(name, _)] = Counter(name for name, _ in members).most_common(1)
        raise bad_request(f"{field_name((name,))} is given twice in one object", field_name((name,)))
    return {name: value for name, value in content.items() if value is not None}


def _refuse_constant(name: str) -> NoReturn:
    raise _invalid(f"the body is not valid JSON: {name} is not a JSON number")


def _check_values(content: Any, *, max_items: int, may_have_halves: bool) -> None:
    for path, value in _walk(content):
        if isinstance(value, str):
            if may_have_halves and (half := _HALF_CHARACTER.search(value)) is not None:
                raise _half_character(path, half.group())
        elif len(value) > max_items and isinstance(value, list):
            message = f"{field_name(path)} has {len(value)} items; the maximum is {max_items}"
            raise bad_request(message, field_name(path), code="context_length_exceeded")
        elif may_have_halves and isinstance(value, dict):
            for name in value:
                if (half := _HALF_CHARACTER.search(name)) is not None:
                    raise _half_character((*path, name), half.group())


def _walk(content: Any) -> Iterator[tuple[Path, Any]]:
    """Yield the texts, arrays and objects of a content, each with its path, outer ones first."""
    waiting: list[tuple[Path, Any]] = [((), content)]
    while waiting:
        path, value = waiting.pop()
        if not isinstance(value, (str, list, dict)):
            continue
        yield path, value
        if isinstance(value, list):
            members: Any = enumerate(value)
        elif isinstance(value, dict):
            members = value.items()
        else:
            continue
        waiting += [((*path, str(key)), inner) for key, inner in members if isinstance(inner, (str, list, dict))]


def _half_character(path: Path, half: str) -> ApiError:
    name = field_name(path)
    code_point = half.encode("ascii", "backslashreplace").decode()
    message = f"{name or 'the body'} has {code_point}, half of a character that takes two; it cannot be encoded"
    return bad_request(message, name or None)


def _invalid(fault: str) -> ApiError:
    return bad_request(fault, code="invalid_json")
