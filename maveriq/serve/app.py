"""The HTTP application: the routes, the authentication in front of them, and OpenAI's shape for every error."""

from __future__ import annotations

import contextlib
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
from maveriq.serve.access_log import AccessLog, AccessLogMiddleware
from maveriq.serve.auth import AuthMiddleware
from maveriq.serve.completion_schemas import UNSUPPORTED
from maveriq.serve.dashboard import dashboard_routes
from maveriq.serve.errors import ApiError, bad_request
from maveriq.serve.head import HeadMiddleware
from maveriq.serve.json_body import field_name
from maveriq.serve.model_registry import ModelRegistry
from maveriq.serve.profile_jobs import ProfileSettings
from maveriq.serve.routes import endpoint_routes, model_routes, openai_routes, operator_routes
from maveriq.serve.service import Service
from maveriq.serve.settings import ServeSettings
from maveriq.serve.store import Store


def create_app(
    cluster: LiveCluster,
    store: Store,
    settings: ServeSettings,
    placements: PinnedPlacementPolicy,
    models: ModelRegistry,
    access_log: AccessLog | None = None,
    profiles: ProfileSettings | None = None,
) -> FastAPI:
    """Return the application for a running cluster; its service is `app.state.service`.

    The app's lifespan starts the service, which restores the endpoints in the store, and stops it, which closes
    cluster and store.

    Args:
        cluster: runs the requests.
        store: the state that survives a restart.
        settings: the limits and the token.
        placements: the policy of `cluster`.
        models: the registered models.
        access_log: gets a line for each request; None for no such log.
        profiles: how profiles of new models are measured; None to measure none.
    """
    service = Service(cluster, store, settings, placements, models, profiles)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()
            await models.close()

    app = FastAPI(
        title="maveriq",
        version=__version__,
        summary="Many LLMs on one GPU cluster, deployed by intent.",
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from other hosts
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(openai_routes(service))
    app.include_router(model_routes(service))
    endpoints = endpoint_routes(service)
    app.include_router(endpoints, prefix="/endpoints")
    app.include_router(endpoints, prefix="/deployments", include_in_schema=False)  # their former path
    app.include_router(operator_routes(service))
    app.include_router(dashboard_routes(service))
    _add_error_handlers(app, service)
    app.add_middleware(HeadMiddleware)
    app.add_middleware(
        AuthMiddleware, settings=settings, on_rejected=lambda code: service.metrics.http_errors.labels(code).inc()
    )
    if access_log is not None:
        app.add_middleware(AccessLogMiddleware, log=access_log)
    return app


def _add_error_handlers(app: FastAPI, service: Service) -> None:
    """Turn every exception into an error in OpenAI's shape, and count it."""

    def response(error: ApiError) -> JSONResponse:
        service.metrics.http_errors.labels(error.code).inc()
        return JSONResponse(error.to_json(), status_code=error.status, headers=error.headers())

    @app.exception_handler(ApiError)
    async def api_error(_request: Request, error: ApiError) -> JSONResponse:
        return response(error)

    @app.exception_handler(InputError)
    async def input_error(_request: Request, error: InputError) -> JSONResponse:
        return response(bad_request(str(error)))

    @app.exception_handler(MaveriqError)
    async def maveriq_error(_request: Request, error: MaveriqError) -> JSONResponse:
        return response(ApiError(503, str(error), code="not_possible_now", retry_after_s=10))

    @app.exception_handler(RequestValidationError)
    async def validation_error(_request: Request, error: RequestValidationError) -> JSONResponse:
        return response(_first_validation_error(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        message = f"{error.detail}: {request.method} {request.url.path}; GET /openapi.json lists the routes"
        answer = response(ApiError(error.status_code, message, code=code))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(MemoryError)
    @app.exception_handler(RuntimeError)
    async def exhausted(_request: Request, error: Exception) -> JSONResponse:
        return response(_exhaustion_error(error))

    @app.exception_handler(Exception)
    async def internal_error(_request: Request, _error: Exception) -> JSONResponse:
        message = "internal error: this is a bug in maveriq; see the server's log"
        return response(ApiError(500, message, code="internal_error"))


def _exhaustion_error(error: Exception) -> ApiError:
    """Return the error for a request for which there is no memory or no thread.

    Raises:
        Exception: the given one, if it is another.
    """
    if isinstance(error, MemoryError):
        message = "the server is out of memory; try again later, or with a shorter request"
        return ApiError(503, message, code="out_of_memory", retry_after_s=10)
    if str(error) == "can't start new thread":  # CPython has no exception of its own for this
        message = "the system starts no more threads for the server; try again later"
        return ApiError(503, message, code="not_possible_now", retry_after_s=10)
    raise error


# Where a field may have several types, pydantic reports one error per type and names the type in the path.
_WRONG_TYPE_ERRORS = frozenset({"string_type", "list_type", "int_type"})
_TYPE_IN_PATH = re.compile(r"str|int|constrained-\w+|.*\[.*\]")


def _first_validation_error(errors: Sequence[Any]) -> ApiError:
    """Return the first error of a body with the path of its field.

    An error that says more than "not of this type" takes precedence.
    """
    error = next((error for error in errors if error["type"] not in _WRONG_TYPE_ERRORS), errors[0])
    *steps, last = map(str, error["loc"][1:] or ("",))
    path = [step for step in steps if not _TYPE_IN_PATH.fullmatch(step)]
    if error["type"] == "extra_forbidden" or not _TYPE_IN_PATH.fullmatch(last):
        path.append(last)
    field = field_name(tuple(path))
    if error["type"] == "extra_forbidden":
        return bad_request(f"unknown field {field}; leave it out", field, code="unknown_parameter")
    if error["type"] == UNSUPPORTED:
        return bad_request(f"{field} is {error['msg']}", field, code=UNSUPPORTED)
    message = error["msg"]
    return bad_request(f"{field or 'the body'}: {message[:1].lower()}{message[1:]}", field or None)
