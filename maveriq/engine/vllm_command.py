"""Reads the settings of vLLM from a plain command line, `vllm serve MODEL --max-num-seqs 64`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec

from maveriq.domain.engine_defaults import NEWEST_CHECKED
from maveriq.engine.vllm_settings import VllmSettings
from maveriq.errors import InputError, did_you_mean
from maveriq.files import data_path
from maveriq.tables import read_toml, readable_error

_SUFFIXES = {"k": 1000, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)([kmgKMG])?")
_STARTS = (("vllm", "serve"), ("python", "-m", "vllm.entrypoints.openai.api_server"))
_SPECIAL = frozenset({"kind", "version", "offline"})  # fields that are no arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmCommand:
    """What a command line says.

    Args:
        model: the model's name or path; None if the command names none.
        settings: its arguments.
        without: arguments that a simulation does without, as they were written.
    """

    model: str | None
    settings: VllmSettings
    without: tuple[str, ...]


class _Without(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    flags: frozenset[str]
    options: frozenset[str]


class _Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    names: dict[str, str]
    model: dict[str, bool]
    without: _Without
    refused: dict[str, str]


@cache
def _arguments() -> _Arguments:
    return read_toml(data_path("vllm_arguments.toml"), _Arguments, what="table of vLLM's arguments")


def read_vllm_command(command: str, *, version: str = NEWEST_CHECKED) -> VllmCommand:
    """Read a command line of vLLM.

    Args:
        command: `vllm serve MODEL ...`, or `python -m vllm.entrypoints.openai.api_server --model MODEL ...`.
        version: of vLLM, which a command line does not say.

    Raises:
        InputError: it is no such command, or an argument is unknown, not modelled, or has a wrong value.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"engine command {command!r} cannot be read: {error}") from None
    start = next((start for start in _STARTS if _begins(words, start)), None)
    if start is None:
        raise InputError(f"engine command {command!r} is none of vLLM's; write: vllm serve MODEL --max-num-seqs 64")
    reader = _Reader(words[len(start) :])
    reader.read()
    try:
        settings = msgspec.convert({"kind": "vllm", "version": version} | reader.values, VllmSettings)
    except msgspec.ValidationError as error:
        raise InputError(f"engine command: {readable_error(str(error), VllmSettings)}") from None
    return VllmCommand(model=reader.model, settings=settings, without=tuple(reader.without))


def _begins(words: list[str], start: tuple[str, ...]) -> bool:
    head = [re.sub(r"^(.*/)?(python|vllm)[\d.]*$", r"\2", word) for word in words[: len(start)]]
    return tuple(head) == start


@cache
def _fields() -> dict[str, bool]:
    """Return the fields that are arguments, and whether they are flags."""
    return {
        field.name: _is_flag(field.type) for field in msgspec.structs.fields(VllmSettings) if field.name not in _SPECIAL
    }


def _is_flag(kind: Any) -> bool:
    return bool in (kind, *getattr(kind, "__args__", ()))


class _Reader:
    """Reads the words of one command (mutable)."""

    def __init__(self, words: list[str]) -> None:
        self._words = words
        self._next = 0
        self.model: str | None = None
        self.values: dict[str, Any] = {}
        self.without: list[str] = []

    def read(self) -> None:
        while self._next < len(self._words):
            word = self._words[self._next]
            self._next += 1
            if word.startswith("-"):
                self._argument(word)
            elif self.model is None:
                self.model = word
            else:
                raise InputError(
                    f"engine command: {word!r} belongs to no argument; the model is {self.model!r} already"
                )

    def _argument(self, word: str) -> None:
        written, given, text = word.partition("=")
        name = written.lstrip("-").replace("_", "-")
        value = text if given else None
        known = _arguments()
        field = known.names.get(name, name.replace("-", "_"))
        negated = field.removeprefix("no_")
        if field in _fields():
            self.values[field] = self._flag(written, value) if _fields()[field] else self._value(written, field, value)
        elif negated != field and _fields().get(negated):
            self.values[negated] = False
        elif name in known.model:
            self.model = self._text(written, value)
        elif name in known.refused:
            raise InputError(f"engine command: {written}: {known.refused[name]}")
        else:
            self._pass_over(written, name, value)

    def _pass_over(self, written: str, name: str, value: str | None) -> None:
        known = _arguments()
        if name in known.without.flags or name.removeprefix("no-") in known.without.flags:
            self.without.append(written)
        elif name in known.without.options:
            self.without.append(f"{written} {self._text(written, value)}")
        else:
            hint = did_you_mean(name, _all_names())
            raise InputError(
                f"engine command: unknown argument {written}{hint or '; leave it out if it changes no schedule'}"
            )

    def _flag(self, written: str, value: str | None) -> bool:
        if value is None or value.casefold() == "true":
            return True
        if value.casefold() == "false":
            return False
        raise InputError(f"engine command: {written} is {value!r}; it must be true or false, or have no value")

    def _value(self, written: str, field: str, value: str | None) -> Any:
        text = self._text(written, value)
        if field == "max_model_len" and text in ("auto", "-1"):
            return None
        match = _NUMBER.fullmatch(text)
        if match is None:
            return text
        number = float(match[1]) * _SUFFIXES.get(match[2], 1)
        return int(number) if number == int(number) and "." not in text else number

    def _text(self, written: str, value: str | None) -> str:
        if value is not None:
            return value
        if self._next == len(self._words):
            raise InputError(f"engine command: {written} has no value")
        self._next += 1
        return self._words[self._next - 1]


@cache
def _all_names() -> Iterable[str]:
    known = _arguments()
    names = {field.replace("_", "-") for field in _fields()} | known.names.keys() | known.refused.keys()
    return sorted(names | known.without.flags | known.without.options)
