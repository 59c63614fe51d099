"""Failures at any time: one line, the right exit code, no half-written files."""

import os
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bad_input import CLUSTER, RULE, SCHEDULE, TINY_CLUSTER, TWO_REQUESTS, Case, bad, policy
from command_results import Maveriq, everything_in, put

from maveriq.report import run_folder
from maveriq.report.reading import read_run

SLOW = "plan llama-2-7b --slo-ms 1"
FAILING = [
    bad(SLOW, "llama-2-7b: misses its SLO of 1 ms", "the fastest that fits takes", "--explain"),
    bad(f"{SLOW} --json", "misses its SLO"),
    bad("plan llama-2-7b --gpus c.toml", "does not fit the free memory", "--explain", files={"c.toml": TINY_CLUSTER}),
    bad("plan llama-2-7b --gpus c.toml --json", "none of 30", files={"c.toml": TINY_CLUSTER}),
    bad("plan llama-2-7b --min-accuracy 99.9 --gpus c.toml", "none of 30", files={"c.toml": TINY_CLUSTER}),
    policy(RULE + "1 / 0", "policy 'r.py:order' failed: ZeroDivisionError: division by zero (r.py, line 2)"),
    policy(
        f"import json\n{RULE}return json.loads('{{')", "policy 'r.py:order' failed: JSONDecodeError", "(r.py, line 3)"
    ),
    policy(RULE + "import sys; sys.exit(0)", "policy 'r.py:order' failed: SystemExit"),
    policy("def order(): pass", "policy 'r.py:order' failed: TypeError"),
    policy(RULE + "return None", "policy 'r.py:order' failed: TypeError", "must return GPUs"),
    policy(RULE + "return [3, 4]", "returned 3, which is not one of the GPUs it was given"),
    policy(RULE + "return [{}]", "returned {}, which is not one of the GPUs it was given"),
    policy(RULE + "return list(gpus) * 2", "returned a GPU twice"),
    policy(RULE + "return []", "returned 0 of 8 GPUs; a rule must order them all"),
]


@pytest.mark.parametrize("case", FAILING, ids=lambda case: case.command + case.files.get("r.py", "")[17:])
def test_failures_give_one_line_and_exit_code_1_and_leave_no_files(
    case: Case, maveriq: Maveriq, tmp_path: Path
) -> None:
    put(tmp_path, case.files)
    before = everything_in(tmp_path)
    ended = maveriq(case.command)
    line = ended.only_line
    assert [word for word in case.words if word not in line] == [], line
    assert ended.code == 1
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("form", ["--quiet", "--json"])
def test_records_show_that_nothing_was_deployed(maveriq: Maveriq, tmp_path: Path, form: str) -> None:
    put(tmp_path, {"c.toml": TINY_CLUSTER, "t.csv": TWO_REQUESTS})
    ended = maveriq(f"sim --trace t.csv --gpus c.toml --out run {form}")
    assert ended.code == 1
    assert "nothing could be deployed" in ended.only_line
    assert "does not fit the free memory" in ended.only_line
    assert "records: run" in ended.only_line
    run = read_run(tmp_path / "run")
    assert {deployment.status for deployment in run.deployments} == {"rejected"}
    assert len(run.requests) == 2


def test_a_model_that_fits_nowhere_does_not_stop_the_others(maveriq: Maveriq, tmp_path: Path) -> None:
    put(tmp_path, {"c.toml": CLUSTER + "memory_gib = 10\n", "t.csv": TWO_REQUESTS})
    assert maveriq("sim --trace t.csv --models regular --gpus c.toml --out run --quiet --drain-s 2000").code == 0
    statuses = [deployment.status for deployment in read_run(tmp_path / "run").deployments]
    assert "rejected" in statuses
    assert set(statuses) - {"rejected"}


