"""Ranks that are not their leader's children: their end is noticed, and none is left behind.

`rank_engines:DaemonRanks` starts them as MPI does, with plain processes. `rank_engines:MpiRanks` starts them with Open
MPI, and is skipped where that is absent (docs/engines.md says how to run it).
"""

from __future__ import annotations

import asyncio
import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from engine_fixtures import environment, run_async, running_executor, until
from fixtures import MODEL

from maveriq.domain.deployments import Intent, Objective
from maveriq.domain.requests import RequestStatus
from maveriq.exec.executor import Executor
from maveriq.exec.live_cluster import EndpointRequest, Submission
from maveriq.exec.process_tree import ProcessTree, ProcessTrees
from maveriq.exec.processes import ENGINE_ID, children_of, marked_processes, read_stat

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has /proc and pidfds")

DAEMON, MPI = "rank_engines:DaemonRanks", "rank_engines:MpiRanks"
MPI_PYTHON = str(Path(os.environ.get("MAVERIQ_MPI_PYTHON", sys.executable)).absolute())


@functools.cache
def lacks_mpi() -> str:
    """Return why the tests with Open MPI cannot run, "" if they can."""
    if shutil.which("orted") is None:
        return "Open MPI is not installed"
    has_mpi4py = subprocess.run([MPI_PYTHON, "-c", "import mpi4py, msgspec"], capture_output=True, check=False)
    return "MAVERIQ_MPI_PYTHON names no Python with mpi4py and msgspec" if has_mpi4py.returncode else ""


