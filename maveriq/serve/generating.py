"""Answering one request for a completion: take it in, follow it, write it down as the client wants it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from maveriq.domain.requests import RequestStatus
from maveriq.exec.cluster import Outcome, Submission
from maveriq.serve.bodies import micros_of
from maveriq.serve.openai_bodies import Generation
from maveriq.serve.refusals import ApiError, bad
from maveriq.serve.service import Endpoint, Service
from maveriq.serve.stopping import StopScanner
from maveriq.serve.tokens import Tokenizer
from maveriq.serve.tracking import Accepted
from maveriq.serve.wire import CompletionWire, Usage

T = TypeVar("T")

_NOBODY_WAITS = 499  # as nginx has it; nobody reads it
_AGAIN_S = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A request for a completion, made out of its body and headers."""

    endpoint: Endpoint
    tokenizer: Tokenizer
    token_ids: tuple[int, ...]
    said: Generation
    priority: bool
    slo_ms: float | None
    request_id: str | None


async def answer(service: Service, request: Request, prompt: Prompt, dialect: type[CompletionWire]) -> Response:
    """Serve one request, to its end or until its client goes away.

    Raises:
        ApiError: it cannot be taken in, or it ended otherwise than completed.
    """
    submission = _submission(service, prompt)
    model = prompt.endpoint.model.spec.name
    accepted = await service.tracker.accept(model, submission, prompt.request_id)
    wire = dialect(request_id=accepted.row.request_id, model=prompt.said.model)
    try:
        if prompt.said.stream:
            return await _stream(service, request, prompt, accepted, wire)
        outcome = await _unless_gone(request, _outcome(accepted))
    except BaseException:
        service.tracker.abandon(accepted)
        raise
    if outcome is None:
        service.tracker.abandon(accepted)
        return Response(status_code=_NOBODY_WAITS)
    _check(outcome, accepted)
    text = _Text(prompt, submission)
    shown = "".join(map(text.step, outcome.tokens)) + text.end()
    body = wire.whole(shown, text.token_ids, text.finish, text.usage)
    return JSONResponse(body, headers=_headers(accepted))


def _submission(service: Service, prompt: Prompt) -> Submission:
    """Return what the cluster is asked, within the service's limits."""
    said, limits, asked = prompt.said, service.settings, prompt.endpoint.stored.asked
    if not prompt.token_ids:
        raise bad("the prompt is empty; give at least one token", "prompt")
    if len(prompt.token_ids) > limits.most_prompt_tokens:
        told = f"the prompt has {len(prompt.token_ids)} tokens; the most is {limits.most_prompt_tokens}"
        raise bad(told, "prompt", code="context_length_exceeded")
    output_tokens = said.wanted_tokens or min(asked.output_tokens, limits.most_output_tokens)
    if output_tokens > limits.most_output_tokens:
        told = f"max_tokens is {output_tokens}; the most is {limits.most_output_tokens}"
        raise bad(told, "max_tokens", code="context_length_exceeded")
    ends = () if said.ignore_eos else prompt.tokenizer.stop_token_ids
    # A stop string of one token ends the engine's work too, not only the text.
    single = tuple(ids[0] for ids in map(prompt.tokenizer.encode, said.stops) if len(ids) == 1)
    return Submission(
        endpoint_id=prompt.endpoint.endpoint_id,
        prompt=prompt.token_ids,
        output_tokens=output_tokens,
        stop_token_ids=tuple(dict.fromkeys((*ends, *single)))[:64],
        slo_us=micros_of(prompt.slo_ms, asked.intent.slo_s),
        priority=prompt.priority,
    )


