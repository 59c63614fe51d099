"""What a terminal and a shell get: no escape sequences under NO_COLOR, and completed values."""

import os
import pty
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("words", "position", "found"),
    [
        ("maveriq sim --queue f", 3, {"fifo", "fifo-per-model"}),
        ("maveriq sim --intent min-l", 3, {"min-latency"}),
        ("maveriq run --backend em", 3, {"emulated"}),
        ("maveriq plan llama-2-7", 2, {"llama-2-7b", "llama-2-70b"}),
        ("maveriq sim --tie", 2, {"--tie-break"}),
        ("maveriq cons", 1, {"console"}),
    ],
)
def test_shells_complete_options_values_and_models(words: str, position: int, found: set[str]) -> None:
    environment = os.environ | {
        "_MAVERIQ_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(position),
    }
    command = [sys.executable, "-m", "maveriq"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert set(ended.stdout.split()) == found


@pytest.mark.parametrize("arguments", ["plan llama-2-7b --top 2", "plan --help", "engines"])
def test_no_color_writes_no_escape_sequence_to_a_terminal(arguments: str) -> None:
    plain, coloured = (_on_terminal(arguments, **variables) for variables in ({"NO_COLOR": "1"}, {}))
    assert b"\x1b" not in plain
    assert b"\x1b" in coloured
    assert plain.split()[:1] != []


def _on_terminal(arguments: str, **variables: str) -> bytes:
    """Return what a command writes to a terminal."""
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "80", **variables}
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "maveriq", *arguments.split()]
    process = subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = b""
    try:
        while chunk := os.read(ours, 4096):
            written += chunk
    except OSError:  # the terminal has no more writer
        pass
    finally:
        os.close(ours)
        process.wait(60)
    return written
