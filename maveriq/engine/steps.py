"""What an engine computes in one step, and what comes out of it."""

from __future__ import annotations

from typing import NamedTuple

from maveriq.engine.requests import RequestId
from maveriq.engine.sequence import Sequence


class ScheduledTokens(NamedTuple):
    """What a step computes of one sequence.

    Attributes:
        sequence: the sequence.
        tokens: tokens computed, at least 1.
        past: tokens of the sequence that were computed before.
        emits: whether a token comes out.
    """

    sequence: Sequence
    tokens: int
    past: int
    emits: bool


class Step:
    """One step: what a step-time model needs, and whose tokens are computed (mutable until it has run).

    Attributes:
        tick: its number among the engine's steps, from 0.
        decodes: sequences that compute one token, their newest.
        context_tokens: tokens that these attend to, themselves included, all sequences together.
        chunks: `(tokens, past)` of each sequence that computes a part of its prompt (or, after a preemption, of what
            it had generated, too), in order.
        scheduled: the sequences of the step in order, without those that are counted together.
        together: sequences that are counted together (`DecodeCohort`); each emits a token.
        preempted: sequences that lost their blocks when the step was composed.
    """

    __slots__ = ("chunks", "context_tokens", "decodes", "preempted", "scheduled", "tick", "together")

    def __init__(self, tick: int = 0) -> None:
        self.tick = tick
        self.decodes = self.context_tokens = self.together = 0
        self.chunks: list[tuple[int, int]] = []
        self.scheduled: list[ScheduledTokens] = []
        self.preempted: list[Sequence] = []

    def add(self, sequence: Sequence, tokens: int, past: int, *, emits: bool) -> None:
        """Let it compute tokens of a sequence; the arguments are those of `ScheduledTokens`."""
        self.scheduled.append(ScheduledTokens(sequence, tokens, past, emits))
        if not emits:
            sequence.steps_without_token += 1
        if tokens == 1:
            self.decodes += 1
            self.context_tokens += past + 1
        else:
            self.chunks.append((tokens, past))

    @property
    def is_empty(self) -> bool:
        """Whether nothing is computed."""
        return not self.decodes and not self.chunks

    @property
    def tokens(self) -> int:
        """Tokens that are computed."""
        return self.decodes + sum(tokens for tokens, _ in self.chunks) if self.chunks else self.decodes


class Emitted(NamedTuple):
    """A token of a request.

    Attributes:
        request_id: whose.
        output_tokens: tokens that the request has now.
        finish_reason: "length" or "stop" with the last one, otherwise None.
        cached_tokens: tokens of its prompt that were found in the prefix cache when it was first admitted.
        preemptions: how often it has lost its blocks.
        steps: steps that have computed something of it: one for each of its tokens, and those that gave it none.
    """

    request_id: RequestId
    output_tokens: int
    finish_reason: str | None
    cached_tokens: int = 0
    preemptions: int = 0
    steps: int = 0

    @classmethod
    def of(cls, sequence: Sequence, length: int, finish_reason: str | None) -> Emitted:
        """Return the token with which a sequence has `length` tokens, its prompt included."""
        output_tokens = length - sequence.prompt_tokens
        return cls(
            sequence.request.request_id,
            output_tokens,
            finish_reason,
            sequence.cached_tokens,
            sequence.preemptions,
            output_tokens + sequence.steps_without_token,
        )


class Advanced(NamedTuple):
    """What came out of several steps that were taken at once, as far as it is listed.

    Attributes:
        first: tokens of the first step that was finished, the one that was in flight before.
        last: tokens of the last one.
    """

    first: list[Emitted]
    last: list[Emitted]
