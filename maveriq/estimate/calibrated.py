"""The calibrated estimator: a roofline with figures fitted to a kind of GPU, and each model's own fingerprints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

from maveriq.domain.models import ModelSpec, WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.estimate import coverage
from maveriq.estimate.calibration_file import Calibration, op_counts, read_calibration, require
from maveriq.estimate.estimator import ServiceEstimate
from maveriq.estimate.fingerprints import OUTPUTS, Fingerprints
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.estimate.memory import MemoryEstimate, estimate_memory, is_measured, memory_margin
from maveriq.estimate.roofline import OpCounts, RooflineParameters, first_token_s, latency_s, token_s
from maveriq.units import Bytes, bytes_from_gib


def share_across(gpu_ids: Sequence[int], tp: int, gpus_per_socket: int) -> float:
    """Return the share of pipeline stages whose GPUs hang at several sockets."""
    stages = [gpu_ids[first : first + tp] for first in range(0, len(gpu_ids), tp)]
    return sum(len({gpu // gpus_per_socket for gpu in stage}) > 1 for stage in stages) / len(stages)


def in_shared_process(configuration: ParallelConfig) -> bool:
    """Say whether an engine runs in the host process that all such engines share, and so has neighbours.

    One of several GPUs is started as processes of its own, one a GPU; it neither disturbs others nor
    is disturbed by them.
    """
    return configuration.gpus == 1


class _Times(NamedTuple):
    """Times of a request: the first token, then tokens that cost more the longer the context is."""

    first_s: float
    token_s: float
    per_output_token_s: float


class CalibratedEstimator:
    """Latency and memory by `physics` and `footprint`.

    What is fitted is common to all models of a kind of GPU; of the model itself it takes the
    shape, how much slower or faster a layer ran in its fingerprint than the law says, and the
    memory its fingerprints held.
    """

    def __init__(self, profile: HardwareProfile, calibration: Calibration, *, served: bool) -> None:
        """Make one of a calibration.

        Args:
            profile: whose fingerprints describe the models.
            calibration: fitted figures.
            served: answer for the live system; else for the benchmark that the ground truth was measured with.
        """
        self._profile = profile
        self._calibration = calibration
        self._served = served
        # Caches; the key of times is model, configuration, batch, prompt tokens and the share of stages across sockets.
        self._times: dict[tuple[ModelSpec, ParallelConfig, int, int, float], _Times] = {}
        self._layer_time_ratio: dict[tuple[ModelSpec, WeightType], float] = {}

    @classmethod
    def serving(cls, profile: HardwareProfile, *, without_run: str | None = None) -> CalibratedEstimator:
        """Return the one that answers for the live system, for planning and simulating.

        Args:
            profile: which names the calibration.
            without_run: a recorded run that the figures of the live system must not have seen.

        Raises:
            InputError: the profile has no calibration, or no such run was recorded.
        """
        path = require(profile.calibrated, profile.name)
        return cls(profile, read_calibration(path, without_run=without_run), served=True)

    @classmethod
    def benchmarked(cls, profile: HardwareProfile, *, without_model: str | None = None) -> CalibratedEstimator:
        """Return the one that answers for the benchmark, to be compared with its tables.

        Args:
            profile: which names the calibration.
            without_model: a model whose ground truth the figures must not have seen.

        Raises:
            InputError: the profile has no calibration.
        """
        path = require(profile.calibrated, profile.name)
        return cls(profile, read_calibration(path, without_model=without_model), served=False)

    @property
    def name(self) -> str:
        """The name by which `--estimator` and `--service-times` know it."""
        return "calibrated"

    def memory_margin(self, model: ModelSpec, configuration: ParallelConfig) -> float:
        """In 90 of 100 cases memory lies between the estimate divided by and times 1 plus this margin."""
        margins, lengths = self._calibration.margins, self._default_lengths()
        return memory_margin(margins, self._held(model, configuration, **lengths))

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

        Stages whose GPUs hang at several sockets of the host sum up more slowly.

        Raises:
            InputError: as `service`.
        """
        live = self._calibration.served if self._served else None
        across = share_across(gpu_ids, configuration.tp, live.gpus_per_socket) if live else 0.0
        return self._service(model, configuration, prompt_tokens, output_tokens, batch, across=across)

    def has_neighbours(self, configuration: ParallelConfig) -> bool:
        """Say whether an engine shares a process of the host with others like it."""
        return self._served and in_shared_process(configuration)

    def wait_s(self, model: ModelSpec, configuration: ParallelConfig, *, neighbours: int) -> float:
        """Return how much longer a token takes while so many neighbours are busy."""
        live = self._calibration.served
        if not live or not neighbours or not self.has_neighbours(configuration):
            return 0.0
        return 1e-6 * (model.layers * live.contention.layer_us + (neighbours - 1) * live.contention.turn_us)

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
        if min(prompt_tokens, output_tokens, batch) < 1:
            raise InputError(
                f"{model.name}: prompt tokens, output tokens and batch must be at least 1, "
                f"not {prompt_tokens}, {output_tokens} and {batch}"
            )
        key = (model, configuration, batch, prompt_tokens, across)
        times = self._times.get(key)
        if times is None:
            times = self._times[key] = self._request_times(*key)
        tpot_s = times.token_s + output_tokens * times.per_output_token_s
        return ServiceEstimate(
            ttft_s=times.first_s - tpot_s,
            tpot_s=tpot_s,
            output_tokens=output_tokens,
            margin=self._margin(configuration.tp, batch),
        )

    def layer_time_ratio(self, model: ModelSpec, weights: WeightType) -> float:
        """Return a layer's time over what the law says, as far as its fingerprints are believed."""
        found = self._layer_time_ratio.get((model, weights))
        if found is None:
            law = self._calibration.law(weights, 1)
            seen = layer_time_ratio(
                measured_layers(
                    self._profile.fingerprints.of(model.name), model, weights, prompt_tokens=self._profile.prompt_tokens
                ),
                law,
            )
            found = self._layer_time_ratio[model, weights] = math.exp(self._calibration.trust * seen)
        return found

    def memory(self, model: ModelSpec, configuration: ParallelConfig) -> Bytes:
        """Estimate the memory over all GPUs of a deployment, at its configuration's batch size.

        The KV cache is taken to hold prompts as long as the profile's, and as many output tokens as
        the calibration says.

        Raises:
            InputError: the configuration has a reason in `why_not`.
        """
        return self.memory_with(model, configuration, **self._default_lengths())

    def memory_with(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int
    ) -> Bytes:
        """Estimate the memory as `memory`, where each request of a batch has come to such lengths.

        Raises:
            InputError: the configuration has a reason in `why_not`.
        """
        seen = self._held(model, configuration, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        return bytes_from_gib(seen.gib)

    def _default_lengths(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._profile.prompt_tokens,
            "output_tokens": self._calibration.memory.output_tokens,
        }

    def _held(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int
    ) -> MemoryEstimate:
        self._refuse(model, configuration)
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
        self._refuse(model, configuration)
        asked = op_counts(
            model,
            configuration.kv,
            tp=configuration.tp,
            pp=configuration.pp,
            batch=batch,
            prompt_tokens=prompt_tokens,
            layer_time_ratio=self.layer_time_ratio(model, configuration.weights),
        )
        law = self._calibration.law(configuration.weights, configuration.tp, served=self._served, across=across)
        # Time is linear in the context, whose mean is the prompt and half of the output.
        short_s = float(token_s(asked, law, prompt_tokens))
        per_context_token_s = float(token_s(asked, law, prompt_tokens + 1)) - short_s
        return _Times(float(first_token_s(asked, law)), short_s, per_context_token_s / 2)

    def _margin(self, tp: int, batch: int) -> float:
        margins = self._calibration.margins
        return (margins.single if batch == 1 else margins.batched)[str(tp)]

    def _refuse(self, model: ModelSpec, configuration: ParallelConfig) -> None:
        reason = self.why_not(model, configuration)
        if reason is not None:
            raise InputError(f"{model.name} with {configuration} cannot be estimated: {reason}")


def layer_time_ratio(seen: Iterable[tuple[OpCounts, int, float]], law: RooflineParameters) -> float:
    """Return the median logarithm of a layer's measured time over what the law says, on one GPU.

    Args:
        seen: what was asked of a layer, output tokens, and the time that the second layer took, in
            seconds. Each alone is noisy, hence the median; noise that went below zero is left out.
        law: at TP 1.
    """
    logs = [
        math.log(measured_s / _second_layer_s(asked, law, output_tokens))
        for asked, output_tokens, measured_s in seen
        if measured_s > 0
    ]
    return median(logs) if logs else 0.0


def _second_layer_s(asked: OpCounts, law: RooflineParameters, output_tokens: int) -> float:
    two, one = (latency_s(replace(asked, layers=layers), law, output_tokens) for layers in (2, 1))
    return float(two - one)


def measured_layers(
    fingerprints: Fingerprints,
    model: ModelSpec,
    weights: WeightType,
    *,
    prompt_tokens: int,
) -> Iterator[tuple[OpCounts, int, float]]:
    """Yield what a model's fingerprints on one GPU say of a layer, whatever their batch size and KV type.

    Args:
        fingerprints: the model's.
        model: whose layer.
        weights: its weight type.
        prompt_tokens: of the prompts that the fingerprints were taken with.
    """
    for at, fingerprint in fingerprints.items():
        if (at.tp, at.pp, at.weights) == (1, 1, weights):
            asked = op_counts(model, at.kv, tp=1, pp=1, batch=at.batch_size, prompt_tokens=prompt_tokens)
            for output_tokens in OUTPUTS:  # the constants give back exactly what was measured at these
                yield asked, output_tokens, fingerprint.ttft_layer_s + output_tokens * fingerprint.tpot_layer_s
