"""Weight matrices of a layer, and checks of the counts that describe them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from maveriq.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """Equal weight matrices of a layer.

    Args:
        name: the module within its layer, by the names of transformers: `self_attn.q_proj`, `mlp.experts.up_proj`.
        inputs: values that it takes.
        outputs: values that it makes.
        copies: how many there are, as many as experts.
        active: how many of them a token passes.
        bias: whether it adds a bias.
        keeps_16_bits: whether no tool quantises it: routers and gates.
    """

    name: str
    inputs: int
    outputs: int
    copies: int = 1
    active: int = 1
    bias: bool = False
    keeps_16_bits: bool = False

    @property
    def weights(self) -> int:
        """Weights of all copies, without biases."""
        return self.copies * self.inputs * self.outputs

    @property
    def biases(self) -> int:
        """Values of the biases of all copies."""
        return self.copies * self.outputs if self.bias else 0

    @property
    def active_weights(self) -> int:
        """Weights and biases of the copies that a token passes."""
        return self.active * self.outputs * (self.inputs + self.bias)


def check_counts(part: object, names: Sequence[str], or_none: Sequence[str] = ()) -> None:
    """Check that fields are positive whole numbers.

    Args:
        part: what has the fields.
        names: the fields.
        or_none: fields that may be None too.

    Raises:
        InputError: one is not.
    """
    for name in (*names, *or_none):
        value = getattr(part, name)
        if name in or_none and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"decoder: {name} must be a positive whole number, not {value!r}")
