"""What a user does to a run besides sending requests: faults, and the removal of endpoints."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from maveriq.errors import InputError
from maveriq.units import Micros


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
    """A developer takes an endpoint away at an instant.

    Raises:
        InputError: a number or a time that cannot be.
    """

    endpoint_id: int
    at_us: Micros

    def __post_init__(self) -> None:
        if self.endpoint_id < 1 or self.at_us < 0:
            raise InputError(f"removal of endpoint {self.endpoint_id}: endpoints count from 1 and times from 0")
