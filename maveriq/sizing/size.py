"""The fewest or cheapest GPUs that serve a workload within its SLOs.

Each probe of a cluster size simulates the workload as `maveriq sim` does, once for each seed. `search` decides which
sizes are simulated.
"""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from maveriq.domain.gpu_kinds import gpu_sheets
from maveriq.errors import InputError, MaveriqError, UnknownNameError
from maveriq.files import exists
from maveriq.scenario.options import Options, options_from
from maveriq.sizing.search import Sizes, fewest_gpus
from maveriq.sweeps.run import LOCAL, Pool, make_pool
from maveriq.sweeps.tables import ALL
from maveriq.sweeps.worker import CellResult, CellTask
from maveriq.workload.model_sets import known_model_sets, load_model_set
from maveriq.workload.options import DEFAULT_SCALE
from maveriq.workload.schedules import Schedule
from maveriq.workload.traces import TRACES, load_trace

SLOWER = 1.1
"""How much longer everything takes than estimated, in the last question of a sizing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeRequest:
    """What a cluster is sized for.

    Args:
        options: of the simulations; their cluster and seed are the sizing's.
        kinds: kinds of GPU, each of which is sized by itself.
        attainment: the share of requests that must meet the SLOs, 0 to 1.
        slo_ttft_ms: time to first token that a request must meet; None for no limit.
        slo_tpot_ms: time per output token that a request must meet; None for no limit.
        max_gpus: the most GPUs to consider.
        seeds: simulations of each size.
        max_seeds: the most of a size that is near the target.

    Raises:
        InputError: an unknown kind of GPU, no SLO, a target that is not a share, or counts out of range.
    """

    options: Options
    kinds: tuple[str, ...]
    attainment: float
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None
    max_gpus: int = 64
    seeds: int = 3
    max_seeds: int = 12

    def __post_init__(self) -> None:
        _check(self)

    @property
    def by_latency_slo(self) -> bool:
        """Whether the target is on the latency SLO of `slo_scale`, without limits on TTFT and TPOT."""
        return self.slo_ttft_ms is None and self.slo_tpot_ms is None


@dataclass(frozen=True, slots=True, kw_only=True)
class KindSize:
    """The answer for one kind of GPU.

    Args:
        kind: its name.
        usd_per_hour: list price of one.
        sizes: the search.
        found: a simulation of each size, of the first seed.
        when_slower: the fewest GPUs if everything takes 10 % longer; None if there are none, or it is unknown.
        why_not_slower: why that is unknown, "" if it is known.
    """

    kind: str
    usd_per_hour: float
    sizes: Sizes
    found: Mapping[int, CellResult]
    when_slower: int | None = None
    why_not_slower: str = ""

    @property
    def cluster_usd_per_hour(self) -> float | None:
        """What the answer costs, None without one."""
        return None if self.sizes.answer is None else self.sizes.answer * self.usd_per_hour


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeResult:
    """The answers for all kinds, in the order asked for."""

    request: SizeRequest
    kinds: tuple[KindSize, ...]

    @property
    def best(self) -> KindSize | None:
        """The cheapest answer; of equal ones, the fewest GPUs. None if no kind has one."""
        answered = [kind for kind in self.kinds if kind.sizes.answer is not None]
        return min(answered, key=lambda kind: (kind.cluster_usd_per_hour, kind.sizes.answer), default=None)

    @property
    def fewest(self) -> KindSize | None:
        """The answer with the fewest GPUs; of equal ones, the cheapest. None if no kind has one."""
        answered = [kind for kind in self.kinds if kind.sizes.answer is not None]
        return min(answered, key=lambda kind: (kind.sizes.answer, kind.cluster_usd_per_hour), default=None)

    def to_html(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a report of the sizing as one HTML file that loads nothing, and return where it is.

        Args:
            path: the file to write.
            overwrite: replace a file that is there.

        Raises:
            InputError: the file is there already and `overwrite` is false, or it cannot be written.
            MaveriqError: the extra `maveriq[report]` is not installed; the disk is full.
        """
        from maveriq.report.page.render import write_page
        from maveriq.sizing.page import page_of

        return write_page(page_of(self), path, overwrite=overwrite)


