"""The routes of developers: models and endpoints.

The routes of operators: what became of requests, health, metrics.
The routes that OpenAI clients know.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from maveriq.domain.deployments import Intent, Objective
from maveriq.exec.live_cluster import EndpointRequest
from maveriq.serve.completions import ChatResponse, CompletionResponse, Prompt, answer
from maveriq.serve.errors import bad_request, not_found
from maveriq.serve.schemas import (
    ERRORS,
    ChatCompletionRequest,
    CompletionRequest,
    CreateEndpoint,
    EndpointView,
    Generation,
    HealthView,
    ModelView,
    RegisterModel,
    RequestStatusName,
    RequestView,
)
from maveriq.serve.service import Service, address
from maveriq.serve.tokenizers import Tokenizer

Id = Annotated[int, Path(ge=0, le=2**53)]


def developer_routes(service: Service) -> APIRouter:
    """Return the routes under /models and /endpoints."""
    router = APIRouter(tags=["maveriq"], responses=ERRORS)

    @router.get("/models")
    async def list_registered_models() -> list[ModelView]:
        """List the registered models."""
        return [ModelView.of(model) for model in service.models]

    @router.post("/models", status_code=201)
    async def register_model(body: RegisterModel) -> ModelView:
        """Make a model known; one that is known already keeps its number."""
        return ModelView.of(await service.models.register(body.model))

    @router.delete("/models/{model_id}", status_code=204)
    async def unregister_model(model_id: Id) -> Response:
        """Take a model that is not deployed out of the register."""
        await service.unregister_model(model_id)
        return Response(status_code=204)

    @router.get("/endpoints")
    async def list_endpoints() -> list[EndpointView]:
        """List the endpoints."""
        return [EndpointView.of(endpoint) for endpoint in service.endpoints()]

    @router.post("/endpoints", status_code=201)
    async def create_endpoint(body: CreateEndpoint) -> EndpointView:
        """Have a model served by intent. One that fits nowhere is listed as rejected, with the reason."""
        intent = Intent(
            objective=Objective.named(body.intent),
            slo_s=None if body.slo_ms is None else body.slo_ms / 1e3,
            min_accuracy=body.min_accuracy,
            float16_only=body.float16_only,
        )
        model = await service.models.register(body.model)
        asked = EndpointRequest(
            model=model.spec, intent=intent, output_tokens=body.output_tokens, batch_size=body.batch_size
        )
        return EndpointView.of(await service.create_endpoint(model, asked, body.placement or ""))

    @router.get("/endpoints/{endpoint_id}")
    async def get_endpoint(endpoint_id: Id) -> EndpointView:
        """Return one endpoint."""
        return EndpointView.of(service.endpoint(endpoint_id))

    @router.delete("/endpoints/{endpoint_id}", status_code=204)
    async def delete_endpoint(endpoint_id: Id) -> Response:
        """Remove an endpoint: running requests finish, waiting ones are refused."""
        await service.remove_endpoint(endpoint_id)
        return Response(status_code=204)

    return router


_MAX_LISTED = 1_000


def operator_routes(service: Service) -> APIRouter:
    """Return the routes under /requests, /health and /metrics."""
    router = APIRouter(tags=["maveriq"], responses=ERRORS)

    @router.get("/requests")
    async def list_requests(
        status: Annotated[RequestStatusName | None, Query()] = None,
        limit: Annotated[int, Query(ge=1, le=_MAX_LISTED)] = 100,
    ) -> list[RequestView]:
        """List the last accepted requests, the newest first."""
        return [RequestView.of(row) for row in await service.store.requests(status=status, maximum=limit)]

    @router.get("/requests/{request_id}")
    async def get_request(request_id: Annotated[str, Path(max_length=64)]) -> RequestView:
        """Return what became of an accepted request."""
        row = await service.store.request(request_id)
        if row is None:
            raise not_found("request", f"there is no request {request_id!r}; it was never accepted, or ended long ago")
        return RequestView.of(row)

    @router.get("/health", responses={503: {"model": HealthView}})
    async def health() -> JSONResponse:
        """Say whether all is well: ready, degraded (it serves, but not everything), or stopping (503)."""
        problems = service.problems()
        stopping = not service.tracker.open
        view = HealthView(
            status="stopping" if stopping else "degraded" if problems else "ready",
            problems=problems,
            endpoints=len(service.endpoints()),
            in_flight=len(service.tracker),
        )
        return JSONResponse(view.model_dump(), status_code=503 if stopping else 200)

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


_IN_A_THREAD_FROM = 4_096  # characters; what is shorter is tokenised at once
_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_MAX_SLO_MS = 1e9


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
        body: CompletionRequest,
        x_priority: Annotated[str | None, Header(max_length=16)] = None,
        x_slo_ms: Annotated[str | None, Header(max_length=32)] = None,
        x_request_id: Annotated[str | None, Header(max_length=64)] = None,
    ) -> Response:
        """Continue a prompt: text, or token ids."""

        async def token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
            prompt = body.one_prompt()
            return await _encoded(tokenizer.encode, prompt, len(prompt)) if isinstance(prompt, str) else tuple(prompt)

        prompt = await _prompt(service, body, token_ids, x_priority, x_slo_ms, x_request_id)
        return await answer(service, request, prompt, CompletionResponse)

    @router.post("/chat/completions")
    async def create_chat_completion(
        request: Request,
        body: ChatCompletionRequest,
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
        return await answer(service, request, prompt, ChatResponse)

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
        raise bad_request("X-Request-Id may hold up to 64 letters, digits and . _ : -", "X-Request-Id")
    endpoint = service.target(body.model)
    tokenizer = service.models.tokenizer(endpoint.model)
    ids = await token_ids(tokenizer)
    vocab_size = endpoint.model.spec.vocab_size
    if ids and max(ids) >= vocab_size:
        raise bad_request(f"token id {max(ids)} is beyond the model's vocabulary of {vocab_size}", "prompt")
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
    raise bad_request(f"X-Priority must be true or false, not {header!r}", "X-Priority")


def _milliseconds(header: str | None) -> float | None:
    if header is None:
        return None
    try:
        value = float(header)
    except ValueError:
        value = math.nan
    if not 0 < value <= _MAX_SLO_MS:
        raise bad_request(f"X-SLO-Ms must be a positive number of milliseconds, not {header!r}", "X-SLO-Ms")
    return value


def _deployed(service: Service) -> list[str]:
    endpoints = [one for one in service.endpoints() if one.status != "rejected"]
    names = [one.model.spec.name for one in endpoints]
    several = [address(one) for one in endpoints if names.count(one.model.spec.name) > 1]
    return [*dict.fromkeys(names), *several]


def _model(name: str, service: Service) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.started_s, "owned_by": "maveriq"}
