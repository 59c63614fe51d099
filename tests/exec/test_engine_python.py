"""The interpreter of an engine: what the option takes, and the check before anything starts."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import TIMEOUT_S
from python_environments import environment_with, is_running

from maveriq.errors import InputError
from maveriq.exec import engine_python
from maveriq.exec.engine_python import EnginePython, check_engine_python, parse_engine_pythons, process_group
from maveriq.exec.local_machine import EngineOptions, LocalMachine

SOURCE = "--engine-python vllm=PYTHON"


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with msgspec and nothing else."""
    return environment_with(tmp_path_factory.mktemp("bare") / "environment", "msgspec")


def script(folder: Path, text: str, *, mode: int = 0o755) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(mode)
    return str(path)


def wrapper(folder: Path, python: Path, packages: Path) -> str:
    """An interpreter that also sees the packages of a folder."""
    paths = f'PYTHONPATH="$PYTHONPATH:{packages}"'
    return script(folder, f'{paths} exec {shlex.quote(str(python))} "$@"')


def test_an_entry_names_an_engine_and_a_path() -> None:
    assert parse_engine_pythons(()) == {}
    assert parse_engine_pythons(("trtllm=/a/python", "vllm=python3=12", "trtllm=/a/python")) == {
        "trtllm": "/a/python",
        "vllm": "python3=12",
    }


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (("/opt/python",), "write ENGINE=PATH, such as trtllm=/opt/trtllm/bin/python"),
        (("trtllm=",), "write ENGINE=PATH"),
        (("trtlm=/a",), "unknown engine 'trtlm'; did you mean 'trtllm'"),
        (("vllm=/a", "vllm=/b"), "names two interpreters for vllm: /a and /b; choose one"),
    ],
)
def test_an_entry_that_cannot_be_meant_is_refused(entries: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_engine_pythons(entries)
    with pytest.raises(InputError, match=message):
        EngineOptions(backend="emulated", engine_python=entries)


def test_an_interpreter_with_all_packages_is_accepted(bare_python: Path) -> None:
    found = check_engine_python(str(bare_python), [], source=SOURCE)
    version = ".".join(map(str, sys.version_info[:3]))
    assert found == EnginePython(path=bare_python, version=version, packages={})


def test_packages_are_imported_and_named_with_their_version(bare_python: Path, tmp_path: Path) -> None:
    """What they print when they are imported is no part of the answer, and threads do not keep it waiting."""
    package = "import threading, time\nprint('hello')\nthreading.Thread(target=time.sleep, args=(10**6,)).start()\n"
    (tmp_path / "vllm.py").write_text(package)
    (tmp_path / "vllm-0.33.0.dist-info").mkdir()
    (tmp_path / "vllm-0.33.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n")
    (tmp_path / "bin").mkdir()
    python = wrapper(tmp_path / "bin", bare_python, tmp_path)
    assert check_engine_python(python, ["vllm"], source=SOURCE).packages == {"vllm": "0.33.0"}


def test_a_path_is_used_as_it_is(bare_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell reads it; it may be relative, begin with ~, or be a name on PATH."""
    folder = tmp_path / "a b; touch stolen; $(touch stolen)"
    folder.mkdir()
    script(folder, f'exec {shlex.quote(str(bare_python))} "$@"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (folder / "python", folder.relative_to(tmp_path) / "python", f"~/{folder.name}/python"):
        assert check_engine_python(str(path), [], source=SOURCE).path == folder / "python"
    assert not list(tmp_path.rglob("stolen"))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    assert check_engine_python("python", [], source=SOURCE).path == folder / "python"


Broken = Callable[[Path, Path], str]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda folder, _: str(folder / "none"), "there is no file .*/none; name the path of an interpreter"),
        (lambda folder, _: "python-of-nobody", "there is no 'python-of-nobody' on PATH"),
        (lambda folder, _: str(folder), "is a folder; name the interpreter in it, such as .*/bin/python"),
        (lambda folder, _: script(folder, "", mode=0o644), "is not executable"),
        (lambda folder, _: "/bin/cat", "fails as an interpreter"),
        (lambda folder, _: script(folder, "echo hello"), "is no Python: it answers 'hello'"),
        (lambda folder, _: script(folder, "printf 3.9.18"), r"is Python 3\.9\.18; an engine runs on Python 3\.10 to 3"),
        (lambda folder, _: script(folder, "printf 3.14.0"), r"is Python 3\.14\.0; an engine runs on"),
        (lambda folder, _: script(folder, "kill -9 $$"), "fails as an interpreter"),
        (lambda folder, _: script(folder, "exec /no/program"), "fails as an interpreter .*/no/program"),
        (lambda folder, _: str(environment_with(folder / "empty")), "cannot import msgspec .*pip install 'msgspec>="),
        (lambda folder, bare: str(bare), "cannot import vllm .ModuleNotFoundError: No module named 'vllm'.; install"),
    ],
    ids=lambda value: value[:25] if isinstance(value, str) else "",
)
def test_an_interpreter_that_cannot_run_an_engine_gets_one_line(
    broken: Broken, message: str, bare_python: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        check_engine_python(broken(tmp_path, bare_python), ["vllm"], source=SOURCE)
    assert str(refused.value).startswith(f"{SOURCE}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise OSError('libcudart.so.13: cannot open\\n shared object file')", "libcudart.so.13: cannot open shared"),
        ("import os; os._exit(7)", "fails as an interpreter"),
        ("import sys; sys.exit('no driver')", "SystemExit: no driver"),
    ],
)
def test_a_package_that_cannot_be_imported_gets_one_line(
    text: str, message: str, bare_python: Path, tmp_path: Path
) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "vllm.py").write_text(text)
    with pytest.raises(InputError, match=message) as refused:
        check_engine_python(wrapper(tmp_path, bare_python, tmp_path / "packages"), ["vllm"], source=SOURCE)
    assert "\n" not in str(refused.value)


def test_one_that_hangs_is_killed_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_python, "_VERSION_TIMEOUT_S", 0.5)
    hangs = script(tmp_path, f"sleep 987654 & echo $! > {tmp_path}/child; wait")
    with pytest.raises(InputError, match=r"has not answered within 0\.5 s"):
        check_engine_python(hangs, [], source=SOURCE)
    deadline = time.monotonic() + TIMEOUT_S
    while (tmp_path / "child").exists() and is_running(int((tmp_path / "child").read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_token_does_not_reach_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAVERIQ_TOKEN", "secret")
    with pytest.raises(InputError, match="it answers 'none'"):
        check_engine_python(script(tmp_path, "echo ${MAVERIQ_TOKEN:-none}"), [], source=SOURCE)


def test_only_the_interpreter_of_the_backend_is_started(bare_python: Path, tmp_path: Path) -> None:
    others = ("vllm=/no/such/python", "trtllm=/no/such/python")
    assert LocalMachine("emulated", others).python is None
    machine = LocalMachine("emulated", (*others, f"emulated={bare_python}"))
    assert machine.python_path == bare_python
    with pytest.raises(InputError, match=r"--engine-python vllm=/no/such/python: there is no file"):
        LocalMachine("vllm", others)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_process_starts_kills_that_process(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class InterruptedPopen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)
            signal.raise_signal(number)  # the process runs, and nothing refers to it yet

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", InterruptedPopen)
    previous = signal.signal(number, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), process_group(["sleep", "60"], environment={}, stdout=2):
            pytest.fail("the signal was lost")
        assert signal.getsignal(number) is interrupt
    finally:
        signal.signal(number, previous)
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_in_other_threads_signals_are_left_alone() -> None:
    with ThreadPoolExecutor() as pool:
        assert pool.submit(_true_in_a_process).result() == 0


def _true_in_a_process() -> int:
    with process_group(["true"], environment={}, stdout=2) as process:
        return process.wait()
