"""The interpreter that runs an engine: which one, whether it can, and the environment that it gets.

Engines pin libraries that do not fit together, so each may have an interpreter of its own (docs/decisions/0014).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from maveriq.errors import InputError, UnknownNameError, cannot_write
from maveriq.exec.engines.engine import BACKENDS
from maveriq.exec.engines.interpreter import module_command
from maveriq.exec.interrupt import stop_signals_deferred

OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)
"""The versions of Python in which the process of an engine is tested."""

HOST_PACKAGE, HOST_REQUIREMENT = "msgspec", "msgspec>=0.19,<1"
"""What every engine's process needs besides the packages of its engine."""

NOT_INHERITED = ("MAVERIQ_TOKEN",)
"""The token of the service: engines run code and files of others."""

_VERSION_TIMEOUT_S = 30.0
_IMPORT_TIMEOUT_S = 300.0  # TensorRT-LLM takes a minute, and two on a busy machine
_PACKAGE = Path(__file__).parents[1]
_SHOW_VERSION = "import sys; sys.stdout.write('%d.%d.%d' % sys.version_info[:3])"  # valid in Python 2 as well
_MAX_SHOWN = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePython:
    """An interpreter that can run an engine.

    Args:
        path: its absolute path, links not followed: an environment is known by the link to its interpreter.
        version: of Python, such as "3.12.1".
        packages: versions of the packages that the engine needs, by name.
    """

    path: Path
    version: str
    packages: Mapping[str, str]


class _Found(msgspec.Struct, frozen=True):
    """The answer of `maveriq.exec.engines.probe`."""

    versions: dict[str, str | None]
    errors: dict[str, str]


def parse_engine_pythons(entries: Sequence[str]) -> dict[str, str]:
    """Return the interpreter of each engine from entries such as `trtllm=/opt/trtllm/bin/python`.

    Raises:
        InputError: an entry is not ENGINE=PATH, or an engine has two.
        UnknownNameError: there is no such engine.
    """
    found: dict[str, str] = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not equals or not path.strip():
            raise InputError(f"--engine-python {entry!r}: write ENGINE=PATH, such as trtllm=/opt/trtllm/bin/python")
        if name not in BACKENDS:
            raise UnknownNameError("engine", name, BACKENDS)
        if found.setdefault(name, path) != path:
            raise InputError(f"--engine-python names two interpreters for {name}: {found[name]} and {path}; choose one")
    return found


def check_engine_python(path: str, packages: Sequence[str], *, source: str) -> EnginePython:
    """Check that an interpreter can run an engine: start it twice, and import the packages in it.

    Args:
        path: of the interpreter; a name without a folder is looked up on PATH.
        packages: what the engine needs, by the names of their imports.
        source: who named the interpreter, the first words of a message.

    Raises:
        InputError: it cannot run the engine; the message is one line.
    """
    python, version = find_python(path, source=source)
    found = _import_packages(python, packages, f"{source}: {python}")
    return EnginePython(
        path=python, version=version, packages={name: found.versions[name] or "version unknown" for name in packages}
    )


def find_python(path: str, *, source: str) -> tuple[Path, str]:
    """Return the absolute path of an interpreter and its version, such as "3.12.1"; it is started once.

    Args:
        path: of the interpreter; a name without a folder is looked up on PATH.
        source: who named the interpreter, the first words of a message.

    Raises:
        InputError: it is no Python that an engine can run on.
    """
    python = _find(path, source)
    where = f"{source}: {python}"
    answered = _run([str(python), "-E", "-c", _SHOW_VERSION], python, Path(), where=where, timeout_s=_VERSION_TIMEOUT_S)
    version = tuple(int(part) for part in answered.split(".") if part.isdigit())
    oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST_PYTHON, NEWEST_PYTHON))
    if len(version) != 3:
        raise InputError(f"{where} is no Python: it answers {answered[:_MAX_SHOWN]!r}; name another")
    if not OLDEST_PYTHON <= version[:2] <= NEWEST_PYTHON:
        raise InputError(f"{where} is Python {answered}; an engine runs on Python {oldest} to {newest}")
    return python, answered


def _find(path: str, source: str) -> Path:
    """Return the absolute path of an executable file.

    Raises:
        InputError: there is none.
    """
    if os.sep not in path:
        on_path = shutil.which(path)
        if on_path is None:
            raise InputError(f"{source}: there is no {path!r} on PATH; name the path of an interpreter")
        path = on_path
    try:
        python = Path(path).expanduser().absolute()
        is_folder, is_file = python.is_dir(), python.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{source}: {path!r} cannot be used: {error}; name another") from None
    if is_folder:
        raise InputError(f"{source}: {python} is a folder; name the interpreter in it, such as {python / 'bin/python'}")
    if not is_file:
        raise InputError(f"{source}: there is no file {python}; name the path of an interpreter")
    if not os.access(python, os.X_OK):
        raise InputError(f"{source}: {python} is not executable; name the path of an interpreter")
    return python


