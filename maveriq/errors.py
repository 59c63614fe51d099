"""Everything maveriq raises on purpose.

::

    MaveriqError              exit code 1
    ├── InputError            exit code 2: what the user gave is wrong (file, row, key, number)
    │   └── UnknownNameError  a name that is not in a catalogue; suggests near ones
    └── InvariantError        a bug in maveriq: a law that must hold does not

A message says what is wrong with its value, where (file and line or key), and how to mend it.
The library raises; only the command line prints and exits.
"""

import difflib
import errno
from collections.abc import Iterable


class MaveriqError(Exception):
    """Base of all errors that maveriq raises on purpose."""

    exit_code = 1


class InputError(MaveriqError):
    """The user's input cannot be used; the message names the value, the place and the remedy."""

    exit_code = 2


_MAX_NAMES, _FEW_NAMES = 16, 5


class UnknownNameError(InputError):
    """A name that no catalogue knows."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        names = sorted(known)
        tail = f" {hint}" if hint else ""
        super().__init__(f"unknown {kind} {name!r}{did_you_mean(name, names)} (known: {_listed(names, name)}){tail}")

    def __reduce__(self) -> tuple[type[InputError], tuple[str, ...]]:
        """Leave only the message to another process: the arguments cannot be had back from it."""
        return InputError, self.args


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" with the known name that is nearest, in whatever case, "" if none is near."""
    by_text = {text.casefold(): text for text in known}
    near = difflib.get_close_matches(name.casefold(), list(by_text), n=1)
    return f"; did you mean {by_text[near[0]]!r}?" if near else ""


def _listed(names: list[str], name: str) -> str:
    """Return the names for one line: all, or of very many the nearest."""
    if len(names) <= _MAX_NAMES:
        return ", ".join(names)
    nearest = difflib.get_close_matches(name, names, n=_FEW_NAMES, cutoff=0.0)
    return f"{', '.join(nearest)} and {len(names) - len(nearest)} more"


_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


def cannot_write(what: str, error: OSError) -> MaveriqError:
    """Return what to raise where `what` cannot be written: a failure of the disk is no bad input."""
    reason = error.strerror or str(error)
    if error.errno in _DISK_ERRORS:
        return MaveriqError(f"{what} cannot be written: {reason}; make room or name another place")
    return InputError(f"{what} cannot be written: {reason}; name another place")


class InvariantError(MaveriqError):
    """A law that maveriq guarantees does not hold; always a bug, never the user's fault."""