@pytest.fixture(params=[DAEMON, MPI], ids=["daemon", "mpi"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a backend whose ranks are another process's children."""
    if request.param == MPI:
        if reason := lacks_mpi():
            pytest.skip(reason)
        monkeypatch.setattr(sys, "executable", MPI_PYTHON)
        for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMPI_MCA_rmaps_base_oversubscribe"):
            monkeypatch.setenv(name, "1")
    return str(request.param)


@asynccontextmanager
async def serving(folder: Path, backend: str) -> AsyncIterator[tuple[Executor, dict[str, int]]]:
    """Run one engine; yield the executor and the PIDs of the engine's processes by name."""
    async with running_executor({1: [(0,)], 2: [(0,)]}, folder, backend=backend) as executor:
        deploy(executor)
        await until(lambda: is_up(executor, 1))
        # A rank that ends before any scan has seen it, and that the engine does not name, is not noticed.
        await until(lambda: _tree(executor).is_settled)
        yield executor, started(folder / "1-1.log")


def _tree(executor: Executor) -> ProcessTree:
    return executor._supervisors[1]._engine._connection._tree  # type: ignore[no-any-return,union-attr]


def deploy(executor: Executor) -> None:
    executor.deploy(EndpointRequest(model=MODEL, intent=Intent(objective=Objective.MIN_COST), output_tokens=1))


def is_up(executor: Executor, endpoint_id: int) -> bool:
    return executor.endpoint(endpoint_id)[0].status == "up"


def started(log: Path) -> dict[str, int]:
    [line] = [line for line in log.read_text().splitlines() if line.startswith("started ")]
    return {name: int(pid) for name, _, pid in (pair.partition("=") for pair in line.split()[1:])}


def alive(pids: dict[str, int]) -> dict[str, int]:
    return {name: pid for name, pid in pids.items() if is_alive(pid)}


def is_alive(pid: int) -> bool:
    stat = read_stat(pid)
    return stat is not None and not stat.ended


@pytest.mark.parametrize(
    ("killed", "lost"), [("rank1", "rank 1, process {pid}"), ("daemon", ", process {pid}"), ("leader", "SIGKILL")]
)
def test_an_engine_that_loses_a_process_restarts_and_leaves_none_behind(
    tmp_path: Path, backend: str, killed: str, lost: str
) -> None:
    async def check() -> None:
        async with serving(tmp_path, backend) as (executor, pids):
            handle = executor.submit(Submission(endpoint_id=1, prompt=(1, 2), output_tokens=1))
            assert (await handle.outcome()).status is RequestStatus.COMPLETED
            assert alive(pids) == pids
            os.kill(pids[killed], signal.SIGKILL)
            await until(lambda: executor.controller.manager.deployments[1].generation == 2)
            await until(lambda: is_up(executor, 1))
            assert alive(pids) == {}, "the GPUs were given to the next engine before they were free"
            expected = lost.format(pid=pids[killed])
            assert any(expected in note for note in executor.notes.notes), executor.notes.notes
            handle = executor.submit(Submission(endpoint_id=1, prompt=(1, 2), output_tokens=1))
            assert (await handle.outcome()).status is RequestStatus.COMPLETED
            second = started(tmp_path / "1-2.log")
            assert alive(second) == second
        assert alive(second) == {}

    run_async(check)


def test_removal_ends_all_processes_before_the_next_engine_starts(tmp_path: Path, backend: str) -> None:
    async def check() -> None:
        async with serving(tmp_path, backend) as (executor, pids):
            executor.remove(1)
            deploy(executor)
            await until(lambda: is_up(executor, 2))
            assert alive(pids) == {}

    run_async(check)


def test_the_end_of_a_helper_is_no_failure(tmp_path: Path) -> None:
    async def check() -> None:
        async with serving(tmp_path, DAEMON) as (executor, pids):
            tree = _tree(executor)
            assert set(tree.pids) == set(pids.values()) - {pids["leader"]}
            os.kill(pids["helper0"], signal.SIGKILL)
            await until(lambda: pids["helper0"] not in tree.pids)
            assert not tree.rank_lost.done()
            os.kill(pids["rank0"], signal.SIGKILL)
            await until(tree.rank_lost.done)
            assert f"rank 0, process {pids['rank0']} (sh)" in tree.rank_lost.result()

    run_async(check)


def test_an_engine_whose_executor_is_gone_ends_all_its_processes(tmp_path: Path) -> None:
    """Nobody else does it then."""

    async def check() -> None:
        loaded = asyncio.Event()

        async def executor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            from engine_fixtures import EngineCase

            from maveriq.exec.messages import Load, Loaded, StreamChannel, decode_from_engine

            channel = StreamChannel(reader, writer, decode_from_engine)
            channel.send(Load(spec=EngineCase(backend=DAEMON).spec()))
            while not isinstance(await channel.receive(), Loaded):
                pass
            loaded.set()
            channel.close()

        async with await asyncio.start_unix_server(executor, tmp_path / "socket"):
            with (tmp_path / "log").open("wb") as log:
                command = [
                    "-m",
                    "maveriq.exec.engine_server",
                    "--socket",
                    str(tmp_path / "socket"),
                    "--backend",
                    DAEMON,
                ]
                engine = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *command,
                    stderr=log,
                    env=environment() | {ENGINE_ID: str(tmp_path)},
                    start_new_session=True,
                )
            await loaded.wait()
            pids = started(tmp_path / "log")
            await engine.wait()
            await until(lambda: not alive(pids))

    run_async(check)


def test_a_child_that_ended_well_does_not_hide_one_that_crashed(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_executor({1: [(0, 1)]}, tmp_path, backend="rank_engines:HiddenCrash") as executor:
            deploy(executor)
            await until(lambda: is_up(executor, 1))
            leader = executor._supervisors[1]._engine._connection.pid  # type: ignore[union-attr]
            [rank] = [pid for pid in children_of(leader) if is_alive(pid)]
            os.kill(rank, signal.SIGKILL)
            await until(lambda: executor.controller.manager.deployments[1].generation == 2)

    run_async(check)


# The scanner alone

UNDER_TEST = f"engine under test {os.getpid()}"


@asynccontextmanager
async def tracked(script: str) -> AsyncIterator[tuple[ProcessTree, asyncio.subprocess.Process]]:
    """Track the processes of a shell script; its output goes to `process.stdout`."""
    trees = ProcessTrees()
    process = await asyncio.create_subprocess_exec(
        "sh",
        "-c",
        script,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {ENGINE_ID: UNDER_TEST},
    )
    tree = trees.track(UNDER_TEST, process.pid)
    try:
        yield tree, process
    finally:
        if process.returncode is None:
            process.kill()
        tree.leader_exited()
        await tree.gone
        assert list(marked_processes(UNDER_TEST)) == []
        await process.wait()  # until the pipe is closed, which the others hold too
        trees.close()


@pytest.mark.parametrize(
    "start",
    [
        "setsid sh -c 'sleep 600 & echo $!; exec sleep 600' & wait",  # a child in a session of its own
        "(setsid sh -c 'sleep 600 & echo $!; exec sleep 600' &) ; sleep 600",  # which has lost its parent
        "env -u MAVERIQ_ENGINE_ID sh -c 'sleep 600 & echo $!; wait'",  # without the mark
        "sh -c 'sleep 600 & echo $!' ; sleep 600",  # an orphan in the leader's group
    ],
)
def test_a_process_is_found_and_killed_however_it_was_started(start: str) -> None:
    async def check() -> None:
        async with tracked(start) as (tree, process):
            assert process.stdout is not None
            pid = int(await process.stdout.readline())
            await until(lambda: pid in tree.pids)
            tree.send_signal(signal.SIGKILL)
            await until(lambda: not is_alive(pid))
            await until(lambda: not tree.pids)

    run_async(check)


def test_what_starts_while_the_tree_is_killed_is_killed_too() -> None:
    script = "i=0; while [ $i -lt 40 ]; do (setsid sleep 600 >/dev/null &); echo $i; i=$((i+1)); done; sleep 600"

    async def check() -> None:
        for _ in range(5):
            async with tracked(script) as (tree, process):
                assert process.stdout is not None
                await process.stdout.readline()
                process.kill()
                tree.leader_exited()
                await tree.gone
                assert list(marked_processes(UNDER_TEST)) == []

    run_async(check)


def test_a_rank_is_known_from_its_start_and_its_helpers_are_none() -> None:
    script = "(OMPI_COMM_WORLD_RANK=3 setsid sh -c 'sleep 600 & echo $!; echo $$; wait; exit 5' &) ; sleep 600"

    async def check() -> None:
        async with tracked(script) as (tree, process):
            assert process.stdout is not None
            helper, rank = int(await process.stdout.readline()), int(await process.stdout.readline())
            await until(lambda: {helper, rank} <= set(tree.pids))
            tree.engine_loaded()
            await until(lambda: tree.is_settled)
            assert not tree.rank_lost.done()
            os.kill(helper, signal.SIGKILL)
            text = await tree.rank_lost
            assert text.startswith(f"rank 3, process {rank} (sh)")
            assert text.endswith(("(sh)", "which ended with exit code 5"))

    run_async(check)


def test_what_uses_cuda_is_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "nvidia-uvm"
    device.touch()
    monkeypatch.setattr("maveriq.exec.processes._CUDA_DEVICE", str(device))
    # The rank has the device open, its parent and its helpers do not.
    script = f"sh -c 'sh -c \"exec 9< {device}; echo \\$\\$; read nothing; exit 3\" <&8; sleep 600' 8<&0 ; sleep 600"

    async def check() -> None:
        async with tracked(script) as (tree, process):
            assert process.stdout is not None
            rank = int(await process.stdout.readline())
            await until(lambda: rank in tree.pids)
            tree.engine_loaded()
            await until(lambda: tree.is_settled)
            os.kill(rank, signal.SIGKILL)
            assert (await tree.rank_lost).startswith(f"a process that uses CUDA, process {rank} (sh)")

    run_async(check)


def test_what_the_engine_names_is_a_rank_and_its_parent_may_reap_it_first() -> None:
    script = "sh -c 'sleep 600 & echo $!; sleep 600 & echo $!; wait %2; sleep 600' ; sleep 600"

    async def check() -> None:
        async with tracked(script) as (tree, process):
            assert process.stdout is not None
            helper, rank = int(await process.stdout.readline()), int(await process.stdout.readline())
            await until(lambda: {helper, rank} <= set(tree.pids))
            tree.engine_loaded([0, rank])
            await until(lambda: tree.is_settled)
            os.kill(helper, signal.SIGKILL)
            await until(lambda: helper not in tree.pids)
            assert not tree.rank_lost.done()
            os.kill(rank, signal.SIGKILL)
            assert (await tree.rank_lost).startswith(f"rank 1, process {rank} (sleep)")

    run_async(check)


def test_a_rank_that_ends_between_loading_and_the_next_scan_is_lost() -> None:
    # The rank is a shell from its start, so that a scan before it runs its program sees the same name.
    script = "sh -c 'sleep 600 & echo $!; sh -c \"sleep 600; exit\" & echo $!; wait %2; sleep 600' ; sleep 600"

    async def check() -> None:
        async with tracked(script) as (tree, process):
            assert process.stdout is not None
            helper, rank = int(await process.stdout.readline()), int(await process.stdout.readline())
            await until(lambda: {helper, rank} <= set(tree.pids))
            tree.engine_loaded([0, rank])
            for pid in (helper, rank):
                os.kill(pid, signal.SIGKILL)
            while {helper, rank} & set(tree.pids):  # before a scan can find out what they are
                tree._on_exit(helper if helper in tree.pids else rank)
            assert not tree.is_settled
            assert not tree.rank_lost.done()
            assert (await tree.rank_lost).startswith(f"rank 1, process {rank} (sh)")

    run_async(check)


@pytest.mark.parametrize("names_leader", [True, False])
def test_a_named_rank_that_no_scan_saw_is_lost_where_others_are_found(*, names_leader: bool) -> None:
    async def check() -> None:
        ended = await asyncio.create_subprocess_exec("true")
        await ended.wait()
        async with tracked("sleep 600") as (tree, process):
            # Where no name is one of its processes, the engine may live in a PID namespace of its own.
            tree.engine_loaded([process.pid if names_leader else 0, ended.pid])
            await until(lambda: tree.is_settled)
            assert tree.rank_lost.done() == names_leader
            if names_leader:
                assert tree.rank_lost.result() == f"rank 1, process {ended.pid}"

    run_async(check)


def test_shared_memory_of_killed_processes_is_removed_unless_another_uses_it(tmp_path: Path) -> None:
    mapper = (
        "import mmap, sys, time\n"
        "files = [open(path, 'w+b') for path in sys.argv[1:]]\n"
        "for file in files: file.truncate(mmap.PAGESIZE)\n"
        "maps = [mmap.mmap(file.fileno(), mmap.PAGESIZE) for file in files]\n"
        "print('mapped', flush=True); time.sleep(600)"
    )
    paths = [Path(f"/dev/shm/maveriq-test-{os.getpid()}-{name}") for name in ("left", "used")]  # noqa: S108
    (tmp_path / "mapper.py").write_text(mapper, encoding="utf-8")
    script = shlex.join([sys.executable, str(tmp_path / "mapper.py"), *map(str, paths)])

    async def check() -> None:
        async with tracked(script) as (tree, process):
            assert process.stdout is not None
            await process.stdout.readline()
            tree.engine_loaded()
            await until(lambda: tree.is_settled)
            await until(lambda: {*map(str, paths)} <= tree._shared_memory)
            with paths[1].open("rb"):
                process.kill()
                tree.leader_exited()
                await tree.gone
            assert [path.exists() for path in paths] == [False, True]

    try:
        run_async(check)
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def test_no_rank_is_lost_while_the_engine_is_ended() -> None:
    async def check() -> None:
        async with tracked("(OMPI_COMM_WORLD_RANK=0 setsid sleep 600 &) ; sleep 600") as (tree, _):
            await until(lambda: len(tree.pids) == 2)
            tree.send_signal(signal.SIGTERM)
            await until(lambda: not tree.pids)
            assert not tree.rank_lost.done()

    run_async(check)


def test_nothing_is_scanned_without_engines() -> None:
    async def check() -> None:
        trees = ProcessTrees()
        trees.scan_soon()
        assert trees._scanning is None

    run_async(check)
