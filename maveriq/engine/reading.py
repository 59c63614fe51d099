"""Reads the settings of an engine from what a user wrote: a table of arguments, a command line, or a name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import msgspec

from maveriq.engine.other_settings import ExclusiveSettings, SglangSettings, TrtllmSettings
from maveriq.engine.vllm_command import read_vllm_command
from maveriq.engine.vllm_settings import VllmSettings
from maveriq.errors import InputError, UnknownNameError
from maveriq.tables import readable_error

EngineSettings: TypeAlias = VllmSettings | TrtllmSettings | SglangSettings | ExclusiveSettings
"""The settings of an engine of any kind; `kind` tells them apart in a table."""

_KINDS: dict[str, type[EngineSettings]] = {
    "vllm": VllmSettings,
    "trtllm": TrtllmSettings,
    "sglang": SglangSettings,
    "exclusive": ExclusiveSettings,
}


def read_engine_settings(value: Mapping[str, Any] | str, *, where: str = "engine") -> EngineSettings:
    """Return the settings that a user wrote.

    Args:
        value: a table `kind = "vllm", max_num_seqs = 64`, whose kind may be left out for vLLM; a kind; a kind and a
            version, `vllm-0.15.1`; or a command line of vLLM.
        where: what to call it in messages.

    Raises:
        InputError: an unknown kind, argument or value.
    """
    if isinstance(value, str):
        return _from_text(value)
    kind = value.get("kind", "vllm")
    if kind not in _KINDS:
        raise UnknownNameError("kind of engine", str(kind), _KINDS)
    try:
        return msgspec.convert({"kind": kind, **value}, _KINDS[kind])
    except msgspec.ValidationError as error:
        raise InputError(f"{where}: {readable_error(str(error), _KINDS[kind])}") from None


def _from_text(text: str) -> EngineSettings:
    if len(text.split()) > 1:
        return read_vllm_command(text).settings
    kind, _, version = text.strip().partition("-")
    if kind not in _KINDS:
        raise UnknownNameError("kind of engine", kind, _KINDS)
    return read_engine_settings({"kind": kind, "version": version} if version else {"kind": kind})
