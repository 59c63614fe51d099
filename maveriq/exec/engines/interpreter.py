"""How a process of an engine runs a module of maveriq, in any interpreter from Python 3.10 on."""

from __future__ import annotations


def module_command(python: str, module: str) -> list[str]:
    """Return the command that calls `main` of a module; the current folder is not on its path.

    Python 3.10 lacks the option `-P` for this.

    Args:
        python: path of the interpreter.
        module: name of the module.
    """
    return [python, "-c", f"import sys; sys.path = [path for path in sys.path if path]; import {module} as m; m.main()"]
