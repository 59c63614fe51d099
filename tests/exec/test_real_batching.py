"""Reports of continuous engines as events of the controller, tokens of clients and records, whatever engines say."""

from __future__ import annotations

from dataclasses import dataclass, field

from fixtures import endpoint_spec

from maveriq.control.events import EngineProgress, FailedAlone, Finished, Started
from maveriq.domain.requests import Request
from maveriq.exec.control_lag import ControlLag
from maveriq.exec.messages import Admitted, Ended, NewTokens, StepReport
from maveriq.exec.real_batching import RealBatching


@dataclass
class Clock:
    """The clock of a run, as far as it is used here."""

    now_us: int = 0
    time_scale: float = 1.0


@dataclass
class Engines:
    """Continuous engines, with what reaches engines, clients and the controller."""

    clock: Clock = field(default_factory=Clock)
    sent: list[tuple[str, int]] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    events: list[EngineProgress] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lag = ControlLag(1.0, planned=False)
        self.batching = RealBatching(self, self.clock, self.events.append, 1_000_000, self.lag)  # type: ignore[arg-type]
        self.batching.loaded(1, 1, endpoint_spec(1, 0), 1_000)

    def submit_to_engine(self, deployment_id: int, request_id: int, *, is_urgent: bool) -> None:
        self.sent.append(("urgent" if is_urgent else "submit", request_id))

    def abort_in_engine(self, deployment_id: int, request_id: int) -> None:
        self.sent.append(("abort", request_id))

    def add_tokens(self, request_id: int, position: int, tokens: tuple[int, ...]) -> None:
        known = self.tokens.setdefault(request_id, [])
        assert len(known) == position
        known.extend(tokens)

    def submit(self, *request_ids: int) -> None:
        for number in request_ids:
            request = Request(request_id=number, endpoint_id=1, arrival_us=0, prompt_tokens=10, output_tokens=9)
            self.batching.submit(1, request, self.clock.now_us)

    def report(self, at_us: int, *, generation: int = 1, **what: object) -> EngineProgress | None:
        self.clock.now_us, before = at_us, len(self.events)
        self.batching.on_report(1, generation, StepReport(number=1, **what))  # type: ignore[arg-type]
        return self.events[-1] if len(self.events) > before else None


def test_a_request_from_admission_to_end() -> None:
    engines = Engines()
    engines.submit(1, 2)
    assert engines.sent == [("submit", 1), ("submit", 2)]
    first = engines.report(
        50_000, ended_s=7.0, step_s=0.02, admitted=(Admitted(1, 4),), tokens=(NewTokens(1, (5,)),), running=1,
        kv_tokens=11,
    )  # fmt: skip
    assert first is not None
    assert (first.started, first.first_tokens, first.kv_tokens) == ([Started(1, 30_000, 4)], [1], 11)
    [counters] = engines.batching.counters().values()
    assert (counters.running, counters.waiting, counters.used_blocks, counters.blocks) == (1, 1, 11, 1_000)
    last = engines.report(
        70_000, ended_s=7.02, step_s=0.02, tokens=(NewTokens(1, (6,)),), ended=(Ended(1, 0.06, 2),), running=0
    )
    assert last is not None
    assert last.finished == [Finished(1, 2, 2)]
    assert engines.tokens == {1: [5, 6]}
    summary = engines.lag.summary()
    assert summary is not None
    assert summary.execution_mean_s == 0.01  # submitted at 0, known at 70 ms, and the engine says 60 ms


def test_steps_are_when_the_engine_says_although_reports_come_late() -> None:
    engines = Engines()
    engines.submit(1)
    engines.report(10_000, ended_s=1.0, step_s=0.005, admitted=(Admitted(1),), tokens=(NewTokens(1, (1,)),), running=1)
    for step in range(1, 11):  # all at once, after the executor had no processor
        engines.report(200_000, ended_s=1.0 + 0.01 * step, step_s=0.005, tokens=(NewTokens(1, (1,)),), running=1)
    table, itl = engines.batching.tables(1_000_000)
    assert table is not None
    assert itl is not None
    assert table.step_us.tolist() == [5_000.0]
    assert table.busy_share.tolist() == [0.055]  # eleven steps of 5 ms
    assert dict(zip(itl.itl_us.tolist(), itl.tokens.tolist(), strict=True)) == {10_000: 10}


def test_an_engine_may_leave_out_admissions() -> None:
    engines = Engines()
    engines.submit(1, 2)
    progress = engines.report(5_000, step_s=0.002, tokens=(NewTokens(1, (5,)),), ended=(Ended(2, 0.0, 1),))
    assert progress is not None
    assert [started.request_id for started in progress.started] == [1, 2]
    assert progress.first_tokens == [1, 2]
    assert progress.finished == [Finished(2, 1, 1)]


def test_what_is_not_of_a_request_is_ignored() -> None:
    engines = Engines()
    engines.submit(1)
    engines.batching.abort(1, 1, 0)
    engines.batching.abort(1, 1, 0)
    assert engines.sent == [("submit", 1), ("abort", 1)]
    reported = {
        "tokens": (NewTokens(1, (5,)),),
        "admitted": (Admitted(1),),
        "preempted": (1,),
        "ended": (Ended(1, 0, 1),),
    }
    assert engines.report(5_000, **reported) is None
    assert not engines.tokens
    assert engines.report(6_000, generation=2, **reported) is None
    engines.batching.stop(1, 7_000)
    assert engines.report(8_000, **reported) is None


def test_a_request_that_the_engine_refuses_fails() -> None:
    engines = Engines()
    engines.submit(1)
    progress = engines.report(5_000, ended=(Ended(1, 0.0, 0, "(error): too long"),))
    assert progress is not None
    assert progress.failed == [FailedAlone(1, "its engine could not do it (error): too long")]
    assert not progress.started
    assert not progress.finished
    assert not progress.first_tokens
    assert bool(progress)


def test_all_that_an_engine_had_counts_as_begun_when_it_fails() -> None:
    engines = Engines()
    engines.submit(1, 2)
    engines.report(5_000, tokens=(NewTokens(1, (5,)),))
    last = engines.batching.last_words(1, 6_000)
    assert last is not None
    assert last.started == [Started(2, 6_000)]
    engines.batching.stop(1, 6_000)
    assert engines.batching.last_words(1, 6_000) is None
