"""What an engine is asked to do, and what it knows about the content of a request's KV blocks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from maveriq.domain.requests import PREFIX_HASH_TOKENS, Request
from maveriq.errors import InputError

RequestId: TypeAlias = int | str
"""Identifies a request within its engine; all requests of an engine have the same type."""

BlockKey: TypeAlias = Hashable
"""Stands for the content of a full KV block and of all blocks before it: equal keys, equal tokens."""


@dataclass(slots=True, kw_only=True)
class EngineRequest:
    """One request to an engine. Nothing changes it.

    What its tokens are matters only to the prefix cache. They are given in one of three ways, from coarse to fine, or
    not at all: then nothing of this request can be found in the cache by another.

    Args:
        request_id: unique among the requests that the engine holds.
        prompt_tokens: length of the prompt, at least 1.
        output_tokens: tokens after which generation ends by itself, at least 1. The scheduler does not know it
            beforehand unless `max_tokens` says the same.
        max_tokens: limit of the output, which the scheduler knows; None for `output_tokens`, as in benchmarks that
            ignore the end of the text.
        priority: smaller goes first under `--scheduling-policy priority`, among equals what was submitted first.
        prompt_id: equal for equal prompts.
        prefix_hashes: the i-th stands for the first `(i + 1) * prefix_hash_tokens` tokens. It may go on beyond the
            prompt, into the output, where later prompts repeat it.
        prefix_hash_tokens: tokens for each of `prefix_hashes`.
        token_ids: prompt and, behind it, output, token by token.

    Raises:
        InputError: a count that is not positive.
    """

    request_id: RequestId
    prompt_tokens: int
    output_tokens: int
    max_tokens: int | None = None
    priority: int = 0
    prompt_id: Hashable | None = None
    prefix_hashes: Sequence[Hashable] | None = None
    prefix_hash_tokens: int = PREFIX_HASH_TOKENS
    token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1 or (self.max_tokens is not None and self.max_tokens < 1):
            raise InputError(
                f"request {self.request_id!r}: {self.prompt_tokens} prompt and {self.output_tokens} output tokens; "
                "an engine computes requests of at least one each"
            )

    @property
    def is_shareable(self) -> bool:
        """Whether another request may have blocks of the same content."""
        return self.prompt_id is not None or self.prefix_hashes is not None or self.token_ids is not None


def engine_request(request: Request) -> EngineRequest:
    """Return what an engine is asked for a request to an endpoint."""
    return EngineRequest(
        request_id=request.request_id,
        prompt_tokens=request.prompt_tokens,
        output_tokens=request.output_tokens,
        priority=0 if request.priority else 1,
        prompt_id=request.prompt_id or None,
        prefix_hashes=request.prefix_hashes or None,
        prefix_hash_tokens=request.prefix_hash_tokens,
    )


def shareable_tokens(request: EngineRequest) -> int:
    """Return the number of leading tokens whose content is known."""
    if request.token_ids is not None:
        return len(request.token_ids)
    if request.prefix_hashes is not None:
        covered = len(request.prefix_hashes) * request.prefix_hash_tokens
        # The last hash of a prompt may stand for less than its number of tokens.
        ends_in_prompt = covered - request.prefix_hash_tokens < request.prompt_tokens
        return min(covered, request.prompt_tokens if ends_in_prompt else request.prompt_tokens + request.output_tokens)
    return request.prompt_tokens if request.prompt_id is not None else 0


def block_keys(request: EngineRequest, block_size: int) -> list[BlockKey]:
    """Return the keys of a request's leading full blocks, as many as its known content fills.

    vLLM chains hashes in the same way (`vllm/v1/core/kv_cache_utils.py`: `hash_block_tokens`).
    """
    number = shareable_tokens(request) // block_size
    if request.token_ids is not None:
        keys: list[BlockKey] = []
        parent = 0
        for index in range(number):
            parent = hash((parent, tuple(request.token_ids[index * block_size : (index + 1) * block_size])))
            keys.append(parent)
        return keys
    if request.prefix_hashes is not None:
        hashes, tokens = request.prefix_hashes, request.prefix_hash_tokens
        return [(hashes[((index + 1) * block_size - 1) // tokens], index) for index in range(number)]
    return [(request.prompt_id, index) for index in range(number)]
