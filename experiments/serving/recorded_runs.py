"""The recorded serving runs: their settings, and their requests as they were sent."""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import tomli_w

from maveriq.calibration.deployment import Deployment
from maveriq.calibration.serving_fit import RecordedRequests
from maveriq.domain.gpu_kinds import gpu_sheet
from maveriq.domain.models import WeightType, known_models, load_model
from maveriq.domain.parallel import ParallelConfig
from maveriq.domain.requests import Request
from maveriq.engine.vllm_settings import VllmSettings
from maveriq.estimate.sheet_profile import sheet_profile

_GPUS = {"H100-SXM-80GB": "H100-SXM", "H100-80GB-HBM3": "H100-SXM", "RTXPRO6000": "RTX-PRO-6000"}
_CLIENT_LIMITS = {"req_residency_h100": 256}  # requests that the recording client had in flight at most
_FILES = ("req_residency_h100", "req_blis_h100", "req_llmservingsim_rtx")
_SETTINGS = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "num_gpu_blocks")


@dataclass(frozen=True, slots=True, kw_only=True)
class SentRequest:
    """A request of a recorded run; times are seconds, from its sending where they measure it."""

    sent_s: float
    prompt_tokens: int
    output_tokens: int
    prompt_id: int
    ttft_s: float
    e2e_s: float

    @property
    def tpot_s(self) -> float:
        """Time for each token after the first."""
        return (self.e2e_s - self.ttft_s) / max(1, self.output_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """A recorded run.

    Args:
        name: its `run_id`.
        split: `fit` or `validate`.
        model: a model's short name, or the path of its config.json.
        settings: of the engine, by the names of `[models.engine]`.
        tp: GPUs.
        gpu: their kind.
        rate: requests a second that its description states, as text.
        requests: in the order in which they were sent; only those that were answered.
        max_in_flight: of the client; None for no limit.
        through_server: whether times include the way through an HTTP server; else they are the engine's own.
    """

    name: str
    split: str
    model: str
    settings: dict[str, int | str]
    tp: int
    gpu: str
    rate: str
    requests: tuple[SentRequest, ...]
    max_in_flight: int | None
    through_server: bool

    @property
    def short_name(self) -> str:
        """The name without date and source."""
        return re.sub(r"^(\d+-\d+-|residency_(sweep_)?)", "", self.name)

    @property
    def model_name(self) -> str:
        """The model's short name, or that of the folder of its config.json."""
        return Path(self.model).parent.name or self.model

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write the model set and the requests as `maveriq sim` takes them, and return the two paths."""
        engine = {"kind": "vllm", **self.settings}
        entry = {"model": self.model, "tp": self.tp, "weights": "bfloat16", "engine": engine}
        models, requests = folder / f"{self.name}.toml", folder / f"{self.name}.csv"
        models.write_text(tomli_w.dumps({"name": "recorded", "models": [entry]}))
        with requests.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("arrival_s", "endpoint", "prompt_tokens", "output_tokens", "prompt_id"))
            writer.writerows(
                (f"{request.sent_s:.6f}", 1, request.prompt_tokens, request.output_tokens, request.prompt_id or "")
                for request in self.requests
            )
        return models, requests

    def deployment(self) -> Deployment:
        """Return the deployment that served it."""
        return Deployment(
            model=load_model(self.model),
            configuration=ParallelConfig(tp=self.tp, pp=1, weights=WeightType.FLOAT16),
            settings=VllmSettings(**self.settings),  # type: ignore[arg-type]
            profile=sheet_profile(gpu_sheet(self.gpu)),
        )

    def recorded(self, *, first: int = 0, most: int | None = None, warm_up: int = 0) -> RecordedRequests:
        """Return its requests, or `most` of them from the `first` on, for a fit or a comparison.

        Args:
            first: number of the first request, from 0.
            most: number of requests; None for all.
            warm_up: so many of them are replayed and not compared.
        """
        chosen = self.requests[first : None if most is None else first + most]
        start_s = chosen[0].sent_s
        return RecordedRequests(
            name=self.name if most is None else f"{self.name} from {first}",
            group=self.model_name,
            deployment=self.deployment(),
            requests=[
                Request(
                    request_id=number, endpoint_id=1, arrival_us=round(1e6 * (request.sent_s - start_s)),
                    prompt_tokens=request.prompt_tokens, output_tokens=request.output_tokens,
                    prompt_id=request.prompt_id,
                )
                for number, request in enumerate(chosen, start=1)
            ],
            ttft_s=np.asarray([request.ttft_s for request in chosen]),
            e2e_s=np.asarray([request.e2e_s for request in chosen]),
            max_in_flight=self.max_in_flight,
            warm_up=warm_up,
        )  # fmt: skip


def recorded_runs(data: Path, models: Path) -> Iterator[RecordedRun]:
    """Yield the runs of vLLM with their requests.

    Args:
        data: the folder of measured serving data.
        models: the folder with a `config.json` for each model, for those that are not known by name.
    """
    with (data / "runs_per_request.csv").open(newline="") as file:
        described = {row["run_id"]: row for row in csv.DictReader(file)}
    for name in _FILES:
        for run_id, requests in _requests(data / f"{name}.csv.gz").items():
            row = described[run_id]
            yield RecordedRun(
                name=run_id,
                split=row["split"],
                model=_model(row["model"], models),
                settings={
                    "version": row["engine_version"].split()[0],
                    **{key: int(row[key]) for key in _SETTINGS if row[key]},
                },
                tp=int(row["tp"]),
                gpu=_GPUS[row["gpu"]],
                rate=row["rate_req_s"],
                requests=tuple(sorted(requests, key=lambda request: request.sent_s)),
                max_in_flight=_CLIENT_LIMITS.get(name),
                through_server="no HTTP" not in row["notes"],
            )


def _requests(path: Path) -> dict[str, list[SentRequest]]:
    found: dict[str, list[SentRequest]] = {}
    with gzip.open(path, "rt", newline="") as file:
        for row in csv.DictReader(file):
            if row.get("ok", "1") != "1":
                continue
            found.setdefault(row["run_id"], []).append(
                SentRequest(
                    sent_s=float(row.get("send_s") or row["arrival_s"]),
                    prompt_tokens=int(row["input_tokens"]),
                    output_tokens=int(row["output_tokens"]),
                    prompt_id=int(row["prompt_id"]) + 1 if row.get("prompt_id") else 0,
                    ttft_s=float(row["ttft_s"]),
                    e2e_s=float(row["e2e_s"]),
                )
            )
    return found


@cache
def _model(repository: str, models: Path) -> str:
    """Return a model's short name where it is known by one, else the path of its configuration."""
    short = re.sub(r"-(instruct|hf)\b", "", repository.rpartition("/")[2].lower())
    if short in known_models():
        return short
    folders = (repository.replace("/", "--"), repository.rpartition("/")[2].lower())
    return next(str(models / name / "config.json") for name in folders if (models / name / "config.json").is_file())
