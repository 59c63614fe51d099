"""Answers one completion request: submits it, follows its tokens, and formats the response, whole or streamed.

`maveriq.serve.routes` prepares the request; `complete` is the entry point here. The rest of the module turns tokens
into text up to a stop string (`OutputText`, `StopStrings`) and text into OpenAI's two formats (`CompletionResponse`,
`ChatResponse`).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from maveriq.domain.requests import RequestStatus
from maveriq.exec.live_cluster import Outcome, Submission
from maveriq.serve.completion_schemas import GenerationRequest
from maveriq.serve.errors import ApiError, bad_request
from maveriq.serve.requests import AcceptedRequest
from maveriq.serve.service import Endpoint, Service
from maveriq.serve.tokenizer_process import TokenizerFailedError
from maveriq.serve.tokenizers import Tokenizer
from maveriq.units import Micros

T = TypeVar("T")
Json: TypeAlias = dict[str, Any]

_CLIENT_CLOSED_REQUEST = 499  # nginx's status; the client does not see it
_RETRY_AFTER_S = 5
_MAX_STOP_TOKENS = 64
_END_OF_TOKENS = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """A completion request with its endpoint and its prompt as token IDs; headers and body are merged."""

    endpoint: Endpoint
    tokenizer: Tokenizer
    token_ids: tuple[int, ...]
    body: GenerationRequest
    priority: bool
    slo_ms: float | None
    request_id: str | None


async def complete(
    service: Service, request: Request, prepared: PreparedRequest, response_type: type[CompletionResponse]
) -> Response:
    """Run a completion request and return the response.

    A client that disconnects cancels its request.

    Raises:
        ApiError: the request is not accepted, or it did not complete.
    """
    submission = await _submission(service, prepared)
    model = prepared.endpoint.model.spec.name
    accepted = await service.requests.accept(model, submission, prepared.request_id)
    response = response_type(request_id=accepted.row.request_id, model=prepared.body.model)
    try:
        if prepared.body.stream:
            return await _streaming_response(service, request, prepared, accepted, response)
        outcome = await _unless_disconnected(request, _outcome(accepted))
    except BaseException:
        service.requests.cancel(accepted)
        raise
    if outcome is None:
        service.requests.cancel(accepted)
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    _check_completed(outcome, accepted)
    output = OutputText(prepared)
    text = await output.feed(outcome.tokens) + await output.flush()
    content = response.full(text, output.token_ids, output.finish_reason, output.usage)
    return JSONResponse(content, headers=_headers(accepted))


async def _submission(service: Service, prepared: PreparedRequest) -> Submission:
    """Return what to submit to the cluster.

    Raises:
        ApiError: the prompt is empty, or prompt or output are over the limits.
    """
    body, settings, endpoint = prepared.body, service.settings, prepared.endpoint.stored.request
    if not prepared.token_ids:
        raise bad_request("the prompt is empty; give at least one token", "prompt")
    if len(prepared.token_ids) > settings.max_prompt_tokens:
        message = f"the prompt has {len(prepared.token_ids)} tokens; the maximum is {settings.max_prompt_tokens}"
        raise bad_request(message, "prompt", code="context_length_exceeded")
    output_tokens = body.requested_tokens or _default_output_tokens(service, prepared)
    if output_tokens > settings.max_output_tokens:
        message = f"max_tokens is {output_tokens}; the maximum is {settings.max_output_tokens}"
        raise bad_request(message, "max_tokens", code="context_length_exceeded")
    tokens = len(prepared.token_ids) + output_tokens
    too_long = service.cluster.why_too_long(prepared.endpoint.endpoint_id, tokens)
    if too_long is not None:
        raise bad_request(too_long, "prompt", code="context_length_exceeded")
    end_tokens = () if body.ignore_eos else prepared.tokenizer.stop_token_ids
    # A stop string of a single token also stops the engine, not only the text.
    encoded = [await prepared.tokenizer.encode(stop_string) for stop_string in body.stop_strings]
    stop_tokens = [ids[0] for ids in encoded if len(ids) == 1]
    return Submission(
        endpoint_id=prepared.endpoint.endpoint_id,
        prompt=prepared.token_ids,
        output_tokens=output_tokens,
        stop_token_ids=tuple(dict.fromkeys((*end_tokens, *stop_tokens)))[:_MAX_STOP_TOKENS],
        slo_us=_slo_us(prepared.slo_ms, endpoint.intent.slo_s),
        priority=prepared.priority,
    )


def _default_output_tokens(service: Service, prepared: PreparedRequest) -> int:
    """Return how many tokens a request gets that names no number: the endpoint's, within what is served."""
    limits = [prepared.endpoint.stored.request.output_tokens, service.settings.max_output_tokens]
    max_tokens = service.cluster.max_sequence_tokens(prepared.endpoint.endpoint_id)
    if max_tokens is not None:
        limits.append(max_tokens - len(prepared.token_ids))
    return max(1, min(limits))