def test_explain_lists_rejected_configurations_even_if_none_meets_the_slo(maveriq: Maveriq) -> None:
    ended = maveriq(f"{SLOW} --explain")
    assert ended.code == 1
    assert "known not to run" in ended.out
    assert ended.err.startswith("maveriq: llama-2-7b: misses its SLO")


# Failures at any time


@pytest.mark.parametrize("command", ["sim --trace t.csv --quiet --out run", "trace export --out new.csv"])
def test_a_full_disk(command: str, maveriq: Maveriq, tmp_path: Path) -> None:
    put(tmp_path, {"t.csv": TWO_REQUESTS})
    before = everything_in(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        ended = maveriq(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ended.code == 1
    assert "cannot be written: File too large; make room or name another place" in ended.only_line
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "stopped; no file is left half-written"),
        (MemoryError(), 1, "not enough memory"),
        (KeyError("x"), 1, "this is a bug in maveriq (KeyError: 'x'); MAVERIQ_TRACEBACK=1 shows where"),
    ],
)
def test_failures_while_writing_keep_the_older_records(
    maveriq: Maveriq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str
) -> None:
    put(tmp_path, {"t.csv": TWO_REQUESTS})
    assert maveriq("sim --trace t.csv --quiet --out run --overwrite").code == 0
    before = everything_in(tmp_path)

    def fail(_samples: object) -> None:
        raise error

    monkeypatch.setattr(run_folder, "_gpu_lines", fail)
    ended = maveriq("sim --trace t.csv --quiet --out run --overwrite")
    assert ended.code == code
    assert says in ended.only_line
    assert everything_in(tmp_path) == before


def test_an_interrupt_while_the_folder_is_replaced_keeps_the_old_one(
    maveriq: Maveriq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, {"t.csv": TWO_REQUESTS})
    maveriq("sim --trace t.csv --quiet --out run --overwrite")
    before = everything_in(tmp_path)
    rename = Path.rename

    def stopped(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    assert maveriq("sim --trace t.csv --quiet --out run --overwrite").code == 130
    assert everything_in(tmp_path) == before


def test_a_traceback_is_shown_on_request(maveriq: Maveriq, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAVERIQ_TRACEBACK", "1")
    ended = maveriq("plan nothing")
    assert ended.err.startswith("Traceback")
    assert ended.err.splitlines()[-1].startswith("maveriq: unknown model 'nothing'")


# The installed command, in a process of its own

COMMAND = Path(sys.executable).with_name("maveriq")


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        (f"{COMMAND} sim --scale abc", 2, "'--scale'"),
        (f"{sys.executable} -m maveriq trace check t.csv", 2, "line 2: prompt_tokens"),
        (f"{COMMAND} sim --policy r.py:order", 130, "stopped; no file is left half-written"),
        (f"sh -c '{COMMAND} plan llama-2-7b > /dev/full'", 1, "the output: No space left on device"),
    ],
)
def test_the_installed_command_behaves_the_same(tmp_path: Path, command: str, code: int, says: str) -> None:
    # Ctrl-C during the simulation, while the policy decides.
    stop = f"import os, signal\n{RULE}os.kill(os.getpid(), signal.SIGINT)\n    return gpus\n"
    put(tmp_path, {"t.csv": SCHEDULE + "1,1,x,1\n", "r.py": stop})
    before = everything_in(tmp_path)
    ended = subprocess.run(
        shlex.split(command),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        check=False,
        # Background jobs of a shell ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert ended.returncode == code
    assert ended.stdout == ""
    [line] = ended.stderr.splitlines()
    assert line.startswith("maveriq: ")
    assert says in line
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("command", ["sim --trace t.csv --out run --quiet --json", "plan llama-2-7b"])
def test_a_closed_output_pipe_is_no_error(tmp_path: Path, command: str) -> None:
    put(tmp_path, {"t.csv": TWO_REQUESTS})
    with subprocess.Popen(
        [COMMAND, *shlex.split(command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
    if command.startswith("sim"):
        assert len(read_run(tmp_path / "run").requests) == 2
