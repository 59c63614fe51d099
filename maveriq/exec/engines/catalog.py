"""Engines by the name of their backend; what one needs is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import cast

from maveriq.errors import UnknownNameError
from maveriq.exec.engines.base import Engine

BACKENDS = {
    "emulated": "maveriq.exec.engines.emulated:EmulatedEngine",
    "torch": "maveriq.exec.engines.torch:TorchEngine",
    "vllm": "maveriq.exec.engines.vllm:VllmEngine",
    "trtllm": "maveriq.exec.engines.trtllm:TrtLlmEngine",
}
"""Where each backend's engine is."""


def make_engine(backend: str) -> Engine:
    """Return a new engine.

    Args:
        backend: a name of `BACKENDS`, or where a class of your own is: `module:Class`.

    Raises:
        UnknownNameError: no such backend.
        ImportError: it needs what is not installed.
    """
    place = BACKENDS.get(backend, backend)
    module, colon, name = place.partition(":")
    if not colon:
        raise UnknownNameError("backend", backend, BACKENDS, "or MODULE:CLASS")
    return cast(Callable[[], Engine], getattr(import_module(module), name))()
