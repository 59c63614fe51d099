"""The `maveriq` command; Ctrl-C ends it quietly even while its modules load."""

from __future__ import annotations

import sys

_INTERRUPTED = 130  # 128 + SIGINT; maveriq.cli.error_handler has it too, but is not loaded yet


def main() -> None:
    """Run the command line and exit."""
    try:
        from maveriq.cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
