"""All processes of an engine, also those that are not its leader's children.

MPI starts ranks through a daemon (`orted`), each in a session of its own. A signal to the leader's group does not reach
them, and the kernel does not report their end to us. `ProcessTrees` therefore scans `/proc` for new processes, once for
all engines of an executor. A process belongs to an engine if it inherited the engine's mark (`ENGINE_ID`), or if its
parent or its session does. From then on a pidfd (pidfd_open(2)) reports its end at once and takes signals, even if its
PID is used again. A process that clears its environment and leaves its parent and its session between two scans is not
found.

A helper such as a compiler may end at any time. The end of a rank, or of a process between a rank and the leader, is a
failure of the engine. A rank is what MPI gave a number to, or, once the engine has loaded, what the engine names or
what uses CUDA.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from maveriq.exec.processes import (
    ENGINE_ID,
    ProcessStat,
    describe_exit,
    read_environment,
    read_stat,
    remove_unused_shared_memory,
    running_processes,
    shared_memory_of,
    uses_cuda,
)

SCAN_INTERVAL_S = 0.25
"""Between scans while an engine starts or ends."""

IDLE_SCAN_INTERVAL_S = 1.0
"""Between scans while all engines serve: their ranks are known, and pidfds report their end."""

_MIN_SCAN_INTERVAL_S = 0.02  # between scans on request
_FIRST_LOOKS = 5  # at a new process: it may have been seen before it started its program, which has another environment
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")  # Open MPI, PMIx, MPICH


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sighting:
    """What a scan saw of a process of an engine; `mpi_rank` and `uses_cuda` decide whether it is a rank."""

    engine_id: str
    stat: ProcessStat
    is_new: bool
    mpi_rank: str
    uses_cuda: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What a scan needs to know.

    Args:
        engine_ids: the marks of engines.
        by_pid: the engine of each process that is known.
        by_session: the engine of each session.
        unsettled: of `by_pid`, the processes to look at again.
        loaded: the engines that have loaded, and whose ranks are not known yet.
        first_ticks: when the oldest leader started.
    """

    engine_ids: Collection[str]
    by_pid: Mapping[int, str]
    by_session: Mapping[int, str]
    unsettled: Collection[int]
    loaded: Collection[str]
    first_ticks: int


@dataclass(slots=True)
class _Process:
    """A process of an engine. `parent_pid` is as first seen: when a parent ends, its children get another."""

    pid: int
    parent_pid: int
    session: int
    started_ticks: int
    name: str
    mpi_rank: str = ""
    uses_cuda: bool = False
    looks: int = 0
    end: str | None = None  # how it ended, if it did between loading and the scan that tells whether it is a rank


