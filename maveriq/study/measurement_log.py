"""The log of a study's measurements: a line for each, written to the disk at once, so that a study goes on.

The log is a text file with one JSON object a line. The first says what is measured, and on what; another model, engine
or machine gets a folder of its own. The others are measurements, in any order. A last line that a crash cut short is
dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from maveriq.append_log import AppendLog, open_append_log
from maveriq.errors import InputError
from maveriq.study.grid import Point
from maveriq.tables import readable_error

LOG_NAME = "measurements.jsonl"
"""The name of the log in the folder of a study."""

_VERSION = 1
_MAX_BYTES = 64 << 20
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]


class Subject(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What is measured: the study, the model and its configuration's digest, the engine, the machine, and how often."""

    version: int = _VERSION
    study: str
    model: str
    config_digest: str
    backend: str
    machine: str
    repeats: int


class MeasuredPoint(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A measurement: medians of times, memory over all GPUs, and what it cost."""

    point: Point
    first_s: Annotated[float, msgspec.Meta(gt=0, le=1e6)]
    each_s: Annotated[float, msgspec.Meta(ge=0, le=1e6)]
    memory_gib: Annotated[float, msgspec.Meta(gt=0, le=1e9)]
    model_build_s: _Seconds
    engine_build_s: _Seconds
    run_s: _Seconds

    @property
    def latency_s(self) -> float:
        """From the start to the last token."""
        return self.first_s + (self.point.output_tokens - 1) * self.each_s


_SUBJECT = msgspec.json.Decoder(Subject)
_POINT = msgspec.json.Decoder(MeasuredPoint)


class MeasurementLog:
    """What has been measured so far (mutable)."""

    def __init__(self, log: AppendLog, points: Sequence[MeasuredPoint]) -> None:
        self._log = log
        self.points = {measured.point: measured for measured in points}

    def add(self, measured: Sequence[MeasuredPoint]) -> None:
        """Write measurements to the disk, and take them into account.

        Raises:
            MaveriqError: the disk is full.
        """
        self._log.append(*measured)
        self.points |= {found.point: found for found in measured}


@contextlib.contextmanager
def open_log(folder: Path, subject: Subject) -> Iterator[MeasurementLog]:
    """Open the log in a folder: a new one, or the one that was begun there with the same subject.

    Raises:
        InputError: a log of another subject, of another process, or a damaged one is there.
        MaveriqError: it cannot be written.
    """
    path = folder / LOG_NAME
    with open_append_log(path, max_bytes=_MAX_BYTES) as log:
        begun, points = _decoded(path, log.text)
        if begun is None:
            log.append(subject)
        elif begun != subject:
            raise InputError(
                f"folder {str(folder)!r} has measurements of another {_difference(begun, subject)}; name another "
                "folder with --out, or give the same options to go on"
            )
        yield MeasurementLog(log, points)


def _difference(begun: Subject, subject: Subject) -> str:
    """Return the first thing that differs, as words."""
    for name in subject.__struct_fields__:
        before, now = getattr(begun, name), getattr(subject, name)
        if before != now:
            what = "configuration of the model" if name == "config_digest" else f"{name} ({before}, not {now})"
            return what.replace("repeats", "number of repeats")
    return "subject"


def _decoded(path: Path, text: bytes) -> tuple[Subject | None, list[MeasuredPoint]]:
    subject, points = None, []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            if number == 1:
                subject = _SUBJECT.decode(line)
            else:
                points.append(_POINT.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(
                f"log {str(path)!r}, line {number}: {readable_error(str(error))}; remove the line, or the file"
            ) from None
    return subject, points
