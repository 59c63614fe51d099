"""Profiles that `maveriq fit` writes of one deployment: the times of its engine, and nothing else that was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from maveriq.domain.gpu_kinds import gpu_sheet
from maveriq.errors import UnknownNameError
from maveriq.estimate.engine_presets import EngineTimes, engine_presets
from maveriq.estimate.hardware_profile import HardwareProfile, known_profiles, load_profile
from maveriq.estimate.profile_file import PROFILE_NAME, planned_profile
from maveriq.estimate.sheet_profile import sheet_profile
from maveriq.files import is_folder
from maveriq.tables import read_toml

_TIMES = "engine_times"


class _FittedProfile(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    name: str
    gpu: str
    source: str = ""
    engine_times: Annotated[dict[str, EngineTimes], msgspec.Meta(min_length=1)]


def load_any_profile(name_or_path: str) -> HardwareProfile:
    """Read a hardware profile, what `maveriq fit` wrote of a deployment, or what `maveriq profile` planned.

    Raises:
        UnknownNameError: neither a known name nor a path; a file of fitted times that names an unknown GPU or preset.
        InputError: a file is missing or invalid.
    """
    path = Path(name_or_path)
    if path.suffix == ".json" or is_folder(path):
        return planned_profile(path / PROFILE_NAME if is_folder(path) else path)
    if name_or_path in known_profiles() or path.suffix != ".toml" or _TIMES not in _keys(path):
        return load_profile(name_or_path)
    read = read_toml(path, _FittedProfile, what="profile")
    for preset in read.engine_times:
        if preset not in engine_presets():
            raise UnknownNameError("engine preset", preset, engine_presets(), f"in profile {name_or_path!r}")
    return replace(sheet_profile(gpu_sheet(read.gpu)), name=read.name, engine_times=read.engine_times)


def _keys(path: Path) -> Mapping[str, Any]:
    return read_toml(path, dict[str, Any], what="profile")


def fitted_profile_toml(name: str, gpu: str, engine_times: Mapping[str, EngineTimes], *, source: str) -> str:
    """Return the text of a file that `load_any_profile` reads.

    Args:
        name: of the profile.
        gpu: the kind of GPU that the deployment ran on.
        engine_times: its times by preset.
        source: what they were fitted to.
    """
    import tomli_w

    rounded = {preset: _rounded(msgspec.to_builtins(times)) for preset, times in engine_times.items()}
    return tomli_w.dumps({"name": name, "gpu": gpu, "source": source, _TIMES: rounded})


def _rounded(times: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _rounded(value) if isinstance(value, Mapping) else float(f"{value:.4g}") for key, value in times.items()
    }
