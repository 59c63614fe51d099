"""The HTTP application: routes behind the gate, every error in OpenAI's shape."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import AsyncIterator, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from maveriq import __version__
from maveriq.errors import InputError, MaveriqError
from maveriq.exec.live_cluster import LiveCluster
from maveriq.policy.pinned import PinnedPlacementPolicy
from maveriq.serve.auth import AuthMiddleware
from maveriq.serve.errors import ApiError, bad_request
from maveriq.serve.model_registry import ModelRegistry
from maveriq.serve.routes import developer_routes, openai_routes, operator_routes
from maveriq.serve.service import Service
from maveriq.serve.settings import ServeSettings
from maveriq.serve.store import Store

_LOG = logging.getLogger(__name__)
_OTHER_TYPE = frozenset({"string_type", "list_type", "int_type"})
_TYPE = re.compile(r"str|int|constrained-\w+|.*\[.*\]")  # in a path where pydantic tries several types


def create_app(
    cluster: LiveCluster,
    store: Store,
    settings: ServeSettings,
    placements: PinnedPlacementPolicy,
    models: ModelRegistry,
) -> FastAPI:
    """Return the application for a cluster that is up.

    Its lifespan brings back what the store knows, and at the end stops the service: cluster and
    store are closed then. The service is `app.state.service`.

    Args:
        cluster: serves.
        store: what survives a restart.
        settings: the limits and the token.
        placements: the policy of `cluster`.
        models: the registered models.
    """
    service = Service(cluster, store, settings, placements, models)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="maveriq",
        version=__version__,
        summary="Many LLMs on one GPU cluster, deployed by intent.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(openai_routes(service))
    app.include_router(developer_routes(service))
    app.include_router(operator_routes(service))
    _explain_errors(app, service)
    app.add_middleware(
        AuthMiddleware, settings=settings, rejected=lambda code: service.metrics.errors.labels(code).inc()
    )
    return app


def _explain_errors(app: FastAPI, service: Service) -> None:
    """Give every error OpenAI's shape and count it."""

    def told(error: ApiError) -> JSONResponse:
        service.metrics.errors.labels(error.code).inc()
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers())

    @app.exception_handler(ApiError)
    async def api_error(_request: Request, error: ApiError) -> JSONResponse:
        return told(error)

    @app.exception_handler(InputError)
    async def input_error(_request: Request, error: InputError) -> JSONResponse:
        return told(bad_request(str(error)))

    @app.exception_handler(MaveriqError)
    async def cannot(_request: Request, error: MaveriqError) -> JSONResponse:
        return told(ApiError(503, str(error), code="not_possible_now", retry_after_s=10))

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        return told(_in_one_line(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        said = f"{error.detail}: {request.method} {request.url.path}; GET /openapi.json lists what there is"
        answer = told(ApiError(error.status_code, said, code=code))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def bug(_request: Request, _error: Exception) -> JSONResponse:
        return told(ApiError(500, "this is a bug in maveriq; the server's log says where", code="internal_error"))


def _in_one_line(faults: Sequence[Any]) -> ApiError:
    """Return the first thing that is wrong with a body, by its place.

    Where a field may be of several types there is a fault for each; one that says more than "not of this type" counts.
    """
    fault = next((one for one in faults if one["type"] not in _OTHER_TYPE), faults[0])
    *steps, last = map(str, fault["loc"][1:] or ("",))
    named = [step for step in steps if not _TYPE.fullmatch(step)]
    if fault["type"] == "extra_forbidden" or not _TYPE.fullmatch(last):
        named.append(last)
    where = ".".join(named)
    if fault["type"] == "extra_forbidden":
        return bad_request(f"{where} is not known here; leave it out", where, code="unknown_parameter")
    if fault["type"] == "json_invalid":
        return bad_request("the body is not valid JSON", code="invalid_json")
    return bad_request(f"{where or 'the body'}: {fault['msg'][:1].lower()}{fault['msg'][1:]}", where or None)
