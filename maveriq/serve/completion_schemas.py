"""The JSON bodies of completions, as clients of OpenAI and vLLM send them.

Each field is in one of three groups: supported; accepted without effect because it does no harm; or accepted only with
a value that changes nothing (`Only`), because maveriq cannot do what it asks for. A null counts as absent and never
arrives here (`maveriq.serve.json_body`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from maveriq.serve.errors import bad_request
from maveriq.serve.schemas import Body, Milliseconds, Name

UNSUPPORTED = "unsupported_parameter"
"""The code of the error for a field that may only have certain values."""

_MAX_MESSAGES = 10_000
_MAX_STOP_STRINGS = 4


@dataclass(frozen=True, eq=False)  # 1 == True, and `Annotated` gives equal annotations one identity
class Only:
    """Annotates a field that is not supported: only values that change nothing are accepted."""

    values: tuple[Any, ...]

    def __get_pydantic_core_schema__(self, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the check, for pydantic."""
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, _handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the JSON schema, for pydantic."""
        return {"enum": [*self.values, None], "description": "Not supported: only values that change nothing."}

    def _check(self, value: Any) -> Any:
        # False == 0 in Python, but `logprobs: 0` asks for log probabilities and `logprobs: false` does not.
        if any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in self.values):
            return value
        allowed_text = " or ".join(map(json.dumps, self.values))
        hint = f"; it may only be {allowed_text}" if allowed_text else ""
        raise PydanticCustomError(UNSUPPORTED, "not supported{hint}", {"hint": hint})


OnlyNull: TypeAlias = Annotated[Any, Only(())]
OnlyFalse: TypeAlias = Annotated[Any, Only((False,))]
OnlyTrue: TypeAlias = Annotated[Any, Only((True,))]
OnlyZero: TypeAlias = Annotated[Any, Only((0,))]
OnlyOne: TypeAlias = Annotated[Any, Only((1,))]
OnlyNoText: TypeAlias = Annotated[Any, Only(("",))]
OnlyNoItems: TypeAlias = Annotated[Any, Only(([],))]
OnlyNoMembers: TypeAlias = Annotated[Any, Only(({},))]

StopString = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


class StreamOptions(Body):
    """What a stream contains in addition to text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(default=None, description="vLLM extension: usage in every chunk.")
    include_obfuscation: bool | None = Field(default=None, description="No effect.")


class GenerationRequest(Body):
    """The fields that text and chat completions share."""

    model: Name = Field(description="A model with an endpoint, or MODEL@ENDPOINT_ID for one of its endpoints.")
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Tokens to generate; default: the endpoint's output_tokens."
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=_MAX_STOP_STRINGS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    priority: Annotated[bool, Field(strict=True)] | Literal[0] = Field(  # vLLM's default is the number 0
        default=False, description="maveriq extension: go to the head of the queue."
    )
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
    cache_salt: str | None = Field(default=None, description="No effect.")
    prompt_cache_key: str | None = Field(default=None, description="No effect.")
    prompt_cache_retention: str | None = Field(default=None, description="No effect.")
    safety_identifier: str | None = Field(default=None, description="No effect.")

    top_k: int | None = Field(default=None, description="Only -1, 0 or 1, unless temperature is 0.")
    min_p: float | None = Field(default=None, description="Only 0, unless temperature is 0.")
    min_tokens: int | None = Field(default=None, description="Only 0, unless ignore_eos is true and stop is empty.")

    n: OnlyOne = None
    echo: OnlyFalse = None
    logprobs: OnlyFalse = None
    prompt_logprobs: OnlyFalse = None
    presence_penalty: OnlyZero = None
    frequency_penalty: OnlyZero = None
    repetition_penalty: OnlyOne = None
    length_penalty: OnlyOne = None
    typical_p: OnlyOne = None
    use_beam_search: OnlyFalse = None
    logit_bias: OnlyNoMembers = None
    bad_words: OnlyNoItems = None
    logits_processors: OnlyNoItems = None
    stop_token_ids: OnlyNoItems = None
    include_stop_str_in_output: OnlyFalse = None
    skip_special_tokens: OnlyTrue = None
    spaces_between_special_tokens: OnlyTrue = None
    return_tokens_as_token_ids: OnlyFalse = None
    response_format: Annotated[Any, Only(({"type": "text"},))] = None
    vllm_xargs: OnlyNoMembers = None

    def check_supported(self) -> None:
        """Refuse fields that are not supported together with others.

        Raises:
            ApiError: there is such a field; the error names it.
        """
        if self.stream_options is not None and not self.stream and any(self.stream_options.model_dump().values()):
            raise bad_request("stream_options needs stream to be true", "stream_options")
        only_length_ends = self.ignore_eos and not self.stop_strings
        for field, values, is_neutral, condition in (
            ("top_k", (-1, 0, 1), self.temperature == 0, "unless temperature is 0"),
            ("min_p", (0,), self.temperature == 0, "unless temperature is 0"),
            ("min_tokens", (0,), only_length_ends, "unless ignore_eos is true and there is no stop string"),
        ):
            if not is_neutral and getattr(self, field) not in (None, *values):
                allowed = " or ".join(map(str, values))
                message = f"{field} is not supported; it may only be {allowed}, {condition}"
                raise bad_request(message, field, code=UNSUPPORTED)

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

    @property
    def usage_in_chunks(self) -> bool:
        """Whether every chunk of the stream has the usage so far."""
        return (
            self.include_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1, fail_fast=True)] = Field(
        description="A text or token IDs; a list may have one prompt."
    )
    best_of: OnlyOne = None
    suffix: OnlyNoText = None
    add_special_tokens: OnlyTrue = None

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
            raise bad_request("give one prompt per request", "prompt", code=UNSUPPORTED)
        [prompt] = self.prompt
        return prompt if isinstance(prompt, (str, list)) else [prompt]


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = Field(default=None, description="No effect.")
    annotations: OnlyNoItems = None


class ChatMessage(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None
    cache_control: dict[str, Any] | None = Field(default=None, description="No effect.")

    refusal: OnlyNoText = None
    annotations: OnlyNoItems = None
    tool_calls: OnlyNoItems = None
    function_call: OnlyNull = None
    audio: OnlyNull = None
    reasoning: OnlyNoText = None
    reasoning_content: OnlyNoText = None
    prefix: OnlyFalse = None

    def to_dict(self) -> dict[str, str]:
        """Return `role` and `content`, as chat templates take them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=_MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    reasoning_effort: str | None = Field(default=None, description="No effect.")
    include_reasoning: bool | None = Field(default=None, description="No effect.")
    verbosity: str | None = Field(default=None, description="No effect.")
    parallel_tool_calls: bool | None = Field(default=None, description="No effect.")

    top_logprobs: OnlyZero = None
    tools: OnlyNoItems = None
    tool_choice: Annotated[Any, Only(("none", "auto"))] = None
    functions: OnlyNoItems = None
    function_call: Annotated[Any, Only(("none", "auto"))] = None
    modalities: Annotated[Any, Only((["text"],))] = None
    audio: OnlyNull = None
    prediction: OnlyNull = None
    web_search_options: OnlyNull = None
    documents: OnlyNoItems = None
    add_generation_prompt: OnlyTrue = None
    continue_final_message: OnlyFalse = None
    add_special_tokens: OnlyFalse = None
    chat_template_kwargs: OnlyNoMembers = None
    mm_processor_kwargs: OnlyNoMembers = None

    @property
    def requested_tokens(self) -> int | None:
        """The maximum number of output tokens; `max_completion_tokens` takes precedence over `max_tokens`."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
