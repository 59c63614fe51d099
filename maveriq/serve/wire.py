"""How completions look on the wire: OpenAI's two dialects, whole and in a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a request."""

    prompt: int
    output: int

    def body(self) -> Json:
        """Return OpenAI's object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.output,
            "total_tokens": self.prompt + self.output,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionWire:
    """The dialect of `/v1/completions`."""

    request_id: str
    model: str
    created_s: int = field(default_factory=lambda: int(time.time()))

    kind: ClassVar[str] = "text_completion"
    chunk_kind: ClassVar[str] = "text_completion"

    def opening(self) -> Json | None:
        """Return the chunk before the first text, if this dialect has one."""
        return None

    def chunk(self, text: str, token_ids: Sequence[int] | None = None, finish: str | None = None) -> Json:
        """Return a chunk of a stream."""
        return self._frame(self.chunk_kind, [_choice({"text": text}, token_ids, finish)])

    def whole(self, text: str, token_ids: Sequence[int] | None, finish: str, usage: Usage) -> Json:
        """Return a whole answer."""
        return self._frame(self.kind, [_choice({"text": text}, token_ids, finish)]) | {"usage": usage.body()}

    def usage(self, usage: Usage) -> Json:
        """Return the last chunk of a stream whose client wants counts."""
        return self._frame(self.chunk_kind, []) | {"usage": usage.body()}

    def _frame(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.request_id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "choices": choices,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatWire(CompletionWire):
    """The dialect of `/v1/chat/completions`."""

    kind: ClassVar[str] = "chat.completion"
    chunk_kind: ClassVar[str] = "chat.completion.chunk"

    def opening(self) -> Json | None:
        """Return the chunk that says who speaks."""
        return self._frame(self.chunk_kind, [_choice({"delta": {"role": "assistant", "content": ""}}, None, None)])

    def chunk(self, text: str, token_ids: Sequence[int] | None = None, finish: str | None = None) -> Json:
        """Return a chunk of a stream."""
        delta: Json = {"content": text} if text else {}
        return self._frame(self.chunk_kind, [_choice({"delta": delta}, token_ids, finish)])

    def whole(self, text: str, token_ids: Sequence[int] | None, finish: str, usage: Usage) -> Json:
        """Return a whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return self._frame(self.kind, [_choice({"message": message}, token_ids, finish)]) | {"usage": usage.body()}


def _choice(content: Json, token_ids: Sequence[int] | None, finish: str | None) -> Json:
    choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
    return choice if token_ids is None else choice | {"token_ids": list(token_ids)}
