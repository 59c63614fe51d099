"""Policies by name, and placement rules of users by `file.py:function` or `module:function`."""

from __future__ import annotations

import importlib
import importlib.util
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from maveriq.domain.cluster import ClusterView, GpuView
from maveriq.domain.deployments import Cost, EndpointSpec
from maveriq.errors import InputError, MaveriqError, UnknownNameError
from maveriq.estimate.estimator import Estimator
from maveriq.files import exists, open_regular_file
from maveriq.policy.baselines import BALANCED, BASELINES, BalancedPolicy, replicas_policy
from maveriq.policy.configuration import AccuracyLookup
from maveriq.policy.load_ranking import EngineEstimates
from maveriq.policy.maveriq import MaverIQ, PlacementRule, TieBreak, hybrid, least_loaded_first, packing
from maveriq.policy.policy import Policy
from maveriq.policy.surprises import EvidenceLookup, no_evidence

RULES: Mapping[str, Callable[[float], PlacementRule | None]] = MappingProxyType(
    {
        "hybrid": hybrid,
        "packing": lambda _threshold: packing,
        "llf": lambda _threshold: least_loaded_first,
        "none": lambda _threshold: None,
    }
)
"""Placement rules by name, each made from the packing threshold; None keeps the GPUs with most free memory."""


def make_policy(
    name: str,
    *,
    estimator: Estimator,
    accuracy: AccuracyLookup,
    packing_threshold: float,
    tie_break: TieBreak = TieBreak.GPU_ID,
    evidence: EvidenceLookup = no_evidence,
    cost: Cost = Cost.MONEY,
    engines: EngineEstimates | None = None,
    endpoints: Sequence[EndpointSpec] = (),
    idle: ClusterView | None = None,
    others: Sequence[str] = (),
) -> Policy:
    """Return the policy of a name.

    Args:
        name: `hybrid`, `packing`, `llf`, `none`, `balanced`, `replicas`, or `module:function` or `file.py:function`
            for a user's placement rule (docs/extending.md).
        estimator: what the policy plans with.
        accuracy: measured accuracy of quantised models.
        packing_threshold: for `hybrid`, 0 to 1; must be valid whatever the policy is.
        tie_break: for the rules that come with maveriq; a rule of one's own always gets the GPUs by id.
        evidence: measured latencies, for notes on decisions.
        cost: what the intent `min-cost` counts.
        engines: estimates of continuous engines, None where there are none.
        endpoints: what will be deployed, in this order; `replicas` chooses by it.
        idle: the GPUs before anything is deployed, likewise.
        others: names of policies that another module makes, for the message about an unknown name.

    Raises:
        InputError: no such policy, a rule that cannot be loaded, a threshold outside 0 to 1.
    """
    if name in BASELINES:
        placer = MaverIQ(name=name, estimator=estimator, accuracy=accuracy, rule=None, cost=cost)
        if name == BALANCED:
            return BalancedPolicy(placer=placer)
        if idle is None:
            raise InputError(f"policy {name!r} chooses by all models of a run, which are not known here; give another")
        return replicas_policy(placer, endpoints, idle)
    hybrid(packing_threshold)  # refuse a bad threshold even if this policy does not use it
    if ":" in name:
        rule: PlacementRule | None = _load_rule(name)
        tie_break = TieBreak.GPU_ID
    elif name in RULES:
        rule = RULES[name](packing_threshold)
    else:
        raise UnknownNameError(
            "policy",
            name,
            (*RULES, *BASELINES, *others),
            hint="or a rule of your own as file.py:function",
        )
    return MaverIQ(
        name=name,
        estimator=estimator,
        accuracy=accuracy,
        rule=rule,
        tie_break=tie_break,
        evidence=evidence,
        cost=cost,
        engines=engines,
    )


def policy_of_rule(
    rule: PlacementRule,
    *,
    estimator: Estimator,
    accuracy: AccuracyLookup,
    evidence: EvidenceLookup = no_evidence,
    cost: Cost = Cost.MONEY,
    engines: EngineEstimates | None = None,
) -> Policy:
    """Return the policy that places by a user's rule; it has the name of the function.

    Args:
        rule: orders the GPUs.
        estimator: what the policy plans with.
        accuracy: measured accuracy of quantised models.
        evidence: measured latencies, for notes on decisions.
        cost: what the intent `min-cost` counts.
        engines: as in `make_policy`.
    """
    name = getattr(rule, "__name__", type(rule).__name__)
    return MaverIQ(
        name=name,
        estimator=estimator,
        accuracy=accuracy,
        rule=_guarded(rule, name),
        evidence=evidence,
        cost=cost,
        engines=engines,
    )


def _load_rule(name: str) -> PlacementRule:
    """Import `module:function` or `file.py:function`; its errors name the policy."""
    place, _, function = name.rpartition(":")
    if place.endswith(".py") and not exists(Path(place)):
        raise InputError(f"policy {name!r}: {place} does not exist; check the path")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # user code can raise anything
        raise InputError(
            f"policy {name!r}: {place or 'nothing'} cannot be imported: {_error_with_line(error)}"
        ) from None
    rule = getattr(module, function, None)
    if not callable(rule):
        raise InputError(f"policy {name!r}: {place} has no function {function!r}; name one that it defines")
    return _guarded(rule, name)


def _guarded(rule: PlacementRule, name: str) -> PlacementRule:
    """Return the rule with a check: an error in it, or an answer that is not its GPUs, names the policy."""

    def order(gpus: Sequence[GpuView]) -> list[GpuView]:
        try:
            answer: list[Any] = list(rule(gpus))
        except (Exception, SystemExit) as error:
            raise MaveriqError(f"policy {name!r} failed: {_error_with_line(error)}; it must return GPUs") from error
        given = set(gpus)
        for gpu in answer:
            if not (isinstance(gpu, GpuView) and gpu in given):
                raise MaveriqError(f"policy {name!r} returned {gpu!r:.60}, which is not one of the GPUs it was given")
        if len({gpu.gpu_id for gpu in answer}) < len(answer):
            raise MaveriqError(f"policy {name!r} returned a GPU twice; each GPU takes one shard")
        if len(answer) < len(gpus):
            raise MaveriqError(
                f"policy {name!r} returned {len(answer)} of {len(gpus)} GPUs; a rule must order them all"
            )
        return answer

    return order


def _error_with_line(error: BaseException) -> str:
    """Return an error as text, with the last line of the user's file before it, if any."""
    ours = (__file__, importlib.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename not in ours and not frame.filename.startswith("<")]
    lines = [frame.lineno for frame in theirs if frame.filename == theirs[0].filename]  # without what it calls
    where = f" ({Path(theirs[0].filename).name}, line {lines[-1]})" if theirs else ""
    return f"{type(error).__name__}: {error}{where}"


class _SourceOnly(SourceFileLoader):
    """Loads a source file, and writes no bytecode beside it: the folder is the user's."""

    def set_data(self, path: str, data: object, *, _mode: int = 0) -> None:
        """Write nothing."""


def _load_file(path: Path) -> ModuleType:
    open_regular_file(path, what="policy file").close()  # importing a pipe would wait, a device would never end
    spec = importlib.util.spec_from_file_location(path.stem, path, loader=_SourceOnly(path.stem, str(path)))
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
