"""The cause of a failure that stands only in what a worker printed, in real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from engine_fixtures import EngineCase, run_async, started_engine
from failing_worker_engine import BROKEN, OUT_OF_MEMORY

from maveriq.exec.messages import Failed


@pytest.mark.parametrize(
    ("model", "kind", "device", "message"),
    [
        ("large", "out-of-memory", "cuda:1", f"needs 2.50 GiB, 1.25 GiB free (failing_worker_engine.{OUT_OF_MEMORY})"),
        ("broken", "error", "", f"caused by {BROKEN}"),
    ],
)
def test_the_cause_of_a_failed_start_is_read_from_the_log(
    tmp_path: Path, model: str, kind: str, device: str, message: str
) -> None:
    async def scenario() -> Failed:
        case = EngineCase(backend="failing_worker_engine:FailingWorkerEngine")
        async with started_engine(case, tmp_path, load=False, model=model) as engine:
            engine.send_load()
            return await engine.receive(Failed)

    failed = run_async(scenario)
    assert (failed.kind, failed.device) == (kind, device)
    assert message in failed.message


LOG = """
import sys
from maveriq.exec.engines.worker_log import WorkerLog

print("RuntimeError: before", flush=True)
log = WorkerLog()
print(*sys.argv[1:], sep="\\n", flush=True)
print(*log.exceptions(), sep="|", file=sys.stderr, flush=True)
"""


def exceptions_in(output: Path, *printed: str) -> list[str]:
    """Return what a process whose standard output goes to a file reads from it."""
    with output.open("wb") as file:
        done = subprocess.run(
            [sys.executable, "-c", LOG, *printed], stdout=file, stderr=subprocess.PIPE, check=True, text=True
        )
    return [text for text in done.stderr.strip().split("|") if text]


def test_exceptions_are_found_behind_prefixes_and_in_order(tmp_path: Path) -> None:
    assert exceptions_in(
        tmp_path / "log",
        "INFO [a.py:1] a worker may report an Error: none so far",
        "(Worker pid=7) ERROR 11-28 [b.py:2] torch.OutOfMemoryError: CUDA out of memory. Tried: 1",
        "MemoryError",
        "  raise ValueError('not the end of a traceback')",
    ) == ["torch.OutOfMemoryError: CUDA out of memory. Tried: 1", "MemoryError"]


def test_only_the_end_of_much_output_is_read(tmp_path: Path) -> None:
    noise = "x" * 100_000
    assert exceptions_in(tmp_path / "log", "KeyError: early", noise, noise, noise, "KeyError: late") == [
        "KeyError: late"
    ]


def test_output_that_is_no_file_is_not_read() -> None:
    assert exceptions_in(Path("/dev/null"), "KeyError: lost") == []
