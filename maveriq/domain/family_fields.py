"""Fields of a decoder's configuration, with what its family implies where they are absent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from maveriq.domain.config_fields import MAX_WIDTH, Fields
from maveriq.domain.decoder_families import FAMILIES, Family, Switch


@dataclass(frozen=True, slots=True)
class FamilyFields:
    """Fields of a decoder's configuration.

    Args:
        fields: the fields.
        architecture: the family's name.
        family: what it implies.
        nested: whether it is a part of a multimodal configuration, which leaves out what equals the family's defaults.
    """

    fields: Fields
    architecture: str
    family: Family
    nested: bool

    @property
    def known(self) -> bool:
        """Whether the family is known, so that it has no part that it is not known to have."""
        return self.architecture in FAMILIES

    def count(self, keys: Sequence[str], maximum: int = MAX_WIDTH) -> int:
        """Return what these keys say, or what a nested part leaves out because the family implies it.

        Raises:
            InputError: neither says anything, or a value is not a positive whole number.
        """
        found = self.optional_count(keys, maximum)
        return self.fields.count(keys, maximum=maximum) if found is None else found

    def optional_count(self, keys: Sequence[str], maximum: int = MAX_WIDTH) -> int | None:
        """Return what these keys say, or what a nested part leaves out; None if neither says anything.

        Raises:
            InputError: a value is not a positive whole number.
        """
        found = self.fields.optional_count(keys, maximum=maximum)
        if found is None and self.nested:
            return next((value for key, value in self.family.part_defaults.items() if key in keys), None)
        return found

    def is_on(self, switch: Switch) -> bool:
        """Return whether a property is switched on.

        Raises:
            InputError: its key is neither true nor false.
        """
        return self.fields.flag(switch.key, default=switch.default) if switch.key else switch.default
