"""The estimator of the MaverIQ paper (SC '25; SPEC 3): four fingerprints and seven sets of exponents."""

from __future__ import annotations

from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.estimate import coverage
from maveriq.estimate.estimator import Basis, ServiceEstimate, check_estimable
from maveriq.estimate.fingerprints import (
    ParallelLatency,
    at_batch,
    parallel_memory_gib,
)
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.units import Bytes, bytes_from_gib


class PaperEstimator:
    """Latency and memory by the paper's formulas, exactly.

    The formulas ignore the prompt length, so estimates apply to prompts about as long as the
    profile's. Fingerprints are looked up by the model's name; the layer count is the model's own.

    Nothing is smoothed, so noise in the fingerprints shows: below ten output tokens a latency can
    be negative, and at TP 8 it can fall over the first output tokens before it grows.
    """

    def __init__(self, profile: HardwareProfile) -> None:
        self._profile = profile
        # A cache by model name, layers and configuration.
        self._latencies: dict[tuple[str, int, ParallelConfig], tuple[ParallelLatency, ParallelLatency | None]] = {}

    @property
    def name(self) -> str:
        """The name by which `--estimator` and `--service-times` know it."""
        return "paper"

    def why_not(self, model: ModelSpec, configuration: ParallelConfig) -> str | None:
        """Return why a configuration cannot be estimated or run here, None if it can."""
        reason = coverage.why_not(self._profile, model, configuration, _needed(configuration))
        if reason is not None:
            return reason
        if configuration.batch_size > 1 and not self._has_batch_two(model, configuration):
            return f"no fingerprint of batch 2 in profile {self._profile.name}, which larger batches need"
        return None

    def service(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int, batch: int
    ) -> ServiceEstimate:
        """Estimate one batch of `batch` equal requests that start together on an idle engine.

        The formula is not exactly linear in output tokens. The estimate is the straight line
        through its values at one token and at `output_tokens` tokens, or at two if that is one.

        Raises:
            InputError: the configuration has a reason in `why_not`, fewer than one output token
                or request, or a larger batch and the profile has no fingerprint of batch 2.
        """
        del prompt_tokens  # the formula ignores it
        if output_tokens < 1 or batch < 1:
            raise InputError(
                f"{model.name}: output tokens and batch must be at least 1, not {output_tokens} and {batch}"
            )
        batch_one, batch_two = self._latency(model, configuration)
        longest = max(2, output_tokens)
        first_s, last_s = batch_one.at(1), batch_one.at(longest)
        if batch > 1:
            if batch_two is None:
                raise InputError(self._no_batch(model, configuration, batch))
            first_s, last_s = at_batch(first_s, batch_two.at(1), batch), at_batch(last_s, batch_two.at(longest), batch)
        tpot_s = (last_s - first_s) / (longest - 1)
        return ServiceEstimate(
            ttft_s=first_s - tpot_s, tpot_s=tpot_s, output_tokens=output_tokens, basis=Basis.MEASURED
        )

    def memory(self, model: ModelSpec, configuration: ParallelConfig) -> Bytes:
        """Estimate the memory over all GPUs of a deployment, at its configuration's batch size.

        Raises:
            InputError: as `service`.
        """
        check_estimable(self, model, configuration)
        batch = configuration.batch_size
        memory_gib = self._memory_gib(model, configuration, 1)
        if batch > 1:
            memory_gib = at_batch(memory_gib, self._memory_gib(model, configuration, 2), batch)
        return bytes_from_gib(memory_gib)

    def _latency(
        self, model: ModelSpec, configuration: ParallelConfig
    ) -> tuple[ParallelLatency, ParallelLatency | None]:
        """Return latency at batch 1, and at batch 2 if there are fingerprints of it."""
        key = (model.name, model.layers, configuration)
        found = self._latencies.get(key)
        if found is None:
            check_estimable(self, model, configuration)
            batch_two = self._scaled(model, configuration, 2) if self._has_batch_two(model, configuration) else None
            found = self._latencies[key] = (self._scaled(model, configuration, 1), batch_two)
        return found

    def _scaled(self, model: ModelSpec, configuration: ParallelConfig, batch: int) -> ParallelLatency:
        table = self._profile.fingerprints
        fingerprints = table.of(model.name)
        tp2 = fingerprints.get(configuration.at(2, 1, batch))
        return ParallelLatency.scaled(
            fingerprints[configuration.at(1, 1, batch)].line(model.layers),
            None if tp2 is None else tp2.line(model.layers),
            table.exponents[configuration.weights, configuration.kv],
            tp=configuration.tp,
            pp=configuration.pp,
        )

    def _memory_gib(self, model: ModelSpec, configuration: ParallelConfig, batch: int) -> float:
        fingerprints = self._profile.fingerprints.of(model.name)
        tp2, pp2 = fingerprints.get(configuration.at(2, 1, batch)), fingerprints.get(configuration.at(1, 2, batch))
        return parallel_memory_gib(
            fingerprints[configuration.at(1, 1, batch)].memory_gib(model.layers),
            None if tp2 is None else tp2.memory_gib(model.layers),
            None if pp2 is None else pp2.memory_gib(model.layers),
            tp=configuration.tp,
            pp=configuration.pp,
        )

    def _has_batch_two(self, model: ModelSpec, configuration: ParallelConfig) -> bool:
        fingerprints = self._profile.fingerprints.of(model.name)
        return all(needed in fingerprints for needed in _needed(configuration, batch=2))

    def _no_batch(self, model: ModelSpec, configuration: ParallelConfig, batch: int) -> str:
        return (
            f"{model.name} with {configuration}: batch {batch} needs fingerprints of batch 2, which profile "
            f"{self._profile.name} has not; take batch 1 or another profile"
        )


def _needed(configuration: ParallelConfig, batch: int = 1) -> list[ParallelConfig]:
    """Return the configurations whose fingerprints an estimate needs."""
    needed = [configuration.at(1, 1, batch)]
    if configuration.tp > 1:
        needed.append(configuration.at(2, 1, batch))
    if configuration.pp > 1:
        needed.append(configuration.at(1, 2, batch))
    return needed
