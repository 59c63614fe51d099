"""Supervision on a clock of its own: patience, backoff, repetition, the steps of stopping."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from engine_fixtures import EngineCase, work
from fixtures import MODEL
from virtual_time import run_virtually

from maveriq.exec.engine_process import LaunchSpec, SupervisionSettings
from maveriq.exec.gpu_memory_gate import GpuMemoryGate, NoMemoryProbe
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
    """The engine's side, as a test scripts it: it answers what it is told to, and keeps what it heard."""

    def __init__(self, answer: Callable[[FakeEngine, ToEngine], None]) -> None:
        self.heard: list[ToEngine] = []
        self.signals: list[str] = []
        self.pid = 4711
        self.channel = self
        self.killable = True
        self.terminable = True
        self._answer = answer
        self._said: asyncio.Queue[FromEngine] = asyncio.Queue()
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    # The channel

    def send(self, message: ToEngine) -> None:
        self.heard.append(message)
        self._answer(self, message)

    async def receive(self) -> FromEngine:
        said = asyncio.ensure_future(self._said.get())
        await asyncio.wait({said, self._exit}, return_when=asyncio.FIRST_COMPLETED)
        if said.done():
            return said.result()
        said.cancel()
        raise ChannelClosedError("gone")

    def close(self) -> None:
        pass

    # The process

    async def wait_exit(self) -> int:
        return await asyncio.shield(self._exit)

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

    def say(self, *messages: FromEngine) -> None:
        for message in messages:
            self._said.put_nowait(message)

    def exit(self, code: int) -> None:
        if not self._exit.done():
            self._exit.set_result(code)

    def of(self, kind: type[ToEngine]) -> list[ToEngine]:
        return [message for message in self.heard if isinstance(message, kind)]


def well(engine: FakeEngine, message: ToEngine) -> None:
    """Do everything at once."""
    match message:
        case Load():
            engine.say(Loaded(backend="fake", version="1"))
        case Ping(number=number):
            engine.say(Pong(number=number, execution_id=0, steps=0))
        case Generate(execution_id=number):
            engine.say(StepProgress(execution_id=number, step=1, tokens=(5,)), finished(number))
        case Stop():
            engine.exit(0)


def finished(number: int) -> Finished:
    return Finished(execution_id=number, first_token_s=0, service_s=0, outputs=((5, 6),))


@dataclass
class Scene:
    """A supervisor with a launcher that gives it scripted engines, and what it was told."""

    answer: Callable[[FakeEngine, ToEngine], None]
    greet: bool = True
    watch: object = field(default_factory=NoMemoryProbe)
    engines: list[FakeEngine] = field(default_factory=list)
    told: list[tuple[float, str, object]] = field(default_factory=list)
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
            engine.say(Hello(protocol=PROTOCOL_VERSION, pid=1))
        return engine

    def _note(self, what: str, detail: object = None) -> None:
        self.told.append((self.loop.time(), what, detail))

    def on_engine_up(self, launch_spec, loaded) -> None:
        self._note("up")

    def on_engine_down(self, deployment_id, reason, *, restarts) -> None:
        self._note("down" if restarts else "lost", reason)

    def on_engine_repaired(self, deployment_id) -> None:
        self._note("repaired")
        self.start()

    def on_step(self, deployment_id, progress) -> None:
        self._note("step", progress.step)

    def on_execution_end(self, deployment_id, result) -> None:
        self._note("executed", result.execution_id)

    def on_warning(self, deployment_id, warning) -> None:
        self._note("warning", warning)

    def on_internal_error(self, error) -> None:
        raise AssertionError(error)

    def times(self, what: str) -> list[float]:
        return [round(time_s, 3) for time_s, told, _ in self.told if told == what]

    def details(self, what: str) -> list[object]:
        return [detail for _, told, detail in self.told if told == what]


def play(script, answer=well, **how) -> Scene:
    """Play a script on a scene, and return the scene."""

    async def main() -> Scene:
        scene = Scene(answer, **how)
        await script(scene)
        await scene.supervisor.close()
        return scene

    return run_virtually(main(), longest_s=100_000)


