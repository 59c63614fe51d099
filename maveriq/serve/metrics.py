"""Prometheus metrics: counts and durations of requests, and the current state of the cluster."""

from __future__ import annotations

from collections import Counter as PythonCounter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from maveriq.domain.progress import Progress
from maveriq.domain.requests import FINAL_STATUSES, RequestStatus
from maveriq.exec.live_cluster import Outcome
from maveriq.serve.profile_jobs import STATUSES, ProfileJobs
from maveriq.units import Micros, seconds

_LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The metrics of one service, in their own registry.

    Durations are on the cluster's clock and begin when a request arrives at the cluster. Time to first token thus
    includes queueing.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.accepted = self._counter("requests_accepted", "Requests accepted.", "model")
        self.ended = self._counter("requests", "Ended requests by final status.", "model", "status")
        self.http_errors = self._counter("http_errors", "HTTP error responses by code.", "code")
        self.connections_closed = self._counter("connections_closed", "Connections closed early by reason.", "reason")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of completed requests.", "model")
        self._output_tokens = self._counter("generated_tokens", "Tokens generated.", "model")
        self._slo = self._counter("slo_requests", "Ended requests with an SLO, by whether they met it.", "model", "met")
        # Of completed requests.
        self._latency = self._histogram("request_latency_seconds", "Arrival to end.", _LATENCY_BUCKETS_S)
        self._queue = self._histogram("request_queue_seconds", "Arrival to start.", _LATENCY_BUCKETS_S)
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", _LATENCY_BUCKETS_S
        )
        self._per_token = self._histogram(
            "time_per_output_token_seconds", "Time per token after the first.", _TOKEN_BUCKETS_S
        )
        ProcessCollector(registry=self.registry)

    def add_cluster(self, progress: Callable[[], Progress], in_flight: Callable[[], int]) -> None:
        """Add the metrics of the cluster; both functions are called at each scrape."""
        self.registry.register(_ClusterCollector(progress, in_flight))

    def add_profiles(self, profiles: ProfileJobs) -> None:
        """Add the profiles that the service measures; they are counted at each scrape."""
        self.registry.register(_ProfileCollector(profiles))

    def add_connections(self, count: Callable[[], int]) -> None:
        """Add the number of open connections; `count` is called at each scrape."""
        for reason in ("full", "slow"):
            self.connections_closed.labels(reason)
        Gauge("maveriq_connections", "Open HTTP connections.", registry=self.registry).set_function(count)

    def add_model(self, model: str) -> None:
        """Start a model's counters at zero, so that rates include the first request."""
        self.accepted.labels(model)
        for status in FINAL_STATUSES:
            self.ended.labels(model, status.label)
        for met in ("true", "false"):
            self._slo.labels(model, met)

    def count_ended(self, model: str, outcome: Outcome, *, prompt_tokens: int, slo_us: Micros) -> None:
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
        self._first_token.labels(model).observe(seconds(outcome.first_token_us - outcome.arrival_us))
        if len(outcome.tokens) > 1:
            decode_s = seconds(outcome.finish_us - outcome.first_token_us)
            self._per_token.labels(model).observe(decode_s / (len(outcome.tokens) - 1))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"maveriq_{name}", help_text, labels, registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"maveriq_{name}", help_text, ("model",), buckets=buckets, registry=self.registry)


class _ClusterCollector(Collector):
    """Reads the state of the cluster at each scrape."""

    def __init__(self, progress: Callable[[], Progress], in_flight: Callable[[], int]) -> None:
        self._progress = progress
        self._in_flight = in_flight

    def describe(self) -> Iterator[Metric]:
        """Return no metrics, so that registering does not read the cluster."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the cluster."""
        progress = self._progress()
        for name, help_text, value in (
            ("requests_in_flight", "Accepted requests that have not ended.", self._in_flight()),
            ("requests_waiting", "Requests in the queue.", progress.waiting),
            ("requests_running", "Requests that an engine runs.", progress.running),
        ):
            yield GaugeMetricFamily(f"maveriq_{name}", help_text, value=value)
        yield from _deployment_metrics(progress)
        yield from _gpu_metrics(progress)


class _ProfileCollector(Collector):
    """Reads the state of the profiles at each scrape."""

    def __init__(self, profiles: ProfileJobs) -> None:
        self._profiles = profiles

    def describe(self) -> Iterator[Metric]:
        """Return no metrics, as the collector of the cluster."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the profiles."""
        counted = PythonCounter(state.status for state in self._profiles.states())
        by_status = GaugeMetricFamily("maveriq_profiles", "Profiles of registered models.", labels=("status",))
        for status in STATUSES:
            by_status.add_metric((status,), counted[status])
        yield by_status
        for name, help_text, value in (
            ("seconds", "Seconds for which profiles have held GPUs.", self._profiles.total_s),
            ("gpu_seconds", "The same times the number of GPUs.", self._profiles.total_gpu_s),
        ):
            yield CounterMetricFamily(f"maveriq_profile_{name}", help_text, value=value)


def _deployment_metrics(progress: Progress) -> Iterator[Metric]:
    labels = ("deployment", "endpoint", "model")
    up = GaugeMetricFamily("maveriq_deployment_up", "1 if its engine is up.", labels=labels)
    waiting = GaugeMetricFamily("maveriq_deployment_waiting", "Requests in its queue.", labels=labels)
    completed = CounterMetricFamily("maveriq_deployment_completed", "Requests it completed.", labels=labels)
    restarts = CounterMetricFamily("maveriq_engine_restarts", "Engine starts after the first.", labels=labels)
    running = GaugeMetricFamily(
        "maveriq_deployment_running",
        "Requests that its continuous engine has admitted.",
        labels=labels,
    )
    kv_use = GaugeMetricFamily("maveriq_deployment_kv_use_ratio", "Share of its KV cache in use.", labels=labels)
    for deployment in progress.deployments:
        if deployment.status == "removed":  # else their series would accumulate
            continue
        values = (str(deployment.deployment_id), str(deployment.endpoint_id), deployment.model)
        up.add_metric(values, float(deployment.status == "up"))
        waiting.add_metric(values, deployment.waiting)
        completed.add_metric(values, deployment.completed)
        restarts.add_metric(values, deployment.restarts)
        if deployment.running is not None:
            running.add_metric(values, deployment.running)
        if deployment.kv_use is not None:
            kv_use.add_metric(values, deployment.kv_use)
    yield from (up, waiting, completed, restarts, running, kv_use)


def _gpu_metrics(progress: Progress) -> Iterator[Metric]:
    used = GaugeMetricFamily("maveriq_gpu_memory_used_bytes", "GPU memory in use.", labels=("gpu",))
    capacity = GaugeMetricFamily("maveriq_gpu_memory_capacity_bytes", "GPU memory capacity.", labels=("gpu",))
    load = GaugeMetricFamily("maveriq_gpu_load_ratio", "Share of the last 120 s in which it was busy.", labels=("gpu",))
    down = GaugeMetricFamily("maveriq_gpu_down", "1 if it is down.", labels=("gpu",))
    for gpu in progress.gpus:
        values = (str(gpu.gpu_id),)
        used.add_metric(values, gpu.used_bytes)
        capacity.add_metric(values, gpu.capacity_bytes)
        load.add_metric(values, gpu.load)
        down.add_metric(values, float(gpu.down))
    yield from (used, capacity, load, down)
