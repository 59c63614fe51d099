"""A new user's first ten minutes: the README's commands on a fresh clone."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.heavy
@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("curl"), reason="needs a Git clone and curl")
def test_no_step_fails_surprises_or_overwrites() -> None:
    script = ROOT / "scripts" / "first_ten_minutes.py"
    done = subprocess.run([sys.executable, script, "--quick"], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
