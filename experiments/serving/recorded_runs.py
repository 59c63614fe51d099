"""The recorded serving runs: their settings, and their requests as they were sent."""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from maveriq.domain.models import known_models

_FILES = ("req_residency_h100", "req_blis_h100")
_CLIENT_LIMITS = {"req_residency_h100": 256}  # requests that the recording client had in flight at most


@dataclass(frozen=True, slots=True, kw_only=True)
class SentRequest:
    """A request of a recorded run; times are seconds, from its sending where they measure it."""

    sent_s: float
    prompt_tokens: int
    output_tokens: int
    prompt_id: str
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
        requests: in the order in which they were sent; only those that were answered.
        max_in_flight: of the client; None for no limit.
    """

    name: str
    split: str
    model: str
    settings: dict[str, int | str]
    tp: int
    requests: tuple[SentRequest, ...]
    max_in_flight: int | None

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
                (f"{request.sent_s:.6f}", 1, request.prompt_tokens, request.output_tokens, request.prompt_id)
                for request in self.requests
            )
        return models, requests


def recorded_runs(data: Path, models: Path) -> Iterator[RecordedRun]:
    """Yield the runs of vLLM on H100 with their requests.

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
                requests=tuple(sorted(requests, key=lambda request: request.sent_s)),
                max_in_flight=_CLIENT_LIMITS.get(name),
            )


_SETTINGS = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "num_gpu_blocks")


def _requests(path: Path) -> dict[str, list[SentRequest]]:
    found: dict[str, list[SentRequest]] = {}
    with gzip.open(path, "rt", newline="") as file:
        for row in csv.DictReader(file):
            if row["ok"] != "1":
                continue
            found.setdefault(row["run_id"], []).append(
                SentRequest(
                    sent_s=float(row.get("send_s") or row["arrival_s"]),
                    prompt_tokens=int(row["input_tokens"]),
                    output_tokens=int(row["output_tokens"]),
                    prompt_id=row.get("prompt_id", ""),
                    ttft_s=float(row["ttft_s"]),
                    e2e_s=float(row["e2e_s"]),
                )
            )
    return found


def _model(repository: str, models: Path) -> str:
    """Return a model's short name where it is known by one, else the path of its configuration."""
    short = re.sub(r"-(instruct|hf)\b", "", repository.rpartition("/")[2].lower())
    return short if short in known_models() else str(models / repository.replace("/", "--") / "config.json")
