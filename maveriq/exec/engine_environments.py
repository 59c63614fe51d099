"""Environments of engines: made by `maveriq engines setup`, found by `maveriq run` and `maveriq serve`.

An environment is a folder with a virtual environment and a record. The record is written first, as unfinished, and
replaced when everything is installed and has been imported. So a folder that an interrupted setup leaves is never used.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from maveriq.errors import InputError, MaveriqError, UnknownNameError, cannot_write
from maveriq.exec.capabilities import EngineFacts, known_engines
from maveriq.exec.engine_python import (
    HOST_REQUIREMENT,
    NOT_INHERITED,
    EnginePython,
    check_engine_python,
    find_python,
    process_group,
)
from maveriq.files import written_whole

RECORD = "maveriq-engine.json"
_MAX_RECORD_BYTES = 65_536
_STDERR = 2


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """What an environment was made for; `python` is the version, `packages` those that were imported in it."""

    engine: str
    finished: bool
    python: str = ""
    packages: dict[str, str] = {}


def engines_with_environments() -> dict[str, EngineFacts]:
    """Return the engines that can have an environment of their own, by name."""
    return {name: facts for name, facts in known_engines().items() if facts.started and facts.requirements}


def default_folder(engine: str) -> Path:
    """Return where the environment of an engine is, unless the user names another folder."""
    data = os.environ.get("XDG_DATA_HOME", "")
    home = Path(data) if Path(data).is_absolute() else Path("~/.local/share").expanduser()
    return home / "maveriq" / "engines" / engine


def find_environment(engine: str) -> EnginePython | None:
    """Return the interpreter of an engine's environment in its default folder; None if no setup has finished there."""
    try:
        folder = default_folder(engine)
    except RuntimeError:  # this user has no home
        return None
    record = _read_record(folder)
    if record is None or not record.finished or record.engine != engine:
        return None
    return EnginePython(path=_interpreter(folder), version=record.python, packages=record.packages)


def set_up(
    engine: str, *, folder: Path, python: str | None = None, replace: bool = False, report: Callable[[str], None]
) -> EnginePython:
    """Make the environment of an engine, and return its interpreter. What pip prints goes to stderr.

    If it fails or is interrupted, the folder is removed.

    Args:
        engine: its name.
        folder: where to make it; a folder that is there must be empty.
        python: the interpreter to make it with; None takes this one, or a suitable one that is on PATH.
        replace: remove the environment that an earlier setup made in the folder.
        report: receives a line before each step.

    Raises:
        UnknownNameError: there is no such engine, or it needs no environment.
        InputError: the folder or the interpreter cannot be used.
        MaveriqError: something cannot be installed; the message says what to do instead.
    """
    known = engines_with_environments()
    if engine not in known:
        raise UnknownNameError("engine", engine, known)
    facts = known[engine]
    folder = folder.expanduser().absolute()
    base = _base_python(engine, facts, python)
    _check_free(folder, replace=replace)
    _start_folder(folder, engine)
    try:
        report(f"making an environment in {folder}")
        _step([str(base), "-m", "venv", str(folder)], "a virtual environment cannot be made", facts)
        requirements = [*facts.requirements, HOST_REQUIREMENT]
        report(f"installing {' '.join(requirements)}")
        pip = [str(_interpreter(folder)), "-m", "pip", "install", "--disable-pip-version-check", *requirements]
        _step(pip, f"pip cannot install {' '.join(facts.requirements)}", facts)
        report(f"importing {' '.join(facts.packages)}")
        found = check_engine_python(str(_interpreter(folder)), facts.packages, source="the new environment")
        finished = _Record(engine=engine, finished=True, python=found.version, packages=dict(found.packages))
        with written_whole(folder / RECORD, what="record of the environment", overwrite=True) as partial:
            partial.write_bytes(_encoded(finished))
    except BaseException:  # Ctrl-C too
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return found


def _base_python(engine: str, facts: EngineFacts, python: str | None) -> Path:
    """Return the interpreter to make an environment with.

    Raises:
        InputError: the one that was named is not suitable, or none is found.
    """
    versions = " or ".join(facts.pythons)
    instead = f", or {facts.otherwise}" if facts.otherwise else ""
    if python is not None:
        path, version = find_python(python, source=f"--python {python}")
        if version.rpartition(".")[0] not in facts.pythons:
            raise InputError(f"--python {python} is Python {version}; {engine} needs {versions}{instead}")
        return path
    if ".".join(map(str, sys.version_info[:2])) in facts.pythons:
        return Path(sys.executable)
    for version in reversed(facts.pythons):
        if shutil.which(f"python{version}"):
            with suppress(InputError):  # a shim whose Python is not there
                path, found = find_python(f"python{version}", source=f"python{version}")
                if found.rpartition(".")[0] == version:
                    return path
    raise InputError(f"{engine} needs Python {versions}, and none is on PATH; name one with --python{instead}")


def _check_free(folder: Path, *, replace: bool) -> None:
    """Check that an environment can be made in a folder, and remove the earlier one if asked to.

    Raises:
        InputError: something is there that must not be removed.
    """
    try:
        is_there, in_use = folder.exists() or folder.is_symlink(), folder.is_dir() and any(folder.iterdir())
    except OSError as error:
        raise InputError(f"folder {str(folder)!r} cannot be read: {error.strerror}; name another with --into") from None
    if is_there and not folder.is_dir():
        raise InputError(f"{str(folder)!r} is not a folder; name another with --into")
    if not in_use:
        return
    record = _read_record(folder)
    if record is None:
        raise InputError(f"folder {str(folder)!r} is not empty, and not an environment that maveriq made; name another")
    if not replace:
        state = "an environment" if record.finished else "an unfinished environment"
        raise InputError(f"folder {str(folder)!r} has {state} of {record.engine}; --replace makes it anew")
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise InputError(f"folder {str(folder)!r} cannot be removed: {error.strerror or error}") from None


def _start_folder(folder: Path, engine: str) -> None:
    """Make the folder with an unfinished record, which also keeps other setups out.

    Raises:
        InputError: it cannot be made, or another setup works in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / RECORD).open("xb") as file:
            file.write(_encoded(_Record(engine=engine, finished=False)))
    except FileExistsError:
        raise InputError(f"another setup works in folder {str(folder)!r}; name another with --into") from None
    except OSError as error:
        raise cannot_write(f"folder {str(folder)!r}", error) from None


def _step(command: Sequence[str], failure: str, facts: EngineFacts) -> None:
    """Run a command that prints to stderr.

    Raises:
        MaveriqError: it fails.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    # Packages on PYTHONPATH would count as installed.
    environment = inherited | {"PYTHONPATH": "", "PYTHONHOME": ""}
    try:
        with process_group(command, environment=environment, stdout=_STDERR) as process:
            code = process.wait()
    except OSError as error:
        raise MaveriqError(f"{failure}: {error.strerror or error}") from None
    if code != 0:
        instead = facts.otherwise or "repair that, and run it again"
        raise MaveriqError(f"{failure}; what went wrong is above; {instead}")


def _interpreter(folder: Path) -> Path:
    return folder / "bin" / "python"


def _read_record(folder: Path) -> _Record | None:
    """Return the record in a folder, None if it has none."""
    try:
        with (folder / RECORD).open("rb") as file:
            return msgspec.json.decode(file.read(_MAX_RECORD_BYTES), type=_Record)
    except (OSError, ValueError, msgspec.DecodeError):
        return None


def _encoded(record: _Record) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record))
