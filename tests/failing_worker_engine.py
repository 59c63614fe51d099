"""An external engine whose worker, a process of its own, fails to start; its exception stands in the log alone."""

from __future__ import annotations

import logging
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path

from maveriq.exec.engines.engine import Step
from maveriq.exec.engines.external import ExternalEngine
from maveriq.exec.messages import EngineSpec, Loaded, PromptSequence

OUT_OF_MEMORY = (
    "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB. "
    "GPU 1 has a total capacity of 47.41 GiB of which 1.25 GiB is free."
)
BROKEN = "ValueError: no layer 7"


class OutOfMemoryError(RuntimeError):
    """As torch's."""


def _start(model: str) -> None:
    if model == "large":
        raise OutOfMemoryError(OUT_OF_MEMORY.partition(": ")[2])
    raise ValueError(BROKEN.partition(": ")[2])


def fail_to_start(model: str) -> None:
    """Log a failure as workers of vLLM do: each line of the traceback has the logger's prefix."""

    class Prefixed(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            prefix = f"(Worker_TP1 pid=1) ERROR 11-28 01:00:00 [{record.filename}:{record.lineno}] "
            return "\n".join(prefix + line for line in super().format(record).splitlines())

    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(Prefixed())
    logger = logging.getLogger("worker")
    logger.addHandler(handler)
    try:
        _start(model)
    except Exception:
        logger.exception("WorkerProc failed to start.")
    sys.exit(1)


class FailingWorkerEngine(ExternalEngine):
    """Starts a worker, which fails, and says only that it did."""

    name = "vllm"

    def _load(self, spec: EngineSpec, folder: Path) -> Loaded:
        worker = multiprocessing.get_context("spawn").Process(target=fail_to_start, args=(spec.model,))
        worker.start()
        worker.join()
        raise RuntimeError("WorkerProc initialization failed due to an exception in a background process.") from None

    def _steps(self, sequences: tuple[PromptSequence, ...]) -> Iterator[Step]:
        raise NotImplementedError

    def _shut_down(self) -> None:
        pass
