"""Compiling functions with numba, and keeping the machine code on disk. Import it late: numba takes half a second.

numba looks for changes only in the file of the function whose machine code it keeps, not in those of the functions that
this one calls. So `part` marks functions that are compiled into others, and the function that others call is given the
digest of all their files as a constant (`source_digest`), which makes the key of what is kept a new one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec, Protocol, TypeAlias, TypeVar

import numba
import numpy as np
import numpy.typing as npt
from numba import carray  # type: ignore[attr-defined]
from numba.core import types
from numba.extending import intrinsic

Integers: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]


class Pointer(Protocol):
    """A pointer to whole numbers, of 64 bits unless it says otherwise. Nobody checks its bounds."""

    def __getitem__(self, index: int) -> int: ...

    def __setitem__(self, index: int, value: int) -> None: ...


class FloatPointer(Protocol):
    """A pointer to floating-point numbers of 64 bits."""

    def __getitem__(self, index: int) -> float: ...

    def __setitem__(self, index: int, value: float) -> None: ...


_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def compiled(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Compile a function when it is first called, and keep the machine code on disk where that can be written."""
    made: Callable[_Parameters, _Result]
    try:
        made = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # nowhere to keep it: each process compiles for itself
        made = numba.njit(nogil=True)(function)
    return made


def is_kept(function: Callable[..., Any]) -> bool:
    """Return whether the machine code of a `compiled` function is kept on disk."""
    stats = getattr(function, "stats", None)
    return stats is not None and stats.cache_path is not None


def part(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Compile a function into those compiled ones that call it. It divides by nothing that may be 0."""
    made: Callable[_Parameters, _Result] = numba.njit(nogil=True, error_model="numpy")(function)
    return made


def source_digest(*modules: ModuleType) -> int:
    """Return a number from 0 to 2^62 that changes with the source of any of some modules."""
    digest = hashlib.sha256()
    for module in modules:
        if module.__file__ is not None:
            digest.update(Path(module.__file__).read_bytes())
    return int.from_bytes(digest.digest()[:8], "big") >> 2


def address(array: npt.NDArray[Any]) -> int:
    """Return the address of an array. The caller keeps the array alive."""
    return int(array.ctypes.data)


def _pointer(kind: Any) -> Any:
    pointer_type: Any = types.CPointer(kind)  # type: ignore[no-untyped-call]

    def pointer(_: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return pointer_type(at), generate

    return intrinsic(pointer)


ints: Callable[[int], Pointer] = _pointer(types.int64)
"""Returns what is at an address, in compiled code."""

shorts: Callable[[int], Pointer] = _pointer(types.int32)
"""Returns the numbers of 32 bits that are at an address, in compiled code."""

bytes_at: Callable[[int], Pointer] = _pointer(types.int8)
"""Returns the numbers of 8 bits that are at an address, in compiled code."""

floats: Callable[[int], FloatPointer] = _pointer(types.float64)
"""Returns what is at an address, in compiled code."""


@part
def float_array(at: int, length: int) -> Floats:
    """Return the array that is at an address, in compiled code."""
    return carray(floats(at), (length,))  # type: ignore[call-overload, no-any-return]
