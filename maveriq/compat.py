"""What Python 3.11 added to the standard library and the modules of an engine's process need on Python 3.10.

maveriq itself needs Python 3.11. The engine's process runs in the interpreter of its engine (docs/decisions/0014).
"""

import sys

if sys.version_info >= (3, 11):
    from enum import StrEnum
else:
    from enum import Enum

    class StrEnum(str, Enum):
        """An enumeration of texts; each member is printed as its value."""

        __str__ = str.__str__


__all__ = ["StrEnum"]
