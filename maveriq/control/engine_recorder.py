"""The records of continuous engines: what each did over time, and when tokens of its requests came.

`EngineRecorder` hears from `SteppedEngine` what ran. It knows when the tokens before came, also where some requests got
none in a step: those that were preempted, and those that had to wait while prompts were computed alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from maveriq.control.engine_series import EngineSeries, EngineSums, StepsEnded, TokenGaps
from maveriq.domain.records import EngineTable, ItlTable
from maveriq.engine.requests import RequestId
from maveriq.engine.sequence import Sequence as EngineSequence
from maveriq.engine.steps import Emitted
from maveriq.units import Micros

if TYPE_CHECKING:
    import numpy as np


class EngineRecorder:
    """Records what one engine does (mutable). Times never go back.

    Args:
        sample_us: length of an interval of its series.
        gaps: where times between tokens are counted; engines may share it.
    """

    __slots__ = (
        "_decoding", "_interrupted", "_late", "_present", "_running", "_start_us", "_sums", "_token_us", "_used_blocks",
        "gaps",
    )  # fmt: skip

    def __init__(self, sample_us: Micros, gaps: TokenGaps) -> None:
        self.gaps = gaps
        self._sums = EngineSums(sample_us, gaps)
        self._present = 0  # requests that were sent and have not ended
        # What runs now.
        self._start_us: Micros = 0
        self._running = self._used_blocks = 0
        # When requests got the token before: most at `_token_us`, others later or, if they were preempted, earlier.
        self._decoding = 0  # requests that have a token and get another
        self._token_us: Micros = 0
        self._late: list[tuple[Micros, int]] = []  # times of first tokens, and how many
        self._interrupted: dict[RequestId, Micros] = {}

    # Requests

    def joined(self, now_us: Micros) -> None:
        """Record that a request was sent to the engine."""
        self._present += 1
        self._sums.moved(now_us, 1)

    def left(self, now_us: Micros, requests: int = 1) -> None:
        """Record that requests have ended, or are no longer wanted."""
        self._present -= requests
        self._sums.moved(now_us, -requests)

    def aborted(self, request_id: RequestId) -> None:
        """Forget when a request got its last token."""
        self._interrupted.pop(request_id, None)

    # Steps

    def begin(self, start_us: Micros, running: int, used_blocks: int) -> None:
        """Record that a step or a run of steps begins.

        Args:
            start_us: when.
            running: requests that have been admitted for it, or before.
            used_blocks: KV blocks that requests hold.
        """
        self._start_us = start_us
        self._running = running
        self._used_blocks = used_blocks

    def preempted(self, sequences: Iterable[EngineSequence]) -> None:
        """Record which sequences were preempted for the step that runs."""
        self.interrupted(
            sequence.request.request_id for sequence in sequences if sequence.length > sequence.prompt_tokens
        )

    def interrupted(self, request_ids: Iterable[RequestId]) -> None:
        """Record which requests, of those that have a token, were preempted for the step that runs."""
        for request_id in request_ids:
            self._interrupted.setdefault(request_id, self._start_us)

    def step_ended(self, end_us: Micros, tokens: int, together: int, emitted: Sequence[Emitted]) -> None:
        """Record that a step has run.

        Args:
            end_us: when it ended.
            tokens: tokens that it computed.
            together: requests that got a token and are not listed.
            emitted: the tokens that are.
        """
        decoded = together
        for token in emitted:
            decoded += token.output_tokens > 1
        on_time = decoded
        if decoded and (self._late or self._interrupted):
            on_time -= self._note_late(end_us) + self._note_interrupted(emitted, end_us)
        used = self._used_blocks
        self._sums.steps_ended(
            StepsEnded(self._start_us, end_us, self._running, used, used, 1, tokens, end_us - self._token_us, on_time)
        )
        if decoded or not self._decoding:
            self._token_us = end_us
        if decoded:
            self._decoding = decoded
        if emitted:
            self._note_ends(emitted, end_us)

    def run_ended(
        self, end_us: Micros, first_end_us: Micros, steps: int, decodes: int, blocks: int, emitted: Sequence[Emitted]
    ) -> None:
        """Record that a run of steps has ended that only decode.

        Args:
            end_us: when the last one ended.
            first_end_us: when the first one ended; `further_steps` has the others.
            steps: how many.
            decodes: sequences of each.
            blocks: KV blocks that these took.
            emitted: tokens of the last step that are listed.
        """
        on_time = decodes - self._note_late(first_end_us) if self._late else decodes
        used = self._used_blocks
        self._sums.steps_ended(
            StepsEnded(
                self._start_us,
                end_us,
                self._running,
                used,
                used + blocks,
                steps,
                steps * decodes,
                first_end_us - self._token_us,
                on_time,
            )
        )
        self._token_us = end_us
        self._decoding = decodes
        if emitted:
            self._note_ends(emitted, end_us)

    def further_steps(self, first: int, growth: int, steps: int, decodes: int) -> None:
        """Record the durations of steps of a run after its first: see `EngineSums.further_gaps`."""
        self._sums.further_gaps(first, growth, steps, decodes)

    def stopped(self, now_us: Micros, *, end_us: Micros, steps: int, decodes: int) -> None:
        """Record that the engine stops, with all its requests, while steps run that were to end later.

        Args:
            now_us: the present.
            end_us: when the steps were to end.
            steps: how many; 0 if nothing runs.
            decodes: sequences of each.
        """
        if steps and now_us > self._start_us:
            done = steps * (now_us - self._start_us) // (end_us - self._start_us)
            used = self._used_blocks
            self._sums.steps_ended(
                StepsEnded(self._start_us, now_us, self._running, used, used, done, done * decodes, 0, 0)
            )
        self.left(now_us, self._present)

    def note(
        self,
        *,
        steps: np.ndarray[Any, Any],
        runs: np.ndarray[Any, Any],
        gaps: np.ndarray[Any, Any],
        moves: np.ndarray[Any, Any],
    ) -> None:
        """Record what an engine has noted itself, instead of all else; the arguments are those of `EngineSums.note`."""
        self._sums.note(steps=steps, runs=runs, gaps=gaps, moves=moves)

    def _note_ends(self, emitted: Sequence[Emitted], end_us: Micros) -> None:
        """Record first and last tokens."""
        begun = ended = 0  # requests that get another token, and that got their last
        for token in emitted:
            if token.finish_reason is None:
                begun += token.output_tokens == 1
            else:
                ended += token.output_tokens > 1
        if begun and self._token_us != end_us:
            self._late.append((end_us, begun))
        self._decoding += begun - ended

    def _note_late(self, end_us: Micros) -> int:
        """Record second tokens of requests whose first came in a step in which others got none; return their number."""
        late, self._late = self._late, []
        for since_us, tokens in late:
            self._sums.other_gap(end_us - since_us, tokens)
        return sum(tokens for _, tokens in late)

    def _note_interrupted(self, emitted: Sequence[Emitted], end_us: Micros) -> int:
        """Record the next token of requests that had been preempted, and return their number."""
        found = 0
        for token in emitted if self._interrupted else ():
            since_us = self._interrupted.pop(token.request_id, None)
            if since_us is not None:
                self._sums.other_gap(end_us - since_us)
                found += 1
        return found

    def series(self, ended_us: Micros) -> EngineSeries:
        """Return what the engine did up to an instant."""
        return self._sums.series(ended_us)


class EngineRecords:
    """What the continuous engines of a run did (mutable): a recorder for each deployment.

    Args:
        sample_us: length of an interval.
    """

    def __init__(self, sample_us: Micros) -> None:
        self._sample_us = sample_us
        self._recorders: dict[int, _Recorded] = {}
        self._gaps: dict[int, TokenGaps] = {}

    def recorder(self, deployment_id: int, *, endpoint_id: int, blocks: int, now_us: Micros) -> EngineRecorder:
        """Return the recorder of a deployment, whose first engine starts now.

        Args:
            deployment_id: the deployment; its later engines get the same recorder.
            endpoint_id: its endpoint.
            blocks: KV blocks that requests may hold.
            now_us: the present.
        """
        recorded = self._recorders.get(deployment_id)
        if recorded is None:
            gaps = self._gaps.setdefault(endpoint_id, TokenGaps())
            recorded = _Recorded(EngineRecorder(self._sample_us, gaps), blocks, now_us)
            self._recorders[deployment_id] = recorded
        return recorded.recorder

    def tables(self, ended_us: Micros) -> tuple[EngineTable | None, ItlTable | None]:
        """Return engines over time and inter-token latencies up to the end of a run; None where there was no engine."""
        if not self._recorders:
            return None, None
        import numpy as np

        parts = []
        for deployment_id, recorded in sorted(self._recorders.items()):
            series = recorded.recorder.series(ended_us)
            rows = np.flatnonzero(series.time_us > recorded.since_us)
            part = {name: column[rows] for name, column in series._asdict().items() if name != "used_blocks"}
            part["kv_use"] = series.used_blocks[rows] / recorded.blocks
            part["deployment_id"] = np.full(len(rows), deployment_id, dtype=np.int64)
            parts.append(part)
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.lexsort((columns["deployment_id"], columns["time_us"]))
        engines = EngineTable(**{name: column[order] for name, column in columns.items()})
        return engines, self._itl()

    def _itl(self) -> ItlTable:
        import numpy as np

        found = [(endpoint_id, *gaps.distribution()) for endpoint_id, gaps in sorted(self._gaps.items())]
        return ItlTable(
            endpoint_id=np.concatenate([np.full(len(gap_us), endpoint_id) for endpoint_id, gap_us, _ in found]),
            itl_us=np.concatenate([gap_us for _, gap_us, _ in found]),
            tokens=np.concatenate([tokens for _, _, tokens in found]),
        )


class _Recorded(NamedTuple):
    recorder: EngineRecorder
    blocks: int
    since_us: Micros
