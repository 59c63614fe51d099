"""The JSON bodies of the HTTP API, except those of completions (`maveriq.serve.completion_schemas`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from maveriq.domain.progress import DeploymentStatus
from maveriq.exec.batching_spec import settings_table
from maveriq.serve.profile_jobs import ProfileJobs, ProfileState
from maveriq.serve.profile_jobs import Status as ProfileStatusName
from maveriq.serve.service import Endpoint, ServiceStatus
from maveriq.serve.store import RequestRow, StoredModel

_MAX_TOKENS = 1_000_000
_MAX_BATCH_SIZE = 10_000
_MAX_MS = 1e9

EngineText = Annotated[str, Field(min_length=1, max_length=4096)]
EngineTable = Annotated[
    dict[Annotated[str, Field(max_length=100)], bool | int | float | Annotated[str, Field(max_length=1024)]],
    Field(max_length=100),
]
Name = Annotated[str, Field(min_length=1, max_length=1024)]
Milliseconds = Annotated[float, Field(gt=0, le=_MAX_MS, allow_inf_nan=False)]
RequestStatusName = Literal["accepted", "completed", "refused", "failed", "unfinished"]


class Body(BaseModel):
    """A JSON body that rejects unknown fields, so that a misspelled field is not silently ignored."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


# Models


class RegisterModel(Body):
    """POST /models: register a model."""

    model: Name = Field(description="A known model's name, or the path of a config.json in the models folder.")
    profile: bool | None = Field(
        default=None,
        description="Whether to measure it in the background. Default: if the server measures new models, and nothing "
        "of it was measured before.",
    )


class ProfileView(Body):
    """A profile of a model that the server measures, and what it has cost."""

    status: ProfileStatusName
    detail: str = Field(description="How far it is, or why it failed.")
    gpus: list[int] = Field(description="The GPUs that it is measured on now.")
    expected_s: float
    measured_s: float = Field(description="Seconds for which it has held GPUs.")
    gpu_s: float = Field(description="The same times the number of GPUs.")
    usd: float | None = Field(description="What these cost; null where the price of a GPU is not known.")
    samples: int

    @classmethod
    def of(cls, state: ProfileState, usd: float | None) -> ProfileView:
        """Return the view of a profile."""
        return cls(
            status=state.status,
            detail=state.detail,
            gpus=list(state.gpus),
            expected_s=round(state.expected_s, 1),
            measured_s=round(state.measured_s, 1),
            gpu_s=round(state.gpu_s, 1),
            usd=None if usd is None else round(usd, 6),
            samples=state.samples,
        )


class ModelView(Body):
    """A registered model."""

    id: int
    name: str
    architecture: str
    layers: int
    hidden_size: int
    vocab_size: int
    own_files: bool = Field(description="Whether it was read from the models folder.")
    profile: ProfileView | None = Field(description="Its profile, where the server measures one.")

    @classmethod
    def of(cls, model: StoredModel, profiles: ProfileJobs) -> ModelView:
        """Return the view of a model and its profile."""
        spec, state = model.spec, profiles.state(model.model_id)
        return cls(
            id=model.model_id,
            name=spec.name,
            architecture=spec.architecture,
            layers=spec.layers,
            hidden_size=spec.hidden_size,
            vocab_size=spec.vocab_size,
            own_files=bool(model.folder),
            profile=None if state is None else ProfileView.of(state, profiles.usd(state)),
        )


# Endpoints


class CreateEndpoint(Body):
    """POST /endpoints: serve a model by intent. A model that is not registered is registered first."""

    model: Name = Field(description="Name or ID of a registered model, or what POST /models takes.")
    intent: Annotated[str, Field(max_length=64)] = Field(
        default="min-cost", description="min-cost, min-latency, min-memory, or min-gpu-cost."
    )
    slo_ms: Milliseconds | None = Field(default=None, description="Objective for the latency of a request.")
    min_accuracy: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = Field(
        default=0.0, description="In percent of the float16 model's accuracy."
    )
    float16_only: bool = Field(default=False, description="No quantized weights.")
    placement: Annotated[str, Field(max_length=64)] | None = Field(
        default=None, description="hybrid, packing, llf or none; default: the server's policy."
    )
    batch_size: Annotated[int, Field(ge=1, le=_MAX_BATCH_SIZE)] = Field(
        default=1, description="Maximum number of requests that an engine runs at once."
    )
    output_tokens: Annotated[int, Field(ge=1, le=_MAX_TOKENS)] = Field(
        default=20, description="Typical length of an output; also the default of max_tokens."
    )
    engine: EngineText | EngineTable | None = Field(
        default=None,
        description="How its engines batch, as in a model set: a table of arguments, a kind, or a whole command; "
        "exclusive for one execution at a time. Default: the server's --engine.",
    )
    wait_for_profile: bool = Field(
        default=True,
        description="While a profile of the model is measured: deploy after it; false deploys at once by the physics "
        "estimate.",
    )


