"""The HTTP routes: OpenAI's under /v1, models and endpoints, and those for operators.

Handlers convert between `maveriq.serve.schemas` and `maveriq.serve.service`; completions continue in
`maveriq.serve.completions`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from maveriq.domain.deployments import Intent, Objective
from maveriq.exec.live_cluster import EndpointRequest
from maveriq.serve import home_page
from maveriq.serve.completion_schemas import ChatCompletionRequest, CompletionRequest, GenerationRequest
from maveriq.serve.completions import ChatResponse, CompletionResponse, PreparedRequest, complete
from maveriq.serve.errors import bad_request, not_found
from maveriq.serve.json_body import JsonRoute
from maveriq.serve.schemas import (
    ERROR_RESPONSES,
    CreateEndpoint,
    EndpointView,
    HealthView,
    ModelView,
    RegisterModel,
    RequestStatusName,
    RequestView,
)
from maveriq.serve.service import Service
from maveriq.serve.tokenizers import Tokenizer

Id = Annotated[int, Path(ge=0, le=2**53)]
PriorityHeader = Annotated[str | None, Header(alias="X-Priority", max_length=16)]
SloHeader = Annotated[str | None, Header(alias="X-SLO-Ms", max_length=32)]
RequestIdHeader = Annotated[str | None, Header(alias="X-Request-Id", max_length=64)]

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_MAX_SLO_MS = 1e9
_MAX_LISTED_REQUESTS = 1_000
_MAX_CHARACTERS_PER_TOKEN = 16  # English has 4; runs of spaces have more


def openai_routes(service: Service) -> APIRouter:
    """Return the routes under /v1."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=ERROR_RESPONSES, route_class=JsonRoute)

    @router.get("/models")
    async def list_models() -> JSONResponse:
        """List the models that have an endpoint, and each endpoint of a model that has several."""
        return JSONResponse({"object": "list", "data": [_model(name, service) for name in _served_names(service)]})

    @router.get("/models/{model}")
    async def retrieve_model(model: Annotated[str, Path(max_length=1024)]) -> JSONResponse:
        """Return one model that has an endpoint."""
        service.endpoint_for(model)
        return JSONResponse(_model(model, service))

    @router.post("/completions")
    async def create_completion(
        request: Request,
        body: CompletionRequest,
        x_priority: PriorityHeader = None,
        x_slo_ms: SloHeader = None,
        x_request_id: RequestIdHeader = None,
    ) -> Response:
        """Complete a prompt: text or token IDs."""

        async def token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
            prompt = body.single_prompt()
            if isinstance(prompt, str):
                return await _encode(service, tokenizer.encode, prompt, len(prompt), field="prompt")
            return tuple(prompt)

        prepared = await _prepare(service, body, token_ids, x_priority, x_slo_ms, x_request_id)
        return await complete(service, request, prepared, CompletionResponse)

    @router.post("/chat/completions")
    async def create_chat_completion(
        request: Request,
        body: ChatCompletionRequest,
        x_priority: PriorityHeader = None,
        x_slo_ms: SloHeader = None,
        x_request_id: RequestIdHeader = None,
    ) -> Response:
        """Complete a conversation."""

        async def token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
            messages = [message.to_dict() for message in body.messages]
            characters = sum(len(message["content"]) for message in messages)
            return await _encode(service, tokenizer.encode_chat, messages, characters, field="messages")

        prepared = await _prepare(service, body, token_ids, x_priority, x_slo_ms, x_request_id)
        return await complete(service, request, prepared, ChatResponse)

    return router


