"""Prompts for requests of which only the length is known."""

from __future__ import annotations

from collections.abc import Iterable

from maveriq.domain.intents import DeployAsk
from maveriq.domain.requests import Request
from maveriq.streams import generator


class Prompts:
    """Made-up prompts, drawn per request from a stream of its own, so that each is the same in every run of a seed."""

    def __init__(self, asks: Iterable[DeployAsk], seed: int) -> None:
        self._vocabulary = {ask.endpoint_id: ask.model.vocab_size for ask in asks}
        self._seed = seed

    def of(self, request: Request) -> tuple[int, ...]:
        """Return the token ids of a request's prompt; any will do for an endpoint that nobody asks for."""
        draw = generator(self._seed, f"prompt of request {request.request_id}")
        return tuple(draw.integers(0, self._vocabulary.get(request.endpoint_id, 2), request.prompt_tokens).tolist())
