"""Accuracy of weight formats relative to 16 bits."""

import math
from pathlib import Path

import numpy as np
import pytest

from maveriq.domain.models import KvType, WeightType
from maveriq.errors import InputError, MaveriqError
from maveriq.profiling.accuracy import (
    Measure,
    Sample,
    question_samples,
    relative_accuracy,
    scores_of,
    text_samples,
)
from maveriq.profiling.questions import Question, examples_for, prompt_of, read_questions

ROWS = '"What is 1, plus 1?",1,2,3,4,B\nWhat floats?,Lead,Wood,Iron,Gold,B\n'


def question(answer: int = 1, subject: str = "sums") -> Question:
    return Question(subject=subject, text="What is 1 + 1?", choices=("1", "2", "3", "4"), answer=answer)


def letters_of(text: str) -> list[int]:
    return [ord(character) for character in text]


def compared(scores: list[float], float16: list[float], measure: Measure = Measure.QUESTIONS):
    return relative_accuracy(scores, float16, weights=WeightType.INT4, kv=KvType.NATIVE, measure=measure)


def test_questions_are_read_by_subject(tmp_path: Path) -> None:
    (tmp_path / "high_school_physics_test.csv").write_text(ROWS, encoding="utf-8")
    (tmp_path / "anatomy_dev.csv").write_text("question,A,B,C,D,answer\n" + ROWS, encoding="utf-8")
    found = read_questions(tmp_path)
    assert [(q.subject, q.text, q.answer) for q in found] == [
        ("anatomy", "What is 1, plus 1?", 1),
        ("anatomy", "What floats?", 1),
        ("high_school_physics", "What is 1, plus 1?", 1),
        ("high_school_physics", "What floats?", 1),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no questions"),
        ("only,three,cells\n", r"line 1: a question has 6 cells \(question, A, B, C, D, answer\), not 3"),
        (ROWS + "q,1,2,3,4,E\n", "line 3: the answer must be one of A, B, C, D, not 'E'"),
        ('"never closed,1,2,3,4,A\n', "is no CSV file"),
    ],
)
def test_wrong_questions_are_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_questions(tmp_path / "q.csv")
    with pytest.raises(InputError, match="does not exist"):
        read_questions(tmp_path / "none.csv")


def test_the_prompt_is_that_of_mmlu() -> None:
    assert prompt_of(question(), [question(answer=2)]) == (
        "The following are multiple choice questions (with answers) about sums.\n\n"
        "What is 1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: C\n\n"
        "What is 1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )


def test_examples_are_of_the_same_subject_and_left_out_of_prompts_that_are_too_long() -> None:
    examples = [question(subject="other"), question(answer=3), question(answer=2)]
    assert examples_for(question(), examples, 1) == [examples[1]]
    with pytest.raises(InputError, match="subject 'sums' has 2 examples, but 3 are"):
        question_samples([question()], letters_of, examples=examples, shots=3)
    short, long = (len(prompt_of(question(), examples[1 : 1 + shots])) for shots in (1, 2))
    (sample,) = question_samples([question()], letters_of, examples=examples, shots=2, max_tokens=long - 1)
    assert len(sample.prompt) == short
    assert sample.wanted == tuple(map(ord, "ABCD"))
    with pytest.raises(InputError, match="tokens; the model takes 10"):
        question_samples([question()], letters_of, max_tokens=10)


def test_letters_need_tokens_of_their_own() -> None:
    with pytest.raises(InputError, match="no token of its own"):
        question_samples([question()], lambda text: [0] * len(text))


class FixedScorer:
    """Gives each wanted token its own number as log probability."""

    def log_probabilities(self, prompts, wanted):
        return [[float(token) for token in tokens] for tokens in wanted]


def test_the_likeliest_letter_is_the_answer() -> None:
    samples = [Sample(prompt=(1,), wanted=(-4, -1, -3, -2), right=right) for right in (1, 1, 0)]
    assert scores_of(FixedScorer(), samples, Measure.QUESTIONS, batch_size=2) == [1.0, 1.0, 0.0]
    assert scores_of(FixedScorer(), samples, Measure.PERPLEXITY, batch_size=2) == [-4.0, -4.0, -4.0]
    broken = [Sample(prompt=(1,), wanted=(math.nan,), right=0)]  # type: ignore[arg-type]
    with pytest.raises(MaveriqError, match="not numbers"):
        scores_of(FixedScorer(), broken, Measure.QUESTIONS, batch_size=1)


def test_a_format_without_loss_has_100_percent() -> None:
    scores = [1.0, 0.0, 1.0, 1.0]
    found = compared(scores, scores)
    assert (found.percent, found.high, found.samples) == (100.0, 100.0, 4)
    assert found.low < 60, "four questions say little"
    assert compared(scores * 1000, scores * 1000).low > 99.5
    assert compared([-1.0, -2.0], [-1.0, -2.0], Measure.PERPLEXITY).percent == 100.0


def test_percent_is_relative_to_16_bits_and_never_more_than_100() -> None:
    assert compared([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]).percent == pytest.approx(50)
    assert compared([1.0, 1.0], [1.0, 0.0]).percent == 100.0
    with pytest.raises(InputError, match="no question was answered rightly in 16 bits"):
        compared([1.0], [0.0])


def test_perplexities_are_compared_by_the_mean_probability_of_a_token() -> None:
    found = compared([math.log(1 / 8)] * 3, [math.log(1 / 4)] * 3, Measure.PERPLEXITY)
    assert (found.score, found.float16_score) == (pytest.approx(8), pytest.approx(4))
    assert found.percent == pytest.approx(50)


@pytest.mark.parametrize("measure", list(Measure))
def test_the_interval_holds_the_true_ratio_95_times_of_100(measure: Measure) -> None:
    random = np.random.default_rng(5)
    held, trials, samples = 0, 400, 400
    for _ in range(trials):
        right = random.random(samples) < 0.7
        lost = right & (random.random(samples) < 0.1)
        float16 = right.astype(float) if measure is Measure.QUESTIONS else random.normal(-2, 1, samples)
        scores = (
            (right & ~lost).astype(float)
            if measure is Measure.QUESTIONS
            else float16 + random.normal(-0.1, 0.3, samples)
        )
        truth = 90 if measure is Measure.QUESTIONS else 100 * math.exp(-0.1)
        found = compared(list(scores), list(float16), measure)
        held += found.low <= truth <= found.high
    assert 0.92 * trials <= held <= 0.98 * trials


def test_a_texts_tokens_are_sampled_with_whole_contexts() -> None:
    samples = text_samples(range(100), context_tokens=10, samples=30)
    assert len(samples) == 30
    for sample in samples:
        (token,) = sample.wanted
        assert sample.prompt == tuple(range(token - 10, token))
    assert [sample.wanted for sample in text_samples(range(12), context_tokens=10, samples=9)] == [(10,), (11,)]
    with pytest.raises(InputError, match="the text has 5 tokens, too few for contexts of 10"):
        text_samples(range(5), context_tokens=10, samples=9)
