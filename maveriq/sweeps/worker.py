"""A process that simulates cells: it reads a line of JSON for each from stdin, and writes one to stdout.

`python -m maveriq.sweeps.worker` starts it. It ends when stdin does, even in the middle of a cell: nobody waits for it.
"""

from __future__ import annotations

import math
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from maveriq.domain.records import DeploymentRecord
from maveriq.errors import InputError, MaveriqError


class CellTask(msgspec.Struct, frozen=True, kw_only=True):
    """A cell to simulate; `folder` is where its records go, "" for nowhere."""

    number: int
    options: dict[str, Any]
    folder: str = ""


class CellResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a cell.

    `error` is "" if it was simulated, else why it was not, in one line. `rows` are the metrics of the whole run ("all")
    and of each model, see `Run.metrics`; a figure that does not apply is None. `saturation` is the verdict on the run,
    `bottlenecks` are sentences on what held it back. `deployments` say which configuration of which model was on how
    many GPUs, or why it was on none. `seconds` is how long it took.
    """

    number: int
    error: str = ""
    saturation: str = ""
    bottlenecks: list[str] = []
    deployments: list[str] = []
    rows: dict[str, dict[str, float | None]] = {}
    seconds: float = 0.0


def simulate_cell(task: CellTask) -> CellResult:
    """Simulate a cell. What goes wrong with it is in the result: the other cells go on."""
    from maveriq.api import simulate

    started_s = time.monotonic()
    try:
        run = simulate(**task.options)
        rows = _rows(run.metrics)
        rows["all"]["gpus_used"] = float(len(_gpus_with_models(run.record.deployments)))
        if task.folder:
            run.save(Path(task.folder), overwrite=True)
    except (InputError, MaveriqError, MemoryError, OSError) as error:
        return _failed(task, str(error) or "not enough memory", started_s)
    except Exception as error:  # a bug ends this cell alone, and is named
        return _failed(task, f"bug in maveriq: {type(error).__name__}: {error}", started_s)
    return CellResult(
        number=task.number,
        saturation=run.saturation.label.value,
        bottlenecks=list(run.saturation.bottlenecks.sentences()),
        deployments=[_deployment(record) for record in run.record.deployments],
        rows=rows,
        seconds=time.monotonic() - started_s,
    )


def _gpus_with_models(records: Sequence[DeploymentRecord]) -> set[int]:
    return {gpu_id for record in records if record.plan is not None for gpu_id in record.plan.gpu_ids}


def _deployment(record: DeploymentRecord) -> str:
    name, plan = record.endpoint.model.name, record.plan
    if plan is None:
        return f"{name}: {record.reason or record.status}"
    return f"{name}: {plan.configuration} on {len(plan.gpu_ids)} GPU{'s' * (len(plan.gpu_ids) > 1)}"


def _failed(task: CellTask, reason: str, started_s: float) -> CellResult:
    line = " ".join(reason.split())
    return CellResult(number=task.number, error=line[:1_000], seconds=time.monotonic() - started_s)


def _rows(metrics: Any) -> dict[str, dict[str, float | None]]:
    """Return a frame of metrics by row and column; NaN, which JSON lacks, becomes None."""
    table: Mapping[str, Mapping[str, float]] = metrics.T.to_dict()
    return {
        str(name): {column: None if math.isnan(value) else float(value) for column, value in row.items()}
        for name, row in table.items()
    }


def main() -> None:
    """Simulate the cells of stdin until it ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints must not mix with the answers
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    while True:
        result = simulate_cell(msgspec.json.decode(lines.get(), type=CellTask))
        answers.write(msgspec.json.encode(result) + b"\n")
        answers.flush()


def _read(lines: queue.SimpleQueue[bytes]) -> None:
    """Pass lines of stdin on, and end the process with stdin.

    A sweep that was killed leaves its workers behind. One of them that went on could write the run of its cell while
    the next start of the sweep writes it, too.
    """
    for line in sys.stdin.buffer:
        lines.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
