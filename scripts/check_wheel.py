"""Build the wheel, install it into an empty environment, and run commands of it there.

Usage: python scripts/check_wheel.py [--extra NAME]...

The script prints one line per check, and exits with 1 at the first failure. Only pip needs the network. With `--extra`,
which CI leaves out for its time, it also installs the wheel with that extra and uses it. It only asks pip what it would
install of `torch`, `vllm` and `trtllm`, which are gigabytes.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN_FILES = {"requests.csv", "deployments.csv", "gpus.csv", "run.json"}
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


class CheckError(Exception):
    """The wheel is not as it should be."""


def main() -> int:
    """Run all checks and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", action="append", default=[], choices=[*USES, *RESOLVED], help="also check an extra")
    extras = parser.parse_args().extra
    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="maveriq-wheel-") as scratch:
        try:
            check(Path(scratch), extras)
        except CheckError as error:
            print(f"FAILED  {error}")
            return 1
    print(f"ok      all checks in {time.perf_counter() - start_s:.0f} s")
    return 0


def check(scratch: Path, extras: Sequence[str] = ()) -> None:
    """Run all checks in a folder outside the repository.

    Raises:
        CheckError: a check failed.
    """
    wheel = build(scratch / "dist")
    say("built", wheel.name)
    say("contents", check_contents(wheel))
    commands = install(wheel, scratch / "venv")
    say("installed", "with its dependencies, into an empty environment")
    empty = scratch / "empty"
    empty.mkdir()
    release = wheel.name.split("-")[1]
    expect(run([commands / "maveriq", "--version"], empty) == f"maveriq {release}\n", "--version says another version")
    say("--version", release)
    expect(run([commands / "maveriq", "sim", "--quiet"], empty) == "", "sim --quiet printed something")
    say("sim", check_run(empty / "runs"))
    expect("TP 1 x PP 1" in run([commands / "maveriq", "plan", "llama-2-7b"], empty), "plan shows no configuration")
    say("plan", "llama-2-7b has configurations")
    expect("requests from" in run([commands / "maveriq", "trace", "show", "code"], empty), "trace show shows no trace")
    say("trace show", "the code trace")
    (empty / "sweep.toml").write_text('name = "seeds"\n[grid]\nseed = [1, 2]\n', encoding="utf-8")
    for extra, arguments in MISSING.items():
        reason = refusal([commands / "maveriq", *arguments], empty)
        expect(f"pip install 'maveriq[{extra}]'" in reason, f"no word of maveriq[{extra}]: {reason}")
    say("missing extras", f"named by the commands that need them: {', '.join(MISSING)}")
    for extra in extras:
        if extra in RESOLVED:
            say(f"maveriq[{extra}]", resolve(wheel, extra, scratch))
        else:
            commands = install(f"maveriq[{extra}] @ {wheel.as_uri()}", scratch / f"venv-{extra}")
            run([commands / "python", "-c", USES[extra]], empty)
            say(f"maveriq[{extra}]", "installed and used")


MISSING = {
    "report": ("report", "runs"),
    "serve": ("serve", "--backend", "emulated"),
    "ray": ("sweep", "sweep.toml", "--on", "ray"),
}
"""Commands that need an extra."""

_SWEEP = '{"options": {"limit": 5}, "grid": {"seed": [1, 2]}}'
USES = {
    "gpu": "import pynvml; from maveriq.exec.gpus import NvmlMeter",
    "ray": f"import maveriq; assert len(maveriq.sweep({_SWEEP}, on='ray')) > 2",
    "report": "import maveriq; maveriq.simulate(limit=20).to_html('report.html')",
    "serve": "import maveriq.serve.app, maveriq.serve.tokenizers, maveriq.serve.client",
}
"""What a program does with each extra."""

RESOLVED = ("torch", "trtllm", "vllm")
"""Extras that are too large to install here."""


