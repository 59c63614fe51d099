"""What engines say, made fit for a line in records."""

_LONGEST = 300


def one_line(text: str) -> str:
    """Return a text on one line, shortened where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
