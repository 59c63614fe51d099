"""Python environments for tests of engines in another interpreter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

_SITE_PACKAGES = Path(sysconfig.get_path("purelib"))


def environment_with(folder: Path, *distributions: str) -> Path:
    """Make an environment of this Python with these distributions of ours and what they need; return its interpreter.

    Links stand for the installed files, so that it needs no network and no space.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next(folder.glob("lib/python3.*/site-packages"))
    for name in _with_dependencies(set(distributions)):
        for top in {PurePosixPath(file).parts[0] for file in metadata.files(name) or ()} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(_SITE_PACKAGES / top)
    return folder / "bin" / "python"


def _with_dependencies(distributions: set[str]) -> set[str]:
    found, waiting = set[str](), set(distributions)
    while waiting:
        found.add(name := waiting.pop())
        needed = map(Requirement, metadata.requires(name) or ())
        waiting |= {need.name for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})} - found
    return found


def environment_of(version: str, folder: Path) -> Path:
    """Make an environment of another Python version with msgspec from the package registry; return its interpreter.

    Skips the test where there is no such Python, or where MAVERIQ_NETWORK=1 does not allow to use the registry.
    """
    if os.environ.get("MAVERIQ_NETWORK") != "1":
        pytest.skip("set MAVERIQ_NETWORK=1 to install msgspec for other versions of Python")
    python = find_python(version)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    subprocess.run([python, "-m", "venv", "--without-pip", str(folder)], check=True)
    interpreter = folder / "bin" / "python"
    our_pip = [sys.executable, "-m", "pip", "--python", str(interpreter)]  # installing another one takes long
    subprocess.run([*our_pip, "install", "--quiet", "--disable-pip-version-check", "msgspec>=0.19,<1"], check=True)
    return interpreter


def stand_in_wheel(folder: Path, name: str, version: str, text: str = "") -> None:
    """Write a wheel of one module into a folder, for `pip install --find-links FOLDER`."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": text,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
        wheel.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD")))


def wheel_of(distribution: str, folder: Path) -> None:
    """Write an installed distribution back into a wheel."""
    paths = [path for path in metadata.files(distribution) or () if path.parts[0] != ".." and path.suffix != ".pyc"]
    tags = (metadata.distribution(distribution).read_text("WHEEL") or "").splitlines()
    tag = next(line.removeprefix("Tag: ") for line in tags if line.startswith("Tag: "))
    own = {"INSTALLER", "REQUESTED", "direct_url.json"}  # of the installation, not of the wheel
    with ZipFile(folder / f"{distribution}-{metadata.version(distribution)}-{tag}.whl", "w") as wheel:
        for path in paths:
            if path.name not in own:
                wheel.write(path.locate(), str(path))


def find_python(version: str) -> str | None:
    """Return the path of an interpreter of a version, such as `3.10`: one that is on PATH, or one of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    show = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in filter(None, candidates):
        shown = subprocess.run([candidate, "-c", show], check=False, capture_output=True, text=True)
        if shown.stdout.strip() == version:  # a shim of pyenv may be there without its version
            return candidate
    return None


def is_running(pid: int) -> bool:
    """Say whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
