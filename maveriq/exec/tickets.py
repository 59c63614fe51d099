"""Requests on their way: their tokens as they come, and their end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from maveriq.domain.requests import Request
from maveriq.exec.cluster import Outcome
from maveriq.exec.messages import Sequence as PromptSequence


class LiveTicket:
    """A request that somebody may follow; `maveriq.exec.cluster.Ticket`."""

    def __init__(self, request: Request, prompt: tuple[int, ...], stop_token_ids: tuple[int, ...] = ()) -> None:
        self.request = request
        self._prompt = prompt
        self._stop_token_ids = stop_token_ids
        self._got: list[int] = []
        self._news = asyncio.Event()
        self._outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    @property
    def request_id(self) -> int:
        """Its number."""
        return self.request.request_id

    @property
    def got(self) -> tuple[int, ...]:
        """The tokens that have come so far."""
        return tuple(self._got)

    def sequence(self) -> PromptSequence:
        """Return it as an engine is asked."""
        return PromptSequence(
            request_id=self.request_id,
            prompt=self._prompt,
            output_tokens=self.request.output_tokens,
            stop_token_ids=self._stop_token_ids,
        )

    def add(self, position: int, tokens: Sequence[int]) -> None:
        """Take in the tokens from a position on; those that are there already came from an engine that failed."""
        self._got.extend(tokens[len(self._got) - position :])
        self._news.set()

    def end(self, outcome: Outcome) -> None:
        """Note how it ended."""
        self._outcome.set_result(outcome)
        self._news.set()

    async def tokens(self) -> AsyncIterator[int]:
        """Yield its tokens as they come, until it ends."""
        sent = 0
        while True:
            while sent < len(self._got):
                yield self._got[sent]
                sent += 1
            if self._outcome.done():
                return
            self._news.clear()
            await self._news.wait()

    async def outcome(self) -> Outcome:
        """Wait for its end."""
        return await asyncio.shield(self._outcome)
