"""The hardware profiles of a cluster: one for each kind of its GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from maveriq.domain.deployments import Cost
from maveriq.domain.gpu_kinds import gpu_sheet
from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.estimate.cluster_spec import gpu_kinds_in
from maveriq.estimate.fitted_profile import load_any_profile
from maveriq.estimate.full_models import MeasuredRatio
from maveriq.estimate.hardware_profile import (
    DEFAULT_PROFILE,
    HardwareProfile,
    StorageTypes,
    load_profile,
    read_accuracy,
)
from maveriq.estimate.sheet_profile import sheet_profile


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClusterProfiles:
    """The profile of each kind of GPU, that of the cluster's first GPU first.

    Configurations say by `ParallelConfig.gpu` which profile is theirs.
    """

    by_kind: Mapping[str, HardwareProfile]

    @property
    def main(self) -> HardwareProfile:
        """The profile that says what belongs to no GPU: dispatcher, load window, SLO bases, typical prompt."""
        return next(iter(self.by_kind.values()))

    @property
    def min_cost(self) -> Cost:
        """What the intent `min-cost` counts: money, unless the profiles of all kinds say otherwise."""
        counted = {profile.min_cost for profile in self.by_kind.values()}
        return counted.pop() if len(counted) == 1 else Cost.MONEY

    def of(self, configuration: ParallelConfig) -> HardwareProfile:
        """Return the profile of the GPUs of a configuration."""
        return self.by_kind[configuration.gpu] if configuration.gpu else self.main

    def accuracy(self, model_name: str, weights: WeightType, kv: KvType) -> float | None:
        """Return a model's accuracy from the first profile that has it: it does not depend on the GPU."""
        found = (profile.accuracy(model_name, weights, kv) for profile in self.by_kind.values())
        return next((percent for percent in found if percent is not None), None)

    def with_accuracy(self, table: Mapping[StorageTypes, float | None]) -> ClusterProfiles:
        """Return profiles that know the accuracy of further models."""
        return ClusterProfiles(by_kind={
            kind: replace(profile, facts=replace(profile.facts, accuracy={**profile.facts.accuracy, **table}))
            for kind, profile in self.by_kind.items()
        })  # fmt: skip

    def measured_ratio(
        self, model_name: str, configuration: ParallelConfig, other: ParallelConfig
    ) -> MeasuredRatio | None:
        """Return the measured latency of one configuration over that of another; None if there is none."""
        return self.of(configuration).full_models.ratio(model_name, configuration, other)

    def load_time_s(self, model: ModelSpec, configuration: ParallelConfig, gib_per_gpu: float) -> float:
        """Return how long an engine loads, as `HardwareProfile.load_time_s`."""
        return self.of(configuration).load_time_s(model, configuration, gib_per_gpu)


def profiles_for(name: str, gpus: str, accuracy: str | None = None) -> ClusterProfiles:
    """Return the hardware profiles for a cluster.

    Args:
        name: a profile's name or path, as `--profile` takes it: of GPUs of its own kind. Kinds without a profile have
            that of their data sheet.
        gpus: the cluster, as `--gpus` takes it.
        accuracy: a table of the accuracy of models, as `--accuracy` takes it: its rows count before the profile's.

    Raises:
        InputError: no such profile, table, cluster or kind of GPU, or a profile of a kind that the cluster has not.
    """
    profiles = _profiles_for(name, gpus)
    return profiles if accuracy is None else profiles.with_accuracy(read_accuracy(Path(accuracy)))


def _profiles_for(name: str, gpus: str) -> ClusterProfiles:
    named = load_any_profile(name)
    kinds = gpu_kinds_in(gpus)
    known = [named] if len(kinds) < 2 or name == DEFAULT_PROFILE else [named, load_profile(DEFAULT_PROFILE)]
    profiles = [_profile_of(kind, known) for kind in kinds] or [named]
    by_kind = {profile.gpu_kind: profile for profile in profiles}
    if name == DEFAULT_PROFILE or named.gpu_kind in by_kind:
        return ClusterProfiles(by_kind=by_kind)
    if len(by_kind) > 1:
        raise InputError(
            f"profile {named.name!r} was measured on {named.gpu_kind}, and cluster {gpus!r} has only "
            f"{', '.join(by_kind)}; leave --profile out, or name a profile of one of these"
        )
    return ClusterProfiles(by_kind={named.gpu_kind: named})  # GPUs of another kind are refused with the cluster


def _profile_of(kind: str, known: Sequence[HardwareProfile]) -> HardwareProfile:
    """Return the first known profile of a kind of GPU, else that of its data sheet."""
    own = next((profile for profile in known if profile.gpu_kind.casefold() == kind.casefold()), None)
    if own is not None:
        return own
    sheet = gpu_sheet(kind)
    return next((profile for profile in known if profile.gpu_kind == sheet.name), sheet_profile(sheet))
