"""Whether `maveriq size` finds what an exhaustive search finds, with how many simulations, and how sure it is rightly.

Usage: python experiments/sizing/exhaustive.py [--problems 1-20] [--repeats N] [--truth-seeds N] [--workers N]
           [--out DIR]

Each problem is drawn from its seed: one to three models, on engines that batch continuously or exclusive ones, a rate,
lengths, SLOs, a target, and a kind of GPU. For each of them

- `size_cluster` answers, with the defaults of `maveriq size`;
- the exhaustive search simulates every size up to `--max-gpus` with `--max-seeds` seeds, the same ones. Its answer is
  the fewest GPUs whose mean meets the target;
- the truth is the same with more seeds, of the sizes around the answer;
- further sizings, from other seeds, count how often the interval that `size` states holds the truth.

Sizes on which a policy deploys the same engines on the same GPUs have the same runs, and are simulated once; they count
as simulations of the exhaustive search all the same.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from maveriq.control.controller import Controller
from maveriq.control.events import EndpointAdded
from maveriq.scenario.build import build_system
from maveriq.scenario.options import Options, options_from
from maveriq.sizing.search import Sizes
from maveriq.sizing.size import SizeRequest, size_cluster
from maveriq.streams import generator
from maveriq.sweeps.tables import ALL
from maveriq.sweeps.worker import CellResult, CellTask, simulate_cell

RESULTS = Path(__file__).parent / "results"
MAX_GPUS, SEEDS, MAX_SEEDS = 64, 3, 12  # the defaults of `maveriq size`
_AROUND = 3  # sizes on each side of the answer of which the truth is found out
_MODELS = ("llama-3.2-3b", "qwen3-4b", "qwen2.5-7b", "mistral-7b", "llama-3.1-8b", "qwen3-14b")
_GPUS = ("L40S", "A100-80GB-SXM", "H100-SXM")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a cluster is sized for; `seed` draws all of it."""

    seed: int
    models: str
    gpu: str
    engines: str
    rate: float
    prompt_tokens: str
    output_tokens: str
    attainment: float
    slo_ttft_ms: float
    slo_tpot_ms: float
    queue: str | None

    def options(self, *, seed: int) -> Options:
        """Return the options of its simulations."""
        return Options(
            models=self.models, trace="synthetic", rate=self.rate, duration_s=20.0, prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens, service_times="physics", queue=self.queue, seed=seed,
        )  # fmt: skip

    def request(self, *, seed: int) -> SizeRequest:
        """Return the sizing."""
        return SizeRequest(
            options=self.options(seed=seed), kinds=(self.gpu,), attainment=self.attainment,
            slo_ttft_ms=self.slo_ttft_ms, slo_tpot_ms=self.slo_tpot_ms, max_gpus=MAX_GPUS, seeds=SEEDS,
            max_seeds=MAX_SEEDS,
        )  # fmt: skip


def problem_of(seed: int, folder: Path) -> Problem:
    """Draw a problem, and write its model set into a folder."""
    draws = generator(seed, "sizing problems")
    is_exclusive = bool(draws.random() < 0.4)
    names = draws.choice(_MODELS, size=int(draws.integers(1, 4)), replace=False).tolist()
    rate = float(draws.uniform(0.5, 3.0) if is_exclusive else draws.uniform(4.0, 40.0))
    rate = round(rate, 2)
    parts = draws.uniform(0.5, 3.0, len(names))
    lines = [f'name = "problem {seed}"']
    for name, part in zip(names, parts / parts.sum(), strict=True):
        lines += ["[[models]]", f'model = "{name}"', f"expected_rps = {float(rate * part)!r}"]
        lines.append("float16_only = true")
        lines.append(f"replicas = {draws.integers(2, 7)}" if is_exclusive else '[models.engine]\nkind = "vllm"')
    path = folder / f"problem-{seed}.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    prompt, output = int(draws.integers(100, 1_200)), int(draws.integers(20, 80 if is_exclusive else 250))
    return Problem(
        seed=seed,
        models=str(path),
        gpu=str(draws.choice(_GPUS)),
        engines="exclusive" if is_exclusive else "continuous",
        rate=rate,
        prompt_tokens=f"lognormal:{prompt},0.6",
        output_tokens=f"lognormal:{output},0.5",
        attainment=float(draws.choice([0.9, 0.95, 0.98, 0.99])),
        slo_ttft_ms=float(round((8 if is_exclusive else 1) * draws.uniform(200, 900))),
        slo_tpot_ms=float(round(draws.uniform(35, 90))),
        queue=str(draws.choice(["fifo-per-model", "edf", "sjf"])) if is_exclusive else None,
    )


