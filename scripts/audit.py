"""Look up known vulnerabilities of the packages in this environment with pip-audit.

Usage: python scripts/audit.py

Exit code: 0 if every package was looked up and none has a known vulnerability, 1 if one has, 2 if packages could not be
looked up: pip-audit itself counts a package that its service does not know, or cannot be asked about, as harmless.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_COMMAND = ("pip_audit", "--local", "--skip-editable", "--format", "json", "--progress-spinner", "off")
_SHOWN = 5


def verdict(dependencies: Sequence[dict[str, Any]]) -> tuple[list[str], int]:
    """Return the lines to print and the exit code for the `dependencies` of pip-audit's report."""
    vulnerable = [dependency for dependency in dependencies if dependency.get("vulns")]
    skipped = [dependency["name"] for dependency in dependencies if _is_unknown(dependency)]
    checked = sum("vulns" in dependency for dependency in dependencies)
    lines = [
        f"{dependency['name']} {dependency['version']}: {found['id']}, fixed in {_or_none(found['fix_versions'])}"
        for dependency in vulnerable
        for found in dependency["vulns"]
    ]
    if skipped:
        names = ", ".join(skipped[:_SHOWN]) + (", ..." if len(skipped) > _SHOWN else "")
        lines.append(
            f"NOT CHECKED: {len(skipped)} packages that the vulnerability service does not answer for ({names})"
        )
    lines.append(f"{checked} packages checked, {len(vulnerable)} with known vulnerabilities")
    if vulnerable:
        return lines, 1
    return lines, 2 if skipped or not checked else 0


def _or_none(versions: Sequence[str]) -> str:
    return ", ".join(versions) or "no version"


def _is_unknown(dependency: dict[str, Any]) -> bool:
    reason = dependency.get("skip_reason", "")
    return bool(reason) and "editable" not in reason  # maveriq itself is installed from this folder


def main() -> int:
    """Run pip-audit, print the verdict, and return the exit code."""
    ended = subprocess.run([sys.executable, "-m", *_COMMAND], capture_output=True, text=True, check=False)  # noqa: S603
    try:
        dependencies = json.loads(ended.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = next(reversed(ended.stderr.strip().splitlines()), "it printed nothing")
        print(f"NOT CHECKED: pip-audit cannot reach its vulnerability service, or failed: {last[:300]}")
        return 2
    lines, code = verdict(dependencies)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
