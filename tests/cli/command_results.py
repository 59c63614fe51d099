"""Helpers for tests of the command line: results of commands, and contents of folders."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def only_line(self) -> str:
        """The one line on stderr of a command that printed nothing else."""
        assert self.out == ""
        assert "Traceback" not in self.err
        [line] = self.err.splitlines()
        assert line.startswith("maveriq: ")
        return line


Maveriq = Callable[[str], Ended]


def put(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files; a name that ends in / is a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def everything_in(folder: Path) -> dict[str, bytes | None]:
    """Return each file's content, None for a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