def kinds_in(gpus: str | Iterable[str]) -> tuple[str, ...]:
    """Return the kinds of GPU in a list, or in a text with commas between them, each once."""
    names = gpus.split(",") if isinstance(gpus, str) else gpus
    return tuple(dict.fromkeys(filter(None, map(str.strip, names))))


def _check(request: SizeRequest) -> None:
    if not request.kinds:
        raise InputError("--gpus names no kind of GPU; give one, such as H100-SXM")
    for kind in request.kinds:
        if kind not in gpu_sheets():
            count, times, name = kind.partition("x")
            if times and count.isdecimal() and name in gpu_sheets():
                raise InputError(f"--gpus {kind}: give the kind alone ({name}); the count is what is looked for")
            raise UnknownNameError("kind of GPU", kind, gpu_sheets())
    if request.by_latency_slo and not request.options.slo_scale:
        raise InputError("a size needs SLOs to meet; give --slo-ttft-ms, --slo-tpot-ms or --slo-scale")
    if not 0 < request.attainment <= 1:
        raise InputError(f"--attainment must be above 0 and at most 100 (percent), not {100 * request.attainment:g}")
    if not 1 <= request.max_gpus <= _MOST_GPUS:
        raise InputError(f"--max-gpus must be from 1 to {_MOST_GPUS:,}, not {request.max_gpus}")
    if not 2 <= request.seeds <= request.max_seeds:
        raise InputError(
            f"--seeds must be at least 2 and at most --max-seeds ({request.max_seeds}), not {request.seeds}"
        )


_MOST_GPUS = 16_384


def size_cluster(
    request: SizeRequest, *, pool: Pool, watch: Callable[[str, int, int], None] = lambda *_: None
) -> SizeResult:
    """Return the fewest GPUs of each kind that meet the SLOs.

    Args:
        request: what is asked.
        pool: simulates.
        watch: is called before the simulations of a size with the kind, the number of GPUs and that of simulations.

    Raises:
        InputError: an option or a file cannot be used.
        MaveriqError: a simulation fails.
    """
    with _at_rate_of_options(request.options) as options:
        simulations = _Simulations(replace(request, options=options), pool, watch)
        return SizeResult(request=request, kinds=tuple(simulations.size(kind) for kind in request.kinds))


def size(
    *,
    gpus: str | Sequence[str] = "H100-SXM",
    slo_ttft_ms: float | None = None,
    slo_tpot_ms: float | None = None,
    attainment: float = 99.0,
    max_gpus: int = 64,
    seeds: int = 3,
    max_seeds: int = 12,
    workers: int | None = None,
    on: str = LOCAL,
    **options: Any,
) -> SizeResult:
    """Return the fewest GPUs that serve a workload within its SLOs, as `maveriq size` does.

    Args:
        gpus: kinds of GPU, as a list or separated by commas; each is sized by itself.
        slo_ttft_ms: time to first token that a request must meet.
        slo_tpot_ms: time per output token that a request must meet.
        attainment: percentage of the requests that must meet the SLOs.
        max_gpus: the most GPUs to consider.
        seeds: simulations of each size.
        max_seeds: the most of a size that is near the target.
        workers: processes at once; None for one a core.
        on: `local`, `ray`, or the address of a Ray cluster.
        options: of the simulations, as for `maveriq.simulate`.

    Raises:
        InputError: an option or a file that cannot be used.
        MaveriqError: a simulation fails.
    """
    request = SizeRequest(
        options=options_from(Options, options),
        kinds=kinds_in(gpus),
        attainment=attainment / 100,
        slo_ttft_ms=slo_ttft_ms,
        slo_tpot_ms=slo_tpot_ms,
        max_gpus=max_gpus,
        seeds=seeds,
        max_seeds=max_seeds,
    )
    with make_pool(on, workers) as pool:
        return size_cluster(request, pool=pool)


