"""The execution that an engine was asked for, as far as word of it has come."""

from __future__ import annotations

from maveriq.exec.messages import Finished, Generate, Progress


class UnderWay:
    """Which steps were handed on, and whether the engine gets on.

    Args:
        work: what was asked for.
        now_s: when.
        allowed_s: how long it may take from one step to the next.
        pings: how many pings had been sent by then.
    """

    def __init__(self, work: Generate, *, now_s: float, allowed_s: float, pings: int) -> None:
        self.work = work
        self._allowed_s = allowed_s
        self._pings = pings
        self._handed_on = 0  # steps
        self._heard_of = 0
        self._moved_s = now_s

    def concerns(self, execution_id: int) -> bool:
        """Say whether a message is about it."""
        return execution_id == self.work.execution_id

    def take_step(self, progress: Progress, now_s: float) -> bool:
        """Note a step; says whether it is the next one to hand on, and not late, twice, or after one that was lost."""
        if progress.step != self._handed_on + 1:
            return False
        self._handed_on = progress.step
        self.got_to(progress.step, now_s)
        return True

    def got_to(self, step: int, now_s: float) -> None:
        """Note that so many steps are done, though word of some may have been lost."""
        if step > self._heard_of:
            self._heard_of = step
            self._moved_s = now_s

    def to_be_repeated(self, ping: int) -> bool:
        """Say whether an engine that answers this ping and is not at it must be told again: word was lost."""
        return ping > self._pings

    def excuse(self, late_s: float, now_s: float) -> None:
        """Note that nobody listened for a while."""
        self._moved_s = min(now_s, self._moved_s + late_s)

    def stands_still(self, now_s: float) -> bool:
        """Say whether the engine does not get on with it."""
        return now_s - self._moved_s > self._allowed_s

    def complaint(self, said: Progress | Finished) -> str:
        """Return what is wrong with what an engine says of it, empty if nothing is."""
        given = said.tokens if isinstance(said, Progress) else said.outputs
        if len(given) != len(self.work.sequences):
            return "tokens for another number of sequences"
        most = [sequence.output_tokens for sequence in self.work.sequences]
        if isinstance(said, Progress):
            too_many = any(said.step > count and token >= 0 for count, token in zip(most, said.tokens, strict=True))
        else:
            too_many = any(len(output) > count for count, output in zip(most, said.outputs, strict=True))
        return "more tokens than were asked for" if too_many else ""
