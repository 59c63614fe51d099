"""Tests that every engine passes, as a process with the protocol of `maveriq.exec.messages`.

To test a new engine, add a line to `ENGINES` of tests/engine_fixtures.py.
"""

from pathlib import Path

import pytest
from engine_fixtures import ENGINES, EngineCase, alive_in_group, batch_of, run_async, started_engine, until

from maveriq.exec.engine_server import NO_PROTOCOL, STOPPED
from maveriq.exec.engines.engine import make_engine
from maveriq.exec.messages import (
    PROTOCOL_VERSION,
    Bye,
    Failed,
    Finished,
    Hello,
    Inspect,
    Inspected,
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


def test_it_sends_hello_until_it_loads(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with started_engine(case, tmp_path, load=False) as engine:
            engine.send(Ping(number=1))
            assert await engine.receive() == Hello(protocol=PROTOCOL_VERSION, pid=engine.connection.pid)
            assert await engine.receive() == Pong(number=1, execution_id=0, steps=0)

    run_async(check)


def test_its_library_is_inspected_before_it_loads(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with started_engine(case, tmp_path, load=False) as engine:
            engine.send(Inspect(spec=engine.spec), Inspect(spec=engine.spec))
            inspected = await engine.receive(Inspected)
            assert await engine.receive() == inspected
            assert inspected.unknown_arguments == ()
            loaded = await engine.load()
            assert inspected.version == loaded.version
            engine.send(Inspect(spec=engine.spec), Ping(number=1))  # too late: no answer
            assert await engine.receive() == Pong(number=1, execution_id=0, steps=0)

    run_async(check)


def test_load_twice_loads_once(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with started_engine(case, tmp_path, load=False) as engine:
            engine.send(Load(spec=engine.spec), Load(spec=engine.spec))
            loaded = await engine.receive(Loaded)
            engine.send(Ping(number=1))
            answer = await engine.receive()
            if answer == loaded:  # the second message came after the load, so the answer is repeated
                answer = await engine.receive()
            assert answer == Pong(number=1, execution_id=0, steps=0)
            engine.send(Load(spec=engine.spec))
            assert await engine.receive() == loaded

    run_async(check)


def test_steps_come_in_order_and_add_up_to_the_outputs(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with started_engine(case, tmp_path) as engine:
            engine.send(batch_of(1, tokens=5))
            *steps, finished = await engine.receive_until(Finished)
            assert [step.step for step in steps] == [1, 2, 3, 4, 5]
            assert all(isinstance(step, StepProgress) and step.execution_id == 1 for step in steps)
            assert finished.outputs == (tuple(step.tokens[0] for step in steps),)
            assert all(0 <= token < case.model.vocab_size for token in finished.outputs[0])
            assert 0 < finished.first_token_s <= finished.service_s

    run_async(check)


def test_equal_prompts_give_equal_tokens_alone_or_in_a_batch(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with started_engine(case, tmp_path) as engine:
            engine.send(batch_of(1, [5, 6, 7]))
            alone = await engine.receive(Finished)
            engine.send(batch_of(2, [5, 6, 7], [5, 6, 7], tokens=[4, 2]))
            together = await engine.receive(Finished)
            assert together.outputs == (alone.outputs[0], alone.outputs[0][:2])

    run_async(check)


def test_an_ended_sequence_gets_no_more_tokens(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with started_engine(case, tmp_path) as engine:
            engine.send(batch_of(1, [5, 6, 7], [1, 2], tokens=[1, 3]))
            *steps, finished = await engine.receive_until(Finished)
            assert [step.tokens[0] >= 0 for step in steps] == [True, False, False]
            assert [len(output) for output in finished.outputs] == [1, 3]

    run_async(check)


def test_generation_ends_with_a_stop_token(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with started_engine(case, tmp_path) as engine:
            engine.send(batch_of(1, tokens=6))
            whole = (await engine.receive(Finished)).outputs[0]
            engine.send(batch_of(2, tokens=6, stop=(whole[2],)))
            assert (await engine.receive(Finished)).outputs[0] == whole[: whole.index(whole[2]) + 1]

    run_async(check)


def test_a_repeated_execution_message_is_not_executed_again(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with started_engine(case, tmp_path) as engine:
            first = batch_of(1, tokens=3, service_s=0.05)
            engine.send(first, first)
            *steps, finished = await engine.receive_until(Finished)
            assert len(steps) == 3
            engine.send(first)
            assert await engine.receive() == finished
            engine.send(batch_of(2), Ping(number=1))
            await engine.receive(Finished)
            engine.send(first, Ping(number=2))  # older than the last: no answer
            while (heard := await engine.receive()) != Pong(number=2, execution_id=0, steps=0):
                assert isinstance(heard, Pong)

    run_async(check)


def test_too_large_a_batch_fails_without_stopping_the_engine(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with started_engine(case, tmp_path, batch_size=2) as engine:
            engine.send(batch_of(1, [1], [2], [3]))
            assert (await engine.receive()).kind == "error"
            engine.send(batch_of(2, [1], [2]))
            assert len((await engine.receive(Finished)).outputs) == 2

    run_async(check)


def test_nothing_can_be_executed_before_loading(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with started_engine(case, tmp_path, load=False) as engine:
            engine.send(batch_of(1))
            assert await engine.receive() == Failed(execution_id=1, kind="error", message="nothing is loaded")

    run_async(check)


def test_it_answers_pings_while_it_executes(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with started_engine(case, tmp_path) as engine:
            engine.send(batch_of(1, tokens=10_000, service_s=20.0))
            await engine.receive(StepProgress)
            steps = []
            for number in (1, 2):
                engine.send(Ping(number=number))
                pong = await engine.receive(Pong)
                assert pong.execution_id == 1
                steps.append(pong.steps)
                await engine.receive(StepProgress)
            assert 0 < steps[0] <= steps[1]

    run_async(check)


def test_it_stops_by_message_during_an_execution(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        async with started_engine(case, tmp_path) as engine:
            engine.send(batch_of(1, tokens=10_000, service_s=600.0))
            engine.send(Stop(), Stop())
            assert isinstance((await engine.receive_until(Bye))[-1], Bye)
            assert await engine.exit_code() == STOPPED

    run_async(check)


def test_all_ranks_are_in_its_process_group_and_end_with_it(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        layers = (case.model.layers - 1, 1)
        async with started_engine(case, tmp_path, pp=2, layer_split=layers) as engine:
            assert len(alive_in_group(engine.connection.pid)) >= 2
            engine.send(batch_of(1))
            assert len((await engine.receive(Finished)).outputs[0]) == 4
            engine.send(Stop())
            assert await engine.exit_code() == STOPPED
            await until(lambda: not alive_in_group(engine.connection.pid))

    run_async(check)


def test_it_ends_when_its_executor_ends(case: EngineCase, tmp_path) -> None:
    async def check() -> None:
        layers = (case.model.layers - 1, 1)
        async with started_engine(case, tmp_path, pp=2, layer_split=layers) as engine:
            engine.send(batch_of(1, tokens=10_000, service_s=20.0))
            await engine.receive(StepProgress)
            engine.connection.channel.close()
            assert await engine.exit_code() == STOPPED
            await until(lambda: not alive_in_group(engine.connection.pid))

    run_async(check)


@pytest.mark.parametrize("bytes_", [b"\0\0\0\3abc", b"\xff" * 64, b"\0\0\0\0"], ids=["no message", "too long", "empty"])
def test_it_ends_on_an_invalid_message(case: EngineCase, tmp_path, bytes_: bytes) -> None:
    async def check() -> None:
        async with started_engine(case, tmp_path, load=False) as engine:
            engine.connection.channel._writer.write(bytes_)
            assert await engine.exit_code() == NO_PROTOCOL

    run_async(check)


def test_close_may_be_called_at_any_time_and_twice(case: EngineCase) -> None:
    engine = make_engine(case.backend)
    engine.close()
    engine.load(case.spec())
    next(iter(engine.generate(batch_of(1))))
    engine.close()
    engine.close()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
def test_heavy_libraries_are_imported_on_load(case: EngineCase, tmp_path) -> None:
    """A backend with heavy libraries answers immediately too."""

    async def check() -> None:
        async with started_engine(case, tmp_path, load=False) as engine:
            maps = Path(f"/proc/{engine.connection.pid}/maps").read_text()
            assert "python" in maps
            assert not [name for name in ("libtorch", "numpy", "cuda") if name in maps]

    run_async(check)
