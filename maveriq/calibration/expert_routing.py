"""The routing with which the tables of expert kernels were measured.

The measuring tool (aiconfigurator) deals tokens to experts evenly, or draws the rows of each expert from a power law.
In expert parallelism it times the GPU with most rows. What reaches that GPU is simulated here, so that fits know it.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_DRAWS = 8
_Counts = npt.NDArray[np.int64]


def measured_routing(
    distribution: str, *, experts: int, per_token: int, tokens: int, groups: int
) -> tuple[float, float]:
    """Return the rows of the timed GPU and how many of its experts get a token; means over some draws.

    Args:
        distribution: `balanced`, or `power_law_` and the exponent.
        experts: experts of a layer.
        per_token: experts of a token.
        tokens: tokens of the step.
        groups: GPUs among which whole experts are dealt.
    """
    if distribution == "balanced":
        counts = [_balanced_rows(experts, per_token, tokens)[: experts // groups]]
    else:
        exponent = float(distribution.removeprefix("power_law_"))
        generator = np.random.default_rng(7)
        counts = []
        for _ in range(_DRAWS):
            dealt = _power_law_rows(experts, per_token * tokens, tokens, exponent, generator).reshape(groups, -1)
            counts.append(np.minimum(dealt[dealt.sum(axis=1).argmax()], tokens))
    return float(np.mean([rows.sum() for rows in counts])), float(np.mean([(rows > 0).sum() for rows in counts]))


def _balanced_rows(experts: int, per_token: int, tokens: int) -> _Counts:
    stride = math.ceil(experts / per_token)
    token, choice = np.arange(tokens)[:, None], np.arange(per_token)[None, :]
    first = token if tokens >= stride else token * stride // tokens
    counts: _Counts = np.bincount(((first + choice * stride) % experts).ravel(), minlength=experts)
    return counts


def _power_law_rows(experts: int, pairs: int, tokens: int, exponent: float, generator: np.random.Generator) -> _Counts:
    low, high = (1.0, 0.8 * tokens) if pairs > experts else (0.01, 2.0)
    power = 1 - exponent
    drawn = ((high**power - low**power) * generator.random(experts) + low**power) ** (1 / power)
    rows: _Counts = np.rint(drawn / drawn.sum() * pairs).astype(np.int64)
    missing = pairs - int(rows.sum())
    if missing > 0:  # the least loaded get one more each
        extra, rest = divmod(missing, experts)
        rows += extra
        rows[np.argsort(rows)[:rest]] += 1
    while missing < 0:  # the most loaded get one less each
        most = np.argsort(-rows)[:-missing]
        most = most[rows[most] > 0]
        rows[most] -= 1
        missing += len(most)
    return rows
