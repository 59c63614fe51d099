"""The supervisor in simulated time: timeouts, backoff, restarts, and the steps of stopping an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from engine_fixtures import EngineCase, batch_of
from fixtures import MODEL
from virtual_time import run_virtually

from maveriq.exec.engine_process import LaunchSpec
from maveriq.exec.gpu_memory_gate import GpuMemoryGate, NoMemoryProbe
from maveriq.exec.gpus import GpuLostError
from maveriq.exec.launcher import LaunchError
from maveriq.exec.messages import (
    PROTOCOL_VERSION,
    ChannelClosedError,
    Failed,
    Finished,
    FromEngine,
    Generate,
    Hello,
    Load,
    Loaded,
    Ping,
    Pong,
    StepProgress,
    Stop,
    ToEngine,
)
from maveriq.exec.supervisor import Supervisor
from maveriq.exec.watchdog import SupervisionSettings

SETTINGS = SupervisionSettings(
    start_timeout_s=100,
    heartbeat_interval_s=1,
    hang_timeout_s=10,
    service_time_factor=3,
    grace_period_s=5,
    initial_backoff_s=1,
    max_backoff_s=5,
    max_restarts=5,
)
NEEDED = {0: 100, 1: 100}


class FakeEngine:
    """A scripted engine process: it answers messages by a given function and keeps what it received."""

    def __init__(self, answer: Callable[[FakeEngine, ToEngine], None]) -> None:
        self.received: list[ToEngine] = []
        self.signals: list[str] = []
        self.pid = 4711
        self.channel = self
        self.killable = True
        self.terminable = True
        self._answer = answer
        self._sent: asyncio.Queue[FromEngine] = asyncio.Queue()
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.rank_lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.gone = asyncio.Event()  # of its ranks
        self.gone.set()

    # The channel

    def send(self, message: ToEngine) -> None:
        self.received.append(message)
        self._answer(self, message)

    async def receive(self) -> FromEngine:
        next_message = asyncio.ensure_future(self._sent.get())
        await asyncio.wait({next_message, self._exit}, return_when=asyncio.FIRST_COMPLETED)
        if next_message.done():
            return next_message.result()
        next_message.cancel()
        raise ChannelClosedError("gone")

    def close(self) -> None:
        pass

    # The process

    def engine_loaded(self, rank_pids: Sequence[int]) -> None:
        pass

    async def wait_exit(self) -> int:
        return await asyncio.shield(self._exit)

    async def wait_gone(self) -> None:
        await self.wait_exit()
        await self.gone.wait()

    def terminate(self) -> None:
        self.signals.append("TERM")
        if self.terminable:
            self.exit(-15)

    def kill(self) -> None:
        self.signals.append("KILL")
        if self.killable:
            self.exit(-9)

    def last_output(self) -> str:
        return ""

    # What a script does

    def reply(self, *messages: FromEngine) -> None:
        for message in messages:
            self._sent.put_nowait(message)

    def exit(self, code: int) -> None:
        if not self._exit.done():
            self._exit.set_result(code)

    def of(self, kind: type[ToEngine]) -> list[ToEngine]:
        return [message for message in self.received if isinstance(message, kind)]


def answer_at_once(engine: FakeEngine, message: ToEngine) -> None:
    """Answer every message immediately."""
    match message:
        case Load():
            engine.reply(Loaded(backend="fake", version="1"))
        case Ping(number=number):
            engine.reply(Pong(number=number, execution_id=0, steps=0))
        case Generate(execution_id=number):
            engine.reply(StepProgress(execution_id=number, step=1, tokens=(5,)), finished(number))
        case Stop():
            engine.exit(0)


def finished(number: int) -> Finished:
    return Finished(execution_id=number, first_token_s=0, service_s=0, outputs=((5, 6),))


@dataclass
class Harness:
    """A supervisor with scripted engines, and the callbacks it made."""

    answer: Callable[[FakeEngine, ToEngine], None]
    greet: bool = True
    watch: object = field(default_factory=NoMemoryProbe)
    engines: list[FakeEngine] = field(default_factory=list)
    events: list[tuple[float, str, object]] = field(default_factory=list)
    refusals: int = 0
    launch_s: float = 0.0

    def __post_init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.supervisor = Supervisor(
            1, launcher=self, callbacks=self, settings=SETTINGS, gate=GpuMemoryGate(self.watch)
        )

    def start(self) -> None:
        case = EngineCase(backend="fake", model=MODEL)
        self.supervisor.start(LaunchSpec(spec=case.spec(), needed=NEEDED, load_s=50))

    async def launch(self, spec, gpu_ids) -> FakeEngine:
        if self.refusals:
            self.refusals -= 1
            raise LaunchError("no such file")
        await asyncio.sleep(self.launch_s)
        engine = FakeEngine(self.answer)
        self.engines.append(engine)
        if self.greet:
            engine.reply(Hello(protocol=PROTOCOL_VERSION, pid=1))
        return engine

    def _note(self, what: str, detail: object = None) -> None:
        self.events.append((self.loop.time(), what, detail))

    def on_engine_up(self, launch_spec, loaded) -> None:
        self._note("up")

    def on_engine_down(self, deployment_id, reason, *, restarts) -> None:
        self._note("down" if restarts else "lost", reason)

    def on_engine_repaired(self, deployment_id) -> None:
        self._note("repaired")
        self.start()

    def on_report(self, deployment_id, generation, report) -> None:
        self._note("report", report.number)

    def on_step(self, deployment_id, progress) -> None:
        self._note("step", progress.step)

    def on_execution_end(self, deployment_id, result) -> None:
        self._note("executed", result.execution_id)

    def on_warning(self, deployment_id, warning) -> None:
        self._note("warning", warning)

    def on_internal_error(self, error) -> None:
        raise AssertionError(error)

    def times(self, what: str) -> list[float]:
        return [round(time_s, 3) for time_s, name, _ in self.events if name == what]

    def details(self, what: str) -> list[object]:
        return [detail for _, name, detail in self.events if name == what]


def run_script(script, answer=answer_at_once, **how) -> Harness:
    """Run a script on a harness in simulated time, and return the harness."""

    async def main() -> Harness:
        harness = Harness(answer, **how)
        await script(harness)
        await harness.supervisor.close()
        return harness

    return run_virtually(main(), longest_s=100_000)


def test_backoff_doubles_up_to_a_limit_and_ends_after_the_last_restart() -> None:
    def dies(engine: FakeEngine, message: ToEngine) -> None:
        if isinstance(message, Load):
            engine.exit(1)

    async def script(harness: Harness) -> None:
        harness.start()
        await asyncio.sleep(1000)

    harness = run_script(script, dies)
    downs = harness.times("down")
    assert [round(up - down) for down, up in zip(downs, harness.times("repaired"), strict=True)] == [1, 2, 4, 5]
    assert harness.details("lost") == ["its engine ended with exit code 1; given up after 5 failures in a row"]
    assert len(harness.engines) == 5


def test_a_successful_execution_resets_the_restart_count() -> None:
    async def script(harness: Harness) -> None:
        harness.start()
        for number in range(1, 10):
            await asyncio.sleep(20)
            harness.supervisor.execute(batch_of(number), 0.0)
            await asyncio.sleep(20)
            harness.engines[-1].exit(1)
        await asyncio.sleep(20)

    harness = run_script(script)
    assert len(harness.times("up")) == 10
    assert harness.details("lost") == []


@pytest.mark.parametrize(("kind", "ends"), [("out-of-memory", "lost"), ("unsupported", "lost"), ("error", "down")])
def test_permanent_failures_are_not_retried(kind: str, ends: str) -> None:
    def refuses(engine: FakeEngine, message: ToEngine) -> None:
        if isinstance(message, Load):
            engine.reply(Failed(execution_id=0, kind=kind, message="no"))

    async def script(harness: Harness) -> None:
        harness.start()
        await asyncio.sleep(0.5)

    harness = run_script(script, refuses)
    assert harness.details(ends) == [f"its engine could not load ({kind}): no"]


def test_the_gpu_that_lacks_memory_is_named_by_its_id_in_the_cluster() -> None:
    def refuses(engine: FakeEngine, message: ToEngine) -> None:
        if isinstance(message, Load):
            engine.reply(Failed(execution_id=0, kind="out-of-memory", message="needs 2 GiB", device="cuda:0"))

    async def script(harness: Harness) -> None:
        # CUDA counts the visible GPUs in the order of the machine, ranks in the order of the plan.
        case = EngineCase(backend="fake", model=MODEL)
        launch_spec = LaunchSpec(spec=case.spec(tp=2, devices=("cuda:1", "cuda:0")), needed={7: 100, 4: 100}, load_s=50)
        harness.supervisor.start(launch_spec)
        await asyncio.sleep(0.5)

    harness = run_script(script, refuses)
    assert harness.details("lost") == ["its engine could not load (out-of-memory on GPU 4): needs 2 GiB"]


def test_another_protocol_version_is_refused() -> None:
    async def script(harness: Harness) -> None:
        harness.start()
        await asyncio.sleep(0.5)
        harness.engines[0].reply(Hello(protocol=PROTOCOL_VERSION + 1, pid=1))
        await asyncio.sleep(0.5)

    harness = run_script(script, lambda engine, message: None, greet=False)
    assert "version" in str(harness.details("lost")[0])


def test_a_slow_start_times_out_even_if_the_engine_answers_pings() -> None:
    def only_pongs(engine: FakeEngine, message: ToEngine) -> None:
        if isinstance(message, Ping):
            engine.reply(Pong(number=message.number, execution_id=0, steps=0))

    async def script(harness: Harness) -> None:
        harness.start()
        await asyncio.sleep(101.5)

    harness = run_script(script, only_pongs)
    assert harness.times("down") == [101.0]
    assert harness.details("down") == ["its engine did not start within 100 s"]


def test_launch_and_load_share_the_start_timeout() -> None:
    async def script(harness: Harness) -> None:
        harness.launch_s = 80
        harness.start()
        await asyncio.sleep(150)

    assert run_script(script, lambda engine, message: None).times("down") == [101.0]


def test_a_process_that_cannot_be_started_is_a_failure() -> None:
    async def script(harness: Harness) -> None:
        harness.refusals = 2
        harness.start()
        await asyncio.sleep(10)

    harness = run_script(script)
    assert harness.details("down") == ["no such file"] * 2
    assert len(harness.times("up")) == 1


def test_an_engine_without_heartbeats_is_killed() -> None:
    def falls_silent(engine: FakeEngine, message: ToEngine) -> None:
        if not isinstance(message, Ping) or message.number < 3:
            answer_at_once(engine, message)

    async def script(harness: Harness) -> None:
        harness.start()
        await asyncio.sleep(14)

    harness = run_script(script, falls_silent)
    assert harness.times("down") == [13.0]  # last heard at 2 s
    assert harness.engines[0].signals == ["KILL"]


@pytest.mark.parametrize("at_work", [False, True])
def test_a_stalled_executor_does_not_kill_its_engines(*, at_work: bool) -> None:
    """The executor was stopped, as by SIGSTOP and SIGCONT, so missing heartbeats are its own fault."""

    def takes_long(engine: FakeEngine, message: ToEngine) -> None:
        match message:
            case Generate():
                pass
            case Ping(number=number):
                engine.reply(Pong(number=number, execution_id=int(at_work), steps=0))
            case _:
                answer_at_once(engine, message)

    async def script(harness: Harness) -> None:
        harness.start()
        await asyncio.sleep(0.5)
        if at_work:
            harness.supervisor.execute(batch_of(1), 0.0)
        await asyncio.sleep(5)
        harness.loop.stall(1000)
        await asyncio.sleep(3)

    assert run_script(script, takes_long).times("down") == []


@pytest.mark.parametrize(
    "too_much",
    [
        StepProgress(execution_id=1, step=3, tokens=(5,)),
        StepProgress(execution_id=1, step=1, tokens=(5, 6)),
        Finished(execution_id=1, first_token_s=0, service_s=0, outputs=((5, 6, 7),)),
        Finished(execution_id=1, first_token_s=0, service_s=0, outputs=()),
    ],
)
def test_an_engine_with_invalid_results_fails(too_much: FromEngine) -> None:
    def sends_too_much(engine: FakeEngine, message: ToEngine) -> None:
        if isinstance(message, Generate):
            engine.reply(too_much)
        else:
            answer_at_once(engine, message)

    async def script(harness: Harness) -> None:
        harness.start()
        await asyncio.sleep(0.5)
        harness.supervisor.execute(batch_of(1, tokens=2), 0.0)
        await asyncio.sleep(0.5)

    harness = run_script(script, sends_too_much)
    assert len(harness.details("down")) == 1
    assert harness.details("executed") == []


@pytest.mark.parametrize(("expected_s", "down_s"), [(0.0, 11.0), (100.0, 311.0)])
def test_an_execution_without_progress_times_out_by_its_expected_time(expected_s: float, down_s: float) -> None:
    """The engine still answers pings, but its execution makes no progress after one step."""

    def stands_still(engine: FakeEngine, message: ToEngine) -> None:
        match message:
            case Generate(execution_id=number):
                engine.reply(StepProgress(execution_id=number, step=1, tokens=(5,)))
            case Ping(number=number):
                engine.reply(Pong(number=number, execution_id=1, steps=1))
            case _:
                answer_at_once(engine, message)

    async def script(harness: Harness) -> None:
        harness.start()
        await asyncio.sleep(0)
        while not harness.times("up"):
            await asyncio.sleep(0)
        harness.supervisor.execute(batch_of(1), expected_s)
        await asyncio.sleep(down_s + 0.5)

    assert run_script(script, stands_still).times("down") == [down_s]


def test_steps_reported_by_pongs_count_as_progress() -> None:
    def slow(engine: FakeEngine, message: ToEngine) -> None:
        match message:
            case Generate():
                pass
            case Ping(number=number):
                engine.reply(Pong(number=number, execution_id=1, steps=number // 5))
            case _:
                answer_at_once(engine, message)

    async def script(harness: Harness) -> None:
        harness.start()
        await asyncio.sleep(0.5)
        harness.supervisor.execute(batch_of(1), 0.0)
        await asyncio.sleep(500)

    assert run_script(script, slow).times("down") == []


def test_lost_messages_are_sent_again() -> None:
    """The first message of each kind from the executor is lost, and so is the first `Finished`."""
    lost: set[str] = set()

    def loses_first(engine: FakeEngine, message: ToEngine) -> None:
        name = type(message).__name__
        if name not in lost:
            lost.add(name)
        elif isinstance(message, Generate) and "end" not in lost:
            lost.add("end")
            engine.reply(StepProgress(execution_id=1, step=1, tokens=(5,)))
        else:
            answer_at_once(engine, message)

    async def script(harness: Harness) -> None:
        harness.start()
        await asyncio.sleep(5)
        harness.supervisor.execute(batch_of(1, tokens=2), 0.0)
        await asyncio.sleep(5)

    harness = run_script(script, loses_first)
    assert len(harness.times("up")) == 1
    assert harness.details("step") == [1]
    assert harness.details("executed") == [1]
    assert len(harness.engines[0].of(Generate)) == 3


def test_steps_are_reported_once_and_in_order() -> None:
    def reorders(engine: FakeEngine, message: ToEngine) -> None:
        if isinstance(message, Generate):
            for step in (2, 1, 1, 3, 2, 3, 5):
                engine.reply(StepProgress(execution_id=1, step=step, tokens=(step,)))
            engine.reply(StepProgress(execution_id=7, step=4, tokens=(4,)), finished(7), finished(1), finished(1))
        else:
            answer_at_once(engine, message)

    async def script(harness: Harness) -> None:
        harness.start()
        await asyncio.sleep(0.5)
        harness.supervisor.execute(batch_of(1, tokens=5), 0.0)
        await asyncio.sleep(0.5)

    harness = run_script(script, reorders)
    assert harness.details("step") == [1, 2, 3]
    assert harness.details("executed") == [1]


@pytest.mark.parametrize(
    ("stubborn", "signals", "took_s"), [("not", [], 0), ("message", ["TERM"], 5), ("signal", ["TERM", "KILL"], 10)]
)
def test_stopping_escalates_from_a_message_to_sigterm_to_sigkill(
    stubborn: str, signals: list[str], took_s: float
) -> None:
    def answer(engine: FakeEngine, message: ToEngine) -> None:
        engine.terminable = stubborn != "signal"
        if not isinstance(message, Stop) or stubborn == "not":
            answer_at_once(engine, message)

    async def script(harness: Harness) -> None:
        harness.start()
        await asyncio.sleep(0.5)
        before_s = harness.loop.time()
        await harness.supervisor.close()
        assert harness.loop.time() - before_s == took_s

    assert run_script(script, answer).engines[0].signals == signals


def test_a_process_that_cannot_be_killed_is_reported() -> None:
    def answer(engine: FakeEngine, message: ToEngine) -> None:
        engine.terminable = engine.killable = False
        if not isinstance(message, Stop):
            answer_at_once(engine, message)

    async def script(harness: Harness) -> None:
        harness.start()
        await asyncio.sleep(0.5)

    assert run_script(script, answer).details("warning") == ["process group 4711 cannot be killed"]


def test_a_lost_rank_ends_the_engine_within_2_s() -> None:
    async def script(harness: Harness) -> None:
        harness.start()
        await asyncio.sleep(1)
        harness.engines[0].rank_lost.set_result("rank 1, process 7 (python)")
        await asyncio.sleep(2)
        assert harness.details("down") == ["its engine lost rank 1, process 7 (python)"]
        assert harness.engines[0].signals == ["KILL"]

    run_script(script)


def test_an_engine_that_ends_because_of_a_lost_rank_says_so() -> None:
    async def script(harness: Harness) -> None:
        harness.start()
        await asyncio.sleep(1)
        harness.engines[0].rank_lost.set_result("rank 1, process 7 (python)")
        harness.engines[0].exit(4)
        await asyncio.sleep(2)
        assert harness.details("down") == ["its engine lost rank 1, process 7 (python)"]

    run_script(script)


@pytest.mark.parametrize("reports", [True, False])
def test_a_load_that_fails_may_lose_its_ranks_before_it_says_why(*, reports: bool) -> None:
    def answer(engine: FakeEngine, message: ToEngine) -> None:
        if isinstance(message, Load) and not engine.rank_lost.done():
            engine.rank_lost.set_result("rank 0, process 6 (python)")
        if isinstance(message, Ping) and message.number == 4 and reports:
            engine.reply(Failed(execution_id=0, kind="out-of-memory", message="no"))

    async def script(harness: Harness) -> None:
        harness.start()
        await asyncio.sleep(SETTINGS.grace_period_s + 0.5)
        assert harness.details("lost") == (["its engine could not load (out-of-memory): no"] if reports else [])
        assert harness.details("down") == ([] if reports else ["its engine lost rank 0, process 6 (python)"])

    run_script(script, answer)


@pytest.mark.parametrize("stop", [True, False])
def test_memory_is_free_only_when_all_processes_have_ended(*, stop: bool) -> None:
    async def script(harness: Harness) -> None:
        harness.start()
        await asyncio.sleep(1)
        harness.engines[0].gone.clear()
        if stop:
            harness.supervisor.stop()
            harness.start()
        else:
            harness.engines[0].exit(1)
        await asyncio.sleep(50)  # it cannot be killed meanwhile
        assert len(harness.engines) == 1
        harness.engines[0].gone.set()
        await asyncio.sleep(0.5)
        assert len(harness.engines) == 2
        assert harness.details("warning") == ["process group 4711 cannot be killed"]

    run_script(script)


def test_an_engine_cannot_start_where_another_never_ends() -> None:
    async def script(harness: Harness) -> None:
        harness.start()
        await asyncio.sleep(1)
        harness.engines[0].gone.clear()
        harness.supervisor.stop()
        harness.start()
        await asyncio.sleep(61)
        assert harness.details("down") == [
            "its engine cannot start: GPU 0, 1 is held by an engine that was stopped 60 s ago and does not end"
        ]
        await asyncio.sleep(1000)
        assert len(harness.details("lost")) == 1
        assert len(harness.engines) == 1

    run_script(script)


class _Memory:
    """GPU memory that stays in use for a while after an engine exited."""

    def __init__(self, back_s: float) -> None:
        self.back_s = back_s

    def device_of(self, gpu_id: int) -> int:
        return gpu_id

    def free_bytes(self, device: int) -> int:
        return 10 if 0.2 < asyncio.get_running_loop().time() < self.back_s else 100


@pytest.mark.parametrize(("back_s", "up_s", "warned"), [(30.0, 30.0, 0), (1000.0, 61.0, 1)])
def test_the_next_engine_waits_for_free_memory_up_to_a_timeout(back_s: float, up_s: float, warned: int) -> None:
    async def script(harness: Harness) -> None:
        harness.start()  # at first there is enough memory
        await asyncio.sleep(0.5)
        assert len(harness.times("up")) == 1
        harness.supervisor.stop()
        await asyncio.sleep(0.5)
        harness.start()
        await asyncio.sleep(200)

    harness = run_script(script, watch=_Memory(back_s))
    assert harness.times("up")[1] == pytest.approx(up_s, abs=0.2)
    assert len(harness.details("warning")) == warned


def test_an_engine_on_a_lost_gpu_is_given_up_at_its_first_restart() -> None:
    class Losing(_Memory):
        def free_bytes(self, device: int) -> int:
            if device == 1 and asyncio.get_running_loop().time() >= self.back_s:
                raise GpuLostError("GPU 1 of this machine (big) is lost: it has fallen off the bus")
            return 100

    async def script(harness: Harness) -> None:
        harness.start()
        await asyncio.sleep(20)
        harness.engines[-1].exit(1)
        await asyncio.sleep(100)

    harness = run_script(script, watch=Losing(20.0))
    assert len(harness.engines) == 1
    assert harness.times("down") == [pytest.approx(20, abs=0.1)]
    assert harness.times("lost") == [pytest.approx(21, abs=0.1)]
    assert harness.details("lost") == ["GPU 1 of this machine (big) is lost: it has fallen off the bus"]


def test_gpus_that_share_a_device_add_up_their_memory() -> None:
    class Shared(_Memory):
        def device_of(self, gpu_id: int) -> int:
            return 0

        def free_bytes(self, device: int) -> int:
            return 150 if asyncio.get_running_loop().time() < self.back_s else 200

    async def script(harness: Harness) -> None:
        harness.start()  # 100 on each of two
        await asyncio.sleep(50)

    assert run_script(script, watch=Shared(30.0)).times("up") == [pytest.approx(30.0, abs=0.2)]


def test_injected_faults_do_not_count_as_failures() -> None:
    async def script(harness: Harness) -> None:
        harness.start()
        for _ in range(2 * SETTINGS.max_restarts):
            await asyncio.sleep(5)
            assert harness.supervisor.abort("killed on purpose", repair_after_s=1.0)
        await asyncio.sleep(5)

    harness = run_script(script)
    assert harness.details("lost") == []
    assert len(harness.times("up")) == 2 * SETTINGS.max_restarts + 1


def test_load_messages_carry_the_remaining_load_time() -> None:
    async def script(harness: Harness) -> None:
        harness.start()
        await asyncio.sleep(8)
        harness.engines[0].reply(Hello(protocol=PROTOCOL_VERSION, pid=1))
        await asyncio.sleep(0.5)

    harness = run_script(script, lambda engine, message: None, greet=False)
    assert [message.spec.load_s for message in harness.engines[0].of(Load)][-1] == pytest.approx(42, abs=0.1)
