"""Do what a new user does in the first ten minutes: the README's commands, in order, on a fresh clone.

Usage: python scripts/first_ten_minutes.py [--quick]

Each `sh` block runs as it stands. The block that starts a service and the one that uses it run on a free port. The
script prints each step with its time, and exits with 1 if a step fails, if a command replaces what an earlier one
wrote, or if Git then sees anything new in the clone. It needs the `serve` extra, and no network. `--quick` leaves out
the replay of a whole trace on real processes, which takes minutes.
"""

# ruff: noqa: S603, S607  (the commands are those of the README)

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SIMULATE, REPLAY = "maveriq sim", "maveriq run --backend emulated --time-scale 0.1"
"""What the first block of the README runs, once maveriq is installed."""

STEP_TIMEOUT_S = 900
READY_TIMEOUT_S = 60


class StepError(Exception):
    """A step failed, or surprised."""


def main() -> int:
    """Run all steps and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave out the replay of a whole trace")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory(prefix="maveriq-first-") as scratch:
        clone = Path(scratch) / "maveriq"
        try:
            _clone(clone)
            _run_all(clone, quick=quick)
        except StepError as error:
            print(f"first ten minutes: {error}", file=sys.stderr)
            return 1
    print("no step failed, replaced anything, or left a file that Git sees")
    return 0


def _clone(clone: Path) -> None:
    """Clone the working tree's commit, with what is not committed yet on top."""
    subprocess.run(["git", "clone", "--quiet", "--local", "--no-hardlinks", ROOT, clone], check=True)
    changed = subprocess.run(["git", "-C", ROOT, "diff", "HEAD", "--binary"], check=True, capture_output=True).stdout
    if changed:
        subprocess.run(["git", "-C", clone, "apply", "--index", "-"], input=changed, check=True)
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
        subprocess.run(["git", "-C", clone, *identity, "commit", "--quiet", "-m", "as it is"], check=True)


def _run_all(clone: Path, *, quick: bool) -> None:
    text = (clone / "README.md").read_text(encoding="utf-8")
    found = BLOCK.findall(text)
    steps = [SIMULATE, *([] if quick else [REPLAY]), *(body for language, body in found if language == "sh")]
    environment = _environment(clone)
    for step in steps:
        before = _contents(clone / "runs")
        _step(step, clone, environment)
        _check_kept(before, _contents(clone / "runs"), step)
    before = _contents(clone / "runs")
    _step(SIMULATE, clone, environment)  # once more: a second run must not replace the first
    _check_kept(before, _contents(clone / "runs"), SIMULATE)
    _serve(found, clone, environment)
    seen = subprocess.run(
        ["git", "-C", clone, "status", "--porcelain"], check=True, capture_output=True, text=True
    ).stdout
    if seen:
        raise StepError(f"Git sees what the commands left: {' '.join(seen.split())}")


def _environment(clone: Path) -> dict[str, str]:
    """Return an environment with this Python's commands on the path and the clone's code in them."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MAVERIQ_")}
    return kept | {"PATH": path, "PYTHONPATH": str(clone)}


def _step(script: str, clone: Path, environment: Mapping[str, str]) -> str:
    """Run a script in the clone and return what it prints."""
    started_s = time.monotonic()
    try:
        done = subprocess.run(
            ["bash", "-euc", script],
            cwd=clone,
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=STEP_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise StepError(f"took more than {STEP_TIMEOUT_S} s: {script.strip()}") from None
    last = next(line for line in reversed(script.strip().splitlines()) if not line.startswith(" "))
    print(f"{time.monotonic() - started_s:6.1f} s  {last}", flush=True)
    if done.returncode or "Traceback" in done.stderr:
        raise StepError(f"exit code {done.returncode}: {script.strip()}\n{done.stderr.strip()}")
    return done.stdout


def _contents(folder: Path) -> dict[str, str]:
    """Return the digest of each file in a folder by its path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _check_kept(before: Mapping[str, str], after: Mapping[str, str], step: str) -> None:
    changed = [name for name, digest in before.items() if after.get(name) != digest]
    if changed:
        raise StepError(f"replaced {changed[0]}: {step.strip()}")


def _serve(found: Sequence[tuple[str, str]], clone: Path, environment: Mapping[str, str]) -> None:
    """Start the service of the README, and run the commands that follow it as they are pasted."""
    [start] = [body for _, body in found if body.startswith("$ maveriq serve")]
    [use] = [body for _, body in found if body.startswith("$ maveriq console")]
    with _service(_commands(start), clone, environment) as port:
        script = _commands(use).replace("maveriq console", f"maveriq console --url http://localhost:{port}")
        output = _step(script.replace("localhost:8000", f"localhost:{port}"), clone, environment)
    if '"text_completion"' not in output:
        raise StepError(f"the service did not complete the prompt: {output}")


def _commands(transcript: str) -> str:
    """Return the commands of a transcript: lines that begin with `$ `, and their continuations."""
    lines: list[str] = []
    for line in transcript.splitlines():
        if line.startswith("$ "):
            lines.append(line[2:])
        elif lines and lines[-1].endswith("\\"):
            lines.append(line)
    return "\n".join(lines)


@contextlib.contextmanager
def _service(command: str, clone: Path, environment: Mapping[str, str]) -> Iterator[int]:
    """Run a service on a free port, and stop it as Ctrl-C does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        ["bash", "-c", f"exec {command} --port {port}"],
        cwd=clone,
        env=dict(environment),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _wait_for_port(port, server)
        yield port
    finally:
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=READY_TIMEOUT_S)
    if server.returncode:
        raise StepError(f"exit code {server.returncode}: {command}\n{errors}")


def _wait_for_port(port: int, server: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s and server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise StepError("the service did not start")


if __name__ == "__main__":
    sys.exit(main())
