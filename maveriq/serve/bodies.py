"""What clients send and get: the JSON bodies of the service's own routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from maveriq.domain.progress import DeploymentStatus
from maveriq.serve.service import Endpoint
from maveriq.serve.store import KnownModel, RequestRow

_MOST_TOKENS = 1_000_000
_MOST_BATCH = 10_000
_MOST_MS = 1e9

Name = Annotated[str, Field(min_length=1, max_length=1024)]
Milliseconds = Annotated[float, Field(gt=0, le=_MOST_MS, allow_inf_nan=False)]


class Body(BaseModel):
    """A body in which nothing unknown may stand, so that a slip of the pen is not passed over."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ModelAsk(Body):
    """Make a model known."""

    model: Name = Field(description="A name that maveriq knows, or the place of a config.json in the models folder.")


class ModelView(Body):
    """A registered model."""

    id: int
    name: str
    architecture: str
    layers: int
    hidden_size: int
    vocab_size: int
    own_files: bool = Field(description="Whether it was read from the models folder.")

    @classmethod
    def of(cls, model: KnownModel) -> ModelView:
        """Return the view of a model."""
        spec = model.spec
        return cls(
            id=model.model_id,
            name=spec.name,
            architecture=spec.architecture,
            layers=spec.layers,
            hidden_size=spec.hidden_size,
            vocab_size=spec.vocab_size,
            own_files=bool(model.folder),
        )


class DeploymentAsk(Body):
    """Have a model served by intent; a model that is not registered is registered first."""

    model: Name = Field(description="Name or number of a registered model, or what POST /models takes.")
    intent: Annotated[str, Field(max_length=64)] = Field(
        default="min-cost", description="min-cost, min-latency, min-memory, or min-gpu-cost."
    )
    slo_ms: Milliseconds | None = Field(default=None, description="A whole request must be done in this time.")
    min_accuracy: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = Field(
        default=0.0, description="In percent of the float16 model's."
    )
    float16_only: bool = Field(default=False, description="No quantised weights.")
    placement: Annotated[str, Field(max_length=64)] | None = Field(
        default=None, description="hybrid, packing, llf or none; the service's where nothing is said."
    )
    batch_size: Annotated[int, Field(ge=1, le=_MOST_BATCH)] = Field(
        default=1, description="Requests that an engine serves at once, at most."
    )
    output_tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] = Field(
        default=20, description="Length of a typical output; also what a request gets that asks for no length."
    )


class EngineView(Body):
    """An engine of a deployment."""

    deployment_id: int
    configuration: str
    layer_split: list[int]
    gpus: list[int]
    status: str
    reason: str
    waiting: int
    completed: int
    restarts: int

    @classmethod
    def of(cls, engine: DeploymentStatus) -> EngineView:
        """Return the view of an engine."""
        return cls(
            deployment_id=engine.deployment_id,
            configuration=engine.configuration,
            layer_split=list(engine.layer_split),
            gpus=list(engine.gpu_ids),
            status=engine.status,
            reason=engine.reason,
            waiting=engine.waiting,
            completed=engine.completed,
            restarts=engine.restarts,
        )


class DeploymentView(Body):
    """A deployment: what was asked for, and what serves it now."""

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
    status: str
    reason: str
    waiting: int
    completed: int
    engines: list[EngineView]

    @classmethod
    def of(cls, endpoint: Endpoint) -> DeploymentView:
        """Return the view of an endpoint."""
        asked, engines = endpoint.stored.asked, endpoint.engines
        return cls(
            id=endpoint.endpoint_id,
            model=endpoint.model.spec.name,
            model_id=endpoint.model.model_id,
            intent=asked.intent.objective.value,
            slo_ms=None if asked.intent.slo_s is None else asked.intent.slo_s * 1e3,
            min_accuracy=asked.intent.min_accuracy,
            float16_only=asked.intent.float16_only,
            placement=endpoint.stored.placement or None,
            batch_size=asked.batch_size,
            output_tokens=asked.output_tokens,
            status=endpoint.status,
            reason="; ".join(engine.reason for engine in engines if engine.reason),
            waiting=sum(engine.waiting for engine in engines),
            completed=sum(engine.completed for engine in engines),
            engines=[EngineView.of(engine) for engine in engines],
        )


RequestStatusName = Literal["accepted", "completed", "refused", "failed", "unfinished"]


class RequestView(Body):
    """An accepted request; times are seconds since 1970."""

    id: str
    model: str
    deployment: int
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
                "deployment": row.endpoint_id,
                "status": row.status,
                "reason": row.reason,
                "prompt_tokens": row.prompt_tokens,
                "output_tokens": row.output_tokens,
                "accepted_s": row.accepted_s,
                "ended_s": row.ended_s,
            }
        )


class HealthView(Body):
    """Whether the service is as it should be."""

    status: Literal["ready", "degraded", "stopping"]
    problems: list[str]
    deployments: int
    in_flight: int


class ErrorDetail(Body):
    """What went wrong, in OpenAI's shape."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorView(Body):
    """The body of every answer that is an error."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorView}, "5XX": {"model": ErrorView}}
"""What a route answers where it cannot do what it is asked; FastAPI's own 422 is one of them and becomes a 400."""


def micros_of(slo_ms: float | None, slo_s: float | None) -> int:
    """Return a request's SLO in µs: its own, else its deployment's, else 0 for none."""
    if slo_ms is not None:
        return max(1, round(slo_ms * 1e3))
    return 0 if slo_s is None else max(1, round(slo_s * 1e6))
