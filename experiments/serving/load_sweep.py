"""The load sweep: one deployment of Llama-3.1-8B under sixteen shapes of requests, each at up to ten loads.

Only percentiles and means of each point were published. A point is replayed with lengths as its load generator drew
them, uniform between half and one and a half times their means, and with the means that were recorded.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from maveriq.calibration.deployment import Deployment
from maveriq.domain.gpu_kinds import gpu_sheet
from maveriq.domain.models import WeightType, load_model
from maveriq.domain.parallel import ParallelConfig
from maveriq.domain.requests import Request
from maveriq.engine.vllm_settings import VllmSettings
from maveriq.estimate.engine_presets import EngineTimes
from maveriq.estimate.sheet_profile import sheet_profile

_CLIENTS = 512
_STABLE_SHARE = 0.9  # of the requests that were sent, or of those asked for, that must have been answered
_SEED = 20251021
_LATENCIES, _MORE_S, _WARM_UP_LATENCIES, _MOST = 6, 20.0, 2, 4000

# Not recorded: a version of October 2025, as many sequences as its authors analyse with, blocks as predicted.
_ENGINE = VllmSettings(version="0.11.0", max_num_seqs=_CLIENTS, max_num_batched_tokens=8192, max_model_len=16_384)


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepPoint:
    """One shape at one load.

    Args:
        shape: its label, `exp1` and so on.
        split: `fit` or `validate`.
        prompt_tokens: nominal.
        output_tokens: nominal.
        mean_prompt: tokens, as it was measured.
        mean_output: the same of outputs.
        rate: requests a second, evenly spaced; None for a closed loop.
        clients: requests in flight at most.
        duration_s: time in which requests were sent; those that had not ended then do not count.
        sent: requests that were sent.
        answered_rps: answers a second.
        in_flight: requests in flight, the mean that was measured.
        measured: medians, s.
    """

    shape: str
    split: str
    prompt_tokens: int
    output_tokens: int
    mean_prompt: float
    mean_output: float
    rate: float | None
    clients: int
    duration_s: float
    sent: int
    answered_rps: float
    in_flight: float
    measured: Mapping[str, float]

    @property
    def name(self) -> str:
        """Shape and load."""
        load = f"{self.clients} clients" if self.rate is None else f"{self.rate:g}/s"
        return f"{self.prompt_tokens}x{self.output_tokens} at {load}"

    @property
    def group(self) -> str:
        """The shape: there is one model."""
        return self.shape

    @property
    def is_stable(self) -> bool:
        """Whether the engine kept up: closed loops never do more than they can."""
        asked, answered = (rate * self.duration_s for rate in (self.rate or 0.0, self.answered_rps))
        return self.rate is None or keeps_up(asked, answered, self.in_flight)

    @property
    def _number(self) -> int:
        return min(_MOST, self.sent if self.rate is None else int(self.rate * self.replayed_s))

    @property
    def replayed_s(self) -> float:
        """The time in which a replay sends requests: several times as long as one takes, at most as measured."""
        enough_s = _LATENCIES * self.measured["E2E"] + _MORE_S
        if self.rate is None:
            return self.duration_s
        return min(self.duration_s, enough_s, _MOST / self.rate)

    @property
    def warm_up_s(self) -> float:
        """The time until as many requests are in flight as later; it hardly counts in what was measured."""
        return _WARM_UP_LATENCIES * self.measured["E2E"] if self.replayed_s < self.duration_s else 0.0

    @cached_property
    def requests(self) -> list[Request]:
        """The requests that the load generator would have sent."""
        number = self._number
        random = np.random.default_rng([_SEED, self.prompt_tokens, self.output_tokens, number])
        prompts, outputs = (
            np.rint(mean * random.permutation(np.linspace(0.5, 1.5, number) if number > 1 else np.ones(1)))
            for mean in (self.mean_prompt, self.mean_output)
        )
        every_us = 0.0 if self.rate is None else 1e6 / self.rate
        return [
            Request(
                request_id=index + 1, endpoint_id=1, arrival_us=round(index * every_us), prompt_tokens=int(prompt),
                output_tokens=int(output),
            )
            for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
        ]  # fmt: skip

    def replayed(self, times: EngineTimes) -> dict[str, float]:
        """Return the medians of a replay."""
        return self.replay(times).medians

    def replay(self, times: EngineTimes) -> ReplayedPoint:
        """Return a replay under an engine's times."""
        found = deployment().replay(self.requests, times, max_in_flight=self.clients)
        return ReplayedPoint(self, np.asarray(found.sent_us), found.ttft_s, found.e2e_s)


