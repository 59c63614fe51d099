"""The routes of operators: what became of requests, health, metrics."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from maveriq.serve.bodies import ERRORS, HealthView, RequestStatusName, RequestView
from maveriq.serve.refusals import unknown
from maveriq.serve.service import Service

_MOST_LISTED = 1_000


def operator_routes(service: Service) -> APIRouter:
    """Return the routes under /requests, /health and /metrics."""
    router = APIRouter(tags=["maveriq"], responses=ERRORS)

    @router.get("/requests")
    async def list_requests(
        status: Annotated[RequestStatusName | None, Query()] = None,
        limit: Annotated[int, Query(ge=1, le=_MOST_LISTED)] = 100,
    ) -> list[RequestView]:
        """List the last accepted requests, the newest first."""
        return [RequestView.of(row) for row in await service.store.requests(status=status, most=limit)]

    @router.get("/requests/{request_id}")
    async def get_request(request_id: Annotated[str, Path(max_length=64)]) -> RequestView:
        """Return what became of an accepted request."""
        row = await service.store.request(request_id)
        if row is None:
            raise unknown("request", f"there is no request {request_id!r}; it was never accepted, or ended long ago")
        return RequestView.of(row)

    @router.get("/health", responses={503: {"model": HealthView}})
    async def health() -> JSONResponse:
        """Say whether all is well: ready, degraded (it serves, but not everything), or stopping (503)."""
        problems = service.problems()
        stopping = not service.tracker.open
        view = HealthView(
            status="stopping" if stopping else "degraded" if problems else "ready",
            problems=problems,
            deployments=len(service.endpoints()),
            in_flight=len(service.tracker),
        )
        return JSONResponse(view.model_dump(), status_code=503 if stopping else 200)

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