class ProcessTree:
    """The processes of one engine. `ProcessTrees.track` creates it."""

    def __init__(self, trees: ProcessTrees, engine_id: str, leader: int) -> None:
        loop = asyncio.get_running_loop()
        self.engine_id = engine_id
        self.leader = leader
        self.rank_lost: asyncio.Future[str] = loop.create_future()
        """Gets a description of the first rank that ends while the engine is meant to run."""
        self.gone: asyncio.Future[None] = loop.create_future()
        """Done when the leader and all other processes have ended, and a scan after that has found no new one."""
        self._trees = trees
        self._leader_exited = False
        self._ending = self._killing = False
        self._loaded = self._settled = False
        self._pidfds: dict[int, int] = {}  # of the running processes but the leader, by PID
        self._processes: dict[int, _Process] = {}  # also some that have ended: they link ranks to the leader
        self._named_ranks: dict[int, int] = {}  # rank by PID, as the engine says
        self._shared_memory: set[str] = set()  # files that its processes have mapped
        self._ranks: dict[int, str] = {}  # description of each rank, and of each process between it and the leader
        stat = read_stat(leader)
        self.started_ticks = stat.started_ticks if stat else 0
        self._is_mpi_child = bool(_mpi_rank(read_environment(leader)))  # as is then all that the leader starts

    @property
    def pids(self) -> tuple[int, ...]:
        """The running processes that are known, without the leader."""
        return tuple(self._pidfds)

    @property
    def is_empty(self) -> bool:
        """Whether the leader and all other known processes have ended."""
        return self._leader_exited and not self._pidfds

    def engine_loaded(self, rank_pids: Sequence[int] = ()) -> None:
        """Look at the next scan which processes are ranks; they do not change from then on.

        Args:
            rank_pids: the process of each rank that the engine names, in rank order; 0 for one that it does not know.
        """
        self._loaded = True
        self._named_ranks = {pid: rank for rank, pid in enumerate(rank_pids)}
        self._trees.scan_soon()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to all processes but the leader; SIGKILL also to those that are found later."""
        self._ending = True
        self._killing = self._killing or number == signal.SIGKILL
        for pidfd in self._pidfds.values():
            _send(pidfd, number)
        self._trees.scan_soon()

    def leader_exited(self) -> None:
        """Kill all other processes: without their leader they serve nothing. Call it when the leader has exited."""
        self._leader_exited = True
        self.send_signal(signal.SIGKILL)

    # Called by `ProcessTrees`

    @property
    def is_loaded(self) -> bool:
        """Whether the engine has loaded."""
        return self._loaded

    @property
    def is_settled(self) -> bool:
        """Whether its ranks are known."""
        return self._settled

    @property
    def is_steady(self) -> bool:
        """Whether no process is expected to appear."""
        return self._settled and not self._ending

    @property
    def unsettled_pids(self) -> list[int]:
        """The processes to look at again: new ones, and all of them once the engine has loaded."""
        if self._settled:
            return []
        return [pid for pid in self._pidfds if self._loaded or self._processes[pid].looks < _FIRST_LOOKS]

    def owned(self) -> tuple[set[int], set[int]]:
        """Return the PIDs and the sessions of the running processes, with the leader's."""
        leader = set() if self._leader_exited else {self.leader}
        sessions = {self._processes[pid].session for pid in self._pidfds} - {os.getsid(0)}  # ours has other processes
        return leader | self._pidfds.keys(), leader | sessions

    def see(self, sighting: _Sighting) -> None:
        """Add a process, or what has become of it."""
        stat = sighting.stat
        if sighting.is_new and stat.pid not in self._pidfds:
            self._add(stat)
        process = self._processes.get(stat.pid)
        if process is None or process.started_ticks != stat.started_ticks:
            return  # it has ended since
        process.name = stat.name
        process.looks += 1
        process.mpi_rank = process.mpi_rank or ("" if self._is_mpi_child else sighting.mpi_rank)
        process.uses_cuda = process.uses_cuda or sighting.uses_cuda

    def settle(self, *, loaded: bool) -> None:
        """Find the ranks after a scan.

        Args:
            loaded: whether the engine had loaded before the scan.
        """
        for pid, process in self._processes.items():
            if pid in self._ranks or (pid not in self._pidfds and process.end is None):
                continue
            parent = self._processes.get(process.parent_pid)
            # A helper inherits the environment and, without a program of its own, the open devices of its rank.
            if process.mpi_rank and not (parent and parent.mpi_rank):
                self._add_rank(process, f"rank {process.mpi_rank}")
            elif pid in self._named_ranks:
                self._add_rank(process, f"rank {self._named_ranks[pid]}")
            elif process.uses_cuda and not (parent and parent.uses_cuda):
                self._add_rank(process, "a process that uses CUDA")
            if pid in self._ranks and process.end is not None:
                self._report_loss(process, process.end)
        self._settled = loaded
        if loaded:
            self._report_named_that_were_not_found()
            self._processes = {pid: self._processes[pid] for pid in (*self._pidfds, *self._ranks)}

    def find_shared_memory(self) -> None:
        """Remember which files in /dev/shm the processes have mapped; it reads files."""
        for pid in (self.leader, *self.pids):
            self._shared_memory |= shared_memory_of(pid)

    def remove_shared_memory(self) -> None:
        """Remove files in /dev/shm that processes of the engine have left; it reads files."""
        remove_unused_shared_memory(self._shared_memory)

    def close(self) -> None:
        """Forget all processes."""
        for pid in self.pids:
            self._drop(pid)
        if not self.gone.done():
            self.gone.cancel()

    def _add(self, stat: ProcessStat) -> None:
        """Begin to watch a process, if it still runs."""
        try:
            pidfd = os.pidfd_open(stat.pid)
        except OSError:  # it has ended, or the kernel is older than 5.3
            return
        now = read_stat(stat.pid)
        if now is None or now.started_ticks != stat.started_ticks:  # it ended, and its PID may be used again
            os.close(pidfd)
            return
        self._pidfds[stat.pid] = pidfd
        self._processes[stat.pid] = _Process(
            pid=stat.pid,
            parent_pid=stat.parent_pid,
            session=stat.session,
            started_ticks=stat.started_ticks,
            name=stat.name,
        )
        asyncio.get_running_loop().add_reader(pidfd, self._on_exit, stat.pid)
        if self._killing:
            _send(pidfd, signal.SIGKILL)

    def _add_rank(self, process: _Process, description: str) -> None:
        self._ranks[process.pid] = description
        parent = self._processes.get(process.parent_pid)
        while parent is not None and parent.pid not in self._ranks:
            self._ranks[parent.pid] = "the parent of its ranks"
            parent = self._processes.get(parent.parent_pid)

    def _on_exit(self, pid: int) -> None:
        stat = read_stat(pid)  # None if its parent has waited for it: how it ended stays unknown
        process = self._processes[pid]
        self._drop(pid)
        end = ""
        if stat is not None and stat.ended and stat.started_ticks == process.started_ticks:
            end = f", which ended with {describe_exit(os.waitstatus_to_exitcode(stat.wait_status))}"
        if pid in self._ranks:
            self._report_loss(process, end)
        elif self._settled:
            del self._processes[pid]
        elif self._loaded:
            process.end = end
        if self._ending:
            self._trees.scan_soon()

    def _report_loss(self, process: _Process, end: str) -> None:
        if not self._ending and not self.rank_lost.done():
            self.rank_lost.set_result(f"{self._ranks[process.pid]}, process {process.pid} ({process.name}){end}")

    def _report_named_that_were_not_found(self) -> None:
        """Report a rank that ended before any scan, unless the engine counts processes in a way of its own."""
        known = self._processes.keys() | {self.leader}
        if self._ending or self.rank_lost.done() or not known & self._named_ranks.keys():
            return
        for pid in self._named_ranks.keys() - known - {0}:
            self.rank_lost.set_result(f"rank {self._named_ranks[pid]}, process {pid}")
            return

    def _drop(self, pid: int) -> None:
        pidfd = self._pidfds.pop(pid)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)


