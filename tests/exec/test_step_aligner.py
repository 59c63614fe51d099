"""The step aligner: whole steps, no lost tokens, no early steps."""

from hypothesis import given
from hypothesis import strategies as st

from maveriq.exec.engines.engine import ENDED, StepAligner


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 99), max_size=3), st.lists(st.integers(0, 99), max_size=3)), min_size=1),
    st.data(),
)
def test_any_interleaving_gives_the_same_steps(halves: list[tuple[list[int], list[int]]], data: st.DataObject) -> None:
    sequences = [first + second for first, second in halves]
    # Each sequence sends its first half, its second half, and its end, in any interleaving.
    turns = data.draw(st.permutations([number for number in range(len(halves)) for _ in range(3)]))
    aligner, steps, sent = StepAligner(len(halves)), [], [0] * len(halves)
    for number in turns:
        chunks = [*halves[number], []]
        aligner.add(number, chunks[sent[number]], ended=sent[number] == 2)
        sent[number] += 1
        steps.extend(aligner.steps())
        # No step comes before each open sequence has a token for it.
        open_ones = [k for k, times in enumerate(sent) if times < 3]
        assert all(len(steps) <= sum(map(len, halves[k][: sent[k]])) for k in open_ones)
    longest = max(map(len, sequences))
    assert steps == [tuple(tokens[k] if k < len(tokens) else ENDED for tokens in sequences) for k in range(longest)]
