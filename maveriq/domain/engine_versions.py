"""Versions of engines. The process of an engine does not import this module: it may run without `packaging`."""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

from maveriq.errors import InputError

_MAX_LENGTH = 100


def release_numbers(version: str) -> tuple[int, ...] | None:
    """Return the numbers of a version such as `0.23.0`, `v0.15.1` or `1.2.0rc6.post3`; None if it is not a version.

    Zeros at the end are left out, so that 1, 1.0 and 1.0.0 are equal. A release candidate has its release's numbers.
    """
    if len(version) > _MAX_LENGTH:
        return None
    try:
        numbers = list(Version(version).release)
    except InvalidVersion:
        return None
    while len(numbers) > 1 and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def release_of(version: str) -> tuple[int, ...]:
    """Return the numbers of an engine's version, as `release_numbers`.

    Raises:
        InputError: it is not a version.
    """
    release = release_numbers(version)
    if release is None:
        raise InputError(f"engine version {version!r} is not a version; write it as 0.23.0")
    return release
