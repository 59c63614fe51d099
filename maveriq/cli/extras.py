"""Parts of maveriq that need packages which a plain installation does not have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from maveriq.errors import InputError


@contextlib.contextmanager
def extra(name: str, *, for_whom: str) -> Iterator[None]:
    """Turn a missing package into the command that installs it.

    Raises:
        InputError: a package that is imported within is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "maveriq":
            raise  # a bug, not a package to install
        raise InputError(
            f"{for_whom} needs the package {error.name}; install it with pip install 'maveriq[{name}]'"
        ) from None
