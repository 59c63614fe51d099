"""The launcher: environment, GPUs, sockets and logs of engine processes."""

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest
from engine_fixtures import EngineCase, batch_of, run_async, started_engine, until

from maveriq.errors import InputError
from maveriq.exec.engine_protocol import LOAD_FAILED
from maveriq.exec.engines.engine import BACKENDS, EngineError, make_engine
from maveriq.exec.gpus import Devices
from maveriq.exec.launcher import EngineLog, LaunchError, ProcessLauncher
from maveriq.exec.messages import Failed, Finished, Inspect, Inspected

CASE = EngineCase(backend="emulated")


def test_an_engine_process_imports_no_slow_modules() -> None:
    script = "import sys, maveriq.exec.engine_server, maveriq.exec.engines.emulated; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    heavy = {"numpy", "typer", "rich", "simpy", "matplotlib", "torch", "maveriq.control", "maveriq.scenario"}
    assert not heavy & set(loaded)


def test_gpus_are_selected_by_uuid_before_the_process_starts(tmp_path: Path) -> None:
    async def check() -> None:
        devices = Devices(uuids=("GPU-a", "GPU-b", "GPU-c"))
        with ProcessLauncher("emulated", logs=tmp_path, devices=devices) as launcher:
            connection = await launcher.launch(CASE.spec(pp=2, layer_split=(7, 1)), (2, 0))
            environment = Path(f"/proc/{connection.pid}/environ").read_bytes().split(b"\0")
            assert b"CUDA_VISIBLE_DEVICES=GPU-c,GPU-a" in environment
            assert os.getpgid(connection.pid) == os.getsid(connection.pid) == connection.pid
            connection.kill()
            await connection.wait_exit()
            connection.channel.close()

    run_async(check)


def test_sockets_are_in_a_private_temporary_folder(tmp_path: Path) -> None:
    with ProcessLauncher("emulated", logs=tmp_path) as launcher:
        folder = launcher._sockets.path
        assert folder.stat().st_mode & 0o777 == 0o700
        assert len(str(folder)) < 80
    assert not folder.exists()