def _import_packages(python: Path, packages: Sequence[str], where: str) -> _Found:
    """Import msgspec and the packages in an interpreter.

    Raises:
        InputError: one cannot be imported.
    """
    try:
        scratch = TemporaryDirectory(prefix="maveriq-python-")
    except OSError as error:
        raise cannot_write("the folder of temporary files", error) from None
    with scratch as folder:
        command = [*module_command(str(python), "maveriq.exec.engines.probe"), HOST_PACKAGE, *packages]
        import_path = link_package(Path(folder))
        answered = _run(command, python, import_path, where=where, timeout_s=_IMPORT_TIMEOUT_S)
    try:
        found = msgspec.json.decode(answered, type=_Found)
    except (msgspec.DecodeError, UnicodeError):
        raise InputError(f"{where} answers {answered[:_MAX_SHOWN]!r}, not what it can import; name another") from None
    if HOST_PACKAGE in found.errors:
        raise InputError(
            f"{where} cannot import {HOST_PACKAGE} ({found.errors[HOST_PACKAGE][:_MAX_SHOWN]}), which every engine "
            f"needs; install it: {python} -m pip install '{HOST_REQUIREMENT}'"
        )
    if found.errors:
        package, reason = next(iter(found.errors.items()))
        raise InputError(f"{where} cannot import {package} ({reason[:_MAX_SHOWN]}); install it there, or name another")
    return found


def _run(command: Sequence[str], python: Path, import_path: Path, *, where: str, timeout_s: float) -> str:
    """Run an interpreter and return what it prints; its whole process group is killed after the time limit.

    Raises:
        InputError: it cannot be started, fails, or takes too long.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    try:
        with process_group(
            command,
            environment=inherited | python_environment(inherited, import_path, python),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            output, errors = (text.decode(errors="replace") for text in process.communicate(timeout=timeout_s))
    except subprocess.TimeoutExpired:
        raise InputError(f"{where} has not answered within {timeout_s:g} s; name another") from None
    except OSError as error:
        raise InputError(f"{where} cannot be started: {error.strerror or error}; name another") from None
    if process.returncode != 0:
        last_line = next(filter(None, reversed([line.strip() for line in errors.splitlines()])), "no output")
        raise InputError(f"{where} fails as an interpreter ({last_line[:_MAX_SHOWN]}); name another")
    return output.strip()


@contextmanager
def process_group(
    command: Sequence[str], *, environment: Mapping[str, str], stdout: int, stderr: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process group, without a shell or input. An exception within the block kills all of it.

    Raises:
        OSError: it cannot be started.
    """
    with ExitStack() as stack:
        with stop_signals_deferred():
            process = stack.enter_context(
                subprocess.Popen(  # noqa: S603 - an interpreter that the user named
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    env=environment,
                    start_new_session=True,
                )
            )
            stack.push(partial(_kill_group_on_error, process.pid))
        yield process


def _kill_group_on_error(group: int, error: type[BaseException] | None, *_: object) -> None:
    if error is not None:
        with suppress(ProcessLookupError, PermissionError):  # the group has ended
            os.killpg(group, signal.SIGKILL)


def link_package(scratch: Path) -> Path:
    """Make a folder that holds a link to this package and nothing else, for the import path of engines.

    The folder that the package is in also holds the libraries of this environment. They must not hide those of another
    interpreter.

    Raises:
        OSError: it cannot be made.
    """
    folder = scratch / "path"
    folder.mkdir()
    (folder / _PACKAGE.name).symlink_to(_PACKAGE, target_is_directory=True)
    return folder


def python_environment(inherited: Mapping[str, str], import_path: Path, python: Path | None) -> dict[str, str]:
    """Return the variables that tell an engine's interpreter where modules and programs are.

    Args:
        inherited: the environment that they are added to.
        import_path: the folder of `link_package`.
        python: the interpreter; None for the one of this process.
    """
    if python is None:
        return {"PYTHONPATH": os.pathsep.join(filter(None, [str(import_path), inherited.get("PYTHONPATH", "")]))}
    # As in an activated environment: engines call programs, such as ninja, that lie beside the interpreter.
    programs = os.pathsep.join(filter(None, [str(python.parent), inherited.get("PATH", "")]))
    return {"PYTHONPATH": str(import_path), "PYTHONHOME": "", "PATH": programs}
