"""How near simulations of recorded serving runs come: what docs/continuous-batching.md states, with a small margin."""

from pathlib import Path

import numpy as np
import pytest
from recorded_runs import RecordedRun, recorded_runs

pytestmark = [pytest.mark.data, pytest.mark.heavy]
REQUESTS, WARM_UP = 500, 150


@pytest.fixture(scope="module")
def runs(measured_data: Path) -> dict[str, RecordedRun]:
    return {run.short_name: run for run in recorded_runs(measured_data / "serving", measured_data / "models")}


@pytest.mark.parametrize(
    ("name", "percent"),
    [
        ("rate_agg_2rps_patched", 4),
        ("rate_agg_8rps_patched", 4),
        ("llama-2-7b-tp1-roleplay", 4),
        ("llama-2-70b-tp4-roleplay", 6),
        ("mixtral-8x7b-v0-1-tp2-roleplay", 7),
        ("codellama-34b-tp2-roleplay", 5),
    ],
)
def test_runs_that_nothing_was_fitted_to(runs: dict[str, RecordedRun], name: str, percent: float) -> None:
    run = runs[name]
    assert run.split == "validate"
    recorded = run.recorded(first=1000 if run.requests[0].prompt_id else 0, most=REQUESTS)
    found = recorded.deployment.replay(recorded.requests, max_in_flight=run.max_in_flight)
    counted = slice(WARM_UP, REQUESTS)
    outputs = np.asarray([request.output_tokens for request in recorded.requests])[counted]
    tpot_s = [(e2e - ttft)[counted] / (outputs - 1) for e2e, ttft in (
        (found.e2e_s, found.ttft_s), (recorded.e2e_s, recorded.ttft_s)
    )]  # fmt: skip
    figures = {
        "TTFT p50": (np.median(found.ttft_s[counted]), np.median(recorded.ttft_s[counted])),
        "TPOT mean": (tpot_s[0].mean(), tpot_s[1].mean()),
        "E2E mean": (found.e2e_s[counted].mean(), recorded.e2e_s[counted].mean()),
    }
    off = {figure: 100 * (simulated / measured - 1) for figure, (simulated, measured) in figures.items()}
    assert {figure: error for figure, error in off.items() if abs(error) > percent} == {}
