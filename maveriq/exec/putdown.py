"""Making an engine's process group go: by word, by SIGTERM, by SIGKILL."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from maveriq.exec.launcher import EngineConnection


async def put_down(connection: EngineConnection, *, stop_s: float, ask: Callable[[], None] | None) -> bool:
    """Return once the group is gone, and its channel closed; False if it could not be killed.

    Args:
        connection: to the group.
        stop_s: time for each step.
        ask: asks it to stop in order; None for one that is not worth asking.
    """
    try:
        for step in (ask, connection.terminate) if ask else ():
            step()
            if await _gone(connection, stop_s):
                return True
        connection.kill()
        return await _gone(connection, stop_s)
    finally:
        connection.channel.close()


async def _gone(connection: EngineConnection, within_s: float) -> bool:
    try:
        async with asyncio.timeout(within_s):
            await connection.wait_exit()
    except TimeoutError:
        return False
    return True