def test_what_a_killed_process_left_goes_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    script = (
        "import os, signal, sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from pathlib import Path\nfrom maveriq.exec.launcher import ProcessLauncher\n"
        "ProcessLauncher('emulated', logs=Path('.'))\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    others = tmp_path / "maveriq-engines-other"  # not locked, but not made by us either
    others.mkdir(mode=0o700)
    with ProcessLauncher("emulated", logs=tmp_path) as first, ProcessLauncher("emulated", logs=tmp_path) as second:
        assert not left.exists()
        assert first._sockets.path.exists(), "its owner lives"
        assert second._sockets.path.exists()
    assert list(tmp_path.iterdir()) == [others]


def test_a_library_that_cannot_be_inspected_ends_the_engine(tmp_path: Path) -> None:
    async def check() -> None:
        async with started_engine(EngineCase(backend="no_such_module:Engine"), tmp_path, load=False) as engine:
            engine.send(Inspect(spec=engine.spec))
            failed = await engine.receive(Failed)
            assert (failed.execution_id, failed.kind) == (0, "unsupported")
            assert "no_such_module" in failed.message
            assert await engine.exit_code() == LOAD_FAILED

    run_async(check)


def test_an_engine_without_inspection_has_no_known_version(tmp_path: Path) -> None:
    async def check() -> None:
        async with started_engine(EngineCase(backend="engine_fixtures:Minimal"), tmp_path, load=False) as engine:
            engine.send(Inspect(spec=engine.spec))
            assert await engine.receive() == Inspected(version="")

    run_async(check)


def test_an_engine_does_not_inherit_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAVERIQ_TOKEN", "secret")

    async def check() -> None:
        with ProcessLauncher("emulated", logs=tmp_path) as launcher:
            connection = await launcher.launch(CASE.spec(), (0,))
            assert b"secret" not in Path(f"/proc/{connection.pid}/environ").read_bytes()
            assert (tmp_path / "1-1.log").stat().st_mode & 0o777 == 0o600
            connection.kill()
            await connection.wait_exit()
            connection.channel.close()

    run_async(check)


def test_an_engine_that_cannot_be_forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_fork(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", no_fork)

    async def check() -> None:
        with (
            ProcessLauncher("emulated", logs=tmp_path) as launcher,
            pytest.raises(LaunchError, match="cannot be started: Resource temporarily unavailable"),
        ):
            await launcher.launch(CASE.spec(), (0,))

    run_async(check)


def test_output_goes_to_the_log(tmp_path: Path) -> None:
    async def check() -> None:
        async with started_engine(CASE, tmp_path, load=False) as engine:
            engine.connection.channel._writer.write(b"\0\0\0\1x")
            await engine.exit_code()
            assert "does not speak this protocol" in engine.connection.last_output()
            assert (tmp_path / "1-1.log").read_text().startswith("maveriq engine: ")

    run_async(check)


@pytest.mark.parametrize(
    ("backend", "kind"), [("engine_fixtures:CannotGenerate", "out-of-memory"), ("engine_fixtures:Crashes", None)]
)
def test_a_full_disk_for_logs_stops_no_engine(tmp_path: Path, backend: str, kind: str | None) -> None:
    """The engine reports the failure or exits; it does not hang."""
    (tmp_path / "1-1.log").symlink_to("/dev/full")

    async def check() -> None:
        async with started_engine(EngineCase(backend=backend), tmp_path) as engine:
            engine.send(batch_of(1, [13]))
            if kind is None:
                await engine.wait_until_closed()
            else:
                assert (await engine.receive(Failed)).kind == kind
                engine.send(batch_of(2, [1]))
                assert (await engine.receive(Finished)).execution_id == 2

    run_async(check)


def test_logs_of_restarts_are_bounded(tmp_path: Path) -> None:
    for number in range(1, 200):
        EngineLog(tmp_path, CASE.spec(generation=number)).path.write_text("it crashed")
    EngineLog(tmp_path, CASE.spec(deployment_id=2)).path.write_text("another engine's")
    left = {path.name for path in tmp_path.iterdir()}
    assert left >= {"1-1.log", "1-199.log", "1-198.log", "2-1.log"}  # the first log explains most
    assert len(left) < 60


LOG = "1-1.log"


def test_a_log_is_truncated_at_its_limit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("maveriq.exec.launcher.MAX_LOG_BYTES", 100_000)
    monkeypatch.setattr("maveriq.exec.launcher.SIZE_CHECK_INTERVAL_S", 0.02)

    async def check() -> None:
        async with started_engine(EngineCase(backend="engine_fixtures:FloodsLog"), tmp_path) as engine:
            for number in range(1, 41):
                engine.send(batch_of(number, tokens=1))
                await engine.receive(Finished)
                await until(
                    lambda: (tmp_path / LOG).stat().st_size <= 100_000
                )  # the log is truncated before the next round
        assert engine.connection.last_output() == "chatter, chatter, the last"
        assert size_of(tmp_path) < 350_000

    run_async(check)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_process_that_exits_at_once_is_a_launch_error(tmp_path: Path, monkeypatch) -> None:
    async def check() -> None:
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with ProcessLauncher("emulated", logs=tmp_path) as launcher:
            with pytest.raises(LaunchError, match="exit code 1"):
                await launcher.launch(CASE.spec(), (0,))
            monkeypatch.setattr(sys, "executable", "/no/such/python")
            with pytest.raises(LaunchError, match="No such file"):
                await launcher.launch(CASE.spec(), (0,))

    asyncio.run(check())


def test_a_cancelled_launch_leaves_no_process(tmp_path: Path, monkeypatch) -> None:
    async def check() -> None:
        sleeper = tmp_path / "sleeper"
        sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
        sleeper.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(sleeper))
        with ProcessLauncher("emulated", logs=tmp_path) as launcher:
            launching = asyncio.create_task(launcher.launch(CASE.spec(), (0,)))
            await asyncio.sleep(0.2)
            launching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await launching
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        assert not [pid for pid in children if b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    run_async(check)


def test_devices_are_numbered_within_the_process() -> None:
    devices = Devices(uuids=("A", "B", "A"))
    assert devices.shared
    assert devices.visible_to((1, 0, 2)) == ("B", "A")
    assert devices.names((1, 0, 2)) == ("cuda:0", "cuda:1", "cuda:1")
    assert Devices().names((5, 6)) == ("cpu", "cpu")
    assert Devices().visible_to((5,)) == ()
    with pytest.raises(InputError, match="GPU 3"):
        devices.names((3,))


@pytest.mark.parametrize("name", ["nothing", ""])
def test_an_unknown_backend_is_named(name: str) -> None:
    with pytest.raises(InputError, match="unknown backend"):
        make_engine(name)


def test_backends_equal_the_started_engines_of_the_capability_matrix() -> None:
    """The launcher and the capabilities list the same engines."""
    from maveriq.exec.capabilities import known_engines

    assert set(BACKENDS) == {name for name, facts in known_engines().items() if facts.started}


@pytest.mark.parametrize("size", [0, -1, 2**31 + 1, "many"])
def test_an_emulated_vocabulary_must_be_valid(size: object) -> None:
    spec = msgspec.structs.replace(CASE.spec(), config_json=json.dumps({"vocab_size": size}))
    with pytest.raises(EngineError, match="vocab_size"):
        make_engine("emulated").load(spec)
