"""Reading faults as a user writes them: `gpu=3@600s,for=120s`, `deployment=2@900s`."""

from __future__ import annotations

import re

from maveriq.domain.faults import Fault, FaultTarget
from maveriq.errors import InputError
from maveriq.units import Micros, micros

_FAULT = re.compile(
    r"(?P<target>gpu|deployment)=(?P<id>\d{1,9})@(?P<at>\d{1,9}(\.\d+)?)s?(,for=(?P<for>\d{1,9}(\.\d+)?)s?)?"
)


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


def check_fault(fault: Fault, *, gpus: int, deployments: int) -> None:
    """Refuse a fault of something that the run cannot have.

    Raises:
        InputError: no such GPU, or a deployment's number beyond those asked for.
    """
    if fault.target is FaultTarget.GPU and fault.target_id >= gpus:
        raise InputError(f"fault of GPU {fault.target_id}: the cluster has GPUs 0 to {gpus - 1}")
    if fault.target is FaultTarget.DEPLOYMENT and not 1 <= fault.target_id <= deployments:
        raise InputError(f"fault of deployment {fault.target_id}: the run has deployments 1 to {deployments}")
