"""Times of steps, compiled with numba for simulators that ask millions of times.

Import it late: the first call in a process takes a second, the first on a machine several. The functions take
`StepModel.packed` and answer as `StepModel.gpu_us` does.
"""

from __future__ import annotations

import numpy as np

from maveriq.compiling import compiled
from maveriq.estimate.log_grid import Array

_FIRST = 5  # where the first axis starts in `StepGrids.packed`


@compiled
def _cell(packed: Array, axis: int, length: int, x: float) -> int:
    """Return the number of the grid cell of an axis that starts at index `axis`."""
    low, high = 0, length - 1
    while high - low > 1:
        middle = (low + high) >> 1
        if x < packed[axis + middle]:
            high = middle
        else:
            low = middle
    return low


@compiled
def _line(packed: Array, axis: int, length: int, table: int, x: float) -> float:
    """Return the value at a size, of a table along one axis."""
    cell = _cell(packed, axis, length, x)
    left, low = packed[axis + cell], packed[table + cell]
    return float(low + (packed[table + cell + 1] - low) / (packed[axis + cell + 1] - left) * (x - left))


@compiled
def _surface(
    packed: Array, rows: int, row_count: int, columns: int, column_count: int, table: int, x: float, y: float
) -> float:
    """Return the value at two sizes, of a table along two axes."""
    row, column = _cell(packed, rows, row_count, x), _cell(packed, columns, column_count, y)
    share = (x - packed[rows + row]) / (packed[rows + row + 1] - packed[rows + row])
    width, beyond = packed[columns + column + 1] - packed[columns + column], y - packed[columns + column]
    at = table + row * column_count + column
    low = packed[at] + (packed[at + 1] - packed[at]) / width * beyond
    at += column_count
    high = packed[at] + (packed[at + 1] - packed[at]) / width * beyond
    return float((1 - share) * low + share * high)


@compiled
def step_us(
    packed: Array, decodes: float, context_tokens: float, chunk_tokens: Array, chunk_past: Array, chunks: int
) -> float:
    """Return the time of the kernels of a step.

    Args:
        packed: the `StepModel.packed` of a model.
        decodes: sequences that decode.
        context_tokens: tokens that these attend to, all sequences together.
        chunk_tokens: tokens of each chunk of a prompt; elements from `chunks` on do not count.
        chunk_past: tokens before each chunk.
        chunks: the number of chunks.
    """
    token_count, sequence_count, context_count = int(packed[0]), int(packed[1]), int(packed[2])
    chunk_count, past_count = int(packed[3]), int(packed[4])
    tokens = _FIRST
    sequences = tokens + token_count
    contexts = sequences + sequence_count
    chunk_axis = contexts + context_count
    past_axis = chunk_axis + chunk_count
    tokens_us = past_axis + past_count
    head_us = tokens_us + token_count
    decode_us = head_us + sequence_count
    mixed_us = decode_us + sequence_count * context_count
    prefill_us = mixed_us + sequence_count * context_count
    lead_table = prefill_us + chunk_count * past_count

    total_tokens, time_us, lead_us = decodes, 0.0, 0.0
    for index in range(chunks):
        size, past = chunk_tokens[index], chunk_past[index]
        total_tokens += size
        time_us += _surface(packed, chunk_axis, chunk_count, past_axis, past_count, prefill_us, size, past)
        alone = _surface(packed, chunk_axis, chunk_count, past_axis, past_count, lead_table, size, past)
        lead_us = max(lead_us, alone)
    if total_tokens == 0:
        return 0.0
    time_us += lead_us
    if decodes > 0:
        table = mixed_us if chunks > 0 else decode_us
        mean = context_tokens / decodes
        time_us += _surface(packed, sequences, sequence_count, contexts, context_count, table, decodes, mean)
    time_us += _line(packed, tokens, token_count, tokens_us, total_tokens)
    return float(time_us + _line(packed, sequences, sequence_count, head_us, decodes + chunks))


@compiled
def decode_run_us(packed: Array, decodes: float, context_tokens: float, steps: int) -> float:
    """Return the time of the kernels of `steps` steps in a row in which the same sequences decode.

    The time is summed in closed form for each cell of the grid that the growing contexts pass, not step by step.

    Args:
        packed: the `StepModel.packed` of a model.
        decodes: sequences that decode; more than 0.
        context_tokens: tokens that these attend to in the first step; each attends to one more in each further step.
        steps: the number of steps.
    """
    token_count, sequence_count, context_count = int(packed[0]), int(packed[1]), int(packed[2])
    sequences = _FIRST + token_count
    contexts = sequences + sequence_count
    tokens_us = contexts + context_count + int(packed[3]) + int(packed[4])
    head_us = tokens_us + token_count
    decode_us = head_us + sequence_count

    row = _cell(packed, sequences, sequence_count, decodes)
    share = (decodes - packed[sequences + row]) / (packed[sequences + row + 1] - packed[sequences + row])
    context, left, total_us = context_tokens / decodes, steps, 0.0
    while left > 0:
        column = _cell(packed, contexts, context_count, context)
        start, end = packed[contexts + column], packed[contexts + column + 1]
        here = left
        if column < context_count - 2:  # until the contexts leave this cell
            here = min(left, max(1, int(np.ceil(end - context))))
        at = decode_us + row * context_count + column
        low = (1 - share) * packed[at] + share * packed[at + context_count]
        high = (1 - share) * packed[at + 1] + share * packed[at + context_count + 1]
        total_us += here * (low + (high - low) / (end - start) * (context + (here - 1) / 2 - start))
        context += here
        left -= here
    of_each = _line(packed, _FIRST, token_count, tokens_us, decodes)
    of_each += _line(packed, sequences, sequence_count, head_us, decodes)
    return float(total_us + steps * of_each)


@compiled
def decode_steps_within(
    packed: Array, decodes: float, context_tokens: float, most: int, limit_us: float, factor: float, added_us: float
) -> int:
    """Return how many steps in a row, in which the same sequences decode, end within a time.

    Args:
        packed: the `StepModel.packed` of a model.
        decodes: sequences that decode; more than 0.
        context_tokens: tokens that these attend to in the first step; each attends to one more in each further step.
        most: the largest number to return.
        limit_us: the time.
        factor: by which an engine's steps take longer than their kernels.
        added_us: what the engine's process adds to each step.
    """
    low, high = 0, most  # bisection: times of steps are positive, so their sums grow
    while low < high:
        middle = (low + high + 1) >> 1
        if factor * decode_run_us(packed, decodes, context_tokens, middle) + middle * added_us <= limit_us:
            low = middle
        else:
            high = middle - 1
    return low