class ProcessTrees:
    """Finds the processes of all engines of an executor; use it within one event loop.

    Scans run in a thread, because a machine may have thousands of processes, and only while there are engines. A scan
    lists the PIDs, and reads more about new processes alone.
    """

    def __init__(self) -> None:
        self._trees: dict[str, ProcessTree] = {}
        self._seen: frozenset[tuple[int, int]] = frozenset()
        self._scanning: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    def track(self, engine_id: str, leader: int) -> ProcessTree:
        """Begin to track the processes of an engine.

        Args:
            engine_id: the value of `ENGINE_ID` in the environment of its leader; no other engine has it.
            leader: the PID of its leader, a child of this process.
        """
        tree = ProcessTree(self, engine_id, leader)
        self._trees[engine_id] = tree
        self.scan_soon()
        return tree

    def scan_soon(self) -> None:
        """Scan now rather than at the end of the interval."""
        self._wake.set()
        if self._trees and (self._scanning is None or self._scanning.done()):
            self._scanning = asyncio.get_running_loop().create_task(self._run())

    def close(self) -> None:
        """Stop scanning and forget all engines."""
        if self._scanning is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._scanning.cancel()
        for tree in self._trees.values():
            tree.close()
        self._trees.clear()

    async def _run(self) -> None:
        while self._trees:
            self._wake.clear()
            await self._scan()
            await asyncio.sleep(_MIN_SCAN_INTERVAL_S)
            steady = all(tree.is_steady for tree in self._trees.values())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_SCAN_INTERVAL_S if steady else SCAN_INTERVAL_S):
                    await self._wake.wait()

    async def _scan(self) -> None:
        trees = list(self._trees.values())
        ending = [tree for tree in trees if tree.is_empty]
        unsettled = [(tree, tree.is_loaded) for tree in trees if not tree.is_settled]
        self._seen, sightings = await asyncio.to_thread(_look, self._seen, _known(trees))
        for sighting in sightings:
            if tree := self._trees.get(sighting.engine_id):
                tree.see(sighting)
        for tree, loaded in unsettled:
            tree.settle(loaded=loaded)
            if loaded:
                await asyncio.to_thread(tree.find_shared_memory)
        for tree in ending:
            if tree.is_empty and tree.engine_id in self._trees:
                del self._trees[tree.engine_id]
                await asyncio.to_thread(tree.remove_shared_memory)
                tree.gone.set_result(None)


