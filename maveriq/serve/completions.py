"""Ending a text at one of the stop strings that a user gave.

How completions look on the wire: OpenAI's two dialects, whole and in a stream.
Answering one request for a completion: take it in, follow it, write it down as the client wants it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from maveriq.domain.requests import RequestStatus
from maveriq.exec.live_cluster import Outcome, Submission
from maveriq.serve.errors import ApiError, bad_request
from maveriq.serve.requests import AcceptedRequest
from maveriq.serve.schemas import Generation, micros_of
from maveriq.serve.service import Endpoint, Service
from maveriq.serve.tokenizers import Tokenizer


class StopStrings:
    """Lets text through until a stop string, which is not part of it.

    Text that may be the beginning of a stop string is held back until that is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(filter(None, stops))
        self._held = ""
        self.stopped = False

    def step(self, text: str) -> str:
        """Return the text that may be shown now."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        self._held += text
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def end(self) -> str:
        """Return what was held back: it was no stop string after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    maximum = min(len(text), len(stop) - 1)
    return next((size for size in range(maximum, 0, -1) if stop.startswith(text[-size:])), 0)


Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a request."""

    prompt: int
    output: int

    def body(self) -> Json:
        """Return OpenAI's object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.output,
            "total_tokens": self.prompt + self.output,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionResponse:
    """The dialect of `/v1/completions`."""

    request_id: str
    model: str
    created_s: int = field(default_factory=lambda: int(time.time()))

    kind: ClassVar[str] = "text_completion"
    chunk_kind: ClassVar[str] = "text_completion"

    def opening(self) -> Json | None:
        """Return the chunk before the first text, if this dialect has one."""
        return None

    def chunk(self, text: str, token_ids: Sequence[int] | None = None, finish: str | None = None) -> Json:
        """Return a chunk of a stream."""
        return self._frame(self.chunk_kind, [_choice({"text": text}, token_ids, finish)])

    def whole(self, text: str, token_ids: Sequence[int] | None, finish: str, usage: Usage) -> Json:
        """Return a whole answer."""
        return self._frame(self.kind, [_choice({"text": text}, token_ids, finish)]) | {"usage": usage.body()}

    def usage(self, usage: Usage) -> Json:
        """Return the last chunk of a stream whose client wants counts."""
        return self._frame(self.chunk_kind, []) | {"usage": usage.body()}

    def _frame(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.request_id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "choices": choices,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatResponse(CompletionResponse):
    """The dialect of `/v1/chat/completions`."""

    kind: ClassVar[str] = "chat.completion"
    chunk_kind: ClassVar[str] = "chat.completion.chunk"

    def opening(self) -> Json | None:
        """Return the chunk that says who speaks."""
        return self._frame(self.chunk_kind, [_choice({"delta": {"role": "assistant", "content": ""}}, None, None)])

    def chunk(self, text: str, token_ids: Sequence[int] | None = None, finish: str | None = None) -> Json:
        """Return a chunk of a stream."""
        delta: Json = {"content": text} if text else {}
        return self._frame(self.chunk_kind, [_choice({"delta": delta}, token_ids, finish)])

    def whole(self, text: str, token_ids: Sequence[int] | None, finish: str, usage: Usage) -> Json:
        """Return a whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return self._frame(self.kind, [_choice({"message": message}, token_ids, finish)]) | {"usage": usage.body()}


def _choice(content: Json, token_ids: Sequence[int] | None, finish: str | None) -> Json:
    choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
    return choice if token_ids is None else choice | {"token_ids": list(token_ids)}


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


async def answer(service: Service, request: Request, prompt: Prompt, dialect: type[CompletionResponse]) -> Response:
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
        service.tracker.cancel(accepted)
        raise
    if outcome is None:
        service.tracker.cancel(accepted)
        return Response(status_code=_NOBODY_WAITS)
    _check(outcome, accepted)
    text = _Text(prompt, submission)
    shown = "".join(map(text.step, outcome.tokens)) + text.end()
    body = wire.whole(shown, text.token_ids, text.finish, text.usage)
    return JSONResponse(body, headers=_headers(accepted))


def _submission(service: Service, prompt: Prompt) -> Submission:
    """Return what the cluster is asked, within the service's limits."""
    said, limits, asked = prompt.said, service.settings, prompt.endpoint.stored.request
    if not prompt.token_ids:
        raise bad_request("the prompt is empty; give at least one token", "prompt")
    if len(prompt.token_ids) > limits.max_prompt_tokens:
        told = f"the prompt has {len(prompt.token_ids)} tokens; the most is {limits.max_prompt_tokens}"
        raise bad_request(told, "prompt", code="context_length_exceeded")
    output_tokens = said.wanted_tokens or min(asked.output_tokens, limits.max_output_tokens)
    if output_tokens > limits.max_output_tokens:
        told = f"max_tokens is {output_tokens}; the most is {limits.max_output_tokens}"
        raise bad_request(told, "max_tokens", code="context_length_exceeded")
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
        self._scanner = StopStrings(prompt.said.stops)
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
    service: Service, request: Request, prompt: Prompt, accepted: AcceptedRequest, wire: CompletionResponse
) -> Response:
    """Return a stream. It begins with the first token, so that what is refused before has a status of its own."""
    tokens = aiter(accepted.handle.result().tokens())
    first = await _unless_gone(request, _next(tokens))
    if first is None:
        service.tracker.cancel(accepted)
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
            service.tracker.cancel(accepted)

    return StreamingResponse(
        lines(), media_type="text/event-stream", headers=_headers(accepted) | {"Cache-Control": "no-cache"}
    )


def _last(
    outcome: Outcome, accepted: AcceptedRequest, text: _Text, wire: CompletionResponse, prompt: Prompt
) -> list[bytes]:
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


def _check(outcome: Outcome, accepted: AcceptedRequest) -> None:
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


async def _outcome(accepted: AcceptedRequest) -> Outcome:
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


def _headers(accepted: AcceptedRequest) -> dict[str, str]:
    return {"X-Request-Id": accepted.row.request_id}
