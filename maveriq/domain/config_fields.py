"""Fields of a parsed `config.json`, read with their keys: a wrong value is refused by the name of its key."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from maveriq.errors import InputError

Config: TypeAlias = Mapping[str, Any]
"""A parsed `config.json`, or an object within."""

MAX_LAYERS, MAX_WIDTH, MAX_VOCABULARY, MAX_CONTEXT = 10_000, 10_000_000, 100_000_000, 2**31
"""The largest values that are taken for meant."""

_NAME = re.compile(r"[A-Za-z0-9_.+-]{1,64}")


def brief(value: object) -> str:
    """Return a value as text for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True, slots=True)
class Fields:
    """Reads fields of a configuration; messages name the file and the key.

    Args:
        config: the configuration, or an object within.
        where: the file's name, for messages.
        path: the key of the object within, with a dot; "" for the whole.
    """

    config: Config
    where: str
    path: str = ""

    def refuse(self, reason: str) -> InputError:
        """Return an error that names the file."""
        return InputError(f"{self.where}: {reason}")

    def has(self, key: str) -> bool:
        """Return whether a key is there and not null."""
        return self.config.get(key) is not None

    def first_key(self, keys: Sequence[str]) -> str | None:
        """Return the first of these keys that is there and not null."""
        return next((key for key in keys if self.has(key)), None)

    def count(self, keys: Sequence[str], *, maximum: int = MAX_WIDTH) -> int:
        """Return what these keys say.

        Raises:
            InputError: none is there, or a value is not a positive whole number.
        """
        found = self.optional_count(keys, maximum=maximum)
        if found is None:
            key_names = " or ".join(self.path + key for key in keys)
            raise self.refuse(f"no {key_names}; is it the config.json of a decoder-only model?")
        return found

    def optional_count(self, keys: Sequence[str], *, maximum: int = MAX_WIDTH, zero: bool = False) -> int | None:
        """Return what the keys that are there say, None if none is.

        Raises:
            InputError: it is not a positive whole number (or 0 where `zero`), or two keys say different things.
        """
        given = {key: self.checked(key, self.config[key], maximum, zero=zero) for key in keys if self.has(key)}
        if len(set(given.values())) > 1:
            (first, value), (second, other), *_ = given.items()
            raise self.refuse(f"{self.path}{first} is {value}, but {self.path}{second} is {other}; leave one of them")
        return next(iter(given.values()), None)

    def checked(self, key: str, value: object, maximum: int, *, zero: bool = False) -> int:
        """Return a value that must be a positive whole number, or 0 where `zero`, up to `maximum`.

        Raises:
            InputError: it is not.
        """
        if not isinstance(value, int) or isinstance(value, bool) or value < (0 if zero else 1):
            kind = "a whole number, 0 or more" if zero else "a positive whole number"
            raise self.refuse(f"{self.path}{key} must be {kind}, not {brief(value)}")
        if value > maximum:
            raise self.refuse(f"{self.path}{key} must be at most {maximum:,}, not {brief(value)}")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        """Return a switch, `default` where it is absent or null.

        Raises:
            InputError: it is neither true nor false.
        """
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(f"{self.path}{key} must be true or false, not {brief(value)}")
        return value

    def part(self, key: str) -> Fields:
        """Return an object within the configuration, empty if there is none.

        Raises:
            InputError: it is not an object.
        """
        value = self.config.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.refuse(f"{self.path}{key} must be an object, not {brief(value)}")
        return Fields(value or {}, self.where, f"{self.path}{key}.")

    def values(self, key: str, *, length: int | None = None) -> list[Any] | None:
        """Return a list, None where it is absent, null or empty.

        Raises:
            InputError: it is not a list, or its length is not as expected.
        """
        value = self.config.get(key)
        if value is None:
            return None
        if value == [] and not length:
            return None
        if not isinstance(value, list):
            raise self.refuse(f"{self.path}{key} must be a list, not {brief(value)}")
        if length is not None and len(value) != length:
            raise self.refuse(f"{self.path}{key} must have {length} entries, one a layer, not {len(value)}")
        return value

    def name(self, key: str) -> str | None:
        """Return a name such as llama, None where there is none.

        Raises:
            InputError: it is not a name.
        """
        value = self.config.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            raise self.refuse(f"{self.path}{key} must be a name such as llama, not {brief(value)}")
        return value


def rope_parameters(config: Config, where: str, *, by_layer: bool = False) -> Config:
    """Return the parameters of rotary positions: `rope_parameters`, or `rope_scaling` before transformers 5.

    Args:
        config: the parsed configuration.
        where: the file's name, for messages.
        by_layer: whether they may differ by the type of layer. Those of full attention then count: they limit lengths.

    Raises:
        InputError: they are not an object, or differ from layer to layer.
    """
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    given = config.get(key) or {}
    if not isinstance(given, dict):
        raise InputError(f"{where}: {key} must be an object, not {brief(given)}")
    if any(isinstance(value, dict) for value in given.values()):
        full = given.get("full_attention")
        if not by_layer or not isinstance(full, dict):
            raise InputError(f"{where}: {key} differs from layer to layer, which is not modelled")
        return full
    return given


def rope_type_of(parameters: Config, where: str) -> str:
    """Return the type of rotary positions, `default` where they are not scaled.

    Raises:
        InputError: it is not a name.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if not isinstance(kind, str) or not _NAME.fullmatch(kind):
        raise InputError(f"{where}: the type of rotary positions must be a name such as linear, not {brief(kind)}")
    return kind
