"""A fixture that runs the command in this process."""

import shlex
import sys
from pathlib import Path

import pytest
from command_results import Ended, Maveriq

from maveriq.cli.app import main


@pytest.fixture
def maveriq(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Maveriq:
    """Run `maveriq` with a command line as a shell would split it, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(command: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["maveriq", *shlex.split(command)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Ended(code=ended.value.code, out=out, err=err)

    return run
