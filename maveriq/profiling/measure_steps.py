"""Measures the steps of an engine that batches continuously, as it reports them while it serves.

A sample is a batch of equal prompts that are submitted together: the step that computes all of them, the steps that
decode, and in the middle one that holds a further prompt. The engine decides what a step computes. Where it did not
compute the batch in one step, because it began before all prompts had come, the sample is taken again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from statistics import fmean

from maveriq.estimate.observations import Batch
from maveriq.exec.messages import BatchingSpec, Failed, PromptSequence, StepReport, SubmitRequest
from maveriq.profiling.measure import LEAST_S, EngineClient, ProfilingError, SampleTimes

_ATTEMPTS = 20
_LEAST_STEP_TOKENS = 2048


def steps_of(batches: Sequence[Batch]) -> BatchingSpec:
    """Return how an engine is started whose steps are measured: all of a batch fits a step, and nothing is cached."""
    tokens = max(batch.size * batch.prompt_tokens + batch.size for batch in batches)
    return BatchingSpec(
        kind="profile",
        arguments={"enable_prefix_caching": False, "max_num_batched_tokens": max(tokens, _LEAST_STEP_TOKENS)},
    )


class StepClient(EngineClient):
    """The connection to an engine that batches continuously (mutable)."""

    _messages = 0
    _requests = 0

    async def sample(self, prompts: Sequence[Sequence[int]], extra: Sequence[int], output_tokens: int) -> SampleTimes:
        """Measure the steps of a batch.

        Args:
            prompts: of the batch.
            extra: the prompt that joins while the batch decodes.
            output_tokens: of each request of the batch.

        Raises:
            ProfilingError: the engine cannot do it, never computes the batch in one step, or takes longer than it may.
        """
        for _ in range(_ATTEMPTS):
            async with self._within("answer"):
                taken = await self._sample(prompts, extra, output_tokens)
            if taken is not None:
                return taken
        raise ProfilingError(
            f"{self._what}: its engine does not compute {len(prompts)} prompts of {len(prompts[0])} tokens in one step"
        )

    async def _sample(
        self, prompts: Sequence[Sequence[int]], extra: Sequence[int], output_tokens: int
    ) -> SampleTimes | None:
        """Return what a batch took; None if its prompts did not share a step."""
        clock = asyncio.get_running_loop().time
        submitted_s = clock()
        batch = {self._submit(prompt, output_tokens) for prompt in prompts}
        joining, steps = 0, _Steps(batch)
        open_requests = set(batch)
        while open_requests:
            report = await self._report()
            steps.take(report, joining, clock())
            if not joining and steps.decoded == output_tokens // 2 and output_tokens > _SHORT:
                joining = self._submit(extra, 1)
                open_requests.add(joining)
            for ended in report.ended:
                if ended.failure:
                    raise ProfilingError(f"{self._what}: a request failed {ended.failure}")
                open_requests.discard(ended.request_id)
        return steps.times(submitted_s)

    def _submit(self, prompt: Sequence[int], output_tokens: int) -> int:
        self._messages += 1
        self._requests += 1
        sequence = PromptSequence(request_id=self._requests, prompt=tuple(prompt), output_tokens=output_tokens)
        self._channel.send(SubmitRequest(number=self._messages, sequence=sequence))
        return self._requests

    async def _report(self) -> StepReport:
        while True:
            match await self._channel.receive():
                case StepReport() as report:
                    return report
                case Failed() as failed:
                    raise ProfilingError(f"{self._what}: {failed.message}")


_SHORT = 4  # tokens of outputs that leave no room for a further prompt


class _Steps:
    """Sorts the steps of a sample by what they computed (mutable).

    An engine that prepares a step while the one before runs reports tokens later than it admits requests. So the
    tokens that a step brings show its kind.
    """

    def __init__(self, batch: set[int]) -> None:
        self._batch = batch
        self._begun_s: float | None = None  # of the first step, by the engine's clock
        self._last_s = 0.0  # end of the last step that brought tokens
        self._received_s = 0.0
        self._first_s: float | None = None
        self._apart = False
        self._mixed_s = 0.0
        self._decode_s: list[float] = []

    @property
    def decoded(self) -> int:
        """How many steps have decoded."""
        return len(self._decode_s)

    def take(self, report: StepReport, joining: int, received_s: float) -> None:
        """Take a report; `joining` is the request that joined, 0 for none."""
        if self._begun_s is None and (report.admitted or report.batch_tokens):
            self._begun_s = report.ended_s - report.step_s
        given = {each.request_id for each in report.tokens}
        if not given or self._begun_s is None:
            return
        period_s, self._last_s = report.ended_s - self._last_s, report.ended_s
        if self._first_s is None:
            self._first_s, self._received_s = report.ended_s - self._begun_s, received_s
            self._apart = given != self._batch
        elif joining in given:
            self._mixed_s = period_s
        elif given == self._batch:
            self._decode_s.append(period_s)

    def times(self, submitted_s: float) -> SampleTimes | None:
        """Return the times; None if the first step was not of the whole batch."""
        if self._apart or self._first_s is None:
            return None
        each_s = fmean(self._decode_s) if self._decode_s else 0.0
        admission_s = self._received_s - submitted_s - self._first_s
        return SampleTimes(self._first_s, max(each_s, LEAST_S), max(0.0, self._mixed_s), max(0.0, admission_s))
