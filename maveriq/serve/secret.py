"""The token: out of a file or the environment, never off a command line, where others could read it."""

from __future__ import annotations

import os
from pathlib import Path

from maveriq.errors import InputError
from maveriq.tables import read_text

TOKEN_VARIABLE = "MAVERIQ_TOKEN"  # noqa: S105  (its name, not its value)


def read_token(file: Path | None) -> str | None:
    """Return the token of a file, else that of the environment, else None.

    Raises:
        InputError: the file cannot be read or is empty, or the token cannot be sent in a header.
    """
    where = f"environment variable {TOKEN_VARIABLE}" if file is None else f"token file {str(file)!r}"
    said = os.environ.get(TOKEN_VARIABLE, "") if file is None else read_text(file, what="token file")
    token = said.strip()
    if not token:
        if file is None:
            return None
        raise InputError(f"{where} is empty; write the token into it")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise InputError(f"{where}: a token is one word of printable ASCII characters")
    return token
