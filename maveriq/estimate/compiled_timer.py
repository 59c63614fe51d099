"""`StepTimer` and `DecodeLine` compiled: the same times to the last tick, for engines that run in compiled code.

Import it late. A time is a pair here, whole microseconds and ticks (2^-32 µs) below one, because ticks since the start
of a run do not fit 64 bits; a duration is ticks, up to 2^62 of them, which are a quarter of an hour.
"""

from __future__ import annotations

import numpy as np

from maveriq.compiling import Integers, Pointer, address, float_array, floats, ints, part
from maveriq.estimate.compiled_step import step_us
from maveriq.estimate.engine_presets import SHARPNESS
from maveriq.estimate.step_timer import StepTimer

_SUMMED_STEPS = 64  # durations of so many steps fit 62 bits if a step takes less than 16 s
_BITS = 32
_BELOW = (1 << _BITS) - 1
_POINTS = 32

POINTS = 32

(
    TIMER_CONSTANTS_AT,  # address of the constants below
    TIMER_PACKED_AT, TIMER_PACKED,  # address and length of `StepModel.packed`
    TIMER_POINTS,  # how many `StepModel.contexts` there are
    TIMER_LINES_AT,  # address of the lines, one for each number of decoding sequences
    TIMER_CONTEXTS,  # here these begin
) = range(6)  # fmt: skip
"""One timer: the memory that a pointer `t` points to."""

(
    KERNEL_FACTOR, PREFILL_FACTOR, STEP_US, SEQUENCE_US,
    LAUNCH_US,  # of all layers
    SHARPNESS_OF_MAX, ROOT,  # literals would let the compiler replace powers by products, which round differently
    API_US, API_TOKEN_US, API_SEQUENCE_US,
) = range(10)  # fmt: skip
"""Constants of the engine's process, floating-point."""

LINE_IS_KNOWN, LINE_TIMES = range(2)
LINE_SLOPES = LINE_TIMES + POINTS
LINE_SIZE = LINE_SLOPES + POINTS
"""A `DecodeLine`: whether it has been computed, ticks at the grid points, and slopes between them."""


class TimerState:
    """The memory of a timer with the times of a `StepTimer`.

    Args:
        timer: the timer.
        max_num_seqs: the most sequences of a step.

    Attributes:
        memory: what `t` points to.
    """

    def __init__(self, timer: StepTimer, *, max_num_seqs: int) -> None:
        preset, contexts = timer.preset, timer.steps.contexts
        self._constants = np.zeros(API_SEQUENCE_US + 1)
        self._constants[KERNEL_FACTOR], self._constants[PREFILL_FACTOR] = preset.kernel_factor, preset.prefill_factor
        self._constants[STEP_US], self._constants[SEQUENCE_US] = preset.step_us, preset.sequence_us
        self._constants[LAUNCH_US] = preset.layer_us * timer.layers
        self._constants[API_US], self._constants[API_TOKEN_US] = preset.api_us, preset.api_token_us
        self._constants[API_SEQUENCE_US] = preset.api_sequence_us
        self._constants[SHARPNESS_OF_MAX], self._constants[ROOT] = SHARPNESS, 1 / SHARPNESS
        self._packed = timer.steps.packed
        self._lines = np.zeros((max_num_seqs + 1, LINE_SIZE), dtype=np.int64)
        self.memory: Integers = np.zeros(TIMER_CONTEXTS + POINTS, dtype=np.int64)
        self.memory[TIMER_CONSTANTS_AT], self.memory[TIMER_LINES_AT] = address(self._constants), address(self._lines)
        self.memory[TIMER_PACKED_AT], self.memory[TIMER_PACKED] = address(self._packed), len(self._packed)
        self.memory[TIMER_POINTS] = len(contexts)
        self.memory[TIMER_CONTEXTS : TIMER_CONTEXTS + len(contexts)] = contexts


@part
def after(time_us: int, below: int, duration: int) -> tuple[int, int]:
    """Return the time, as µs and ticks, that is a duration in ticks after another one."""
    below += duration
    return time_us + (below >> _BITS), below & _BELOW


@part
def micros_after(time_us: int, below: int) -> int:
    """Return the first whole microsecond that is not before a time."""
    return time_us + 1 if below > 0 else time_us


@part
def _ticks(t: Pointer, gpu_us: float, factor: int, sequences: int) -> int:
    """Return the duration of a step: its kernels', and what the host adds (`EnginePreset.step_time_us`)."""
    constants = floats(t[TIMER_CONSTANTS_AT])
    kernels_us = gpu_us * constants[factor]
    launch_us, sharpness = constants[LAUNCH_US], constants[SHARPNESS_OF_MAX]
    if launch_us > 0.0:
        kernels_us = (kernels_us**sharpness + launch_us**sharpness) ** constants[ROOT]
    step_time_us = kernels_us + constants[STEP_US] + constants[SEQUENCE_US] * sequences
    return int(np.rint(step_time_us * 4294967296.0))


@part
def first_token_delay(t: Pointer, prompt_tokens: int, running: int) -> int:
    """Return `EnginePreset.first_token_delay_us` as whole microseconds."""
    constants = floats(t[TIMER_CONSTANTS_AT])
    delay_us = constants[API_US] + constants[API_TOKEN_US] * prompt_tokens + constants[API_SEQUENCE_US] * running
    return int(np.rint(delay_us))


@part
def _kernels_us(t: Pointer, decodes: int, context_tokens: int, tokens_at: int, past_at: int, chunks: int) -> float:
    packed = float_array(t[TIMER_PACKED_AT], t[TIMER_PACKED])
    chunk_tokens, chunk_past = float_array(tokens_at, chunks), float_array(past_at, chunks)
    return step_us(packed, float(decodes), float(context_tokens), chunk_tokens, chunk_past, chunks)


