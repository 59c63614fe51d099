"""The estimator of a cluster with several kinds of GPU, or several nodes.

Each kind has an estimator of its own, which knows nothing of the others and of the network between nodes. A
configuration names its kind (`ParallelConfig.gpu`) and how often a stage hands over to another node (`network_hops`).
In every step each of these hand-overs takes longer than one within a node, by the difference of network and link.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from maveriq.domain.cluster import Cluster
from maveriq.domain.gpu_kinds import gpu_sheets
from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.estimate.cluster_profiles import ClusterProfiles
from maveriq.estimate.engine_presets import EnginePreset
from maveriq.estimate.estimator import (
    ContentionAware,
    Estimator,
    SequenceAware,
    ServiceEstimate,
    own_estimator,
    service_at,
)
from maveriq.estimate.hand_over import UNKNOWN_NODE, Channel, network_channel, node_channel
from maveriq.estimate.registry import check_estimator_name, default_estimator, make_estimator, note_on_default
from maveriq.units import Bytes

_JOINED = "+"


@dataclass(frozen=True, slots=True, kw_only=True)
class KindEstimator:
    """What answers for GPUs of one kind.

    Args:
        estimator: answers for engines within a node.
        node: the way from stage to stage within a node.
        network: that between nodes.
    """

    estimator: Estimator
    node: Channel
    network: Channel

    def network_delay_s(self, model: ModelSpec, tokens: int) -> float:
        """Return how much longer the activations of `tokens` tokens take between nodes than within one."""
        sizes = (tokens, model.hidden_size)
        return max(0.0, self.network.hand_over_us(*sizes) - self.node.hand_over_us(*sizes)) / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterEstimator:
    """Estimates by the kind of GPU that a configuration names, and adds the network between nodes.

    Args:
        kinds: by name, that of the cluster's first GPU first.
        node_gpu_ids: the number of each GPU within its node.
    """

    kinds: Mapping[str, KindEstimator]
    node_gpu_ids: Sequence[int]

    @property
    def name(self) -> str:
        """The name of its estimators, or the names joined where they differ."""
        names = [kind.estimator.name for kind in self.kinds.values()]
        return names[0] if len(set(names)) == 1 else _JOINED.join(names)

    def of_kind(self, kind: str) -> Estimator:
        """Return the estimator of one kind, for configurations that name none; "" for the first."""
        return self.kinds[kind or next(iter(self.kinds))].estimator

    def why_not(self, model: ModelSpec, configuration: ParallelConfig) -> str | None:
        """Return why a configuration cannot be estimated, None if it can."""
        reason = self._why_no_kind(configuration)
        return reason or self._kind(configuration).estimator.why_not(model, _within_node(configuration))

    def service(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int, batch: int
    ) -> ServiceEstimate:
        """Estimate one batch, as `Estimator.service`.

        Raises:
            InputError: as the estimator of the kind.
        """
        kind = self._kind(configuration)
        service = kind.estimator.service(
            model,
            _within_node(configuration),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            batch=batch,
        )
        return _over_network(service, kind, model, configuration, prompt_tokens=prompt_tokens, batch=batch)

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

        Raises:
            InputError: as `service`.
        """
        kind = self._kind(configuration)
        in_node = [self.node_gpu_ids[gpu_id] for gpu_id in gpu_ids]
        service = service_at(kind.estimator, in_node)(
            model,
            _within_node(configuration),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            batch=batch,
        )
        return _over_network(service, kind, model, configuration, prompt_tokens=prompt_tokens, batch=batch)

    def memory(self, model: ModelSpec, configuration: ParallelConfig) -> Bytes:
        """Estimate the memory of a deployment, as `Estimator.memory`.

        Raises:
            InputError: as the estimator of the kind.
        """
        return self._kind(configuration).estimator.memory(model, _within_node(configuration))

    def why_no_room(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int
    ) -> str | None:
        """Return why a batch of requests of these lengths does not fit the KV cache; None if it does, or none knows.

        Raises:
            InputError: as the estimator of the kind.
        """
        estimator = own_estimator(self._kind(configuration).estimator, model)
        if not isinstance(estimator, SequenceAware):
            return None
        lengths = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
        return estimator.why_no_room(model, _within_node(configuration), **lengths)

    def shares_process(self, configuration: ParallelConfig) -> bool:
        """Return whether the engine shares a host process with other engines."""
        estimator = self._kind(configuration).estimator
        return isinstance(estimator, ContentionAware) and estimator.shares_process(_within_node(configuration))

    def contention_delay_s(self, model: ModelSpec, configuration: ParallelConfig, *, co_located: int) -> float:
        """Return how many seconds longer a token takes while `co_located` other engines are busy."""
        estimator = self._kind(configuration).estimator
        if not isinstance(estimator, ContentionAware):
            return 0.0
        return estimator.contention_delay_s(model, _within_node(configuration), co_located=co_located)

    def _kind(self, configuration: ParallelConfig) -> KindEstimator:
        reason = self._why_no_kind(configuration)
        if reason is not None:
            raise InputError(f"{configuration} cannot be estimated: {reason}")
        return self.kinds[configuration.gpu or next(iter(self.kinds))]

    def _why_no_kind(self, configuration: ParallelConfig) -> str | None:
        if len(self.kinds) > 1 and not configuration.gpu:
            return f"it does not say on which kind of GPU it runs: {', '.join(self.kinds)}"
        if configuration.gpu and configuration.gpu not in self.kinds:
            return f"the cluster has no {configuration.gpu}"
        return None


