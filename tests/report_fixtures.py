"""Pages of reports for tests: runs of two models, sweeps and sizings without a simulation, and a parser of HTML."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from record_fixtures import deployment, run_record, single_server

from maveriq.domain.records import GpuSample, RunRecord
from maveriq.report.metrics import summarise
from maveriq.report.page.run_page import RunResults
from maveriq.report.saturation import assess_saturation
from maveriq.sweeps.folder import open_folder
from maveriq.sweeps.run import SweepResult, load_sweep
from maveriq.sweeps.spec import SweepSpec, cells_of, read_sweep
from maveriq.sweeps.worker import CellResult
from maveriq.units import bytes_from_gib, micros

HOSTILE = "</script><img src=x onerror=alert(1)>'\"&{{ 7*7 }}"


class Parsed(HTMLParser):
    """The elements of a page, its texts by element, and the texts of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.texts.append((self._open[-1] if self._open else "", data))

    @property
    def text(self) -> str:
        return " ".join(data for _, data in self.texts)


def results(record: RunRecord, *, name: str = "mine", **limits: float) -> RunResults:
    return RunResults(
        name=name,
        record=record,
        summary=summarise(record, **limits),
        saturation=assess_saturation(record),
        meta={"kind": "simulated", "workload": "poisson", "notes": [name], "options": {"policy": "llf", "note": name}},
    )


def queue_of_two_models(names: tuple[str, str] = ("tiny", "big"), *, requests: int = 600) -> RunRecord:
    random = np.random.default_rng(1)
    record = single_server(random.exponential(1.0, requests), random.exponential(0.8, requests))
    at = np.arange(requests) % 2 + 1
    columns = replace(record.requests, endpoint_id=at, deployment_id=at, slo_us=np.full(requests, micros(2.0)))
    samples = [
        GpuSample(time_us=micros(10.0 * k), gpu_id=gpu, memory_bytes=bytes_from_gib(3.0 + gpu), busy_share=0.25 * gpu)
        for k in range(1, 40)
        for gpu in range(3)
    ]
    return run_record(
        columns,
        deployments=[
            deployment(1, model=names[0]),
            deployment(2, model=names[1], endpoint_id=2, gpu_ids=(2,), note=names[1]),
        ],
        gpu_samples=samples,
        models=dict(enumerate(names, start=1)),
        ended_us=record.ended_us,
    )


def run_of(name: str, seed: int, *, load: float = 0.5) -> RunResults:
    random = np.random.default_rng(seed)
    queue = single_server(random.exponential(1.0, 200), random.exponential(load, 200))
    return results(run_record(queue.requests, ended_us=queue.ended_us), name=name)


def finished_sweep(folder: Path, *, grid: dict[str, Any], fail: int = 0) -> SweepResult:
    """Write the folder of a sweep without simulating; the latency of a run is 10 times its scale, plus its seed."""
    spec = read_sweep({"name": HOSTILE, "grid": grid})
    with open_folder(folder, spec, overwrite=False) as opened:
        for number in range(1, 1 + int(np.prod([len(values) for values in grid.values()]))):
            opened.add(_cell(number, spec, failed=number == fail))
    return load_sweep(folder)


def _cell(number: int, spec: SweepSpec, *, failed: bool) -> CellResult:
    factors = cells_of(spec)[number - 1].factors
    latency_s = 10.0 * float(factors.get("scale", 0.1)) + 0.01 * int(factors.get("seed", 0))
    if failed:
        return CellResult(number=number, error=HOSTILE)
    row = {"requests": 10.0, "completed": 10.0, "latency_mean_s": latency_s, "slo_attainment": None}
    return CellResult(number=number, saturation="stable", rows={"all": row, "tiny": row})


def size(gpus: int, attainment: float, **more: Any) -> dict[str, Any]:
    return {
        "gpus": gpus,
        "attainment": attainment,
        "attainment_ci95": 0.01,
        "seeds": 3,
        "verdict": "meets",
        "saturation": "stable",
        "deployments": [f"{HOSTILE}: TP 1 on 1 GPU"],
        "bottlenecks": [],
        "ttft_p95_s": 0.2,
        "unknown_to_this_version": 1,
        **more,
    }


def sizing(**kind: Any) -> dict[str, Any]:
    found = {
        "gpu": "H100-SXM",
        "gpus": 5,
        "gpus_low": 4,
        "gpus_high": 6,
        "usd_per_hour": 14.95,
        "gpus_if_10_percent_slower": 7,
        "simulations": 18,
        "sizes": [size(4, 0.926), size(5, 0.983), size(6, 0.9915)],
        **kind,
    }
    return {"attainment_target": 0.98, "cheapest": "H100-SXM", "kinds": [found]}
