"""`maveriq engines check`: starts small engines of every kind on this machine and checks them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from maveriq.cli.options import JsonFlag
from maveriq.errors import InputError, MaveriqError, UnknownNameError
from maveriq.exec.checks.engines import SUPERVISION, EngineSetup
from maveriq.exec.checks.plan import DEFAULT_CPU_GPUS, parse_gpu_ids, plan_checks
from maveriq.exec.checks.runner import CheckResult, Status
from maveriq.exec.checks.session import check_engines
from maveriq.exec.engines.engine import BACKENDS
from maveriq.exec.gpu_memory_gate import NoMemoryProbe
from maveriq.exec.gpus import Devices
from maveriq.exec.interrupt import InterruptHandler
from maveriq.exec.launcher import ProcessLauncher
from maveriq.exec.local_machine import LocalMachine
from maveriq.exec.scratch_folder import ScratchFolder
from maveriq.report.engine_checks import result_line, results_json, results_table
from maveriq.report.terminal import open_console

_CPU_START_TIMEOUT_S = 900.0  # importing vLLM takes minutes on two busy cores


def check(
    *,
    backend: Annotated[str, typer.Option(metavar="trtllm|vllm|torch|emulated", help="The engine.")],
    gpus: Annotated[
        str | None, typer.Option(metavar="0-7", help="GPUs of this machine to use.", show_default="all")
    ] = None,
    engine_python: Annotated[
        list[str] | None, typer.Option(metavar="ENGINE=PATH", help="The interpreter that runs the engine; repeatable.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check the engines of a backend on this machine.

    Starts small engines of each format and split side by side, runs requests
    on them, and kills them; at most 8 minutes on GPUs. Prints a line for each check as
    it ends, then a table. The exit code is 1 if a check fails. Without a GPU
    the engines run on the CPU.
    """
    if backend not in BACKENDS:
        raise UnknownNameError("backend", backend, BACKENDS)
    chosen = None if gpus is None else parse_gpu_ids(gpus)
    lines = open_console(stderr=as_json)
    results: list[CheckResult] = []

    def show(result: CheckResult) -> None:
        results.append(result)
        lines.print(result_line(result), highlight=False, soft_wrap=True)

    with contextlib.closing(LocalMachine(backend, engine_python or ())) as machine, InterruptHandler() as interrupt:
        gpu_ids = _gpu_ids(machine, chosen)
        _run(_check(machine, gpu_ids, show), interrupt)
        if as_json:
            report = results_json(backend, gpu_ids, results, interrupted=interrupt.interrupted)
            typer.echo(json.dumps(report, indent=2, allow_nan=False))
        elif results:
            console = open_console()
            console.print()
            console.print(results_table(backend, results))
        if interrupt.interrupted:
            raise KeyboardInterrupt
    if failures := [result.name for result in results if result.outcome.status is Status.FAILED]:
        raise MaveriqError(f"{len(failures)} of {len(results)} checks of {backend} failed: {', '.join(failures)}")


def _gpu_ids(machine: LocalMachine, chosen: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the GPUs to use.

    Raises:
        InputError: the machine has no such GPU.
    """
    if machine.meter is None:
        return chosen or DEFAULT_CPU_GPUS
    known = len(machine.meter.gpus)
    if chosen and chosen[-1] >= known:
        raise InputError(f"--gpus: there is no GPU {chosen[-1]}; this machine has {known}, counted from 0")
    return chosen or tuple(range(known))


async def _check(machine: LocalMachine, gpu_ids: tuple[int, ...], on_result: Callable[[CheckResult], None]) -> None:
    meter = machine.meter
    used = () if meter is None else [meter.gpus[gpu_id] for gpu_id in gpu_ids]
    plan = plan_checks(machine.backend, gpu_ids, gpus=used)
    devices = Devices() if meter is None else Devices(uuids=tuple(gpu.uuid for gpu in meter.gpus))
    with (
        ScratchFolder("maveriq-check-") as scratch,
        ProcessLauncher(machine.backend, logs=scratch.path, devices=devices, python=machine.python_path) as launcher,
    ):
        setup = EngineSetup(
            launcher=launcher,
            logs=Path(scratch.path),
            devices=devices,
            memory_probe=machine.memory_probe() or NoMemoryProbe(),
            settings=SUPERVISION if meter else replace(SUPERVISION, start_timeout_s=_CPU_START_TIMEOUT_S),
        )
        await check_engines(machine.backend, plan, setup, gpu_ids=gpu_ids, on_result=on_result, meter=meter)


def _run(checking: Coroutine[Any, Any, None], interrupt: InterruptHandler) -> None:
    """Run the checks; the first signal ends them early, and their engines in order."""

    async def interruptible() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.create_task(checking)
        interrupted = asyncio.Event()
        with interrupt.calling(lambda: loop.call_soon_threadsafe(interrupted.set)):
            signalled = asyncio.create_task(interrupted.wait())
            await asyncio.wait((task, signalled), return_when=asyncio.FIRST_COMPLETED)
            signalled.cancel()
            if not task.done():
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    asyncio.run(interruptible())