@part
def chunked_step(t: Pointer, decodes: int, context_tokens: int, tokens_at: int, past_at: int, chunks: int) -> int:
    """Return the duration of a step that holds chunks of prompts.

    Args:
        t: the timer.
        decodes: sequences that decode.
        context_tokens: tokens that these attend to.
        tokens_at: address of the tokens of each chunk, floating-point.
        past_at: address of the tokens before each.
        chunks: how many there are.
    """
    kernels_us = _kernels_us(t, decodes, context_tokens, tokens_at, past_at, chunks)
    return _ticks(t, kernels_us, PREFILL_FACTOR, decodes + chunks)


@part
def _line_of(t: Pointer, decodes: int) -> Pointer:
    """Return the line of steps that decode so many sequences."""
    line = ints(t[TIMER_LINES_AT] + 8 * LINE_SIZE * decodes)
    if line[LINE_IS_KNOWN] == 0:
        points = t[TIMER_POINTS]
        for point in range(points):
            kernels_us = _kernels_us(t, decodes, decodes * t[TIMER_CONTEXTS + point], 0, 0, 0)
            line[LINE_TIMES + point] = _ticks(t, kernels_us, KERNEL_FACTOR, decodes)
        for cell in range(points - 1):
            width = decodes * (t[TIMER_CONTEXTS + cell + 1] - t[TIMER_CONTEXTS + cell])
            line[LINE_SLOPES + cell] = (line[LINE_TIMES + cell + 1] - line[LINE_TIMES + cell]) // width
        line[LINE_IS_KNOWN] = 1
    return line


@part
def _cell_of(t: Pointer, decodes: int, context_tokens: int) -> int:
    """Return the grid cell of the tokens that so many sequences attend to."""
    low, high = 0, t[TIMER_POINTS] - 1
    while high - low > 1:
        middle = (low + high) >> 1
        if context_tokens < decodes * t[TIMER_CONTEXTS + middle]:
            high = middle
        else:
            low = middle
    return low


@part
def decode_step(t: Pointer, decodes: int, context_tokens: int) -> int:
    """Return the duration of a step that only decodes."""
    line, cell = _line_of(t, decodes), _cell_of(t, decodes, context_tokens)
    beyond = context_tokens - decodes * t[TIMER_CONTEXTS + cell]
    return line[LINE_TIMES + cell] + line[LINE_SLOPES + cell] * beyond


@part
def piece_of(t: Pointer, decodes: int, context_tokens: int, steps: int) -> tuple[int, int, int]:
    """Return the first of some steps that only decode, and those behind it in the same grid cell.

    Args:
        t: the timer.
        decodes: sequences of each step.
        context_tokens: tokens that these attend to in the first one.
        steps: how many there are, at least 1.

    Returns:
        The duration of the first, by how much each further one takes longer, and how many are in the cell.
    """
    line, cell = _line_of(t, decodes), _cell_of(t, decodes, context_tokens)
    slope, here = line[LINE_SLOPES + cell], steps
    if cell < t[TIMER_POINTS] - 2:
        here = min(here, -((context_tokens - decodes * t[TIMER_CONTEXTS + cell + 1]) // decodes))
    first = line[LINE_TIMES + cell] + slope * (context_tokens - decodes * t[TIMER_CONTEXTS + cell])
    return first, slope * decodes, here


@part
def _sum_of_few(t: Pointer, decodes: int, context_tokens: int, steps: int) -> int:
    """Return the duration of at most `_SUMMED_STEPS` steps that only decode."""
    total = 0
    while steps > 0:
        first, growth, here = piece_of(t, decodes, context_tokens, steps)
        total += here * first + growth * (here * (here - 1) // 2)
        context_tokens += here * decodes
        steps -= here
    return total


@part
def after_steps(
    t: Pointer,
    start_us: int,
    start_below: int,
    decodes: int,
    context_tokens: int,
    steps: int,
    slowdown: int,
) -> tuple[int, int]:
    """Return when steps that only decode have run.

    Args:
        t: the timer.
        start_us: when the first starts, in µs.
        start_below: ticks of this time.
        decodes: sequences of each step.
        context_tokens: tokens that these attend to in the first; in each further one, `decodes` more.
        steps: how many; none end at once.
        slowdown: factor on their times.
    """  # fmt: skip
    while steps > 0:
        few = min(steps, _SUMMED_STEPS)
        duration = slowdown * _sum_of_few(t, decodes, context_tokens, few)
        start_us, start_below = after(start_us, start_below, duration)
        context_tokens += few * decodes
        steps -= few
    return start_us, start_below


@part
def steps_until(
    t: Pointer,
    start_us: int,
    start_below: int,
    decodes: int,
    context_tokens: int,
    steps: int,
    slowdown: int,
    until_us: int,
    until_below: int,
) -> tuple[int, int, int]:
    """Return the first number of steps, 1 to `steps`, that have not run before a time; and when they have run.

    The other arguments are those of `after_steps`.
    """  # fmt: skip
    taken = 0
    while taken < steps:
        few = min(steps - taken, _SUMMED_STEPS)
        end_us, end_below = after_steps(t, start_us, start_below, decodes, context_tokens, few, slowdown)
        if end_us > until_us or (end_us == until_us and end_below >= until_below):
            break
        start_us, start_below = end_us, end_below
        context_tokens += few * decodes
        taken += few
    while taken < steps and (taken == 0 or start_us < until_us or (start_us == until_us and start_below < until_below)):
        duration = slowdown * decode_step(t, decodes, context_tokens)
        start_us, start_below = after(start_us, start_below, duration)
        context_tokens += decodes
        taken += 1
    return taken, start_us, start_below
