"""What engines print, kept without filling the disk: engines may run for months, and be restarted for as long."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

from maveriq.exec.messages import EngineSpec

MOST_BYTES = 16 << 20
"""A log that has grown to this is put aside, in place of the one that was before, and begun anew."""

MOST_LOGS = 20
"""So many of the last logs of a deployment are kept, beside the first, which says best what is wrong."""

LOOK_EVERY_S = 10.0

_TAIL_BYTES = 4096
_LONGEST_LINE = 200


class EngineLog:
    """The log of one engine; whoever writes to it appends (`O_APPEND`)."""

    def __init__(self, folder: Path, spec: EngineSpec) -> None:
        self.path = folder / f"{spec.deployment_id}-{spec.incarnation}.log"
        self._before = self.path.with_suffix(".log.before")
        oldest = folder / f"{spec.deployment_id}-{spec.incarnation - MOST_LOGS}.log"
        if spec.incarnation - MOST_LOGS > 1:
            for old in (oldest, oldest.with_suffix(".log.before")):
                with contextlib.suppress(OSError):
                    old.unlink()

    async def keep_short(self) -> None:
        """Look at its size now and then, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            with contextlib.suppress(OSError):  # gone, or the disk is full: then cutting it is all the more right
                if self.path.stat().st_size > MOST_BYTES:
                    await asyncio.to_thread(self._cut)

    def _cut(self) -> None:
        """Put what is there aside; a line that is printed meanwhile may be lost."""
        try:
            with self.path.open("rb") as now, self._before.open("wb") as before:
                while piece := now.read(1 << 20):
                    before.write(piece)
        finally:
            os.truncate(self.path, 0)

    def last_line(self) -> str:
        """Return the last line that says something, of its last few KiB."""
        return _last_line(self.path) or _last_line(self._before)


def _last_line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read(_TAIL_BYTES).decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip()[:_LONGEST_LINE] for line in reversed(lines) if line.strip()), "")
