"""Write the error tables of docs/calibrated.md: errors of the calibrated estimator on data outside its fit.

Usage: python scripts/calibrated_errors.py DATA_DIR [--document FILE]

DATA_DIR contains `a6000` and `testbed`. The calibration for each benchmark row is fitted without the full-model
measurements of its model, that for each recorded run without the run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from maveriq.calibration.evaluation import EACH, Evaluation, benchmarked_estimator, evaluate
from maveriq.calibration.online import read_recorded
from maveriq.estimate.calibrated import CalibratedEstimator
from maveriq.estimate.estimator import Estimator
from maveriq.estimate.hardware_profile import HardwareProfile, load_profile
from maveriq.estimate.registry import make_estimator

_BEGIN, _END = "<!-- written by scripts/calibrated_errors.py -->", "<!-- end -->"
_TABLES = (
    ("full models, 923-token prompts", "full_model_long_prompt.csv", "a6000-long", ("all", "tp")),
    ("batches, short prompts", "full_model_batched_short_prompt.csv", "a6000-short", ("all", "batch")),
    ("pruned weights", "full_model_pruned.csv", "a6000-long", ("all",)),
    ("uneven splits", "uneven_pipeline.csv", "a6000-short", ("all",)),
)


def main() -> None:
    """Replace the text between the marks of the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="folder that contains a6000 and testbed")
    document = Path(__file__).parent.parent / "docs" / "calibrated.md"
    parser.add_argument("--document", type=Path, default=document, help="file to update (default: docs/calibrated.md)")
    arguments = parser.parse_args()
    text = arguments.document.read_text(encoding="utf-8")
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    lines = [*benchmark_lines(arguments.data_dir / "a6000"), "", *served_lines(arguments.data_dir / "testbed")]
    written = "\n".join([_BEGIN, "", *lines, "", _END])
    arguments.document.write_text(before + written + after, encoding="utf-8")


def benchmark_lines(folder: Path) -> list[str]:
    """Return the table of errors on the benchmark, with those of the paper's estimator."""
    lines = [
        "| table | rows | paper: median | median | mean | p90 | in 90 % interval | memory: median | p95 | in it |",
        "| --- " * 10 + "|",
    ]
    for title, name, profile_name, groupings in _TABLES:
        profile = load_profile(profile_name)
        unseen = _errors(folder / name, benchmarked_estimator("calibrated", profile, without_model=EACH), profile)
        published = _errors(folder / name, make_estimator("paper", profile), profile)
        medians = {(group.by, group.value): f"{group.latency.median:.1f}" for group in published.groups}
        for group in unseen.groups:
            if group.by in groupings:
                what = title if group.by == "all" else f"{group.by} {group.value}"
                latency, memory = group.latency, group.memory
                figures = (latency.median, latency.mean, latency.p90, group.latency_covered or 0.0)
                cells = [what, f"{latency.n:,}", medians.get((group.by, group.value), ""), *map(_figure, figures)]
                cells += map(_figure, (memory.median, memory.p95, group.memory_covered or 0.0) if memory else ())
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def served_lines(folder: Path) -> list[str]:
    """Return one sentence on the service times of recorded runs, each predicted by a fit without that run."""
    profile = load_profile("a6000-short")
    errors: dict[tuple[str, str], list[float]] = {}
    for execution in read_recorded(folder):
        unseen = CalibratedEstimator.serving(profile, without_run=execution.run)
        lengths = {"prompt_tokens": execution.prompt_tokens, "output_tokens": execution.output_tokens, "batch": 1}
        estimate = unseen.service_on(execution.gpu_ids, execution.model, execution.configuration, **lengths)
        errors.setdefault((execution.run, execution.model.name), []).append(
            abs(estimate.latency_s / execution.service_s - 1)
        )
    off = 100 * np.array([np.median(found) for found in errors.values()])
    runs = len({run for run, _ in errors})
    median, p90, worst = np.median(off), np.percentile(off, 90), off.max()
    return [
        f"Median service time without contention, {len(off)} (run, model) pairs of {runs} recorded runs: off by",
        f"{median:.1f} % in the median, {p90:.1f} % at the 90th percentile, {worst:.1f} % at worst.",
    ]


def _errors(table: Path, judged: Estimator, profile: HardwareProfile) -> Evaluation:
    return evaluate(table, judged, prompt_tokens=profile.prompt_tokens)


def _figure(value: float) -> str:
    return f"{value:.1f}"


if __name__ == "__main__":
    main()
