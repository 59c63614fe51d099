"""The committed comparison with AlpaServe equals the results of the code, and the page shows it."""

from pathlib import Path

import numpy as np
import pytest
from cases import Case, load_comparison
from compare import page_grids
from outcomes import Outcome, outcome_of, read_outcomes, to_csv
from page import filled
from recorded_slo import recorded_slo_csv
from recordings import read_recorded

from maveriq.errors import InputError
from maveriq.estimate.hardware_profile import load_profile
from maveriq.workload.forecast import published_forecast
from maveriq.workload.model_sets import load_model_set
from maveriq.workload.traces import embedded_trace

ROOT = Path(__file__).parents[2]
HERE = ROOT / "experiments" / "alpaserve"
RESULTS = HERE / "results"
STALE = "run experiments/alpaserve/compare.py and look at what changed"
CASES = list(load_comparison(HERE / "comparison.toml").cases())
QUICK_EVERY = 6  # `make test` takes one row in so many
AS_PUBLISHED, REPAIRED = "AlpaServe as published", "AlpaServe repaired (published table)"
DISTINGUISHABLE = ("large", "regular")


def key(outcome: Outcome) -> tuple[str, str, float, float]:
    return outcome.model_set, outcome.trace, outcome.scale, outcome.slo_scale


@pytest.fixture(scope="module")
def committed() -> list[Outcome]:
    return list(read_outcomes(RESULTS / "comparison.csv"))


def of(committed: list[Outcome], policy: str) -> dict[tuple[str, str, float, float], Outcome]:
    return {
        key(outcome): outcome
        for outcome in committed
        if outcome.policy == policy and outcome.model_set in DISTINGUISHABLE
    }


def checked(case: Case) -> bool:
    """Each policy on one workload, and a workload without a feasible placement; each takes 0.1 s."""
    workload = (case.model_set, case.trace, case.scale, case.slo_scale)
    if workload == ("twentyone", "conversation", 0.1, 7.5):
        return case.variant.name == "AlpaServe*"
    return workload in {("large", "code", 0.1, 5.0), ("regular", "code", 0.2, 2.5)}


def test_every_case_has_a_row(committed: list[Outcome]) -> None:
    wanted = [(case.model_set, case.trace, case.scale, case.slo_scale, case.variant.name) for case in CASES]
    assert [(*key(outcome), outcome.policy) for outcome in committed] == wanted, STALE


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.heavy] if at % QUICK_EVERY else [])
        for at, case in enumerate(filter(checked, CASES))
    ],
    ids=lambda case: f"{case.model_set}-{case.variant.name}",
)
def test_simulating_a_case_gives_its_row(case: Case) -> None:
    _, row = to_csv([outcome_of(case)]).splitlines()
    assert row in (RESULTS / "comparison.csv").read_text(encoding="utf-8").splitlines(), STALE


def test_simulating_a_recorded_scenario_gives_its_row() -> None:
    recorded = read_recorded(ROOT / "experiments/published/results/queue_model.csv", RESULTS / "recorded_slo.csv")
    case = next(run.case() for run in recorded if run.run == "AlpaServe_large_None_code_0.1_slo5")
    _, row = to_csv([outcome_of(case)]).splitlines()
    assert row in (RESULTS / "recorded.csv").read_text(encoding="utf-8").splitlines(), STALE


@pytest.mark.heavy
@pytest.mark.data
def test_the_recorded_slos_are_those_of_the_data(measured_data: Path) -> None:
    assert recorded_slo_csv(measured_data) == (RESULTS / "recorded_slo.csv").read_text(encoding="utf-8")


def test_the_page_shows_the_committed_results() -> None:
    page = (ROOT / "docs" / "alpaserve.md").read_text(encoding="utf-8")
    grids = page_grids(RESULTS)
    assert filled(page, grids) == page, STALE
    shown = [grid.name for grid in grids if f"<!-- table: {grid.name} -->" in page]
    sets = [
        f"{models} {what}" for models in DISTINGUISHABLE for what in ("search", "completed", "scheduled", "latency")
    ]
    assert shown == [*sets, "summary", "recorded"]


