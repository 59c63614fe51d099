"""A request inside an engine: how far it is, and which KV blocks it holds."""

from __future__ import annotations

from enum import IntEnum

from maveriq.engine.requests import BlockKey, EngineRequest


class SequenceStatus(IntEnum):
    """Where a sequence is."""

    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2
    FINISHED = 3


class Sequence:
    """A request inside an engine (mutable). Counts are tokens unless they say blocks.

    Attributes:
        request: what was asked.
        admission: orders running sequences; a later admission has a larger number.
        order: `(priority, arrival)`, smaller first.
        prompt_tokens: length of the prompt.
        length: prompt and tokens generated so far.
        limit: length at which the scheduler knows that it ends.
        end: length at which it ends by itself; never beyond `limit`.
        computed: tokens whose keys and values are in the cache, or are being computed.
        pending: tokens that steps in flight will produce, where the scheduler runs ahead of them.
        blocks: KV blocks that it holds.
        shared_blocks: identifiers of the leading ones among these that other sequences may find; see `KVBlockPool`.
        registered: tokens whose full blocks can be found in the prefix cache.
        keys: content of its leading full blocks as far as others may have the same; None until that is needed.
        cached_tokens: prompt tokens that were found in the prefix cache when it was first admitted.
        preemptions: how often it lost its blocks.
        steps_without_token: steps that computed something of it but no new token.
        cohort_entry: positive while a `DecodeCohort` counts for it; `length`, `computed` and `blocks` are then of the
            step in which it joined, as are the attributes that only the cohort uses: `offset`, `joined_tick`,
            `counts_from`.
    """

    __slots__ = (
        "admission", "blocks", "cached_tokens", "cohort_entry", "computed", "counts_from", "end", "joined_tick", "keys",
        "length", "limit", "offset", "order", "pending", "preemptions", "prompt_tokens", "registered", "request",
        "shared_blocks", "status", "steps_without_token",
    )  # fmt: skip

    def __init__(self, request: EngineRequest, max_model_len: int, arrival: int) -> None:
        prompt = request.prompt_tokens
        self.request = request
        self.order = (request.priority, arrival)
        self.prompt_tokens = prompt
        self.length = prompt
        max_tokens = request.output_tokens if request.max_tokens is None else request.max_tokens
        self.limit = min(prompt + max_tokens, max_model_len)
        self.end = min(prompt + request.output_tokens, self.limit)
        self.admission = 0
        self.computed = 0
        self.pending = 0
        self.blocks = 0
        self.shared_blocks: list[int] = []
        self.registered = 0
        self.keys: list[BlockKey] | None = None if request.is_shareable else []
        self.cached_tokens = 0
        self.cohort_entry = self.offset = self.joined_tick = self.counts_from = 0
        self.preemptions = self.steps_without_token = 0
        self.status = SequenceStatus.WAITING

    @property
    def finish_reason(self) -> str | None:
        """Why it ends with its newest token: "length" or "stop"; None if it goes on."""
        if self.length < self.end:
            return None
        return "length" if self.length >= self.limit else "stop"

    def admit(self, admission: int, cached_tokens: int) -> bool:
        """Count it as running, with the first tokens found in the prefix cache. Return whether it never ran before."""
        is_first = self.status is SequenceStatus.WAITING
        if is_first:
            self.cached_tokens = cached_tokens
        self.status = SequenceStatus.RUNNING
        self.admission = admission
        self.computed = cached_tokens
        return is_first

    def preempt(self) -> None:
        """Count it as waiting again. It keeps its tokens; their keys and values are computed anew later."""
        self.computed = self.registered = 0
        self.preemptions += 1
        self.status = SequenceStatus.PREEMPTED

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id!r}, {self.status.name}, {self.computed}/{self.length} tokens, "
            f"{self.blocks} blocks)"
        )