class RememberingPool:
    """Simulates in this process, each run once: a size that deploys what a smaller one does has its runs (mutable)."""

    def __init__(self) -> None:
        self.simulated = 0
        self._results: dict[str, dict[int, CellResult]] = {}  # by options without the cluster, then by GPUs
        self._settled: dict[str, int] = {}  # from how many GPUs on results are equal

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def results(self, tasks: Iterable[CellTask]) -> Iterator[CellResult]:
        """Yield the results of runs in the order of the tasks."""
        for task in tasks:
            yield replace_number(self._result(task.options), task.number)

    def _result(self, options: dict[str, Any]) -> CellResult:
        gpus, _, kind = str(options["gpus"]).partition("x")
        run = json.dumps({**options, "gpus": kind}, sort_keys=True)
        settled = min(int(gpus), self._settled.get(run, int(gpus)))
        known = self._results.setdefault(run, {})
        if settled not in known:
            self.simulated += 1
            known[settled] = simulate_cell(CellTask(number=0, options={**options, "gpus": f"{settled}x{kind}"}))
            has_spare = settled < MAX_GPUS and _has_spare_gpu(known[settled], settled)
            if has_spare and _placement(options, settled, kind) == _placement(options, MAX_GPUS, kind):
                self._settled[run] = settled
        return known[settled]


def replace_number(result: CellResult, number: int) -> CellResult:
    """Return a result under another number."""
    return CellResult(**{name: getattr(result, name) for name in CellResult.__struct_fields__} | {"number": number})


def _has_spare_gpu(result: CellResult, gpus: int) -> bool:
    """Return whether deployments leave a GPU, if none share one."""
    return sum(map(int, re.findall(r" on (\d+) GPU", " ".join(result.deployments)))) < gpus


