"""Where the `maveriq` command starts: Ctrl-C while its modules are read ends it as quietly as later on."""

from __future__ import annotations

import sys

_INTERRUPTED = 130  # as in maveriq.cli.ending, which is not read yet


def main() -> None:
    """Run the command line."""
    try:
        from maveriq.cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    run()