@dataclass(frozen=True)
class ReplayedPoint:
    """The replay of a point, of which those requests count that ended in time."""

    point: SweepPoint
    sent_us: Any
    ttft_s: Any
    e2e_s: Any

    @cached_property
    def _answered(self) -> Any:
        sent_s = self.sent_us / 1e6
        return (sent_s >= self.point.warm_up_s) & (sent_s + self.e2e_s <= self.point.replayed_s)

    @cached_property
    def medians(self) -> dict[str, float]:
        """TTFT, ITL and E2E in seconds."""
        answered = self._answered if self._answered.any() else np.ones_like(self._answered)
        outputs = np.asarray([request.output_tokens for request in self.point.requests])[answered]
        ttft_s, e2e_s = self.ttft_s[answered], self.e2e_s[answered]
        return {
            "TTFT": float(np.median(ttft_s)),
            "ITL": float(np.median((e2e_s - ttft_s) / np.maximum(outputs - 1, 1))),
            "E2E": float(np.median(e2e_s)),
        }

    @cached_property
    def in_flight(self) -> float:
        """Requests in flight, a mean over the time that counts."""
        start_s, end_s = self.point.warm_up_s, self.point.replayed_s
        sent_s = self.sent_us / 1e6
        within = np.clip(sent_s + self.e2e_s, start_s, end_s) - np.clip(sent_s, start_s, end_s)
        return float(within.sum() / (end_s - start_s))

    @property
    def is_stable(self) -> bool:
        """Whether the engine kept up."""
        rate, counted_s = self.point.rate, self.point.replayed_s - self.point.warm_up_s
        return rate is None or keeps_up(rate * counted_s, float(self._answered.sum()), self.in_flight)


def keeps_up(asked: float, answered: float, in_flight: float) -> bool:
    """Return whether an engine keeps up with an open loop: what it has not answered is what it works on, and no more.

    Args:
        asked: requests that the loop should have sent.
        answered: those that ended in its time.
        in_flight: requests in flight in the mean. In a backlog that grows evenly, twice as many are left at the end.
    """
    return asked - answered <= max(1.5 * in_flight, 0.02 * asked) and in_flight < _STABLE_SHARE * _CLIENTS


def deployment() -> Deployment:
    """Return the deployment that was measured."""
    return Deployment(
        model=load_model("llama-3.1-8b"),
        configuration=ParallelConfig(tp=1, pp=1, weights=WeightType.FLOAT16),
        settings=_ENGINE,
        profile=sheet_profile(gpu_sheet("H100-SXM")),
    )


def sweep_points(data: Path) -> Iterator[SweepPoint]:
    """Yield the points of the sweep.

    Args:
        data: the folder of measured serving data.
    """
    with (data / "load_sweep_guidellm_h100.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            rate = float(row["target_rate"]) if row["target_rate"] else None
            yield SweepPoint(
                shape=row["exp"],
                split=row["split"],
                prompt_tokens=int(row["isl_nominal"]),
                output_tokens=int(row["osl_nominal"]),
                mean_prompt=float(row["input_tokens_mean"]),
                mean_output=float(row["output_tokens_mean"]),
                rate=rate,
                clients=1 if row["strategy"] == "synchronous" else _CLIENTS,
                duration_s=float(row["duration_s"]),
                sent=int(row["n_ok"]) + int(row["n_incomplete"]),
                answered_rps=float(row["achieved_req_s"]),
                in_flight=float(row["concurrency_mean"]),
                measured={
                    name: float(row[column]) / 1e3
                    for name, column in (("TTFT", "ttft_p50_ms"), ("ITL", "itl_p50_ms"), ("E2E", "e2e_p50_ms"))
                },
            )