def model_routes(service: Service) -> APIRouter:
    """Return the routes under /models."""
    router = APIRouter(prefix="/models", tags=["maveriq"], responses=ERROR_RESPONSES, route_class=JsonRoute)

    @router.get("")
    async def list_registered_models() -> list[ModelView]:
        """List the registered models, and how far their profiles are."""
        return [ModelView.of(model, service.profiles) for model in service.models]

    @router.post("", status_code=201)
    async def register_model(body: RegisterModel) -> ModelView:
        """Register a model; a registered model keeps its ID. A profile of it is measured in the background."""
        return ModelView.of(await service.register_model(body.model, profile=body.profile), service.profiles)

    @router.get("/{model_id}")
    async def get_model(model_id: Id) -> ModelView:
        """Return one registered model, and how far its profile is."""
        return ModelView.of(service.models.by_id(model_id), service.profiles)

    @router.post("/{model_id}/profile", status_code=202)
    async def profile_model(model_id: Id) -> ModelView:
        """Measure a profile of a registered model in the background, again if there is one."""
        return ModelView.of(await service.profile_model(model_id), service.profiles)

    @router.delete("/{model_id}/profile", status_code=204)
    async def cancel_profile(model_id: Id) -> Response:
        """Cancel a profile; endpoints that wait for it are rejected."""
        await service.cancel_profile(model_id)
        return Response(status_code=204)

    @router.delete("/{model_id}", status_code=204)
    async def unregister_model(model_id: Id) -> Response:
        """Remove a model that has no endpoints from the registry."""
        await service.unregister_model(model_id)
        return Response(status_code=204)

    return router


def endpoint_routes(service: Service) -> APIRouter:
    """Return the routes under /endpoints, without this prefix: the application has them under a former path too."""
    router = APIRouter(tags=["maveriq"], responses=ERROR_RESPONSES, route_class=JsonRoute)

    @router.get("")
    async def list_endpoints() -> list[EndpointView]:
        """List the endpoints."""
        return [EndpointView.of(endpoint) for endpoint in service.endpoints()]

    @router.post("", status_code=201)
    async def create_endpoint(body: CreateEndpoint) -> EndpointView:
        """Create an endpoint by intent; one that does not fit has the status `rejected` and a reason."""
        intent = Intent(
            objective=Objective.named(body.intent),
            slo_s=None if body.slo_ms is None else body.slo_ms / 1e3,
            min_accuracy=body.min_accuracy,
            float16_only=body.float16_only,
        )
        engine, whole_command = service.settings.engine.settings(body.engine)
        if engine is not None and body.batch_size > 1:
            raise bad_request(
                "batch_size is for engines that take one execution at a time; engines that batch continuously have "
                "max_num_seqs",
                "batch_size",
            )
        model = await service.register_model(body.model)
        request = EndpointRequest(
            model=model.spec,
            intent=intent,
            output_tokens=body.output_tokens,
            batch_size=body.batch_size,
            engine=engine,
            whole_command=whole_command,
            wait_for_profile=body.wait_for_profile,
        )
        return EndpointView.of(await service.create_endpoint(model, request, body.placement or ""))

    @router.get("/{endpoint_id}")
    async def get_endpoint(endpoint_id: Id) -> EndpointView:
        """Return one endpoint."""
        return EndpointView.of(service.endpoint(endpoint_id))

    @router.delete("/{endpoint_id}", status_code=204)
    async def delete_endpoint(endpoint_id: Id) -> Response:
        """Remove an endpoint: running requests finish, waiting requests are refused."""
        await service.remove_endpoint(endpoint_id)
        return Response(status_code=204)

    return router


