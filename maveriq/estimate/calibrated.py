"""The calibrated estimator: a roofline fitted to a kind of GPU, corrected by each model's own fingerprints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

from maveriq.domain.models import ModelSpec, WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate import coverage
from maveriq.estimate.calibration_file import Calibration, op_counts, read_calibration, require
from maveriq.estimate.estimator import Basis, ServiceEstimate, check_estimable, check_lengths
from maveriq.estimate.fingerprints import OUTPUTS, Fingerprints
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.estimate.intervals import Interval
from maveriq.estimate.memory import MemoryEstimate, estimate_memory, is_measured, memory_interval
from maveriq.estimate.roofline import OpCounts, RooflineParameters, first_token_s, latency_s, token_s
from maveriq.units import Bytes, bytes_from_gib


def share_across(gpu_ids: Sequence[int], tp: int, gpus_per_socket: int) -> float:
    """Return the share of pipeline stages whose GPUs span several sockets of the host."""
    stages = [gpu_ids[first : first + tp] for first in range(0, len(gpu_ids), tp)]
    return sum(len({gpu // gpus_per_socket for gpu in stage}) > 1 for stage in stages) / len(stages)


def uses_shared_process(configuration: ParallelConfig) -> bool:
    """Return whether an engine runs in the host process that all single-GPU engines share.

    An engine on several GPUs has processes of its own, one per GPU. It neither slows other engines
    down nor is slowed down by them.
    """
    return configuration.gpus == 1


class _Times(NamedTuple):
    """Times of a request; the time of a token grows with the context."""

    first_s: float
    token_s: float
    per_output_token_s: float


class CalibratedEstimator:
    """Estimates latency by the roofline and memory by `estimate_memory`.

    The fitted figures apply to all models on a kind of GPU. Three things are specific to a model:
    its shape, the ratio of measured to predicted layer time in its fingerprints, and the memory of
    its fingerprints.
    """

    def __init__(self, profile: HardwareProfile, calibration: Calibration, *, online: bool) -> None:
        """Make an estimator from a calibration.

        Args:
            profile: provides the fingerprints of the models.
            calibration: the fitted figures.
            online: estimate the live system; else the benchmark that the ground truth was measured with.
        """
        self._profile = profile
        self._calibration = calibration
        self._online = online
        # Caches; the key of times is model, configuration, batch, prompt tokens and the share of stages across sockets.
        self._times: dict[tuple[ModelSpec, ParallelConfig, int, int, float], _Times] = {}
        self._layer_time_ratio: dict[tuple[ModelSpec, WeightType], float] = {}

    @classmethod
    def serving(cls, profile: HardwareProfile, *, without_run: str | None = None) -> CalibratedEstimator:
        """Return the estimator of the live system, for planning and simulating.

        Args:
            profile: names the calibration file.
            without_run: use the online calibration fitted without this recorded run.

        Raises:
            InputError: the profile has no calibration, or the recorded run does not exist.
        """
        path = require(profile.calibrated, profile.name)
        return cls(profile, read_calibration(path, without_run=without_run), online=True)

    @classmethod
    def benchmarked(cls, profile: HardwareProfile, *, without_model: str | None = None) -> CalibratedEstimator:
        """Return the estimator of the benchmark, for comparison with its tables.

        Args:
            profile: names the calibration file.
            without_model: use the calibration fitted without the ground truth of this model.

        Raises:
            InputError: the profile has no calibration.
        """
        path = require(profile.calibrated, profile.name)
        return cls(profile, read_calibration(path, without_model=without_model), online=False)

    @property
    def name(self) -> str:
        """The name by which `--estimator` and `--service-times` know it."""
        return "calibrated"

    def memory_interval(self, model: ModelSpec, configuration: ParallelConfig) -> Interval:
        """Return the factors of the estimate between which the memory lies in 90 of 100 cases."""
        margins, lengths = self._calibration.margins, self._default_lengths()
        return memory_interval(margins, self._memory(model, configuration, **lengths))

    def why_not(self, model: ModelSpec, configuration: ParallelConfig) -> str | None:
        """Return why a configuration cannot be estimated or run here, None if it can."""
        reason = coverage.why_not(self._profile, model, configuration, [configuration.at(1, 1)])
        if reason is not None:
            return reason
        if configuration.weights not in self._calibration.weights:
            return f"the calibration knows no {configuration.weights} weights"
        if str(configuration.tp) not in self._calibration.tp:
            return f"the calibration knows TP {', '.join(self._calibration.tp)} only"
        if not is_measured(configuration, self._profile.fingerprints.of(model.name), self._calibration.memory):
            return f"no memory was ever measured at TP {configuration.tp} x PP {configuration.pp}"
        return None

    def service(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int, batch: int
    ) -> ServiceEstimate:
        """Estimate one batch of `batch` equal requests that start together on an idle engine.

        Raises:
            InputError: the configuration has a reason in `why_not`, or fewer than one output token,
                prompt token or request.
        """
        return self._service(model, configuration, prompt_tokens, output_tokens, batch, across=0.0)

    def service_on(
        self,
        gpu_ids: Sequence[int],
        model: ModelSpec,
        configuration: ParallelConfig,
        *,
        prompt_tokens: int,
        output_tokens: int,
        batch: int,
    ) -> ServiceEstimate:
        """Estimate as `service`, for an engine on these GPUs (stage-major, as in a plan).

        All-reduces take longer in stages whose GPUs span several sockets of the host.

        Raises:
            InputError: as `service`.
        """
        live = self._calibration.online if self._online else None
        across = share_across(gpu_ids, configuration.tp, live.gpus_per_socket) if live else 0.0
        return self._service(model, configuration, prompt_tokens, output_tokens, batch, across=across)

    def shares_process(self, configuration: ParallelConfig) -> bool:
        """Return whether the engine shares a host process with other engines."""
        return self._online and uses_shared_process(configuration)

    def contention_delay_s(self, model: ModelSpec, configuration: ParallelConfig, *, co_located: int) -> float:
        """Return how many seconds longer a token takes while `co_located` other engines are busy."""
        live = self._calibration.online
        if not live or not co_located or not self.shares_process(configuration):
            return 0.0
        return 1e-6 * (model.layers * live.contention.layer_us + (co_located - 1) * live.contention.turn_us)

    def _service(
        self,
        model: ModelSpec,
        configuration: ParallelConfig,
        prompt_tokens: int,
        output_tokens: int,
        batch: int,
        *,
        across: float,
    ) -> ServiceEstimate:
        check_lengths(model, prompt_tokens=prompt_tokens, output_tokens=output_tokens, batch=batch)
        key = (model, configuration, batch, prompt_tokens, across)
        times = self._times.get(key)
        if times is None:
            times = self._times[key] = self._request_times(*key)
        tpot_s = times.token_s + output_tokens * times.per_output_token_s
        return ServiceEstimate(
            ttft_s=times.first_s - tpot_s,
            tpot_s=tpot_s,
            output_tokens=output_tokens,
            interval=self._calibration.margins.latency_interval(configuration.tp, batch),
            basis=Basis.MEASURED,
        )

    def layer_time_ratio(self, model: ModelSpec, weights: WeightType) -> float:
        """Return measured over predicted time of a layer, from the model's fingerprints, weighted by `trust`."""
        found = self._layer_time_ratio.get((model, weights))
        if found is None:
            roofline = self._calibration.roofline(weights, 1)
            log_ratio = layer_time_ratio(
                measured_layers(
                    self._profile.fingerprints.of(model.name), model, weights, prompt_tokens=self._profile.prompt_tokens
                ),
                roofline,
            )
            found = self._layer_time_ratio[model, weights] = math.exp(self._calibration.trust * log_ratio)
        return found

    def memory(self, model: ModelSpec, configuration: ParallelConfig) -> Bytes:
        """Estimate the memory over all GPUs of a deployment, at its configuration's batch size.

        The KV cache is sized for the prompt length of the profile and the output length of the
        calibration.

        Raises:
            InputError: the configuration has a reason in `why_not`.
        """
        return self.memory_with(model, configuration, **self._default_lengths())

    def memory_with(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int
    ) -> Bytes:
        """Estimate the memory as `memory`, with each request of a batch at the given lengths.

        Raises:
            InputError: the configuration has a reason in `why_not`.
        """
        estimate = self._memory(model, configuration, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        return bytes_from_gib(estimate.gib)

    def _default_lengths(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._profile.prompt_tokens,
            "output_tokens": self._calibration.memory.output_tokens,
        }

    def _memory(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int
    ) -> MemoryEstimate:
        check_estimable(self, model, configuration)
        return estimate_memory(
            model,
            configuration,
            self._profile.fingerprints.of(model.name),
            self._calibration.memory,
            tokens=prompt_tokens + output_tokens,
            fingerprint_tokens=self._profile.prompt_tokens + OUTPUTS[0],
        )

    def _request_times(
        self, model: ModelSpec, configuration: ParallelConfig, batch: int, prompt_tokens: int, across: float
    ) -> _Times:
        check_estimable(self, model, configuration)
        ops = op_counts(
            model,
            configuration.kv,
            tp=configuration.tp,
            pp=configuration.pp,
            batch=batch,
            prompt_tokens=prompt_tokens,
            layer_time_ratio=self.layer_time_ratio(model, configuration.weights),
        )
        roofline = self._calibration.roofline(
            configuration.weights, configuration.tp, online=self._online, across=across
        )
        # The time of a token is linear in the context, whose mean is the prompt plus half of the output.
        short_s = float(token_s(ops, roofline, prompt_tokens))
        per_context_token_s = float(token_s(ops, roofline, prompt_tokens + 1)) - short_s
        return _Times(float(first_token_s(ops, roofline)), short_s, per_context_token_s / 2)


def layer_time_ratio(measured: Iterable[tuple[OpCounts, int, float]], roofline: RooflineParameters) -> float:
    """Return the median logarithm of measured over predicted time of a layer, on one GPU.

    Args:
        measured: operation counts, output tokens, and the measured time of the second layer in seconds.
            Single values are noisy, hence the median; values that noise made negative are left out.
        roofline: the parameters at TP 1.
    """
    logs = [
        math.log(measured_s / _second_layer_s(ops, roofline, output_tokens))
        for ops, output_tokens, measured_s in measured
        if measured_s > 0
    ]
    return median(logs) if logs else 0.0


def _second_layer_s(ops: OpCounts, roofline: RooflineParameters, output_tokens: int) -> float:
    two_layers_s, one_layer_s = (latency_s(replace(ops, layers=layers), roofline, output_tokens) for layers in (2, 1))
    return float(two_layers_s - one_layer_s)


def measured_layers(
    fingerprints: Fingerprints,
    model: ModelSpec,
    weights: WeightType,
    *,
    prompt_tokens: int,
) -> Iterator[tuple[OpCounts, int, float]]:
    """Yield operation counts, output tokens and seconds of a layer, from all fingerprints on one GPU.

    Args:
        fingerprints: fingerprints of the model.
        model: the model.
        weights: the weight type to select; batch sizes and KV types are not selected.
        prompt_tokens: prompt length of the fingerprints.
    """
    for at, fingerprint in fingerprints.items():
        if (at.tp, at.pp, at.weights) == (1, 1, weights):
            ops = op_counts(model, at.kv, tp=1, pp=1, batch=at.batch_size, prompt_tokens=prompt_tokens)
            for output_tokens in OUTPUTS:  # at these lengths the constants give exactly the measured times
                yield ops, output_tokens, fingerprint.ttft_layer_s + output_tokens * fingerprint.tpot_layer_s
