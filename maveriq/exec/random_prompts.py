"""Prompts for workloads, which hold only their lengths and, perhaps, which of them begin alike."""

from __future__ import annotations

from typing import Any

import numpy as np

from maveriq.domain.requests import Request
from maveriq.streams import generator


class RandomPrompts:
    """Draws prompts of random token ids; equal seeds draw equal prompts.

    Requests with the same `prompt_id` get the same prompt, and those whose `prefix_hashes` begin alike get prompts that
    begin alike, as far as these cover the prompt. An engine's prefix cache then finds what a simulated one finds, but
    not the outputs of earlier turns: what engines generate is not what the workload recorded.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def prompt(self, request: Request, vocabulary_size: int) -> tuple[int, ...]:
        """Return the token ids of a request's prompt."""
        left = request.prompt_tokens
        parts = []
        for prefix_hash in request.prefix_hashes:
            if left <= 0:
                break
            tokens = min(left, request.prefix_hash_tokens)
            parts.append(self._draw(f"prefix {prefix_hash}", vocabulary_size, request.prefix_hash_tokens)[:tokens])
            left -= tokens
        if left > 0:
            whose = f"of request {request.request_id}" if not request.prompt_id else f"number {request.prompt_id}"
            parts.append(self._draw(f"prompt {whose}", vocabulary_size, left))
        return tuple(np.concatenate(parts).tolist())

    def _draw(self, name: str, vocabulary_size: int, tokens: int) -> np.ndarray[Any, Any]:
        return generator(self._seed, name).integers(0, vocabulary_size, tokens)