def test_a_page_with_an_unknown_marker_is_refused() -> None:
    with pytest.raises(InputError, match="no table 'unknown'"):
        filled("<!-- table: unknown -->\n<!-- end of table -->", page_grids(RESULTS))


def test_repaired_search_drops_no_model_and_expects_every_slo(committed: list[Outcome]) -> None:
    for outcome in of(committed, REPAIRED).values():
        assert (outcome.refused, outcome.expected_met) == (0, 1.0)
        assert "none" not in outcome.placement


def test_as_published_the_first_model_is_dropped(committed: list[Outcome]) -> None:
    dropped = {
        where for where, outcome in of(committed, AS_PUBLISHED).items() if outcome.placement.startswith("1:none")
    }
    assert {(models, scale) for models, _, scale, _ in dropped} == {
        ("large", 0.1), *(("regular", scale) for scale in (0.1, 0.2, 0.3, 0.4))
    }  # fmt: skip


@pytest.mark.parametrize("model_set", DISTINGUISHABLE)
@pytest.mark.parametrize("trace", ["code", "conversation"])
def test_as_published_the_search_expects_the_share_not_addressed_to_the_last_model(
    committed: list[Outcome], model_set: str, trace: str
) -> None:
    profile = load_profile("a6000-short")
    for (models, name, scale, _), outcome in of(committed, AS_PUBLISHED).items():
        if (models, name) == (model_set, trace):
            forecast = published_forecast(
                embedded_trace(trace).requests_per_minute,
                load_model_set(model_set),
                scale=scale,
                slo_s=lambda model: profile.slo_s(model, 20) or 0.0,
                name_offset=1,
            )
            assert outcome.expected_met == pytest.approx(np.mean(forecast.model_index >= 0), abs=1e-6)


def test_repaired_placements_on_large_equal_those_of_alpaserve_star(committed: list[Outcome]) -> None:
    """The recordings of AlpaServe* can therefore represent the repaired baseline."""
    star = of(committed, "AlpaServe* (published table)")
    repaired = {where: outcome for where, outcome in of(committed, REPAIRED).items() if where[0] == "large"}
    assert all(outcome.placement == star[where].placement for where, outcome in repaired.items())
    assert all("4x2" in repaired["large", trace, 0.1, 5.0].placement for trace in ("code", "conversation"))


def test_the_defect_never_lowers_attainment_over_completed_requests(committed: list[Outcome]) -> None:
    """The page states that the metric is better in 7 and 24 of 24 runs, and never worse."""
    repaired = of(committed, REPAIRED)
    better = dict.fromkeys(DISTINGUISHABLE, 0)
    for where, outcome in of(committed, AS_PUBLISHED).items():
        assert (outcome.met_of_completed or 0) >= (repaired[where].met_of_completed or 0)
        better[where[0]] += (outcome.met_of_completed or 0) > (repaired[where].met_of_completed or 0)
    assert better == {"large": 7, "regular": 24}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("scales = [0]", "scales"),
        ('colour = "red"', "colour"),
        ('[[policies]]\nname = "x"\nfloat16 = true', "float16"),
    ],
)
def test_an_invalid_comparison_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    lists = {
        "model_sets": '["large"]', "traces": '["code"]', "scales": "[0.1]", "slo_scales": "[5.0]",
        "policies": '[{name = "MaverIQ"}]',
    }  # fmt: skip
    kept = [f"{name} = {value}" for name, value in lists.items() if not text.startswith((name, f"[[{name}"))]
    path = tmp_path / "comparison.toml"
    path.write_text("\n".join([*kept, text]), encoding="utf-8")
    with pytest.raises(InputError, match=fault):
        load_comparison(path)
