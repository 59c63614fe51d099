"""Reports what an interpreter can import: `python -m maveriq.exec.engines.probe PACKAGE...` prints a line of JSON.

It runs before an engine starts (`maveriq.exec.engine_python`), in the interpreter of the engine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from importlib import import_module, metadata


def installed_version(package: str) -> str | None:
    """Return the version of the distribution that provides a package; None if it is not installed."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        names = metadata.packages_distributions().get(package, [])
        return next((f"{metadata.version(name)} ({name})" for name in names), "version unknown")


def main() -> None:
    """Import each package that the arguments name, and print the versions, and the errors of those that fail."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what packages print when they are imported is no part of the answer
    versions, errors = {}, {}
    for package in sys.argv[1:]:
        try:
            import_module(package)
        except BaseException as error:
            errors[package] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            versions[package] = installed_version(package)
    with answer:
        json.dump({"versions": versions, "errors": errors}, answer)
    os._exit(0)  # a package may have started threads


if __name__ == "__main__":
    main()
