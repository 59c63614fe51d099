"""What Prometheus reads: counts and durations of requests, and the cluster as it is at the moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from maveriq.domain.progress import Progress
from maveriq.domain.requests import FINAL_STATUSES, RequestStatus
from maveriq.exec.live_cluster import Outcome
from maveriq.units import Micros, seconds

_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_REMOVED = "removed"  # those would pile up over the years
_PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """All series of one service, in a registry of its own.

    Durations are on the cluster's clock and begin when a request arrives there; first-token time
    thus includes waiting, as for a user (the records of a run count it from the start of execution).
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.accepted = self._counter("requests_accepted", "Requests taken in.", "model")
        self.ended = self._counter("requests", "Requests by the one status that they ended in.", "model", "status")
        self.errors = self._counter("http_errors", "HTTP requests answered with an error, by its code.", "code")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of completed requests.", "model")
        self._output_tokens = self._counter("generated_tokens", "Tokens generated.", "model")
        self._slo = self._counter("slo_requests", "Ended requests that had an SLO.", "model", "met")
        self._latency = self._histogram("request_latency_seconds", "Arrival to end of completed requests.", _LATENCY_S)
        self._queue = self._histogram("request_queue_seconds", "Arrival to start of completed requests.", _LATENCY_S)
        self._first = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _LATENCY_S)
        self._per_token = self._histogram("time_per_output_token_seconds", "Per token after the first.", _PER_TOKEN_S)
        ProcessCollector(registry=self.registry)

    def watch(self, progress: Callable[[], Progress], in_flight: Callable[[], int]) -> None:
        """Show the cluster too, as `progress` says it is when somebody reads."""
        self.registry.register(_ClusterCollector(progress, in_flight))

    def model_known(self, model: str) -> None:
        """Let a model's counters begin at zero, so that rates see the first request."""
        self.accepted.labels(model)
        for status in FINAL_STATUSES:
            self.ended.labels(model, status.label)
        for met in ("true", "false"):
            self._slo.labels(model, met)

    def finished(self, model: str, outcome: Outcome, *, prompt_tokens: int, slo_us: Micros) -> None:
        """Count a request that has ended."""
        self.ended.labels(model, outcome.status.label).inc()
        self._output_tokens.labels(model).inc(len(outcome.tokens))
        completed = outcome.status is RequestStatus.COMPLETED
        if slo_us:
            met = completed and outcome.finish_us - outcome.arrival_us <= slo_us
            self._slo.labels(model, "true" if met else "false").inc()
        if not completed:
            return
        self._prompt_tokens.labels(model).inc(prompt_tokens)
        self._latency.labels(model).observe(seconds(outcome.finish_us - outcome.arrival_us))
        self._queue.labels(model).observe(seconds(outcome.start_us - outcome.arrival_us))
        self._first.labels(model).observe(seconds(outcome.first_token_us - outcome.arrival_us))
        if len(outcome.tokens) > 1:
            decode_s = seconds(outcome.finish_us - outcome.first_token_us)
            self._per_token.labels(model).observe(decode_s / (len(outcome.tokens) - 1))

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, told: str, *labels: str) -> Counter:
        return Counter(f"maveriq_{name}", told, labels, registry=self.registry)

    def _histogram(self, name: str, told: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"maveriq_{name}", told, ("model",), buckets=buckets, registry=self.registry)


class _ClusterCollector(Collector):
    """Asks the cluster each time somebody reads."""

    def __init__(self, progress: Callable[[], Progress], in_flight: Callable[[], int]) -> None:
        self._progress = progress
        self._in_flight = in_flight

    def describe(self) -> Iterator[Metric]:
        """Name no series before the first reading (the registry asks when this is registered)."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield the cluster's series."""
        now = self._progress()
        for name, told, value in (
            ("requests_in_flight", "Accepted requests that have not ended.", self._in_flight()),
            ("requests_waiting", "Requests in the queue.", now.waiting),
            ("requests_running", "Requests that an engine is serving.", now.running),
        ):
            yield GaugeMetricFamily(f"maveriq_{name}", told, value=value)
        yield from _deployments(now)
        yield from _gpus(now)


def _deployments(now: Progress) -> Iterator[Metric]:
    labels = ("deployment", "model")
    up = GaugeMetricFamily("maveriq_deployment_up", "1 if its engine serves.", labels=labels)
    waiting = GaugeMetricFamily("maveriq_deployment_waiting", "Requests that wait for it.", labels=labels)
    completed = CounterMetricFamily("maveriq_deployment_completed", "Requests it completed.", labels=labels)
    restarts = CounterMetricFamily("maveriq_engine_restarts", "Engines started after the first.", labels=labels)
    for one in now.deployments:
        if one.status == _REMOVED:
            continue
        named = (str(one.deployment_id), one.model)
        up.add_metric(named, float(one.status == "up"))
        waiting.add_metric(named, one.waiting)
        completed.add_metric(named, one.completed)
        restarts.add_metric(named, one.restarts)
    yield from (up, waiting, completed, restarts)


def _gpus(now: Progress) -> Iterator[Metric]:
    used = GaugeMetricFamily("maveriq_gpu_memory_used_bytes", "GPU memory held.", labels=("gpu",))
    capacity = GaugeMetricFamily("maveriq_gpu_memory_capacity_bytes", "GPU memory there is.", labels=("gpu",))
    load = GaugeMetricFamily("maveriq_gpu_load_ratio", "Share of the last 120 s that it was busy.", labels=("gpu",))
    down = GaugeMetricFamily("maveriq_gpu_down", "1 if it failed.", labels=("gpu",))
    for gpu in now.gpus:
        named = (str(gpu.gpu_id),)
        used.add_metric(named, gpu.used_bytes)
        capacity.add_metric(named, gpu.capacity_bytes)
        load.add_metric(named, gpu.load)
        down.add_metric(named, float(gpu.down))
    yield from (used, capacity, load, down)