def test_backoff_doubles_up_to_a_bound_and_ends_after_the_last_failure() -> None:
    def dies(engine: FakeEngine, message: ToEngine) -> None:
        if isinstance(message, Load):
            engine.exit(1)

    async def script(scene: Scene) -> None:
        scene.start()
        await asyncio.sleep(1000)

    scene = play(script, dies)
    downs = scene.times("down")
    assert [round(up - down) for down, up in zip(downs, scene.times("repaired"), strict=True)] == [1, 2, 4, 5]
    assert scene.details("lost") == ["its engine ended with exit code 1; given up after 5 failures in a row"]
    assert len(scene.engines) == 5


def test_an_execution_that_succeeds_is_a_new_start_for_the_count() -> None:
    async def script(scene: Scene) -> None:
        scene.start()
        for number in range(1, 10):
            await asyncio.sleep(20)
            scene.supervisor.execute(work(number), 0.0)
            await asyncio.sleep(20)
            scene.engines[-1].exit(1)
        await asyncio.sleep(20)

    scene = play(script)
    assert len(scene.times("up")) == 10
    assert scene.details("lost") == []


@pytest.mark.parametrize(("kind", "ends"), [("out-of-memory", "lost"), ("unsupported", "lost"), ("error", "down")])
def test_what_no_repeat_mends_is_not_repeated(kind: str, ends: str) -> None:
    def refuses(engine: FakeEngine, message: ToEngine) -> None:
        if isinstance(message, Load):
            engine.say(Failed(execution_id=0, kind=kind, message="no"))

    async def script(scene: Scene) -> None:
        scene.start()
        await asyncio.sleep(0.5)

    scene = play(script, refuses)
    assert scene.details(ends) == [f"its engine could not load ({kind}): no"]


def test_another_version_of_the_protocol_is_refused() -> None:
    async def script(scene: Scene) -> None:
        scene.start()
        await asyncio.sleep(0.5)
        scene.engines[0].say(Hello(protocol=PROTOCOL_VERSION + 1, pid=1))
        await asyncio.sleep(0.5)

    scene = play(script, lambda engine, message: None, greet=False)
    assert "version" in str(scene.details("lost")[0])


def test_a_start_that_takes_too_long_is_a_failure_also_when_the_engine_answers() -> None:
    def only_pongs(engine: FakeEngine, message: ToEngine) -> None:
        if isinstance(message, Ping):
            engine.say(Pong(number=message.number, execution_id=0, steps=0))

    async def script(scene: Scene) -> None:
        scene.start()
        await asyncio.sleep(101.5)

    scene = play(script, only_pongs)
    assert scene.times("down") == [101.0]
    assert scene.details("down") == ["its engine did not start within 100 s"]


def test_launch_and_load_share_the_time_to_start() -> None:
    async def script(scene: Scene) -> None:
        scene.launch_s = 80
        scene.start()
        await asyncio.sleep(150)

    assert play(script, lambda engine, message: None).times("down") == [101.0]


def test_a_process_that_cannot_be_started_is_a_failure() -> None:
    async def script(scene: Scene) -> None:
        scene.refusals = 2
        scene.start()
        await asyncio.sleep(10)

    scene = play(script)
    assert scene.details("down") == ["no such file"] * 2
    assert len(scene.times("up")) == 1


def test_an_engine_that_is_not_heard_hangs() -> None:
    def falls_silent(engine: FakeEngine, message: ToEngine) -> None:
        if not isinstance(message, Ping) or message.number < 3:
            well(engine, message)

    async def script(scene: Scene) -> None:
        scene.start()
        await asyncio.sleep(14)

    scene = play(script, falls_silent)
    assert scene.times("down") == [13.0]  # last heard at 2 s
    assert scene.engines[0].signals == ["KILL"]


@pytest.mark.parametrize("at_work", [False, True])
def test_an_executor_that_stood_still_holds_nothing_against_its_engines(*, at_work: bool) -> None:
    """As after SIGSTOP and SIGCONT: nobody could be heard, so nobody was silent."""

    def takes_long(engine: FakeEngine, message: ToEngine) -> None:
        match message:
            case Generate():
                pass
            case Ping(number=number):
                engine.say(Pong(number=number, execution_id=int(at_work), steps=0))
            case _:
                well(engine, message)

    async def script(scene: Scene) -> None:
        scene.start()
        await asyncio.sleep(0.5)
        if at_work:
            scene.supervisor.execute(work(1), 0.0)
        await asyncio.sleep(5)
        scene.loop.stall(1000)
        await asyncio.sleep(3)

    assert play(script, takes_long).times("down") == []


