"""An engine ends when its executor is killed, even if it hangs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine_fixtures import TIMEOUT_S

CHILD = """
import os, sys, time
from maveriq.exec.engine_server import exit_with_parent
exit_with_parent()
print(os.getpid(), flush=True)
time.sleep(600)
"""
PARENT = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {CHILD!r}])
time.sleep(600)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process of its parent's end")
def test_a_stopped_engine_dies_with_its_executor() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, signal.SIGSTOP)
        parent.kill()
        deadline_s = time.monotonic() + TIMEOUT_S
        while is_alive(child):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """A zombie process counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
