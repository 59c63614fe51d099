"""The routes of developers: models and deployments."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.responses import Response

from maveriq.domain.intents import Intent, Objective
from maveriq.exec.cluster import EndpointRequest
from maveriq.serve.bodies import ERRORS, DeploymentAsk, DeploymentView, ModelAsk, ModelView
from maveriq.serve.service import Service

Number = Annotated[int, Path(ge=0, le=2**53)]


def developer_routes(service: Service) -> APIRouter:
    """Return the routes under /models and /deployments."""
    router = APIRouter(tags=["maveriq"], responses=ERRORS)

    @router.get("/models")
    async def list_registered_models() -> list[ModelView]:
        """List the registered models."""
        return [ModelView.of(model) for model in service.models]

    @router.post("/models", status_code=201)
    async def register_model(body: ModelAsk) -> ModelView:
        """Make a model known; one that is known already keeps its number."""
        return ModelView.of(await service.models.register(body.model))

    @router.delete("/models/{number}", status_code=204)
    async def forget_model(number: Number) -> Response:
        """Take a model that is not deployed out of the register."""
        await service.forget(number)
        return Response(status_code=204)

    @router.get("/deployments")
    async def list_deployments() -> list[DeploymentView]:
        """List the deployments."""
        return [DeploymentView.of(endpoint) for endpoint in service.endpoints()]

    @router.post("/deployments", status_code=201)
    async def create_deployment(body: DeploymentAsk) -> DeploymentView:
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
        return DeploymentView.of(await service.deploy(model, asked, body.placement or ""))

    @router.get("/deployments/{number}")
    async def get_deployment(number: Number) -> DeploymentView:
        """Return one deployment as it is now."""
        return DeploymentView.of(service.endpoint(number))

    @router.delete("/deployments/{number}", status_code=204)
    async def delete_deployment(number: Number) -> Response:
        """Take a deployment away: what runs is finished, what waits is refused."""
        await service.remove(number)
        return Response(status_code=204)

    return router
