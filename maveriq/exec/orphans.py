"""No engine outlives its executor, not even one that hangs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the one that started it ends; elsewhere than on Linux nothing happens.

    An engine that still listens ends in good order when its socket closes. This is for one that does not any more.
    """
    if not sys.platform.startswith("linux"):
        return
    parent_pid = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it has just ended
        os.kill(os.getpid(), signal.SIGKILL)
