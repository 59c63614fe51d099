"""`maveriq engines setup`: environments of engines are finished or not there, and nothing else is touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_results import everything_in
from engine_fixtures import TIMEOUT_S
from python_environments import is_running, stand_in_wheel, wheel_of

from maveriq.errors import InputError, MaveriqError
from maveriq.exec import engine_environments
from maveriq.exec.engine_environments import RECORD, default_folder, find_environment, set_up
from maveriq.exec.local_machine import LocalMachine

HERE = ".".join(map(str, sys.version_info[:2]))


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def fake_python(folder: Path, *, venv: str = "", pip: str = "", name: str = "python", version: str = "3.12.1") -> str:
    """An interpreter that makes environments of itself, and whose `-m venv` and `-m pip` do what the texts say."""
    path = folder / name
    path.write_text(
        "#!/bin/sh\n"
        f'case "$*" in\n'
        f'  *"-m venv"*) {venv or "mkdir -p $3/bin && cp $0 $3/bin/python"} ;;\n'
        f'  *"-m pip"*) {pip or ":"} ;;\n'
        f"  *sys.version_info*) printf {version} ;;\n"
        f"  *) echo '{json.dumps({'versions': {'torch': '2.9', 'safetensors': '1'}, 'errors': {}})}' ;;\n"
        "esac\n"
    )
    path.chmod(0o755)
    return str(path)


def make(folder: Path, engine: str = "torch", **more: object) -> list[str]:
    lines: list[str] = []
    set_up(engine, folder=folder, report=lines.append, **more)  # type: ignore[arg-type]
    return lines


def test_the_default_folder_follows_the_users_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_folder("vllm") == tmp_path / "data" / "maveriq" / "engines" / "vllm"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in ("", "relative/data"):  # a relative path is to be ignored, says the specification
        monkeypatch.setenv("XDG_DATA_HOME", unset)
        assert default_folder("vllm") == tmp_path / "home/.local/share/maveriq/engines/vllm"


def test_a_finished_environment_is_found(tmp_path: Path) -> None:
    folder = default_folder("torch")
    lines = make(folder, python=fake_python(tmp_path))
    assert lines == [
        f"making an environment in {folder}",
        "installing safetensors>=0.4,<1 torch>=2.6,<3 transformers>=5.20,<6 msgspec>=0.19,<1",
        "importing torch safetensors",
    ]
    found = find_environment("torch")
    assert found is not None
    assert (found.path, found.version) == (folder / "bin" / "python", "3.12.1")
    assert found.packages == {"torch": "2.9", "safetensors": "1"}
    assert find_environment("vllm") is None
    assert LocalMachine("torch").python_path == found.path
    other = fake_python(tmp_path, name="other")
    assert LocalMachine("torch", (f"torch={other}",)).python_path == Path(other)
    found.path.unlink()
    with pytest.raises(InputError, match=r"the environment of torch \(maveriq engines setup torch --replace .*no file"):
        LocalMachine("torch")


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"venv": "echo no ensurepip >&2; exit 1"}, "a virtual environment cannot be made; what went wrong is above"),
        (
            {"pip": "echo no wheel >&2; exit 1"},
            r"pip cannot install safetensors>=0\.4,<1 torch>=2\.6,<3 transformers>=5\.20,<6; what went wrong is",
        ),
        ({"pip": "rm $0; exit 0"}, "the new environment: there is no file"),
    ],
)
def test_a_step_that_fails_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], steps: dict[str, str], message: str
) -> None:
    with pytest.raises(MaveriqError, match=message):
        make(default_folder("torch"), python=fake_python(tmp_path, **steps))
    assert not default_folder("torch").exists()
    assert find_environment("torch") is None
    out, err = capfd.readouterr()
    assert out == ""
    assert ("no " in err) == ("rm" not in str(steps)), "what pip prints is shown"


def test_where_tensorrt_llm_cannot_be_installed_the_container_is_named(tmp_path: Path) -> None:
    container = "run maveriq in NVIDIA's container"
    with pytest.raises(MaveriqError, match=rf"pip cannot install tensorrt-llm>=1\.2,<1\.3; .*; {container}"):
        make(tmp_path / "e", "trtllm", python=fake_python(tmp_path, pip="exit 1"))
    old = fake_python(tmp_path, version="3.11.7")
    with pytest.raises(InputError, match=rf"is Python 3\.11\.7; trtllm needs 3\.12, or {container}"):
        make(tmp_path / "e", "trtllm", python=old)
    assert not (tmp_path / "e").exists()


def test_a_suitable_interpreter_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_environments.sys, "version_info", (3, 11, 7))
    with monkeypatch.context() as without:
        without.setattr(engine_environments.shutil, "which", lambda _name: None)
        with pytest.raises(InputError, match=r"needs Python 3\.12, and none is on PATH; name one with --python, or"):
            make(tmp_path / "e", "trtllm")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    fake_python(tmp_path / "bin", name="python3.12", venv=f"echo $0 > {tmp_path}/used; exit 1")
    with pytest.raises(MaveriqError, match="a virtual environment cannot be made"):
        make(tmp_path / "e", "trtllm")
    assert (tmp_path / "used").read_text() == f"{tmp_path}/bin/python3.12\n"


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("content", ["file", "folder", "link", "record of another kind"])
def test_what_maveriq_did_not_make_is_never_removed(tmp_path: Path, content: str, *, replace: bool) -> None:
    target = tmp_path / "target"
    if content == "file":
        target.write_text("mine")
    else:
        real = tmp_path / "real" if content == "link" else target
        real.mkdir()
        (real / "mine.txt").write_text("mine")
        if content == "link":
            target.symlink_to(real)
        elif content != "folder":
            (real / RECORD).write_text('{"engine": 3}')
    python = fake_python(tmp_path)
    before = everything_in(tmp_path)
    with pytest.raises(InputError, match=r"name another|is not a folder"):
        make(target, python=python, replace=replace)
    assert everything_in(tmp_path) == before


def test_an_earlier_environment_is_replaced_only_if_asked(tmp_path: Path) -> None:
    folder, python = tmp_path / "e", fake_python(tmp_path)
    folder.mkdir()  # an empty folder may be used
    make(folder, python=python)
    (folder / "added").write_text("")
    before = everything_in(folder)
    with pytest.raises(InputError, match="has an environment of torch; --replace makes it anew"):
        make(folder, python=python)
    assert everything_in(folder) == before
    make(folder, python=python, replace=True)
    assert set(everything_in(folder)) == set(before) - {"added"}


def test_two_setups_of_one_folder_do_not_mix(tmp_path: Path) -> None:
    folder, again = tmp_path / "e", fake_python(tmp_path, name="again")
    command = f"{sys.executable} -m maveriq engines setup torch --python {again} --into {folder}"
    first = fake_python(tmp_path, pip=f"{command} > {tmp_path}/second 2>&1; true")
    make(folder, python=first)
    assert "has an unfinished environment of torch" in (tmp_path / "second").read_text()
    assert json.loads((folder / RECORD).read_text())["finished"] is True


def test_engines_that_need_none_have_none(tmp_path: Path) -> None:
    for engine in ("emulated", "trtllm-engine", "vlm"):
        with pytest.raises(InputError, match=f"unknown engine '{engine}'"):
            make(tmp_path / "e", engine)


def test_pip_sees_neither_our_path_nor_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/our/packages")
    monkeypatch.setenv("MAVERIQ_TOKEN", "secret")
    make(tmp_path / "e", python=fake_python(tmp_path, pip=f'echo "$PYTHONPATH$MAVERIQ_TOKEN" > {tmp_path}/seen'))
    assert (tmp_path / "seen").read_text() == "\n"


def command_in(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "maveriq", "engines", "setup", "torch", "--into", str(folder), *more]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_setup_that_is_stopped_leaves_nothing_that_looks_finished(tmp_path: Path, number: signal.Signals) -> None:
    folder, started = default_folder("torch"), tmp_path / "started"
    waits = fake_python(tmp_path, pip=f"sleep 987654 & echo $! > {started}.new && mv {started}.new {started}; wait")
    setup = subprocess.Popen(command_in(folder, "--python", waits), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + TIMEOUT_S
    while not started.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    setup.send_signal(number)
    setup.wait(TIMEOUT_S)
    build = int(started.read_text())
    if number == signal.SIGKILL:
        os.killpg(os.getpgid(build), signal.SIGKILL)
        assert json.loads((folder / RECORD).read_text())["finished"] is False
        with pytest.raises(InputError, match="has an unfinished environment of torch; --replace makes it anew"):
            make(folder, python=fake_python(tmp_path))
    else:
        assert setup.returncode == 130
        assert not folder.exists()
        while is_running(build):  # what pip started ends with it
            assert time.monotonic() < deadline
            time.sleep(0.01)
    setup.communicate()
    assert find_environment("torch") is None
    assert LocalMachine("torch").python is None
    make(folder, python=fake_python(tmp_path), replace=True)
    assert find_environment("torch") is not None


@pytest.mark.heavy
def test_an_environment_is_really_made(tmp_path: Path) -> None:
    """With venv and pip, from wheels in a folder: stand-ins for what torch engines need, and the msgspec of here."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    stand_in_wheel(wheels, "torch", "2.6.5")
    stand_in_wheel(wheels, "safetensors", "0.4.1")
    stand_in_wheel(wheels, "transformers", "5.20.0")
    wheel_of("msgspec", wheels)
    settings = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_EXTRA_INDEX_URL": ""}
    command = [sys.executable, "-m", "maveriq", "engines", "setup", "torch"]
    made = subprocess.run(command, check=False, capture_output=True, text=True, env=settings)
    assert made.returncode == 0, made.stderr
    folder = default_folder("torch")
    version = ".".join(map(str, sys.version_info[:3]))
    assert made.stdout.splitlines() == [
        f"environment: {folder} (Python {version}; torch 2.6.5, safetensors 0.4.1)",
        f"use it: --engine-python torch={folder}/bin/python (maveriq run, serve and profile use it without the option)",
    ]
    assert "Successfully installed" in made.stderr
    shown = subprocess.run([sys.executable, "-m", "maveriq", "engines", "--json"], check=True, capture_output=True)
    torch = json.loads(shown.stdout)["engines"]["torch"]
    assert torch["python"] == f"{folder}/bin/python"
    assert torch["installed"] == {"torch": "2.6.5", "safetensors": "0.4.1"}
    assert LocalMachine("torch").python_path == folder / "bin" / "python"
