"""One run of the checks: opens what they need, runs them, and leaves no process behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

import msgspec

from maveriq.errors import MaveriqError
from maveriq.exec.checks.checks import CheckContext, checks_for
from maveriq.exec.checks.engines import CheckedEngines, EngineSetup
from maveriq.exec.checks.plan import CheckPlan
from maveriq.exec.checks.runner import CheckResult, run_checks
from maveriq.exec.device import Device
from maveriq.exec.engine_process import terminate
from maveriq.exec.gpus import GpuMeter
from maveriq.exec.launcher import EngineConnection
from maveriq.exec.messages import ChannelClosedError, EngineSpec, Failed, Inspect, Inspected, Stop

_LIMIT_S = {Device.CUDA: 480.0, Device.CPU: 1800.0}  # for all checks; a CPU loads the libraries of GPUs slowly


async def check_engines(
    backend: str,
    plan: CheckPlan,
    setup: EngineSetup,
    *,
    gpu_ids: Sequence[int],
    on_result: Callable[[CheckResult], None],
    meter: GpuMeter | None = None,
) -> None:
    """Run all checks. If this is cancelled, the engines are stopped before it returns.

    Args:
        backend: a key of the capability matrix.
        plan: the engines.
        setup: how they are started.
        gpu_ids: the GPUs in use.
        on_result: receives each result as soon as it is known.
        meter: reads the GPUs, None without any.

    Raises:
        MaveriqError: the GPUs cannot be read.
    """
    used_before = () if meter is None else tuple(reading.used_bytes for reading in await asyncio.to_thread(meter.read))
    engines = CheckedEngines(plan, setup)
    specs = [engine.launch_spec.spec for engine in engines.by_label.values() if engine.planned in plan.matrix]
    inspection = asyncio.create_task(_inspect(setup, specs))
    context = CheckContext(
        backend=backend,
        engines=engines,
        inspection=inspection,
        gpu_ids=tuple(gpu_ids),
        meter=meter,
        used_before=used_before,
    )
    try:
        engines.start()
        await run_checks(checks_for(engines), context, limit_s=_LIMIT_S[plan.device], on_result=on_result)
    finally:
        inspection.cancel()
        await asyncio.gather(inspection, return_exceptions=True)
        await engines.close()


async def _inspect(setup: EngineSetup, specs: Sequence[EngineSpec]) -> list[Inspected]:
    """Return what the engine's library says of each spec; one process answers for all.

    Raises:
        MaveriqError: no engine can be started at all, or the library cannot be imported.
    """
    if not specs:
        raise MaveriqError("this backend runs none of the models that are checked")
    async with _launched(setup, specs[0]) as connection:
        found = []
        for spec in specs:
            connection.channel.send(Inspect(spec=spec))
            while not isinstance(answer := await connection.channel.receive(), Inspected):
                if isinstance(answer, Failed):
                    raise MaveriqError(f"inspection failed {answer}")
            found.append(answer)
        return found


@contextlib.asynccontextmanager
async def _launched(setup: EngineSetup, spec: EngineSpec) -> AsyncIterator[EngineConnection]:
    """Yield an engine's process that has loaded nothing, and end it.

    Raises:
        MaveriqError: it cannot be launched, or ends too early.
    """
    unused = msgspec.structs.replace(spec, deployment_id=0)
    connection = await setup.launcher.launch(unused, range(spec.tp * spec.pp))
    try:
        yield connection
    except ChannelClosedError:
        raise MaveriqError(f"the process ended: {connection.last_output()}") from None
    finally:
        send_stop = partial(connection.channel.send, Stop())
        await terminate(connection, grace_period_s=setup.settings.grace_period_s, send_stop=send_stop)