def _within_node(configuration: ParallelConfig) -> ParallelConfig:
    """Return a configuration as the estimators of one kind know it."""
    if not (configuration.gpu or configuration.network_hops):
        return configuration
    return replace(configuration, gpu="", network_hops=0)


def _over_network(
    service: ServiceEstimate,
    kind: KindEstimator,
    model: ModelSpec,
    configuration: ParallelConfig,
    *,
    prompt_tokens: int,
    batch: int,
) -> ServiceEstimate:
    hops = configuration.network_hops
    if not hops:
        return service
    first_s = hops * kind.network_delay_s(model, batch * prompt_tokens)
    token_s = hops * kind.network_delay_s(model, batch)
    return replace(service, ttft_s=service.ttft_s + first_s - token_s, tpot_s=service.tpot_s + token_s)


def estimator_names(name: str | None, profiles: ClusterProfiles, models: Collection[ModelSpec] = ()) -> dict[str, str]:
    """Return the name of the estimator of each kind of GPU.

    Args:
        name: an estimator's name, or one for each kind joined by `+`; None for the best that each profile has data for.
        profiles: the kinds.
        models: those that will be estimated; none where they are not known yet.

    Raises:
        UnknownNameError: there is no such estimator.
        InputError: several names, but not one for each kind.
    """
    if name is None:
        return {kind: default_estimator(profile, models) for kind, profile in profiles.by_kind.items()}
    names = name.split(_JOINED)
    for part in names:
        check_estimator_name(part)
    if len(names) not in (1, len(profiles.by_kind)):
        raise InputError(
            f"estimator {name!r} has {len(names)} names, and the cluster {len(profiles.by_kind)} kinds of GPU "
            f"({', '.join(profiles.by_kind)}); give one name, or one for each kind"
        )
    return dict(zip(profiles.by_kind, names if len(names) > 1 else names * len(profiles.by_kind), strict=True))


def estimator_for(
    cluster: Cluster,
    profiles: ClusterProfiles,
    name: str | None = None,
    engine: EnginePreset | None = None,
    models: Collection[ModelSpec] = (),
) -> Estimator:
    """Return the estimator for the GPUs of a cluster.

    Args:
        cluster: its kinds and nodes.
        profiles: what is known of each kind.
        name: as for `estimator_names`.
        engine: the engine that is estimated where nothing was measured; None for the default.
        models: as for `estimator_names`.

    Raises:
        UnknownNameError: there is no such estimator.
        InputError: a profile has no data for it, or a wrong number of names.
    """
    names = estimator_names(name, profiles, models)
    made = {
        kind: make_estimator(names[kind], profiles.by_kind[kind], engine, node_gpus=cluster.largest_node(kind))
        for kind in cluster.kinds
    }
    return on_cluster(made, cluster)


def on_cluster(estimators: Mapping[str, Estimator], cluster: Cluster) -> Estimator:
    """Return the estimators of the kinds of a cluster as one, with its network; a single one bare without it."""
    if len(estimators) == 1 and not cluster.has_network:
        return next(iter(estimators.values()))
    first_of_node: dict[int, int] = {}
    for gpu in cluster.gpus:
        first_of_node.setdefault(gpu.node, gpu.gpu_id)
    return ClusterEstimator(
        kinds={
            kind: KindEstimator(
                estimator=estimator,
                node=node_channel(gpu_sheets()[kind]) if kind in gpu_sheets() else UNKNOWN_NODE,
                network=network_channel(cluster.network_gbps(kind)),
            )
            for kind, estimator in estimators.items()
        },
        node_gpu_ids=[gpu.gpu_id - first_of_node[gpu.node] for gpu in cluster.gpus],
    )


def notes_on_defaults(profiles: ClusterProfiles, models: Collection[ModelSpec] = ()) -> tuple[str, ...]:
    """Return a note for the user on each kind whose default estimator is not the calibrated one."""
    return tuple(note for profile in profiles.by_kind.values() if (note := note_on_default(profile, models)))
