"""What clients send and get: the JSON bodies of the service's own routes.

What OpenAI clients send, and what of it maveriq can do.

Every field of the official client is in one of three groups: it works; it has no effect here and does no
harm; or it would change the answer in a way that maveriq cannot, and is refused unless it has the
value that changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from maveriq.domain.progress import DeploymentStatus
from maveriq.serve.errors import bad_request
from maveriq.serve.service import Endpoint
from maveriq.serve.store import RequestRow, StoredModel

_MAX_TOKENS = 1_000_000
_MAX_BATCH = 10_000
_MAX_MS = 1e9

Name = Annotated[str, Field(min_length=1, max_length=1024)]
Milliseconds = Annotated[float, Field(gt=0, le=_MAX_MS, allow_inf_nan=False)]


class Body(BaseModel):
    """A body in which nothing unknown may stand, so that a slip of the pen is not passed over."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class RegisterModel(Body):
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
    def of(cls, model: StoredModel) -> ModelView:
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


class CreateEndpoint(Body):
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
    batch_size: Annotated[int, Field(ge=1, le=_MAX_BATCH)] = Field(
        default=1, description="Requests that an engine serves at once, at most."
    )
    output_tokens: Annotated[int, Field(ge=1, le=_MAX_TOKENS)] = Field(
        default=20, description="Length of a typical output; also what a request gets that asks for no length."
    )


class DeploymentView(Body):
    """A deployment: one replica of an endpoint, served by one engine."""

    id: int
    configuration: str
    layer_split: list[int]
    gpus: list[int]
    status: str
    reason: str
    waiting: int
    completed: int
    restarts: int

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
    status: str
    reason: str
    waiting: int
    completed: int
    deployments: list[DeploymentView]

    @classmethod
    def of(cls, endpoint: Endpoint) -> EndpointView:
        """Return the view of an endpoint."""
        requested, deployments = endpoint.stored.request, endpoint.deployments
        return cls(
            id=endpoint.endpoint_id,
            model=endpoint.model.spec.name,
            model_id=endpoint.model.model_id,
            intent=requested.intent.objective.value,
            slo_ms=None if requested.intent.slo_s is None else requested.intent.slo_s * 1e3,
            min_accuracy=requested.intent.min_accuracy,
            float16_only=requested.intent.float16_only,
            placement=endpoint.stored.placement or None,
            batch_size=requested.batch_size,
            output_tokens=requested.output_tokens,
            status=endpoint.status,
            reason="; ".join(deployment.reason for deployment in deployments if deployment.reason),
            waiting=sum(deployment.waiting for deployment in deployments),
            completed=sum(deployment.completed for deployment in deployments),
            deployments=[DeploymentView.of(deployment) for deployment in deployments],
        )


RequestStatusName = Literal["accepted", "completed", "refused", "failed", "unfinished"]


class RequestView(Body):
    """An accepted request; times are seconds since 1970."""

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
    """Whether the service is as it should be."""

    status: Literal["ready", "degraded", "stopping"]
    problems: list[str]
    endpoints: int
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
    """Return a request's SLO in µs: its own, else its endpoint's, else 0 for none."""
    if slo_ms is not None:
        return max(1, round(slo_ms * 1e3))
    return 0 if slo_s is None else max(1, round(slo_s * 1e6))


_MAX_MESSAGES = 10_000
_MAX_STOPS = 4

Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]

# Values that change nothing; anything else is refused.
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
}


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(default=None, description="Without effect.")


class Generation(Body):
    """What both kinds of completion take."""

    model: Name = Field(description="A model with an endpoint, or MODEL@ENDPOINT_ID for one endpoint.")
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Tokens to generate; the endpoint's output length where nothing is said."
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=_MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    priority: bool = Field(default=False, description="maveriq's: go to the head of the queue.")
    slo_ms: Milliseconds | None = Field(default=None, description="maveriq's: be done in this time.")
    ignore_eos: bool = Field(default=False, description="vLLM's: go on after the model's end token.")
    return_token_ids: bool = Field(default=False, description="vLLM's: the tokens, beside the text.")

    temperature: float | None = Field(default=None, description="Without effect: engines take the likeliest token.")
    top_p: float | None = Field(default=None, description="Without effect.")
    seed: int | None = Field(default=None, description="Without effect.")
    user: str | None = Field(default=None, description="Without effect.")
    metadata: dict[str, str] | None = Field(default=None, description="Without effect.")
    store: bool | None = Field(default=None, description="Without effect.")
    service_tier: str | None = Field(default=None, description="Without effect.")

    n: Any = Field(default=None, description="Only 1.")
    logprobs: Any = Field(default=None, description="Not supported.")
    presence_penalty: Any = Field(default=None, description="Only 0.")
    frequency_penalty: Any = Field(default=None, description="Only 0.")
    logit_bias: Any = Field(default=None, description="Not supported.")

    def check(self) -> None:
        """Refuse what would change the answer in a way that maveriq cannot.

        Raises:
            ApiError: such a field, by its name.
        """
        for field, harmless in _HARMLESS.items():
            value = getattr(self, field, None)
            # To Python 0 is False; to a client no log-probabilities and the likeliest one's are two things.
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in harmless):
                allowed = " or ".join(json.dumps(one) for one in harmless if one is not None)
                instead = f"; it may only be {allowed}" if allowed else ""
                raise bad_request(f"{field} is not supported{instead}", field, code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options needs stream to be true", "stream_options")

    @property
    def wanted_tokens(self) -> int | None:
        """How many tokens the client asks for at most, None if it does not say."""
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether the stream is to end with the counts of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1)] = Field(
        description="A text, or token ids. A list may hold one prompt."
    )
    best_of: Any = Field(default=None, description="Only 1.")
    echo: Any = Field(default=None, description="Not supported.")
    suffix: Any = Field(default=None, description="Not supported.")

    def one_prompt(self) -> str | list[int]:
        """Return the prompt.

        Raises:
            ApiError: there are several.
        """
        if isinstance(self.prompt, str):
            return self.prompt
        numbers = [one for one in self.prompt if isinstance(one, int)]
        if numbers:
            return numbers
        if len(self.prompt) > 1:
            raise bad_request("give one prompt per request", "prompt", code="unsupported_parameter")
        [only] = self.prompt
        return only if isinstance(only, (str, list)) else [only]


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: str | None = None

    def plain(self) -> dict[str, str]:
        """Return role and text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatCompletionRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=_MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    reasoning_effort: str | None = Field(default=None, description="Without effect.")
    verbosity: str | None = Field(default=None, description="Without effect.")
    parallel_tool_calls: bool | None = Field(default=None, description="Without effect.")
    prompt_cache_key: str | None = Field(default=None, description="Without effect.")
    safety_identifier: str | None = Field(default=None, description="Without effect.")

    top_logprobs: Any = Field(default=None, description="Not supported.")
    tools: Any = Field(default=None, description="Not supported.")
    tool_choice: Any = Field(default=None, description="Not supported.")
    functions: Any = Field(default=None, description="Not supported.")
    function_call: Any = Field(default=None, description="Not supported.")
    response_format: Any = Field(default=None, description="Only text.")
    modalities: Any = Field(default=None, description="Only text.")
    audio: Any = Field(default=None, description="Not supported.")
    prediction: Any = Field(default=None, description="Not supported.")
    web_search_options: Any = Field(default=None, description="Not supported.")

    @property
    def wanted_tokens(self) -> int | None:
        """How many tokens the client asks for at most; the newer name wins."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
