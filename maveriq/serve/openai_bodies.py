"""What OpenAI clients send, and what of it maveriq can do.

Every field of the official client is in one of three groups: it works; it has no effect here and does no
harm; or it would change the answer in a way that maveriq cannot, and is refused unless it has the
value that changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from maveriq.serve.bodies import Body, Milliseconds, Name
from maveriq.serve.refusals import bad

_MOST_MESSAGES = 10_000
_MOST_STOPS = 4

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

    model: Name = Field(description="A deployed model, or MODEL@ENDPOINT for one of its endpoints.")
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Tokens to generate; the deployment's output length where nothing is said."
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=_MOST_STOPS)] | None = None
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
                raise bad(f"{field} is not supported{instead}", field, code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise bad("stream_options needs stream to be true", "stream_options")

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


class CompletionAsk(Generation):
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
            raise bad("give one prompt per request", "prompt", code="unsupported_parameter")
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


class ChatAsk(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=_MOST_MESSAGES)]
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