def _slo_us(request_slo_ms: float | None, endpoint_slo_s: float | None) -> Micros:
    """Return the SLO of the request, else that of its endpoint, else 0 for none."""
    if request_slo_ms is not None:
        return max(1, round(request_slo_ms * 1e3))
    return 0 if endpoint_slo_s is None else max(1, round(endpoint_slo_s * 1e6))


async def _streaming_response(
    service: Service,
    request: Request,
    prepared: PreparedRequest,
    accepted: AcceptedRequest,
    response: CompletionResponse,
) -> Response:
    """Return a stream of server-sent events.

    The first token is awaited before the stream begins, so that earlier errors have an HTTP status.
    """
    tokens = aiter(accepted.handle.result().tokens())
    first_token = await _unless_disconnected(request, _next_token(tokens))
    if first_token is None:
        service.requests.cancel(accepted)
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    if first_token == _END_OF_TOKENS:
        _check_completed(await _outcome(accepted), accepted)
    output = OutputText(prepared)

    async def events() -> AsyncIterator[bytes]:
        try:
            first_chunk = response.first_chunk()
            if first_chunk is not None:
                yield _chunk_event(first_chunk, output, prepared)
            token = first_token
            while token != _END_OF_TOKENS:
                text = await output.feed((token,))
                token_ids = [token] if prepared.body.return_token_ids and not output.stopped else None
                if text or token_ids:
                    yield _chunk_event(response.chunk(text, token_ids), output, prepared)
                token = await _next_token(tokens)
            for event in await _last_events(await _outcome(accepted), accepted, output, response, prepared):
                yield event
        except TokenizerFailedError as error:
            yield _event(ApiError(503, str(error), code="tokenizer_unusable").to_json())
        finally:
            service.requests.cancel(accepted)  # has no effect on a request that ended

    headers = _headers(accepted) | {"Cache-Control": "no-cache"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


async def _last_events(
    outcome: Outcome,
    accepted: AcceptedRequest,
    output: OutputText,
    response: CompletionResponse,
    prepared: PreparedRequest,
) -> list[bytes]:
    """Return the end of a stream: the finish reason, the usage if the client wants it, and `[DONE]`; or an error."""
    try:
        _check_completed(outcome, accepted)
    except ApiError as error:
        return [_event(error.to_json())]
    events = []
    text = await output.flush()
    if text:
        events.append(_chunk_event(response.chunk(text), output, prepared))
    last_chunk = response.chunk("", finish_reason=output.finish_reason)
    events.append(_chunk_event(last_chunk, output, prepared))
    if prepared.body.include_usage:
        events.append(_event(response.usage_chunk(output.usage)))
    return [*events, b"data: [DONE]\n\n"]


def _check_completed(outcome: Outcome, accepted: AcceptedRequest) -> None:
    """Raise the error of a request that did not complete.

    Raises:
        ApiError: the request was refused, failed, or is unfinished.
    """
    request_id = accepted.row.request_id
    if not accepted.outcome_stored:
        raise ApiError(503, outcome.reason, code="outcome_not_stored", request_id=request_id)
    match outcome.status:
        case RequestStatus.COMPLETED:
            return
        case RequestStatus.REFUSED:
            raise ApiError(503, outcome.reason, code="refused", retry_after_s=_RETRY_AFTER_S, request_id=request_id)
        case RequestStatus.FAILED:
            raise ApiError(502, outcome.reason, code="engine_failed", request_id=request_id)
        case _:
            message = outcome.reason or "the server stopped before the request ended"
            raise ApiError(503, message, code="server_stopping", retry_after_s=_RETRY_AFTER_S, request_id=request_id)


async def _outcome(accepted: AcceptedRequest) -> Outcome:
    return await asyncio.shield(accepted.outcome)


async def _next_token(tokens: AsyncIterator[int]) -> int:
    return await anext(tokens, _END_OF_TOKENS)


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Return the result of `work`, or None if the client disconnects first."""
    working, disconnected = asyncio.create_task(work), asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait((working, disconnected), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        disconnected.cancel()


async def _disconnect(request: Request) -> None:
    """Wait until the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _chunk_event(chunk: Json, output: OutputText, prepared: PreparedRequest) -> bytes:
    return _event(chunk | {"usage": output.usage.to_json()} if prepared.body.usage_in_chunks else chunk)


def _event(content: Json) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _headers(accepted: AcceptedRequest) -> dict[str, str]:
    return {"X-Request-Id": accepted.row.request_id}


class OutputText:
    """Turns the tokens of one output into text, up to an end token or a stop string."""

    def __init__(self, prepared: PreparedRequest) -> None:
        self._stream = prepared.tokenizer.stream()
        self._stop_strings = StopStrings(prepared.body.stop_strings)
        self._end_tokens = frozenset(() if prepared.body.ignore_eos else prepared.tokenizer.stop_token_ids)
        self._prompt_tokens = len(prepared.token_ids)
        self._return_token_ids = prepared.body.return_token_ids
        self._token_ids: list[int] = []
        self.stopped = False

    async def feed(self, token_ids: Sequence[int]) -> str:
        """Return the text that the next tokens complete."""
        if self.stopped:
            return ""
        until_end = list(itertools.takewhile(lambda token_id: token_id not in self._end_tokens, token_ids))
        shown: list[str] = []
        for token_id, piece in zip(until_end, await self._stream.feed(until_end), strict=True):
            self._token_ids.append(token_id)
            shown.append(self._stop_strings.feed(piece))
            if self._stop_strings.stopped:
                break
        else:
            if len(until_end) < len(token_ids):
                self._token_ids.append(token_ids[len(until_end)])
                self.stopped = True
        self.stopped = self.stopped or self._stop_strings.stopped
        return "".join(shown)

    async def flush(self) -> str:
        """Return the text that was held back."""
        last = await self._stream.flush()
        if self._stop_strings.stopped:
            return ""
        return self._stop_strings.feed(last) + self._stop_strings.flush()

    @property
    def finish_reason(self) -> str:
        """Why the text ends: `stop` or `length`."""
        return "stop" if self.stopped or self._stop_strings.stopped else "length"

    @property
    def token_ids(self) -> list[int] | None:
        """The tokens so far, or None if the client does not want them."""
        return self._token_ids if self._return_token_ids else None

    @property
    def usage(self) -> Usage:
        """The token counts so far."""
        return Usage(prompt_tokens=self._prompt_tokens, output_tokens=len(self._token_ids))


class StopStrings:
    """Passes text on until a stop string, which is not part of the output.

    Text that may be the beginning of a stop string is held back until that is decided.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = tuple(filter(None, stop_strings))
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Return the text that can be output now."""
        if self.stopped or not self._stop_strings:
            return "" if self.stopped else text
        self._held += text
        positions = [position for position in map(self._held.find, self._stop_strings) if position >= 0]
        if positions:
            self.stopped = True
            output, self._held = self._held[: min(positions)], ""
            return output
        keep = max(_overlap(self._held, stop_string) for stop_string in self._stop_strings)
        output, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return output

    def flush(self) -> str:
        """Return the text that was held back and turned out not to be a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop_string: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop_string`."""
    max_length = min(len(text), len(stop_string) - 1)
    return next((length for length in range(max_length, 0, -1) if stop_string.startswith(text[-length:])), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of a request."""

    prompt_tokens: int
    output_tokens: int

    def to_json(self) -> Json:
        """Return OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.prompt_tokens + self.output_tokens,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionResponse:
    """The response format of `/v1/completions`."""

    request_id: str
    model: str
    created_s: int = field(default_factory=lambda: int(time.time()))

    object_name: ClassVar[str] = "text_completion"
    chunk_name: ClassVar[str] = "text_completion"

    def first_chunk(self) -> Json | None:
        """Return the chunk before the first text, or None if the format has none."""
        return None

    def chunk(self, text: str, token_ids: Sequence[int] | None = None, finish_reason: str | None = None) -> Json:
        """Return a chunk of a stream."""
        return self._response(self.chunk_name, [_choice({"text": text}, token_ids, finish_reason)])

    def full(self, text: str, token_ids: Sequence[int] | None, finish_reason: str, usage: Usage) -> Json:
        """Return the response of a request without `stream`."""
        choices = [_choice({"text": text}, token_ids, finish_reason)]
        return self._response(self.object_name, choices) | {"usage": usage.to_json()}

    def usage_chunk(self, usage: Usage) -> Json:
        """Return the last chunk of a stream with `include_usage`."""
        return self._response(self.chunk_name, []) | {"usage": usage.to_json()}

    def _response(self, object_name: str, choices: list[Json]) -> Json:
        return {
            "id": self.request_id,
            "object": object_name,
            "created": self.created_s,
            "model": self.model,
            "choices": choices,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatResponse(CompletionResponse):
    """The response format of `/v1/chat/completions`."""

    object_name: ClassVar[str] = "chat.completion"
    chunk_name: ClassVar[str] = "chat.completion.chunk"

    def first_chunk(self) -> Json | None:
        """Return the chunk with the role."""
        return self._response(self.chunk_name, [_choice({"delta": {"role": "assistant", "content": ""}}, None, None)])

    def chunk(self, text: str, token_ids: Sequence[int] | None = None, finish_reason: str | None = None) -> Json:
        """Return a chunk of a stream."""
        delta: Json = {"content": text} if text else {}
        return self._response(self.chunk_name, [_choice({"delta": delta}, token_ids, finish_reason)])

    def full(self, text: str, token_ids: Sequence[int] | None, finish_reason: str, usage: Usage) -> Json:
        """Return the response of a request without `stream`."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choices = [_choice({"message": message}, token_ids, finish_reason)]
        return self._response(self.object_name, choices) | {"usage": usage.to_json()}


def _choice(content: Json, token_ids: Sequence[int] | None, finish_reason: str | None) -> Json:
    choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
    return choice if token_ids is None else choice | {"token_ids": list(token_ids)}
