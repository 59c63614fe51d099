"""The log of a profile in the making: what is planned, and every sample, so that an interrupted profile goes on.

The log is a text file with one JSON object a line. The first line is the plan: what was chosen does not change when
the profile goes on. Every further line is written to the disk before the next measurement begins. A line that a crash
cut short is dropped, and its sample is measured again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec

from maveriq.append_log import AppendLog, open_append_log, whole_lines
from maveriq.errors import InputError
from maveriq.estimate.profile_file import EngineRecord, MachineRecord, ModelRecord
from maveriq.files import open_regular_file
from maveriq.profiling.plan import ProfilePlan
from maveriq.tables import readable_error

LOG_NAME = "session.jsonl"
"""The name of the log in the folder of a profile."""

_VERSION = 1
_MAX_LOG_BYTES = 64 << 20
_Number = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
_Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class SessionStart(msgspec.Struct, tag="plan", forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The first line.

    Args:
        version: of the log.
        options: what the plan follows from; a log of other options is not continued.
        made_at: date and time, UTC.
        machine: what is measured on.
        engine: what is measured with.
        models: the models.
        plan: what is measured.
    """

    version: int
    options: Annotated[str, msgspec.Meta(max_length=100_000)]
    made_at: str
    machine: MachineRecord
    engine: EngineRecord
    models: tuple[ModelRecord, ...]
    plan: ProfilePlan


class EngineStarted(msgspec.Struct, tag="engine", forbid_unknown_fields=True, frozen=True, kw_only=True):
    """An engine has started: of which run, in how many seconds, and what it reported."""

    run: _Number
    start_s: _Seconds
    version: Annotated[str, msgspec.Meta(max_length=300)]
    weights_bytes: _Bytes
    kv_cache_bytes: _Bytes
    memory_before_bytes: _Bytes
    kv_tokens: _Bytes = 0


class Sample(msgspec.Struct, tag="sample", forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A batch was measured: of which run, case and repeat, and when (seconds since 1970).

    The other times are those of `SampleTimes`.
    """

    run: _Number
    case: _Number
    repeat: _Number
    first_s: Annotated[float, msgspec.Meta(gt=0, le=1e6)]
    each_s: Annotated[float, msgspec.Meta(gt=0, le=1e6)]
    mixed_s: _Seconds = 0.0
    admission_s: _Seconds = 0.0
    at_s: Annotated[float, msgspec.Meta(ge=0, le=1e11)] = 0.0


class RunEnded(msgspec.Struct, tag="ended", forbid_unknown_fields=True, frozen=True, kw_only=True):
    """All samples of a run were taken: what its engine held then, and at most."""

    run: _Number
    memory_after_bytes: _Bytes
    memory_peak_bytes: _Bytes


Entry: TypeAlias = SessionStart | EngineStarted | Sample | RunEnded
_DECODER: msgspec.json.Decoder[Entry] = msgspec.json.Decoder(Entry)


class Session:
    """What has been measured so far, and the log that keeps it (mutable).

    Args:
        log: the open log.
        start: the first line.
        entries: further lines that were there already.
    """

    def __init__(self, log: AppendLog, start: SessionStart, entries: list[Entry]) -> None:
        self._log = log
        self.start = start
        self.samples: dict[tuple[int, int], list[Sample]] = {}
        self.engines: dict[int, EngineStarted] = {}
        self.ended: dict[int, RunEnded] = {}
        self.resumed = bool(entries)
        for entry in entries:
            self._take(entry)

    def add(self, entry: EngineStarted | Sample | RunEnded) -> None:
        """Write an entry to the disk, and take it into account.

        Raises:
            MaveriqError: the disk is full.
        """
        self._log.append(entry)
        self._take(entry)

    def _take(self, entry: Entry) -> None:
        match entry:
            case Sample():
                self.samples.setdefault((entry.run, entry.case), []).append(entry)
            case EngineStarted():
                self.engines.setdefault(entry.run, entry)
            case RunEnded():
                self.ended[entry.run] = entry
            case SessionStart():
                raise InputError("the log of a profile has two plans; remove it, and measure again")


@contextlib.contextmanager
def open_session(folder: Path, start: SessionStart) -> Iterator[Session]:
    """Open the session in a folder: a new one, or the one that was begun there with the same options.

    Raises:
        InputError: a session of other options, of another process, or something else is there.
        MaveriqError: it cannot be written.
    """
    path = folder / LOG_NAME
    with open_append_log(path, max_bytes=_MAX_LOG_BYTES) as log:
        begun, entries = _decoded(path, log.text)
        if begun is None:
            log.append(start)
            begun = start
        elif begun.options != start.options:
            raise InputError(
                f"output folder {str(folder)!r} holds an unfinished profile of other options; give the same ones to go "
                "on with it, or --overwrite to begin anew"
            )
        yield Session(log, begun, entries)


def begun_session(folder: Path) -> SessionStart | None:
    """Return the first line of the session in a folder, None where there is none.

    Raises:
        InputError: what is there is not the log of a session.
    """
    path = folder / LOG_NAME
    if not path.is_file():
        return None
    with open_regular_file(path, what="log") as log:
        return _decoded(path, whole_lines(log.read(_MAX_LOG_BYTES)))[0]


def _decoded(path: Path, text: bytes) -> tuple[SessionStart | None, list[Entry]]:
    entries: list[Entry] = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            entries.append(_DECODER.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(
                f"log {str(path)!r}, line {number}: {readable_error(str(error))}; --overwrite begins anew"
            ) from None
    if not entries:
        return None, []
    start = entries[0]
    if not isinstance(start, SessionStart) or start.version != _VERSION:
        raise InputError(f"log {str(path)!r} is not of this version of maveriq; --overwrite begins anew")
    return start, entries[1:]


def session_start(
    options: str,
    made_at: str,
    machine: MachineRecord,
    engine: EngineRecord,
    models: tuple[ModelRecord, ...],
    plan: ProfilePlan,
) -> SessionStart:
    """Return the first line of a new session."""
    return SessionStart(
        version=_VERSION, options=options, made_at=made_at, machine=machine, engine=engine, models=models, plan=plan
    )
