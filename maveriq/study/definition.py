"""Definitions of studies: a TOML file each, in `experiments/study` or anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from maveriq.errors import InputError, UnknownNameError
from maveriq.files import exists, studies_path
from maveriq.study.grid import Measure
from maveriq.tables import read_toml

_WHAT = "definition of a study"
_Text = Annotated[str, msgspec.Meta(min_length=1)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
_Counts = Annotated[tuple[_Count, ...], msgspec.Meta(min_length=1)]


class PublishedTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A published table of measurements: its file below the folder of measured data, and the prompts of its rows."""

    file: _Text
    prompt_tokens: _Count


class PublishedFigure(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A published number that a study also computes.

    Args:
        figure: the name of the study's figure.
        value: as published; a whole number where it was printed without decimals.
        what: what it says.
        source: who published it, and where.
        why: why ours differs; empty where it does not.
    """

    figure: _Text
    value: int | float
    what: _Text
    source: _Text
    why: str = ""

    @property
    def decimals(self) -> int:
        """Decimals that were printed."""
        return len(repr(self.value).partition(".")[2]) if isinstance(self.value, float) else 0


class FromData(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The published measurements of a study.

    Args:
        tables: one or more for each part that they play, such as `full_models`.
        profile: the hardware profile with the fingerprints of their prompts.
        figures: what was published.
    """

    tables: Mapping[str, Annotated[tuple[PublishedTable, ...], msgspec.Meta(min_length=1)]]
    profile: _Text = "a6000-long"
    figures: tuple[PublishedFigure, ...] = ()


class Definition(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One study.

    Args:
        analysis: what is computed, a key of `maveriq.study.analyses.ANALYSES`.
        title: of its plot.
        question: what it answers, in a sentence.
        from_data: the published measurements that answer it; None where there are none.
        options: numbers that the analysis takes, such as output lengths.
        measure: what is measured on this machine; None where a study only takes published measurements.
    """

    analysis: _Text
    title: _Text
    question: _Text
    from_data: FromData | None = None
    options: Mapping[str, _Counts] = {}
    measure: Measure | None = None


def known_studies() -> dict[str, Path]:
    """Return the studies that come with maveriq: the path of each definition by name, sorted."""
    return {path.stem: path for path in sorted(studies_path().glob("*.toml"))}


def read_definition(name: str) -> tuple[str, Definition]:
    """Return the name and the definition of a study, known by name or given as a path.

    Raises:
        UnknownNameError: there is no such study.
        InputError: not a definition.
    """
    known = known_studies()
    if name in known:
        return name, read_toml(known[name], Definition, what=_WHAT)
    path = Path(name)
    if path.suffix != ".toml":
        raise UnknownNameError("study", name, known, hint="or give the path of a TOML file")
    if not exists(path):
        raise InputError(f"{_WHAT} {name!r} does not exist; `maveriq study list` lists those that come with maveriq")
    return path.stem, read_toml(path, Definition, what=_WHAT)
