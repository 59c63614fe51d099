"""What an engine's workers print, read by the process that started them.

Some engines report that a worker failed, but not why: the exception stands only in what the worker printed. Workers
inherit standard output and error, which are a log file under the launcher (`maveriq.exec.launcher`).
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator

_OUTPUTS = (1, 2)  # the descriptors of standard output and error
_TAIL_BYTES = 256 * 1024  # tracebacks of eight ranks

# A line that ends a traceback, behind the prefixes of a logger: `torch.OutOfMemoryError: CUDA out of memory. ...`
_EXCEPTION = re.compile(r"(?:^|\s)((?:\w+\.)*\w+(?:Error|Exception)(?:: .*)?)$")


class WorkerLog:
    """What this process and its workers print from its creation on, as far as it goes to regular files."""

    def __init__(self) -> None:
        self._starts = {descriptor: _size(descriptor) for descriptor in _OUTPUTS}

    def exceptions(self) -> list[str]:
        """Return the exceptions that were printed, as `type: message`, in order; of much output those at its end."""
        return [
            found[1].strip()
            for descriptor in self._distinct()
            for line in self._tail(descriptor).splitlines()
            if (found := _EXCEPTION.search(line))
        ]

    def _distinct(self) -> Iterator[int]:
        """Yield the outputs that are regular files, each file once."""
        seen: set[tuple[int, int]] = set()
        for descriptor in _OUTPUTS:
            with contextlib.suppress(OSError):
                status = os.fstat(descriptor)
                if stat.S_ISREG(status.st_mode) and (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    yield descriptor

    def _tail(self, descriptor: int) -> str:
        with contextlib.suppress(OSError), open(f"/proc/self/fd/{descriptor}", "rb") as file:  # noqa: PTH123
            size, start = _size(descriptor), self._starts[descriptor]
            file.seek(max(start if start <= size else 0, size - _TAIL_BYTES))  # a log that is full starts again empty
            return file.read(_TAIL_BYTES).decode(errors="replace")
        return ""


def _size(descriptor: int) -> int:
    with contextlib.suppress(OSError):
        return os.fstat(descriptor).st_size
    return 0