def _known(trees: Iterable[ProcessTree]) -> _Known:
    by_pid: dict[int, str] = {}
    by_session: dict[int, str] = {}
    for tree in trees:
        pids, sessions = tree.owned()
        by_pid |= dict.fromkeys(pids, tree.engine_id)
        by_session |= dict.fromkeys(sessions, tree.engine_id)
    return _Known(
        engine_ids=[tree.engine_id for tree in trees],
        by_pid=by_pid,
        by_session=by_session,
        unsettled=[pid for tree in trees for pid in tree.unsettled_pids],
        loaded={tree.engine_id for tree in trees if tree.is_loaded and not tree.is_settled},
        first_ticks=min((tree.started_ticks for tree in trees), default=0),
    )


def _look(seen: frozenset[tuple[int, int]], known: _Known) -> tuple[frozenset[tuple[int, int]], list[_Sighting]]:
    """Return the processes that need not be looked at again, and those that are an engine's, parents first."""
    listed = running_processes()
    new = [key for key in listed - seen if key[0] not in known.by_pid]
    stats = [(stat, key) for key in new if (stat := read_stat(key[0])) and stat.started_ticks >= known.first_ticks]
    by_pid = dict(known.by_pid)
    sightings: list[_Sighting] = []
    unclear: set[tuple[int, int]] = set()

    def see(engine_id: str, stat: ProcessStat, environment: Mapping[str, str], *, is_new: bool) -> None:
        sightings.append(
            _Sighting(
                engine_id=engine_id,
                stat=stat,
                is_new=is_new,
                mpi_rank=_mpi_rank(environment),
                uses_cuda=engine_id in known.loaded and uses_cuda(stat.pid),
            )
        )

    for stat, key in sorted(stats, key=lambda item: (item[0].started_ticks, item[0].pid)):
        if stat.ended:
            continue
        environment = read_environment(stat.pid)
        mark = environment.get(ENGINE_ID)
        engine_id = mark if mark in known.engine_ids else None
        engine_id = engine_id or by_pid.get(stat.parent_pid) or known.by_session.get(stat.session)
        if engine_id is not None:
            by_pid[stat.pid] = engine_id
            see(engine_id, stat, environment, is_new=True)
        elif not environment and not stat.is_kernel_thread:
            unclear.add(key)  # its program is about to start
    for pid in known.unsettled:
        if stat := read_stat(pid):
            see(known.by_pid[pid], stat, read_environment(pid), is_new=False)
    return listed - unclear, sightings


def _mpi_rank(environment: Mapping[str, str]) -> str:
    """Return the rank that MPI gave to a process or to one that started it, "" if none."""
    return next((environment[name] for name in _RANK_VARIABLES if environment.get(name)), "")


def _send(pidfd: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended
        signal.pidfd_send_signal(pidfd, number)
