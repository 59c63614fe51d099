"""The kinds of devices that engines compute on."""

from __future__ import annotations

from maveriq.compat import StrEnum
from maveriq.errors import UnknownNameError


class Device(StrEnum):
    """What an engine computes on."""

    CUDA = "cuda"
    CPU = "cpu"

    @classmethod
    def named(cls, text: str) -> Device:
        """Return the kind of a device such as `cuda:0`.

        Raises:
            UnknownNameError: it is none.
        """
        try:
            return cls(text.partition(":")[0])
        except ValueError:
            raise UnknownNameError("device", text, [device.value for device in cls]) from None

    def __str__(self) -> str:
        return {Device.CUDA: "a CUDA GPU", Device.CPU: "a CPU"}[self]
