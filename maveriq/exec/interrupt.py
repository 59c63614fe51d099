"""Ctrl-C, SIGTERM and SIGHUP during a run: they end it early and in order, so that its records are written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that ask a process to stop.

    SIGHUP, which a closed terminal sends, is one unless it is ignored, as under nohup.
    """
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM, *(() if ignored else (signal.SIGHUP,)))


@contextmanager
def stop_signals_deferred() -> Iterator[None]:
    """Handle the signals that ask the process to stop at the end of the block, and not within it.

    A process that is started in the block is thus known when an interrupt is raised. It inherits no blocked signals.
    Outside the main thread, where no handler runs, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    previous = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for late in arrived:
            signal.raise_signal(late)


class InterruptHandler:
    """Records the signals that ask the process to stop, which then do not end the process. Enter it in the main thread.

    A second Ctrl-C, while engines stop or records are written, is only recorded again and loses nothing.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._callback: Callable[[], object] = lambda: None

    def __enter__(self) -> Self:
        self._previous_handlers = {number: signal.signal(number, self._on_signal) for number in stop_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.interrupted = True
        self._callback()

    @contextmanager
    def calling(self, callback: Callable[[], object]) -> Iterator[None]:
        """Call `callback` on each signal, and at once if one has arrived before.

        It runs in the main thread, in the signal handler.
        """
        self._callback = callback
        if self.interrupted:
            callback()
        try:
            yield
        finally:
            self._callback = lambda: None