class _Simulations:
    """Simulates sizes of clusters (mutable: keeps what it found)."""

    def __init__(self, request: SizeRequest, pool: Pool, watch: Callable[[str, int, int], None]) -> None:
        self._request = request
        self._pool = pool
        self._watch = watch

    def size(self, kind: str) -> KindSize:
        """Return the answer for a kind of GPU, also for when everything takes longer."""
        found: dict[int, CellResult] = {}
        sizes = self._search(self._request, kind, found, least=1)
        answer = KindSize(kind=kind, usd_per_hour=gpu_sheets()[kind].usd_per_hour, sizes=sizes, found=found)
        if sizes.answer is None:
            return replace(answer, why_not_slower="there is no answer")
        if why_not := _why_not_slower(self._request.options):
            return replace(answer, why_not_slower=why_not)
        with _slower(self._request) as slower:
            return replace(answer, when_slower=self._search(slower, kind, {}, least=sizes.answer).answer)

    def _search(self, request: SizeRequest, kind: str, found: dict[int, CellResult], *, least: int) -> Sizes:
        def simulate(gpus: int, seeds: Sequence[int]) -> list[float]:
            self._watch(kind, gpus, len(seeds))
            results = self._results(request, kind, gpus, seeds)
            found.setdefault(gpus, results[0])
            return [_attainment(request, result) for result in results]

        return fewest_gpus(
            simulate,
            target=request.attainment,
            max_gpus=request.max_gpus,
            least=least,
            seeds=request.seeds,
            max_seeds=request.max_seeds,
        )

    def _results(self, request: SizeRequest, kind: str, gpus: int, seeds: Sequence[int]) -> list[CellResult]:
        limits = {"slo_ttft_ms": request.slo_ttft_ms, "slo_tpot_ms": request.slo_tpot_ms}
        own = request.options.to_dict() | {"gpus": f"{gpus}x{kind}"} | limits
        tasks = [CellTask(number=seed, options=own | {"seed": request.options.seed + seed - 1}) for seed in seeds]
        results = sorted(self._pool.results(tasks), key=lambda result: result.number)
        for result in results:
            if result.error:
                raise MaveriqError(f"the simulation of {gpus} x {kind} failed: {result.error}")
        return results


def _attainment(request: SizeRequest, result: CellResult) -> float:
    """Return the share of all requests that met the SLOs; what was refused or did not complete has missed them."""
    share = result.rows[ALL]["slo_attainment" if request.by_latency_slo else "goodput"]
    return 0.0 if share is None else share


def _why_not_slower(options: Options) -> str:
    """Return why the effect of slower engines is unknown, "" if it can."""
    if options.trace in TRACES or options.rate is not None or options.concurrency is not None:
        return ""
    return "a schedule has its own times" if isinstance(load_trace(options.trace), Schedule) else ""


@contextmanager
def _slower(request: SizeRequest) -> Iterator[SizeRequest]:
    """Yield the request for engines of which every step takes 10 % longer.

    That is the same workload on a clock that runs 10 % slower: with more requests a second, and tighter SLOs.
    """
    options = request.options

    def faster(value: float | None) -> float | None:
        return None if value is None else value * SLOWER

    def shorter(value: float | None) -> float | None:
        return None if value is None else value / SLOWER

    has_scale = options.rate is None and options.concurrency is None
    changed = replace(
        options,
        rate=faster(options.rate),
        scale=faster(options.scale or (DEFAULT_SCALE if options.trace in TRACES else 1.0)) if has_scale else None,
        duration_s=shorter(options.duration_s),
        slo_scale=options.slo_scale / SLOWER,
    )
    with _at_rate_of_options(changed) as scaled:
        yield replace(
            request,
            options=scaled,
            slo_ttft_ms=shorter(request.slo_ttft_ms),
            slo_tpot_ms=shorter(request.slo_tpot_ms),
        )


@contextmanager
def _at_rate_of_options(options: Options) -> Iterator[Options]:
    """Yield options whose model set expects the rate that they give, so that policies plan for what will come.

    Only a set with `expected_rps` is changed: a copy of it is, with the same parts for each model.
    """
    if options.rate is None or options.models in known_model_sets() or not exists(Path(options.models)):
        yield options
        return
    entries = load_model_set(options.models).entries  # checks the file
    expected_rps = sum(entry.expected_rps or 0.0 for entry in entries)
    if not expected_rps:
        yield options
        return
    path = Path(options.models)
    values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    for model, entry in zip(values["models"], entries, strict=True):
        model["expected_rps"] = float(model["expected_rps"]) * options.rate / expected_rps
        if entry.config is not None:
            model["model"] = str(entry.config.absolute())
    with tempfile.TemporaryDirectory(prefix="maveriq-size-") as folder:
        copy = Path(folder) / path.name
        copy.write_text(tomli_w.dumps(values), encoding="utf-8")
        yield replace(options, models=str(copy))