def resolve(wheel: Path, extra: str, scratch: Path) -> str:
    """Ask pip what it would install with an extra into an empty environment, and return how much that is."""
    venv.create(scratch / f"venv-{extra}")
    report = scratch / f"{extra}.json"
    wanted = f"maveriq[{extra}] @ {wheel.as_uri()}"
    run([*PIP, "--python", scratch / f"venv-{extra}", "install", "--dry-run", "--report", report, wanted], scratch)
    return f"resolves to {len(json.loads(report.read_text(encoding='utf-8'))['install'])} packages"


def build(folder: Path) -> Path:
    """Build the wheel and return its path."""
    run([*PIP, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], ROOT)
    wheels = list(folder.glob("*.whl"))
    expect(len(wheels) == 1, f"the build made {len(wheels)} wheels")
    return wheels[0]


def check_contents(wheel: Path) -> str:
    """Check that the wheel contains every file of the package and of traces/, every study, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "maveriq").rglob("*") if path.is_file()}
    tables = {f"maveriq/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "traces").rglob("*") if path.is_file()}
    studies = {f"maveriq/studies/{path.name}" for path in (ROOT / "experiments" / "study").glob("*.toml")}
    wanted = {name for name in sources | tables | studies if "__pycache__" not in name}
    expect(wanted <= inside, f"missing in the wheel: {min(wanted - inside, default='')}")
    unexpected = {name for name in inside - wanted if ".dist-info/" not in name}
    expect(not unexpected, f"not wanted in the wheel: {min(unexpected, default='')}")
    return f"{len(sources & wanted)} files of the package, {len(tables)} of traces, {len(studies)} studies, no tests"


def install(wheel: Path | str, folder: Path) -> Path:
    """Install the wheel, or a requirement, into a new environment and return the folder of its commands."""
    venv.create(folder)
    commands = folder / ("Scripts" if os.name == "nt" else "bin")
    run([*PIP, "--python", folder, "install", wheel], folder)
    return commands


def check_run(runs: Path) -> str:
    """Check that there is one run folder, and that its files are complete and agree."""
    folders = list(runs.iterdir()) if runs.is_dir() else []
    expect(len(folders) == 1, f"sim left {len(folders)} run folders")
    files = {path.name for path in folders[0].iterdir()}
    expect(files == RUN_FILES, f"the run folder holds {', '.join(sorted(files))}")
    with (folders[0] / "requests.csv").open(encoding="utf-8", newline="") as lines:
        statuses = Counter(row["status"] for row in csv.DictReader(lines))
    record = json.loads((folders[0] / "run.json").read_text(encoding="utf-8"))
    counts = record["summary"]["overall"]["counts"]
    total = counts.pop("scheduled")
    expect(total > 0, "sim had no request")
    expect(sum(counts.values()) == total, f"{counts} do not add up to {total} requests")
    expect(statuses == Counter(counts), f"requests.csv has {dict(statuses)}, run.json {counts}")
    return f"{total:,} requests, {counts['completed']:,} completed, all files there"


def run(command: Sequence[str | Path], folder: Path) -> str:
    """Run a command in a folder, without the user's Python settings, and return its output.

    Raises:
        CheckError: the command failed.
    """
    done = _done(command, folder)
    if done.returncode:
        raise CheckError(f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def refusal(command: Sequence[str | Path], folder: Path) -> str:
    """Run a command that is refused, and return its one line of reason.

    Raises:
        CheckError: the command succeeded, or said more than a line.
    """
    done = _done(command, folder)
    if not done.returncode or len(done.stderr.splitlines()) != 1:
        raise CheckError(f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stderr


def _done(command: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    removed = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MAVERIQ_DATA")
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    return subprocess.run(  # noqa: S603
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        check=False,
        capture_output=True,
        encoding="utf-8",
    )


def expect(true: bool, otherwise: str) -> None:  # noqa: FBT001
    """Raise CheckError with a message unless a condition is true."""
    if not true:
        raise CheckError(otherwise)


def say(what: str, found: str) -> None:
    """Print the line of a passed check."""
    print(f"ok      {what}: {found}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
