"""`maveriq` on a system that starts no more threads, or no more processes, while a file says so.

python starved.py FILE ARGUMENT...

A limit of the kernel would be closer to life, but does not bind root. FILE has the word `threads` or `processes`.
"""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maveriq.cli.app import main

STARVED = Path(sys.argv.pop(1))


def unless(word: str, error: Exception, call: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*arguments: Any, **named: Any) -> Any:
        if STARVED.exists() and STARVED.read_text() == word:
            raise error
        return call(*arguments, **named)

    return checked


threading.Thread.start = unless(  # type: ignore[method-assign]
    "threads", RuntimeError("can't start new thread"), threading.Thread.start
)
subprocess._fork_exec = unless(  # type: ignore[attr-defined]
    "processes",
    BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)),
    subprocess._fork_exec,  # type: ignore[attr-defined]
)

if __name__ == "__main__":
    main()