def _placement(options: dict[str, Any], gpus: int, kind: str) -> list[Any]:
    """Return what is deployed where on so many GPUs."""
    own = {name: value for name, value in options.items() if name not in ("slo_ttft_ms", "slo_tpot_ms")}
    system = build_system(
        options_from(Options, own | {"gpus": f"{gpus}x{kind}"}),
        slo_ttft_s=options["slo_ttft_ms"] / 1e3,
        slo_tpot_s=options["slo_tpot_ms"] / 1e3,
    )
    controller = Controller(system.cluster, system.policy, system.settings, system.predict_service_time)
    controller.handle(0, [EndpointAdded(endpoint) for endpoint in system.workload.endpoints])
    plans = [deployment.plan for deployment in controller.manager.deployments.values()]
    return [None if plan is None else (plan.configuration, plan.layer_split, plan.gpu_ids) for plan in plans]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a problem; sizes are numbers of GPUs, None where no size meets the target."""

    problem: int
    engines: str
    gpu: str
    rate: float
    attainment: float
    answer: int | None
    exhaustive: int | None
    truth: int | None
    low: int
    high: int | None
    simulations: int
    exhaustive_simulations: int
    ratio: float
    when_10_percent_slower: int | None
    repeats: int
    held: int
    above_the_answer: str


def outcome(number: int, *, repeats: int, truth_seeds: int) -> Outcome:
    """Size one problem, and search it exhaustively."""
    with tempfile.TemporaryDirectory() as folder:
        problem, pool = problem_of(number, Path(folder)), RememberingPool()
        found = size_cluster(problem.request(seed=1), pool=pool).kinds[0]
        sizes = range(1, MAX_GPUS + 1)
        means = {gpus: _mean(problem, pool, gpus, MAX_SEEDS) for gpus in sizes}
        exhaustive = next((gpus for gpus in sizes if means[gpus] >= problem.attainment), None)
        truth = _truth(problem, pool, means, exhaustive, truth_seeds)
        firsts = [1 + MAX_SEEDS * repeat for repeat in range(repeats)]
        others = [size_cluster(problem.request(seed=first), pool=pool).kinds[0].sizes for first in firsts]
    return Outcome(
        problem=number,
        engines=problem.engines,
        gpu=problem.gpu,
        rate=problem.rate,
        attainment=problem.attainment,
        answer=found.sizes.answer,
        exhaustive=exhaustive,
        truth=truth,
        low=found.sizes.low,
        high=found.sizes.high,
        simulations=found.sizes.simulations,
        exhaustive_simulations=MAX_GPUS * MAX_SEEDS,
        ratio=round(found.sizes.simulations / (MAX_GPUS * MAX_SEEDS), 3),
        when_10_percent_slower=found.when_slower,
        repeats=repeats,
        held=sum(_holds(sizes, truth) for sizes in others),
        above_the_answer=_above(means, exhaustive, problem.attainment),
    )


def _mean(problem: Problem, pool: RememberingPool, gpus: int, seeds: int) -> float:
    limits = {"slo_ttft_ms": problem.slo_ttft_ms, "slo_tpot_ms": problem.slo_tpot_ms}
    own = problem.options(seed=1).to_dict() | {"gpus": f"{gpus}x{problem.gpu}"} | limits
    tasks = [CellTask(number=seed, options=own | {"seed": seed}) for seed in range(1, seeds + 1)]
    shares = []
    for result in pool.results(tasks):
        if result.error:
            raise SystemExit(f"problem {problem.seed}, {gpus} GPUs: {result.error}")
        shares.append(result.rows[ALL]["goodput"] or 0.0)
    return float(np.mean(shares))


def _truth(
    problem: Problem, pool: RememberingPool, means: dict[int, float], exhaustive: int | None, seeds: int
) -> int | None:
    """Return the fewest GPUs whose mean over many seeds meets the target."""
    best = exhaustive or max(means, key=lambda gpus: means[gpus])
    for gpus in range(max(1, best - _AROUND), min(MAX_GPUS, best + _AROUND) + 1):
        if _mean(problem, pool, gpus, seeds) >= problem.attainment:
            return gpus
    return None


def _holds(sizes: Sizes, truth: int | None) -> bool:
    if truth is None:
        return sizes.high is None
    return sizes.low <= truth <= (sizes.high or MAX_GPUS)


def _above(means: dict[int, float], answer: int | None, target: float) -> str:
    """Return the sizes above the exhaustive answer that miss the target: where more GPUs are worse."""
    return " ".join(str(gpus) for gpus, mean in means.items() if answer and gpus > answer and mean < target)


def main() -> None:
    """Solve the problems, print a line for each, and write results/exhaustive.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", default="1-20", help="seeds of problems, FIRST-LAST (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="sizings of each problem (default: %(default)s)")
    parser.add_argument("--truth-seeds", type=int, default=60, help="seeds of the truth (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    first, _, last = options.problems.partition("-")
    outcomes = []
    with ProcessPoolExecutor(options.workers) as processes:
        waiting = [
            processes.submit(outcome, seed, repeats=options.repeats, truth_seeds=options.truth_seeds)
            for seed in range(int(first), int(last or first) + 1)
        ]
        for future in waiting:
            outcomes.append(future.result())
            sys.stdout.write(" ".join(f"{name}={value}" for name, value in asdict(outcomes[-1]).items()) + "\n")
            sys.stdout.flush()
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "exhaustive.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Outcome)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, outcomes))
    sys.stdout.write("\n".join([*summary(outcomes), ""]))


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """Return how many answers agree, what they cost, and how often intervals hold."""
    agreeing = [each for each in outcomes if each.answer == each.exhaustive]
    ratios = [each.ratio for each in outcomes]
    return [
        f"same answer as the exhaustive search: {len(agreeing)} of {len(outcomes)}",
        f"simulations, of those of the exhaustive search: mean {np.mean(ratios):.3f}, most {max(ratios):.3f}",
        f"interval holds the truth: {sum(e.held for e in outcomes)} of {sum(e.repeats for e in outcomes)} sizings",
    ]


if __name__ == "__main__":
    main()