class _Text:
    """The text of one output as it comes, up to where it stops."""

    def __init__(self, prompt: Prompt, submission: Submission) -> None:
        self._stream = prompt.tokenizer.stream()
        self._scanner = StopScanner(prompt.said.stops)
        self._ends = frozenset(prompt.tokenizer.stop_token_ids if not prompt.said.ignore_eos else ())
        self._prompt_tokens = len(submission.prompt)
        self._ids: list[int] = []
        self._wants_ids = prompt.said.return_token_ids
        self.stopped = False

    def step(self, token_id: int) -> str:
        """Return what can be shown with this token."""
        if self.stopped:
            return ""
        self._ids.append(token_id)
        self.stopped = token_id in self._ends
        shown = "" if self.stopped else self._scanner.step(self._stream.step(token_id))
        self.stopped = self.stopped or self._scanner.stopped
        return shown

    def end(self) -> str:
        """Return what was held back."""
        if self._scanner.stopped:
            return ""
        return self._scanner.step(self._stream.end()) + self._scanner.end()

    @property
    def finish(self) -> str:
        """Why the text ends: `stop` or `length`."""
        return "stop" if self.stopped or self._scanner.stopped else "length"

    @property
    def token_ids(self) -> list[int] | None:
        """The tokens, if the client wants them."""
        return self._ids if self._wants_ids else None

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        return Usage(prompt=self._prompt_tokens, output=len(self._ids))


async def _stream(
    service: Service, request: Request, prompt: Prompt, accepted: Accepted, wire: CompletionWire
) -> Response:
    """Return a stream. It begins with the first token, so that what is refused before has a status of its own."""
    tokens = aiter(accepted.ticket.result().tokens())
    first = await _unless_gone(request, _next(tokens))
    if first is None:
        service.tracker.abandon(accepted)
        return Response(status_code=_NOBODY_WAITS)
    if first == _NONE_LEFT:
        _check(await _outcome(accepted), accepted)
    text = _Text(prompt, accepted.submission)

    async def lines() -> AsyncIterator[bytes]:
        try:
            opening = wire.opening()
            if opening is not None:
                yield _line(opening)
            token = first
            while token != _NONE_LEFT:
                shown = text.step(token)
                ids = [token] if prompt.said.return_token_ids and not text.stopped else None
                if shown or ids:
                    yield _line(wire.chunk(shown, ids))
                token = await _next(tokens)
            for line in _last(await _outcome(accepted), accepted, text, wire, prompt):
                yield line
        finally:
            service.tracker.abandon(accepted)

    return StreamingResponse(
        lines(), media_type="text/event-stream", headers=_headers(accepted) | {"Cache-Control": "no-cache"}
    )


def _last(outcome: Outcome, accepted: Accepted, text: _Text, wire: CompletionWire, prompt: Prompt) -> list[bytes]:
    """Return the end of a stream: why it ends, counts if they are wanted, and the word for done; or an error."""
    try:
        _check(outcome, accepted)
    except ApiError as error:
        return [_line(error.body())]
    lines = []
    held = text.end()
    if held:
        lines.append(_line(wire.chunk(held)))
    lines.append(_line(wire.chunk("", finish=text.finish)))
    if prompt.said.wants_usage:
        lines.append(_line(wire.usage(text.usage)))
    return [*lines, b"data: [DONE]\n\n"]


def _check(outcome: Outcome, accepted: Accepted) -> None:
    """Let a completed request pass.

    Raises:
        ApiError: it ended otherwise.
    """
    name = accepted.row.request_id
    match outcome.status:
        case RequestStatus.COMPLETED:
            return
        case RequestStatus.REFUSED:
            raise ApiError(503, outcome.reason, code="refused", retry_after_s=_AGAIN_S, request_id=name)
        case RequestStatus.FAILED:
            raise ApiError(502, outcome.reason, code="engine_failed", request_id=name)
        case _:
            told = outcome.reason or "the server stopped before the request had ended"
            raise ApiError(503, told, code="server_stopping", retry_after_s=_AGAIN_S, request_id=name)


async def _outcome(accepted: Accepted) -> Outcome:
    return await asyncio.shield(accepted.outcome)


_NONE_LEFT = -1


async def _next(tokens: AsyncIterator[int]) -> int:
    return await anext(tokens, _NONE_LEFT)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Return what comes of `work`, or None if the client goes away before."""
    wanted, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((wanted, gone), return_when=asyncio.FIRST_COMPLETED)
        return wanted.result() if wanted.done() else None
    finally:
        wanted.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _line(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _headers(accepted: Accepted) -> dict[str, str]:
    return {"X-Request-Id": accepted.row.request_id}