@pytest.mark.parametrize(
    "too_much",
    [
        StepProgress(execution_id=1, step=3, tokens=(5,)),
        StepProgress(execution_id=1, step=1, tokens=(5, 6)),
        Finished(execution_id=1, first_token_s=0, service_s=0, outputs=((5, 6, 7),)),
        Finished(execution_id=1, first_token_s=0, service_s=0, outputs=()),
    ],
)
def test_an_engine_that_gives_what_nobody_asked_for_has_failed(too_much: FromEngine) -> None:
    def babbles(engine: FakeEngine, message: ToEngine) -> None:
        if isinstance(message, Generate):
            engine.say(too_much)
        else:
            well(engine, message)

    async def script(scene: Scene) -> None:
        scene.start()
        await asyncio.sleep(0.5)
        scene.supervisor.execute(work(1, tokens=2), 0.0)
        await asyncio.sleep(0.5)

    scene = play(script, babbles)
    assert len(scene.details("down")) == 1
    assert scene.details("executed") == []


@pytest.mark.parametrize(("expected_s", "down_s"), [(0.0, 11.0), (100.0, 311.0)])
def test_an_execution_that_does_not_get_on_hangs_after_a_time_that_fits_it(expected_s: float, down_s: float) -> None:
    """The engine goes on answering: only its work stands still, after one step."""

    def stands_still(engine: FakeEngine, message: ToEngine) -> None:
        match message:
            case Generate(execution_id=number):
                engine.say(StepProgress(execution_id=number, step=1, tokens=(5,)))
            case Ping(number=number):
                engine.say(Pong(number=number, execution_id=1, steps=1))
            case _:
                well(engine, message)

    async def script(scene: Scene) -> None:
        scene.start()
        await asyncio.sleep(0)
        while not scene.times("up"):
            await asyncio.sleep(0)
        scene.supervisor.execute(work(1), expected_s)
        await asyncio.sleep(down_s + 0.5)

    assert play(script, stands_still).times("down") == [down_s]


