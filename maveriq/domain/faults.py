"""Faults and removals of endpoints: `gpu=3@600s,for=120s`, `deployment=2@900s`, `endpoint=2@900s`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from maveriq.errors import InputError
from maveriq.units import Micros, micros, seconds


class FaultTarget(StrEnum):
    """What fails."""

    GPU = "gpu"
    DEPLOYMENT = "deployment"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A GPU or a deployment's engine fails at an instant, for a while or for good (`for_us` None).

    Raises:
        InputError: a number or a time that is negative.
    """

    target: FaultTarget
    target_id: int
    at_us: Micros
    for_us: Micros | None = None

    def __post_init__(self) -> None:
        if self.target_id < 0 or self.at_us < 0 or (self.for_us is not None and self.for_us < 0):
            raise InputError(f"fault of {self.target} {self.target_id}: number and times must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """An endpoint is removed at an instant.

    Raises:
        InputError: a number below 1 or a negative time.
    """

    endpoint_id: int
    at_us: Micros

    def __post_init__(self) -> None:
        if self.endpoint_id < 1 or self.at_us < 0:
            raise InputError(f"removal of endpoint {self.endpoint_id}: endpoints count from 1 and times from 0")


_FAULT = re.compile(
    r"(?P<target>gpu|deployment)=(?P<id>\d{1,9})@(?P<at>\d{1,9}(\.\d+)?)s?(,for=(?P<for>\d{1,9}(\.\d+)?)s?)?"
)

_REMOVAL = re.compile(r"endpoint=(?P<id>\d{1,9})@(?P<at>\d{1,9}(\.\d+)?)s?")


def parse_fault(text: str) -> Fault:
    """Read one fault; times are seconds since the run's start.

    Raises:
        InputError: it is written otherwise.
    """
    match = _FAULT.fullmatch(text.replace(" ", ""))
    if not match:
        raise InputError(f"cannot read the fault {text!r}; write gpu=3@600s,for=120s or deployment=2@900s")
    return Fault(
        target=FaultTarget(match["target"]),
        target_id=int(match["id"]),
        at_us=micros(float(match["at"])),
        for_us=_duration(match["for"]),
    )


def _duration(text: str | None) -> Micros | None:
    return None if text is None else micros(float(text))


def parse_removal(text: str) -> Removal:
    """Read one removal; the time is seconds since the run's start.

    Raises:
        InputError: it is written otherwise.
    """
    match = _REMOVAL.fullmatch(text.replace(" ", ""))
    if not match:
        raise InputError(f"cannot read the removal {text!r}; write endpoint=2@900s")
    return Removal(endpoint_id=int(match["id"]), at_us=micros(float(match["at"])))


def check_removal(removal: Removal, *, requested_us: Sequence[Micros]) -> None:
    """Refuse the removal of an endpoint that does not exist at that time.

    Raises:
        InputError: no such endpoint at that time.
    """
    if removal.endpoint_id > len(requested_us):
        raise InputError(f"removal of endpoint {removal.endpoint_id}: the run has endpoints 1 to {len(requested_us)}")
    requested_s = seconds(requested_us[removal.endpoint_id - 1])
    if removal.at_us <= requested_us[removal.endpoint_id - 1]:
        raise InputError(f"removal of endpoint {removal.endpoint_id}: it is not asked for before {requested_s:g} s")


def check_fault(fault: Fault, *, gpus: int, requested_us: Sequence[Micros], end_us: Micros) -> None:
    """Refuse a fault without a target.

    Args:
        fault: the fault.
        gpus: of the cluster.
        requested_us: when each deployment is requested.
        end_us: when the run ends at the latest.

    Raises:
        InputError: no such GPU or deployment, or not at that time.
    """
    what = f"fault of {'GPU' if fault.target is FaultTarget.GPU else 'deployment'} {fault.target_id}"
    if fault.at_us > end_us:
        raise InputError(f"{what} at {seconds(fault.at_us):g} s: the run ends by {seconds(end_us):g} s")
    if fault.target is FaultTarget.GPU and fault.target_id >= gpus:
        raise InputError(f"fault of GPU {fault.target_id}: the cluster has GPUs 0 to {gpus - 1}")
    if fault.target is FaultTarget.DEPLOYMENT and not 1 <= fault.target_id <= len(requested_us):
        raise InputError(f"fault of deployment {fault.target_id}: the run has deployments 1 to {len(requested_us)}")
    if fault.target is FaultTarget.DEPLOYMENT and fault.at_us < requested_us[fault.target_id - 1]:
        requested_s = seconds(requested_us[fault.target_id - 1])
        raise InputError(f"{what} at {seconds(fault.at_us):g} s: it is not asked for before {requested_s:g} s")


def notes_on_faults(faults: Iterable[Fault], deployments: Collection[int]) -> list[str]:
    """Return a note for each fault that hit nothing, because its deployment was never made.

    Before a run it is not known how many replicas a policy will choose.

    Args:
        faults: of the run.
        deployments: the numbers of all that there were.
    """
    return [
        f"fault of deployment {fault.target_id} at {seconds(fault.at_us):g} s hit nothing: the run made deployments "
        f"{min(deployments)} to {max(deployments)}"
        for fault in faults
        if fault.target is FaultTarget.DEPLOYMENT and deployments and fault.target_id not in deployments
    ]
