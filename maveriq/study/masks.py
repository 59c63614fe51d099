"""Masks that prune weight matrices: by magnitude or by Wanda's score, a share of all weights or n of each group of m.

A mask is True where a weight stays. Matrices have a row for each output and a column for each input, as in `nn.Linear`.

Sources: magnitude pruning (Han et al., NeurIPS 2015); Wanda, "A Simple and Effective Pruning Approach for Large
Language Models" (Sun et al., ICLR 2024), whose score of a weight is its size times the norm of its input, within a row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maveriq.errors import InputError

Matrix: TypeAlias = npt.NDArray[Any]
Mask: TypeAlias = npt.NDArray[np.bool_]

MAGNITUDE, WANDA = "magnitude", "wanda"
_METHOD = re.compile(
    rf"(?P<score>{MAGNITUDE}|{WANDA})-(?:(?P<percent>[1-9]\d?)|(?P<kept>\d{{1,2}}):(?P<group>\d{{1,2}}))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningMethod:
    """How a matrix is pruned.

    Args:
        score: `magnitude` or `wanda`.
        percent: percent of the weights that go; 0 with groups.
        kept: weights that stay of each group; 0 without groups.
        group: neighbouring weights of a row that form a group; 0 without groups.
    """

    score: str
    percent: int = 0
    kept: int = 0
    group: int = 0

    def __str__(self) -> str:
        return f"{self.score}-{self.percent}" if self.percent else f"{self.score}-{self.kept}:{self.group}"


def pruning_method(text: str) -> PruningMethod:
    """Return the method that a text such as `magnitude-50` or `wanda-2:4` names.

    Raises:
        InputError: it names none.
    """
    match = _METHOD.fullmatch(text)
    if match is None:
        raise InputError(
            f"pruning {text!r} is none; write magnitude-50 or wanda-50 (percent that go), magnitude-2:4 or wanda-4:8 "
            "(how many stay of how many)"
        )
    if match["percent"]:
        return PruningMethod(score=match["score"], percent=int(match["percent"]))
    kept, group = int(match["kept"]), int(match["group"])
    if not 0 < kept < group:
        raise InputError(f"pruning {text!r}: of {group} weights, 1 to {group - 1} can stay")
    return PruningMethod(score=match["score"], kept=kept, group=group)


def mask_of(weights: Matrix, method: PruningMethod, input_norms: Matrix | None = None) -> Mask:
    """Return which weights stay.

    Args:
        weights: a matrix of outputs x inputs.
        method: how to prune.
        input_norms: the norm of each input over some tokens, for `wanda`.

    Raises:
        InputError: the inputs do not divide into groups, or norms are missing.
    """
    scores = np.abs(weights.astype(np.float32))
    if method.score == WANDA:
        if input_norms is None or input_norms.shape != (weights.shape[1],):
            raise InputError(f"pruning {method} needs the norm of each of the {weights.shape[1]} inputs of a matrix")
        scores = scores * input_norms.astype(np.float32)
    if method.group:
        return largest_of_groups(scores, method.kept, method.group)
    if method.score == WANDA:
        return np.stack([largest(row, method.percent) for row in scores])
    return largest(scores, method.percent)


def largest(scores: Matrix, percent: int) -> Mask:
    """Keep the largest scores of an array; exactly `percent` % go, rounded down. Of equal scores the first stay."""
    gone = scores.size * percent // 100
    mask = np.ones(scores.size, dtype=bool)
    # Sorted backwards, so that of equal scores the last go first.
    order = scores.size - 1 - np.argsort(scores.ravel()[::-1], kind="stable")
    mask[order[:gone]] = False
    return mask.reshape(scores.shape)


def largest_of_groups(scores: Matrix, kept: int, group: int) -> Mask:
    """Keep the `kept` largest scores of each `group` neighbours in a row. Of equal scores the first stay.

    Raises:
        InputError: a row does not divide into groups.
    """
    rows, columns = scores.shape
    if columns % group:
        raise InputError(
            f"a matrix with {columns} inputs cannot be pruned in groups of {group}, which do not divide them"
        )
    groups = scores.reshape(rows, columns // group, group)
    order = np.argsort(-groups, axis=2, kind="stable")
    mask = np.zeros(groups.shape, dtype=bool)
    np.put_along_axis(mask, order[:, :, :kept], True, axis=2)  # noqa: FBT003
    return mask.reshape(rows, columns)