def test_steps_that_only_pongs_tell_of_count_as_getting_on() -> None:
    def slow(engine: FakeEngine, message: ToEngine) -> None:
        match message:
            case Generate():
                pass
            case Ping(number=number):
                engine.say(Pong(number=number, execution_id=1, steps=number // 5))
            case _:
                well(engine, message)

    async def script(scene: Scene) -> None:
        scene.start()
        await asyncio.sleep(0.5)
        scene.supervisor.execute(work(1), 0.0)
        await asyncio.sleep(500)

    assert play(script, slow).times("down") == []


def test_what_is_lost_is_said_again() -> None:
    """The first of each message from the executor is lost, and so is the first end of the execution."""
    lost: set[str] = set()

    def loses_first(engine: FakeEngine, message: ToEngine) -> None:
        name = type(message).__name__
        if name not in lost:
            lost.add(name)
        elif isinstance(message, Generate) and "end" not in lost:
            lost.add("end")
            engine.say(StepProgress(execution_id=1, step=1, tokens=(5,)))
        else:
            well(engine, message)

    async def script(scene: Scene) -> None:
        scene.start()
        await asyncio.sleep(5)
        scene.supervisor.execute(work(1, tokens=2), 0.0)
        await asyncio.sleep(5)

    scene = play(script, loses_first)
    assert len(scene.times("up")) == 1
    assert scene.details("step") == [1]
    assert scene.details("executed") == [1]
    assert len(scene.engines[0].of(Generate)) == 3


def test_steps_are_handed_on_once_and_in_order() -> None:
    def muddles(engine: FakeEngine, message: ToEngine) -> None:
        if isinstance(message, Generate):
            for step in (2, 1, 1, 3, 2, 3, 5):
                engine.say(StepProgress(execution_id=1, step=step, tokens=(step,)))
            engine.say(StepProgress(execution_id=7, step=4, tokens=(4,)), finished(7), finished(1), finished(1))
        else:
            well(engine, message)

    async def script(scene: Scene) -> None:
        scene.start()
        await asyncio.sleep(0.5)
        scene.supervisor.execute(work(1, tokens=5), 0.0)
        await asyncio.sleep(0.5)

    scene = play(script, muddles)
    assert scene.details("step") == [1, 2, 3]
    assert scene.details("executed") == [1]


@pytest.mark.parametrize(
    ("stubborn", "signals", "took_s"), [("not", [], 0), ("word", ["TERM"], 5), ("signal", ["TERM", "KILL"], 10)]
)
def test_stopping_goes_from_a_word_to_sigterm_to_sigkill(stubborn: str, signals: list[str], took_s: float) -> None:
    def answer(engine: FakeEngine, message: ToEngine) -> None:
        engine.terminable = stubborn != "signal"
        if not isinstance(message, Stop) or stubborn == "not":
            well(engine, message)

    async def script(scene: Scene) -> None:
        scene.start()
        await asyncio.sleep(0.5)
        before_s = scene.loop.time()
        await scene.supervisor.close()
        assert scene.loop.time() - before_s == took_s

    assert play(script, answer).engines[0].signals == signals


def test_a_process_that_cannot_be_killed_is_noticed_and_waited_for_no_longer() -> None:
    def answer(engine: FakeEngine, message: ToEngine) -> None:
        engine.terminable = engine.killable = False
        if not isinstance(message, Stop):
            well(engine, message)

    async def script(scene: Scene) -> None:
        scene.start()
        await asyncio.sleep(0.5)

    assert play(script, answer).details("warning") == ["process group 4711 cannot be killed"]


class _Memory:
    """Memory that is held for a while after an engine has gone."""

    def __init__(self, back_s: float) -> None:
        self.back_s = back_s

    def device_of(self, gpu_id: int) -> int:
        return gpu_id

    def free_bytes(self, device: int) -> int:
        return 10 if 0.2 < asyncio.get_running_loop().time() < self.back_s else 100


@pytest.mark.parametrize(("back_s", "up_s", "warned"), [(30.0, 30.0, 0), (1000.0, 61.0, 1)])
def test_the_next_engine_waits_for_memory_to_come_back_but_not_for_ever(
    back_s: float, up_s: float, warned: int
) -> None:
    async def script(scene: Scene) -> None:
        scene.start()  # there is room at first
        await asyncio.sleep(0.5)
        assert len(scene.times("up")) == 1
        scene.supervisor.stop()
        await asyncio.sleep(0.5)
        scene.start()
        await asyncio.sleep(200)

    scene = play(script, watch=_Memory(back_s))
    assert scene.times("up")[1] == pytest.approx(up_s, abs=0.2)
    assert len(scene.details("warning")) == warned


def test_gpus_that_share_a_device_need_its_memory_together() -> None:
    class Shared(_Memory):
        def device_of(self, gpu_id: int) -> int:
            return 0

        def free_bytes(self, device: int) -> int:
            return 150 if asyncio.get_running_loop().time() < self.back_s else 200

    async def script(scene: Scene) -> None:
        scene.start()  # 100 on each of two
        await asyncio.sleep(50)

    assert play(script, watch=Shared(30.0)).times("up") == [pytest.approx(30.0, abs=0.2)]


def test_what_is_broken_on_purpose_does_not_count_as_a_failure() -> None:
    async def script(scene: Scene) -> None:
        scene.start()
        for _ in range(2 * SETTINGS.max_restarts):
            await asyncio.sleep(5)
            assert scene.supervisor.abort("killed on purpose", repair_after_s=1.0)
        await asyncio.sleep(5)

    scene = play(script)
    assert scene.details("lost") == []
    assert len(scene.times("up")) == 2 * SETTINGS.max_restarts + 1


def test_loading_is_told_how_long_is_left_of_what_it_should_take() -> None:
    async def script(scene: Scene) -> None:
        scene.start()
        await asyncio.sleep(8)
        scene.engines[0].say(Hello(protocol=PROTOCOL_VERSION, pid=1))
        await asyncio.sleep(0.5)

    scene = play(script, lambda engine, message: None, greet=False)
    assert [message.spec.load_s for message in scene.engines[0].of(Load)][-1] == pytest.approx(42, abs=0.1)
