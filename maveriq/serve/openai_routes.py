"""The routes that OpenAI clients know."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Request
from fastapi.responses import JSONResponse, Response

from maveriq.serve.bodies import ERRORS
from maveriq.serve.generating import Prompt, answer
from maveriq.serve.openai_bodies import ChatAsk, CompletionAsk, Generation
from maveriq.serve.refusals import bad
from maveriq.serve.service import Service, address
from maveriq.serve.tokens import Tokenizer
from maveriq.serve.wire import ChatWire, CompletionWire

_IN_A_THREAD_FROM = 4_096  # characters; what is shorter is tokenised at once
_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_MOST_SLO_MS = 1e9


def openai_routes(service: Service) -> APIRouter:
    """Return the routes under /v1."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=ERRORS)

    @router.get("/models")
    async def list_models() -> JSONResponse:
        """List what is deployed: each model, and each endpoint of those that have several."""
        return JSONResponse({"object": "list", "data": [_model(name, service) for name in _deployed(service)]})

    @router.get("/models/{model}")
    async def retrieve_model(model: Annotated[str, Path(max_length=1024)]) -> JSONResponse:
        """Return one deployed model."""
        service.target(model)
        return JSONResponse(_model(model, service))

    @router.post("/completions")
    async def create_completion(
        request: Request,
        body: CompletionAsk,
        x_priority: Annotated[str | None, Header(max_length=16)] = None,
        x_slo_ms: Annotated[str | None, Header(max_length=32)] = None,
        x_request_id: Annotated[str | None, Header(max_length=64)] = None,
    ) -> Response:
        """Continue a prompt: text, or token ids."""

        async def token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
            prompt = body.one_prompt()
            return await _encoded(tokenizer.encode, prompt, len(prompt)) if isinstance(prompt, str) else tuple(prompt)

        prompt = await _prompt(service, body, token_ids, x_priority, x_slo_ms, x_request_id)
        return await answer(service, request, prompt, CompletionWire)

    @router.post("/chat/completions")
    async def create_chat_completion(
        request: Request,
        body: ChatAsk,
        x_priority: Annotated[str | None, Header(max_length=16)] = None,
        x_slo_ms: Annotated[str | None, Header(max_length=32)] = None,
        x_request_id: Annotated[str | None, Header(max_length=64)] = None,
    ) -> Response:
        """Continue a conversation."""

        async def token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
            messages = [message.plain() for message in body.messages]
            size = sum(len(message["content"]) for message in messages)
            return await _encoded(tokenizer.encode_chat, messages, size)

        prompt = await _prompt(service, body, token_ids, x_priority, x_slo_ms, x_request_id)
        return await answer(service, request, prompt, ChatWire)

    return router


async def _prompt(
    service: Service,
    body: Generation,
    token_ids: Callable[[Tokenizer], Any],
    priority: str | None,
    slo_ms: str | None,
    request_id: str | None,
) -> Prompt:
    """Put a request together; a header counts where the body says nothing.

    Raises:
        ApiError: something about it cannot be used.
    """
    body.check()
    if request_id is not None and not _ID.fullmatch(request_id):
        raise bad("X-Request-Id may hold up to 64 letters, digits and . _ : -", "X-Request-Id")
    endpoint = service.target(body.model)
    tokenizer = service.models.tokenizer(endpoint.model)
    ids = await token_ids(tokenizer)
    vocab_size = endpoint.model.spec.vocab_size
    if ids and max(ids) >= vocab_size:
        raise bad(f"token id {max(ids)} is beyond the model's vocabulary of {vocab_size}", "prompt")
    return Prompt(
        endpoint=endpoint,
        tokenizer=tokenizer,
        token_ids=ids,
        said=body,
        priority=body.priority or _is_true(priority),
        slo_ms=body.slo_ms if body.slo_ms is not None else _milliseconds(slo_ms),
        request_id=request_id,
    )


async def _encoded(encode: Callable[[Any], tuple[int, ...]], what: Any, size: int) -> tuple[int, ...]:
    """Tokenise; what is long does not hold up others meanwhile."""
    return encode(what) if size < _IN_A_THREAD_FROM else await asyncio.to_thread(encode, what)


def _is_true(header: str | None) -> bool:
    if header is None or header.lower() in ("false", "0"):
        return False
    if header.lower() in ("true", "1"):
        return True
    raise bad(f"X-Priority must be true or false, not {header!r}", "X-Priority")


def _milliseconds(header: str | None) -> float | None:
    if header is None:
        return None
    try:
        value = float(header)
    except ValueError:
        value = math.nan
    if not 0 < value <= _MOST_SLO_MS:
        raise bad(f"X-SLO-Ms must be a positive number of milliseconds, not {header!r}", "X-SLO-Ms")
    return value


def _deployed(service: Service) -> list[str]:
    endpoints = [one for one in service.endpoints() if one.status != "rejected"]
    names = [one.model.spec.name for one in endpoints]
    several = [address(one) for one in endpoints if names.count(one.model.spec.name) > 1]
    return [*dict.fromkeys(names), *several]


def _model(name: str, service: Service) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.started_s, "owned_by": "maveriq"}