def operator_routes(service: Service) -> APIRouter:
    """Return the routes under /requests, /health and /metrics, and the page at /."""
    router = APIRouter(tags=["maveriq"], responses=ERROR_RESPONSES)

    @router.get("/", include_in_schema=False)
    async def home(request: Request) -> Response:
        """Say what the service offers: HTML for browsers, else plain text."""
        status, models = service.status, _served_names(service)
        routes = home_page.routes_of(request.app.openapi())
        if "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(home_page.as_html(status, models, routes), headers=home_page.HTML_HEADERS)
        return PlainTextResponse(home_page.as_text(status, models, routes))

    @router.get("/requests")
    async def list_requests(
        status: Annotated[RequestStatusName | None, Query()] = None,
        limit: Annotated[int, Query(ge=1, le=_MAX_LISTED_REQUESTS)] = 100,
    ) -> list[RequestView]:
        """List accepted requests, newest first."""
        return [RequestView.of(row) for row in await service.store.requests(status=status, limit=limit)]

    @router.get("/requests/{request_id}")
    async def get_request(request_id: Annotated[str, Path(max_length=64)]) -> RequestView:
        """Return the status of an accepted request."""
        row = await service.store.request(request_id)
        if row is None:
            raise not_found(
                "request", f"there is no request {request_id!r}; it was not accepted, or its status is no longer kept"
            )
        return RequestView.of(row)

    @router.get("/health", responses={503: {"model": HealthView}})
    async def health() -> JSONResponse:
        """Return `ready`, `degraded` (it serves, but not everything) or `stopping` (503)."""
        status = service.status
        view = HealthView(
            status=status,
            problems=service.problems(),
            endpoints=len(service.endpoints()),
            in_flight=len(service.requests),
        )
        return JSONResponse(view.model_dump(), status_code=503 if status == "stopping" else 200)

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


async def _prepare(
    service: Service,
    body: GenerationRequest,
    token_ids: Callable[[Tokenizer], Awaitable[tuple[int, ...]]],
    priority: str | None,
    slo_ms: str | None,
    request_id: str | None,
) -> PreparedRequest:
    """Find the endpoint of a completion request and tokenize its prompt; a header counts if the body has no value.

    Raises:
        ApiError: a parameter is not supported or not valid, or the model has no endpoint.
    """
    body.check_supported()
    if request_id is not None and not _REQUEST_ID.fullmatch(request_id):
        raise bad_request("X-Request-Id may have up to 64 letters, digits and . _ : -", "X-Request-Id")
    endpoint = service.endpoint_for(body.model)
    tokenizer = await service.models.tokenizer(endpoint.model)
    ids = await token_ids(tokenizer)
    vocab_size = endpoint.model.spec.vocab_size
    if ids and len(ids) <= service.settings.max_prompt_tokens and max(ids) >= vocab_size:
        raise bad_request(f"token ID {max(ids)} is beyond the model's vocabulary of {vocab_size}", "prompt")
    return PreparedRequest(
        endpoint=endpoint,
        tokenizer=tokenizer,
        token_ids=ids,
        body=body,
        priority=bool(body.priority) or _priority(priority),
        slo_ms=body.slo_ms if body.slo_ms is not None else _slo_ms(slo_ms),
        request_id=request_id,
    )


async def _encode(
    service: Service, encode: Callable[[Any], Awaitable[tuple[int, ...]]], content: Any, characters: int, *, field: str
) -> tuple[int, ...]:
    """Tokenize a text, unless it is surely too long.

    Raises:
        ApiError: the text is too long.
    """
    max_characters = service.settings.max_prompt_tokens * _MAX_CHARACTERS_PER_TOKEN
    if characters > max_characters:
        message = f"the prompt has {characters} characters; the maximum is {max_characters}"
        raise bad_request(message, field, code="context_length_exceeded")
    return await encode(content)


def _priority(header: str | None) -> bool:
    if header is None or header.lower() in ("false", "0"):
        return False
    if header.lower() in ("true", "1"):
        return True
    raise bad_request(f"X-Priority must be true or false, not {header!r}", "X-Priority")


def _slo_ms(header: str | None) -> float | None:
    if header is None:
        return None
    try:
        value = float(header)
    except ValueError:
        value = math.nan
    if not 0 < value <= _MAX_SLO_MS:
        raise bad_request(f"X-SLO-Ms must be a positive number of milliseconds, not {header!r}", "X-SLO-Ms")
    return value


def _served_names(service: Service) -> list[str]:
    endpoints = [endpoint for endpoint in service.endpoints() if endpoint.status != "rejected"]
    models = [endpoint.model.spec.name for endpoint in endpoints]
    addresses = [endpoint.address for endpoint in endpoints if models.count(endpoint.model.spec.name) > 1]
    return [*dict.fromkeys(models), *addresses]


def _model(name: str, service: Service) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.started_s, "owned_by": "maveriq"}
