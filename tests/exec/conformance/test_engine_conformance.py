"""What every engine does, as a process and behind the protocol of `maveriq.exec.messages`.

A new engine joins by a line in `ENGINES` of tests/engine_fixtures.py.
"""

from pathlib import Path

import pytest
from engine_fixtures import ENGINES, EngineCase, alive_in_group, rig, run_async, until, work

from maveriq.exec.engine_server import NO_PROTOCOL, STOPPED
from maveriq.exec.engines.engine import make_engine
from maveriq.exec.messages import (
    PROTOCOL_VERSION,
    Bye,
    Failed,
    Finished,
    Hello,
    Load,
    Loaded,
    Ping,
    Pong,
    StepProgress,
    Stop,
)

pytestmark = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case.backend == "emulated" else [pytest.mark.heavy], id=case.backend)
        for case in ENGINES
    ],
)


def test_it_introduces_itself_until_it_is_told_what_to_load(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with rig(case, tmp_path, load=False) as one:
            one.say(Ping(number=1))
            assert await one.hear() == Hello(protocol=PROTOCOL_VERSION, pid=one.connection.pid)
            assert await one.hear() == Pong(number=1, execution_id=0, steps=0)

    run_async(check)


def test_load_twice_loads_once(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with rig(case, tmp_path, load=False) as one:
            one.say(Load(spec=one.spec), Load(spec=one.spec))
            loaded = await one.hear(Loaded)
            one.say(Ping(number=1))
            answer = await one.hear()
            if answer == loaded:  # the second message came after the load had ended, and repeats its answer
                answer = await one.hear()
            assert answer == Pong(number=1, execution_id=0, steps=0)
            one.say(Load(spec=one.spec))
            assert await one.hear() == loaded

    run_async(check)


def test_steps_come_in_order_and_add_up_to_the_outputs(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with rig(case, tmp_path) as one:
            one.say(work(1, tokens=5))
            *steps, finished = await one.hear_until(Finished)
            assert [step.step for step in steps] == [1, 2, 3, 4, 5]
            assert all(isinstance(step, StepProgress) and step.execution_id == 1 for step in steps)
            assert finished.outputs == (tuple(step.tokens[0] for step in steps),)
            assert all(0 <= token < case.model.vocab_size for token in finished.outputs[0])
            assert 0 < finished.first_token_s <= finished.service_s

    run_async(check)


def test_equal_prompts_give_equal_tokens_alone_or_in_a_batch(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with rig(case, tmp_path) as one:
            one.say(work(1, [5, 6, 7]))
            alone = await one.hear(Finished)
            one.say(work(2, [5, 6, 7], [5, 6, 7], tokens=[4, 2]))
            together = await one.hear(Finished)
            assert together.outputs == (alone.outputs[0], alone.outputs[0][:2])

    run_async(check)


def test_a_sequence_that_has_ended_gets_no_token_while_others_go_on(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with rig(case, tmp_path) as one:
            one.say(work(1, [5, 6, 7], [1, 2], tokens=[1, 3]))
            *steps, finished = await one.hear_until(Finished)
            assert [step.tokens[0] >= 0 for step in steps] == [True, False, False]
            assert [len(output) for output in finished.outputs] == [1, 3]

    run_async(check)


def test_generation_ends_with_a_stop_token(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with rig(case, tmp_path) as one:
            one.say(work(1, tokens=6))
            whole = (await one.hear(Finished)).outputs[0]
            one.say(work(2, tokens=6, stop=(whole[2],)))
            assert (await one.hear(Finished)).outputs[0] == whole[: whole.index(whole[2]) + 1]

    run_async(check)


def test_a_repeated_execution_is_not_done_again(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with rig(case, tmp_path) as one:
            first = work(1, tokens=3, service_s=0.05)
            one.say(first, first)
            *steps, finished = await one.hear_until(Finished)
            assert len(steps) == 3
            one.say(first)
            assert await one.hear() == finished
            one.say(work(2), Ping(number=1))
            await one.hear(Finished)
            one.say(first, Ping(number=2))  # older than the last: no answer to it
            while (heard := await one.hear()) != Pong(number=2, execution_id=0, steps=0):
                assert isinstance(heard, Pong)

    run_async(check)


def test_too_large_a_batch_fails_alone(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with rig(case, tmp_path, batch_size=2) as one:
            one.say(work(1, [1], [2], [3]))
            assert (await one.hear()).kind == "error"
            one.say(work(2, [1], [2]))
            assert len((await one.hear(Finished)).outputs) == 2

    run_async(check)


def test_nothing_can_be_executed_before_loading(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with rig(case, tmp_path, load=False) as one:
            one.say(work(1))
            assert await one.hear() == Failed(execution_id=1, kind="error", message="nothing is loaded")

    run_async(check)


def test_it_answers_while_it_works(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with rig(case, tmp_path) as one:
            one.say(work(1, tokens=10_000, service_s=20.0))
            await one.hear(StepProgress)
            steps = []
            for number in (1, 2):
                one.say(Ping(number=number))
                pong = await one.hear(Pong)
                assert pong.execution_id == 1
                steps.append(pong.steps)
                await one.hear(StepProgress)
            assert 0 < steps[0] <= steps[1]

    run_async(check)


def test_it_stops_by_word_in_the_middle_of_work(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with rig(case, tmp_path) as one:
            one.say(work(1, tokens=10_000, service_s=600.0))
            one.say(Stop(), Stop())
            assert isinstance((await one.hear_until(Bye))[-1], Bye)
            assert await one.exit_code() == STOPPED

    run_async(check)


def test_all_its_ranks_are_in_its_group_and_go_with_it(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        layers = (case.model.layers - 1, 1)
        async with rig(case, tmp_path, pp=2, layer_split=layers) as one:
            assert len(alive_in_group(one.connection.pid)) >= 2
            one.say(work(1))
            assert len((await one.hear(Finished)).outputs[0]) == 4
            one.say(Stop())
            assert await one.exit_code() == STOPPED
            await until(lambda: not alive_in_group(one.connection.pid))

    run_async(check)


def test_it_ends_when_its_executor_does(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        layers = (case.model.layers - 1, 1)
        async with rig(case, tmp_path, pp=2, layer_split=layers) as one:
            one.say(work(1, tokens=10_000, service_s=20.0))
            await one.hear(StepProgress)
            one.connection.channel.close()
            assert await one.exit_code() == STOPPED
            await until(lambda: not alive_in_group(one.connection.pid))

    run_async(check)


@pytest.mark.parametrize("bytes_", [b"\0\0\0\3abc", b"\xff" * 64, b"\0\0\0\0"], ids=["no message", "too long", "empty"])
def test_it_ends_when_it_is_told_nonsense(case: EngineCase, tmp_path, bytes_: bytes) -> None:
    async def check() -> None:
        async with rig(case, tmp_path, load=False) as one:
            one.connection.channel._writer.write(bytes_)
            assert await one.exit_code() == NO_PROTOCOL

    run_async(check)


def test_close_may_come_twice_and_at_any_time(case: EngineCase) -> None:
    engine = make_engine(case.backend)
    engine.close()
    engine.load(case.spec())
    next(iter(engine.generate(work(1))))
    engine.close()
    engine.close()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
def test_heavy_libraries_are_imported_when_it_loads(case: EngineCase, tmp_path) -> None:
    """So that also a backend with heavy libraries answers at once."""

    async def check() -> None:
        async with rig(case, tmp_path, load=False) as one:
            maps = Path(f"/proc/{one.connection.pid}/maps").read_text()
            assert "python" in maps
            assert not [name for name in ("libtorch", "numpy", "cuda") if name in maps]

    run_async(check)
