"""The JSON bodies of the HTTP API: what clients send and receive.

Each field of OpenAI's completion bodies is in one of three groups: supported; accepted without effect because it does
no harm; or refused unless it has a value that changes nothing, because maveriq cannot do what it asks for.
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
_MAX_BATCH_SIZE = 10_000
_MAX_MS = 1e9
_MAX_MESSAGES = 10_000
_MAX_STOP_STRINGS = 4

Name = Annotated[str, Field(min_length=1, max_length=1024)]
Milliseconds = Annotated[float, Field(gt=0, le=_MAX_MS, allow_inf_nan=False)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
RequestStatusName = Literal["accepted", "completed", "refused", "failed", "unfinished"]


class Body(BaseModel):
    """A JSON body that rejects unknown fields, so that a misspelled field is not silently ignored."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


# Models


class RegisterModel(Body):
    """POST /models: register a model."""

    model: Name = Field(description="A known model's name, or the path of a config.json in the models folder.")


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
            status=endpoint.status,
            reason="; ".join(deployment.reason for deployment in deployments if deployment.reason),
            waiting=sum(deployment.waiting for deployment in deployments),
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

    status: Literal["ready", "degraded", "stopping"]
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


# Completions, as OpenAI clients send them

# Values of unsupported fields that change nothing; other values are refused.
_ALLOWED_VALUES: Mapping[str, tuple[Any, ...]] = {
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
    """What a stream contains in addition to text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(default=None, description="No effect.")


class GenerationRequest(Body):
    """The fields that text and chat completions share."""

    model: Name = Field(description="A model with an endpoint, or MODEL@ENDPOINT_ID for one of its endpoints.")
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Tokens to generate; default: the endpoint's output_tokens."
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=_MAX_STOP_STRINGS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    priority: bool = Field(default=False, description="maveriq extension: go to the head of the queue.")
    slo_ms: Milliseconds | None = Field(default=None, description="maveriq extension: objective for the latency.")
    ignore_eos: bool = Field(default=False, description="vLLM extension: continue after the end token.")
    return_token_ids: bool = Field(default=False, description="vLLM extension: return token IDs with the text.")

    temperature: float | None = Field(default=None, description="No effect: decoding is greedy.")
    top_p: float | None = Field(default=None, description="No effect.")
    seed: int | None = Field(default=None, description="No effect.")
    user: str | None = Field(default=None, description="No effect.")
    metadata: dict[str, str] | None = Field(default=None, description="No effect.")
    store: bool | None = Field(default=None, description="No effect.")
    service_tier: str | None = Field(default=None, description="No effect.")

    n: Any = Field(default=None, description="Only 1.")
    logprobs: Any = Field(default=None, description="Not supported.")
    presence_penalty: Any = Field(default=None, description="Only 0.")
    frequency_penalty: Any = Field(default=None, description="Only 0.")
    logit_bias: Any = Field(default=None, description="Not supported.")

    def check_supported(self) -> None:
        """Refuse unsupported fields whose values would change the result.

        Raises:
            ApiError: there is such a field; the error names it.
        """
        for field, allowed_values in _ALLOWED_VALUES.items():
            value = getattr(self, field, None)
            # False == 0 in Python, but `logprobs: 0` asks for log probabilities and `logprobs: false` does not.
            if not any(
                value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in allowed_values
            ):
                allowed_text = " or ".join(json.dumps(allowed) for allowed in allowed_values if allowed is not None)
                hint = f"; it may only be {allowed_text}" if allowed_text else ""
                raise bad_request(f"{field} is not supported{hint}", field, code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options needs stream to be true", "stream_options")

    @property
    def requested_tokens(self) -> int | None:
        """The maximum number of output tokens, or None for the endpoint's default."""
        return self.max_tokens

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1)] = Field(
        description="A text or token IDs; a list may have one prompt."
    )
    best_of: Any = Field(default=None, description="Only 1.")
    echo: Any = Field(default=None, description="Not supported.")
    suffix: Any = Field(default=None, description="Not supported.")

    def single_prompt(self) -> str | list[int]:
        """Return the prompt: a text or token IDs.

        Raises:
            ApiError: there are several.
        """
        if isinstance(self.prompt, str):
            return self.prompt
        token_ids = [token_id for token_id in self.prompt if isinstance(token_id, int)]
        if token_ids:
            return token_ids
        if len(self.prompt) > 1:
            raise bad_request("give one prompt per request", "prompt", code="unsupported_parameter")
        [prompt] = self.prompt
        return prompt if isinstance(prompt, (str, list)) else [prompt]


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

    def to_dict(self) -> dict[str, str]:
        """Return `role` and `content`, as chat templates take them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=_MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    reasoning_effort: str | None = Field(default=None, description="No effect.")
    verbosity: str | None = Field(default=None, description="No effect.")
    parallel_tool_calls: bool | None = Field(default=None, description="No effect.")
    prompt_cache_key: str | None = Field(default=None, description="No effect.")
    safety_identifier: str | None = Field(default=None, description="No effect.")

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
    def requested_tokens(self) -> int | None:
        """The maximum number of output tokens; `max_completion_tokens` takes precedence over `max_tokens`."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