class DeploymentView(Body):
    """A deployment: one replica of an endpoint, run by one engine."""

    id: int
    configuration: str
    layer_split: list[int]
    gpus: list[int]
    status: str
    reason: str
    waiting: int
    completed: int
    restarts: int
    running: int | None = Field(description="Requests that an engine that batches continuously has admitted.")
    kv_use: float | None = Field(description="Share of its KV cache that they hold.")

    @classmethod
    def of(cls, deployment: DeploymentStatus) -> DeploymentView:
        """Return the view of a deployment."""
        return cls(
            id=deployment.deployment_id,
            configuration=deployment.configuration,
            layer_split=list(deployment.layer_split),
            gpus=list(deployment.gpu_ids),
            status=deployment.status,
            reason=deployment.reason,
            waiting=deployment.waiting,
            completed=deployment.completed,
            restarts=deployment.restarts,
            running=deployment.running,
            kv_use=deployment.kv_use,
        )


class EndpointView(Body):
    """An endpoint: what was requested, and the deployments that serve it."""

    id: int
    model: str
    model_id: int
    intent: str
    slo_ms: float | None
    min_accuracy: float
    float16_only: bool
    placement: str | None
    batch_size: int
    output_tokens: int
    engine: EngineTable | None = Field(description="Settings of its engines where they batch continuously.")
    status: str
    reason: str
    waiting: int
    completed: int
    deployments: list[DeploymentView]

    @classmethod
    def of(cls, endpoint: Endpoint) -> EndpointView:
        """Return the view of an endpoint."""
        request, deployments = endpoint.stored.request, endpoint.deployments
        return cls(
            id=endpoint.endpoint_id,
            model=endpoint.model.spec.name,
            model_id=endpoint.model.model_id,
            intent=request.intent.objective.value,
            slo_ms=None if request.intent.slo_s is None else request.intent.slo_s * 1e3,
            min_accuracy=request.intent.min_accuracy,
            float16_only=request.intent.float16_only,
            placement=endpoint.stored.placement or None,
            batch_size=request.batch_size,
            output_tokens=request.output_tokens,
            engine=None if request.engine is None else settings_table(request.engine),
            status=endpoint.status,
            reason=endpoint.reason,
            waiting=endpoint.waiting + sum(deployment.waiting for deployment in deployments),
            completed=sum(deployment.completed for deployment in deployments),
            deployments=[DeploymentView.of(deployment) for deployment in deployments],
        )


# Requests, health, errors


class RequestView(Body):
    """An accepted request; times are in seconds since 1970."""

    id: str
    model: str
    endpoint_id: int
    status: RequestStatusName
    reason: str
    prompt_tokens: int
    output_tokens: int
    accepted_s: float
    ended_s: float | None

    @classmethod
    def of(cls, row: RequestRow) -> RequestView:
        """Return the view of a request."""
        return cls.model_validate(
            {
                "id": row.request_id,
                "model": row.model,
                "endpoint_id": row.endpoint_id,
                "status": row.status,
                "reason": row.reason,
                "prompt_tokens": row.prompt_tokens,
                "output_tokens": row.output_tokens,
                "accepted_s": row.accepted_s,
                "ended_s": row.ended_s,
            }
        )


class HealthView(Body):
    """The health of the service."""

    status: ServiceStatus
    problems: list[str]
    endpoints: int
    in_flight: int


class ErrorDetail(Body):
    """An error in OpenAI's shape."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorView(Body):
    """The body of every error response."""

    error: ErrorDetail


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorView}, "5XX": {"model": ErrorView}}
"""The error responses of every route, for the OpenAPI schema. FastAPI's own 422 becomes a 400."""
