"""Analyses of studies, on runs whose answer is known."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maveriq.calibration.exponent_descent import START, Point, Points, descend
from maveriq.calibration.measurements import Measurement
from maveriq.domain.models import KvType, WeightType, load_model
from maveriq.domain.parallel import ParallelConfig, even_split
from maveriq.estimate.fingerprints import Exponents, Line, ParallelLatency
from maveriq.study.analyses import ANALYSES
from maveriq.study.predictions import Predictions
from maveriq.study.result import StudyResult

NONE = Predictions(exponents={}, by_name={}, accuracy_percent=lambda model, weights, kv: None)
INT4 = WeightType.INT4


def run(
    tp: int = 1,
    pp: int = 1,
    *,
    layers: int = 32,
    batch: int = 1,
    weights: WeightType = WeightType.FLOAT16,
    kv: KvType = KvType.NATIVE,
    **changed: object,
) -> Measurement:
    made = Measurement(
        where="",
        model_name="llama-2-7b",
        layers=layers,
        configuration=ParallelConfig(tp=tp, pp=pp, weights=weights, kv=kv, batch_size=batch),
        output_tokens=100,
        latency_s=1.0,
        memory_gib=1.0,
        prompt_tokens=10,
        layer_split=even_split(layers, pp),
    )
    return replace(made, **changed)


def analysed(name: str, *, predictions: Predictions = NONE, **parts: Sequence[Measurement]) -> StudyResult:
    return ANALYSES[name].run(parts, predictions, ANALYSES[name].options)


def cells(result: StudyResult, *columns: str) -> list[tuple[object, ...]]:
    places = [result.table.columns.index(column) for column in columns]
    return [tuple(row[place] for place in places) for row in result.table.rows]


def test_a_batch_is_compared_with_one_request_of_the_same_engine() -> None:
    runs = [run(batch=batch, tp=tp, latency_s=tp * (1 + 0.1 * (batch - 1))) for tp, batch in product((1, 2), (1, 11))]
    result = analysed("batch-scaling", batched=runs)
    assert cells(result, "tp", "batch", "latency_ratio", "tokens_per_s_ratio") == [
        (1, 1, 1.0, 1.0), (1, 11, 2.0, 5.5), (2, 1, 1.0, 1.0), (2, 11, 2.0, 5.5)
    ]  # fmt: skip


def test_a_batch_without_a_single_request_is_left_out() -> None:
    assert analysed("batch-scaling", batched=[run(batch=8)]).table.rows == ()


def test_a_line_through_two_layer_counts_is_exact_where_layers_are_alike() -> None:
    runs = [run(layers=n, latency_s=0.5 + 0.1 * n, memory_gib=2.0 + n) for n in (1, 2, 4, 32)]
    result = analysed("layer-scaling", layers=runs)
    assert list(result.figures.values()) == pytest.approx([0, 0], abs=1e-9)
    assert cells(result, "layers", "from_layers") == [(1, ""), (2, "1 2"), (4, "2 4"), (32, "")]


def test_a_line_that_misses_says_by_how_much() -> None:
    runs = [run(layers=1, latency_s=1.0), run(layers=2, latency_s=2.0), run(layers=4, latency_s=8.0)]
    assert analysed("layer-scaling", layers=runs).table.rows[1][-2] == -50.0


def test_an_uneven_split_is_compared_with_the_even_one() -> None:
    runs = [run(pp=2), run(pp=2, layer_split=(8, 24), latency_s=1.5, memory_gib=2.0)]
    result = analysed("uneven-splits", splits=runs)
    assert cells(result, "largest_stage", "latency_ratio", "memory_ratio") == [(1.0, 1.0, 1.0), (1.5, 1.5, 2.0)]
    assert result.figures["latency-change-worst"] == pytest.approx(50)


def test_quantised_runs_are_compared_on_the_same_gpus_only() -> None:
    runs = [run(), run(weights=INT4, latency_s=0.25), run(2, 1, weights=INT4)]
    result = analysed("quantisation", full_models=runs)
    assert cells(result, "tp", "weights", "latency_ratio") == [(1, "int4", 0.25)]


def test_a_pruned_model_is_compared_with_its_base() -> None:
    pruned = run(model_name="llama-2-7b-wanda24", latency_s=0.9)
    result = analysed("pruning", pruned=[pruned, replace(pruned, latency_s=1.1)], full_models=[run()])
    assert cells(result, "model", "pruned", "latency_ratio") == [("llama-2-7b", "wanda24", 1.0)]


def test_speedup_is_over_the_fewest_gpus() -> None:
    runs = [run(2, 2, latency_s=2.0), run(4, 2, latency_s=1.0)]
    assert cells(analysed("parallelism", full_models=runs), "gpus", "speedup", "efficiency") == [
        (4, 1.0, 1.0), (8, 2.0, 1.0)
    ]  # fmt: skip


EXPONENTS = Exponents(a=0.05, b=0.69, c=0.19, d=0.57)


def points(exponents: Exponents) -> list[Point]:
    found = []
    for tp, pp in product((1, 2, 4, 8), (1, 2, 3, 8)):
        single, tp2 = Line(ttft_s=2.0, tpot_s=0.0), Line(ttft_s=1.4, tpot_s=0.0)
        latency_s = ParallelLatency.scaled(single, tp2, exponents, tp=tp, pp=pp).at(1)
        found.append(Point(tp=tp, pp=pp, single_s=2.0, beyond_half_s=0.4, latency_s=latency_s))
    return found


EXPONENT = st.floats(0.01, 2.0)


@given(EXPONENT, EXPONENT, EXPONENT, EXPONENT)
def test_the_formula_of_the_descent_is_that_of_the_estimator(a: float, b: float, c: float, d: float) -> None:
    made = points(Exponents(a=a, b=b, c=c, d=d))
    measured = [point.latency_s for point in made]
    assert Points(made).latency_s(np.array([a, b, c, d])) == pytest.approx(measured, rel=1e-9)


@given(EXPONENT, EXPONENT, EXPONENT, EXPONENT)
def test_the_gradient_is_that_of_the_error(a: float, b: float, c: float, d: float) -> None:
    table, position, step = Points(points(Exponents(a=2.5, b=2.5, c=2.5, d=2.5))), np.array([a, b, c, d]), 1e-6
    differences = [
        (table.mean_error(position + step * axis) - table.mean_error(position - step * axis)) / (2 * step)
        for axis in np.eye(4)
    ]
    assert table.gradient(position) == pytest.approx(differences, rel=1e-3, abs=1e-5)


def test_a_descent_finds_exponents_that_explain_exact_points() -> None:
    made = points(EXPONENTS)
    table = Points(made)
    found = descend(made, steps=1500)
    error = table.mean_error(np.array([found.a, found.b, found.c, found.d]))
    assert error < 0.02 < table.mean_error(np.array([START.a, START.b, START.c, START.d]))


def fingerprints(weights: WeightType = WeightType.FLOAT16) -> list[Measurement]:
    """Runs of fingerprints whose layers take 10 ms and 1 ms for each token, half of that and 2 ms at TP 2."""
    return [
        run(
            tp, layers=n, weights=weights, output_tokens=o, latency_s=n * (0.01 + o * 0.001) / tp + 0.002 * n * (tp - 1)
        )
        for tp, n, o in product((1, 2), (1, 2), (10, 20))
    ]


def test_every_fit_of_exponents_is_judged_on_the_same_runs() -> None:
    layers = load_model("llama-2-7b").layers
    single_s = layers * (0.01 + 100 * 0.001)
    tp2_s = single_s / 2 + 0.002 * layers
    whole = []
    for tp, pp in product((1, 2, 4), (1, 2, 3)):
        single, tp2 = Line(ttft_s=single_s, tpot_s=0.0), Line(ttft_s=tp2_s, tpot_s=0.0)
        latency_s = ParallelLatency.scaled(single, tp2, EXPONENTS, tp=tp, pp=pp).at(1)
        whole.append(run(tp, pp, latency_s=latency_s))
    known = replace(NONE, exponents={(WeightType.FLOAT16, KvType.NATIVE): EXPONENTS})
    result = analysed("exponents", predictions=known, full_models=whole, fingerprints=fingerprints())
    assert result.figures["latency-mean published"] == pytest.approx(0, abs=1e-6)
    assert result.figures["latency-mean robust least squares"] < 1
    assert result.figures["latency-mean descent, every point"] < 2
    assert [row[3] for row in result.table.rows] == [None, 5, 9, 9]
