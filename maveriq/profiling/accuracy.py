"""What a weight format costs a model in accuracy: the score with it, relative to the score in 16 bits.

Two scores are known: the share of right answers to multiple-choice questions, by the likeliest of the four letters,
and the likelihood of a text's tokens (perplexity). Both formats see the same samples, so that the uncertainty is that
of the difference, which is much smaller than that of either score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from maveriq.compat import StrEnum
from maveriq.domain.models import KvType, WeightType
from maveriq.errors import InputError, MaveriqError
from maveriq.profiling.questions import LETTERS, Question, examples_for, prompt_of

_Z_95 = 1.959964
"""The standard normal distribution's 97.5th percentile."""

ACCURACY_COLUMNS = (
    "model", "weights", "kv", "percent", "percent_low", "percent_high", "measure", "score", "float16_score", "samples",
)  # fmt: skip


class Measure(StrEnum):
    """What a score is."""

    QUESTIONS = "questions"
    PERPLEXITY = "perplexity"


class Scorer(Protocol):
    """A loaded model."""

    def log_probabilities(self, prompts: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log probabilities of tokens after prompts.

        Args:
            prompts: the tokens of each prompt.
            wanted: for each prompt, the tokens that may follow it.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt, and the tokens that may follow it.

    Args:
        prompt: the prompt's tokens.
        wanted: the tokens that are asked for: those of the four letters, or the token that the text has there.
        right: the index of the right one.
    """

    prompt: tuple[int, ...]
    wanted: tuple[int, ...]
    right: int


def question_samples(
    questions: Sequence[Question],
    encode: Callable[[str], Sequence[int]],
    *,
    examples: Sequence[Question] = (),
    shots: int = 0,
    max_tokens: int | None = None,
) -> list[Sample]:
    """Return the samples of multiple-choice questions.

    Args:
        questions: the questions.
        encode: returns the tokens of a text.
        examples: questions for few-shot prompts, of the same subjects.
        shots: how many of them stand before each question.
        max_tokens: the longest prompt that the model takes; examples are left out of longer ones. None for any.

    Raises:
        InputError: a prompt without examples is longer, the tokenizer has no token of its own for a letter, or a
            subject has fewer examples than `shots`.
    """
    found = []
    for question in questions:
        chosen = examples_for(question, examples, shots)
        if len(chosen) < shots:
            raise InputError(
                f"subject {question.subject!r} has {len(chosen)} examples, but {shots} are to stand before each "
                "question; give more --examples, or fewer --shots"
            )
        prompt = tuple(encode(prompt_of(question, chosen)))
        while chosen and max_tokens is not None and len(prompt) > max_tokens:
            chosen.pop()
            prompt = tuple(encode(prompt_of(question, chosen)))
        if max_tokens is not None and len(prompt) > max_tokens:
            raise InputError(
                f"a question of {question.subject!r} has {len(prompt)} tokens; the model takes {max_tokens}"
            )
        found.append(
            Sample(prompt=prompt, wanted=_letter_tokens(prompt_of(question, chosen), encode), right=question.answer)
        )
    return found


def _letter_tokens(prompt: str, encode: Callable[[str], Sequence[int]]) -> tuple[int, ...]:
    """Return the tokens of the letters as they follow a prompt."""
    tokens = tuple(encode(f"{prompt} {letter}")[-1] for letter in LETTERS)
    if len(set(tokens)) < len(LETTERS):
        raise InputError("the tokenizer has no token of its own for each of the letters A to D")
    return tokens


def text_samples(tokens: Sequence[int], *, context_tokens: int, samples: int) -> list[Sample]:
    """Return samples of a text: its tokens at evenly spaced places, each after the tokens before it.

    Args:
        tokens: the text's tokens.
        context_tokens: how many tokens stand before each.
        samples: how many places, at most.

    Raises:
        InputError: the text is too short.
    """
    places = len(tokens) - context_tokens
    if places < 1:
        raise InputError(
            f"the text has {len(tokens)} tokens, too few for contexts of {context_tokens}; give a longer one, or fewer "
            "--context-tokens"
        )
    chosen = sorted({context_tokens + place * places // min(samples, places) for place in range(min(samples, places))})
    return [
        Sample(prompt=tuple(tokens[place - context_tokens : place]), wanted=(tokens[place],), right=0)
        for place in chosen
    ]


def scores_of(
    scorer: Scorer,
    samples: Sequence[Sample],
    measure: Measure,
    *,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda _done: None,
) -> list[float]:
    """Return the score of each sample: 1 or 0 for a right or wrong answer, or the log probability of the text's token.

    Raises:
        MaveriqError: the model gives numbers that are none.
    """
    found: list[float] = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        answers = scorer.log_probabilities([s.prompt for s in batch], [s.wanted for s in batch])
        for sample, values in zip(batch, answers, strict=True):
            if any(math.isnan(value) for value in values):
                raise MaveriqError(
                    "the model's logits are not numbers; its weights are damaged, or overflow in 16 bits"
                )
            likeliest = max(range(len(values)), key=values.__getitem__)
            found.append(values[0] if measure is Measure.PERPLEXITY else float(likeliest == sample.right))
        on_progress(len(found))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class RelativeAccuracy:
    """The accuracy of a format relative to 16 bits.

    Args:
        weights, kv: the format.
        measure: what the scores are.
        score: with the format: the share of right answers, or the perplexity.
        float16_score: the same in 16 bits.
        percent: of the accuracy in 16 bits, at most 100. Of perplexities it is the ratio of the tokens' geometric mean
            probabilities.
        low, high: the ends of its 95 % interval.
        samples: how many samples both saw.
    """

    weights: WeightType
    kv: KvType
    measure: Measure
    score: float
    float16_score: float
    percent: float
    low: float
    high: float
    samples: int


def relative_accuracy(
    scores: Sequence[float], float16_scores: Sequence[float], *, weights: WeightType, kv: KvType, measure: Measure
) -> RelativeAccuracy:
    """Compare a format's scores with those in 16 bits of the same samples.

    The interval is that of a ratio of paired shares, or of a mean of paired differences.

    Raises:
        InputError: no answer was right in 16 bits, so that nothing can be relative to it.
    """
    number = len(scores)
    mean, reference = math.fsum(scores) / number, math.fsum(float16_scores) / number
    pairs = list(zip(scores, float16_scores, strict=True))
    if measure is Measure.PERPLEXITY:
        ratio = math.exp(mean - reference)
        spread = _Z_95 * _standard_error([score - other for score, other in pairs])
        low, high = ratio * math.exp(-spread), ratio * math.exp(spread)
        mean, reference = math.exp(-mean), math.exp(-reference)
    else:
        if reference == 0:
            raise InputError("no question was answered rightly in 16 bits; give more questions, or another model")
        ratio = mean / reference
        low, high = _ratio_interval(pairs)
    percent, low, high = (min(100.0, max(0.0, 100 * value)) for value in (ratio, min(ratio, low), max(ratio, high)))
    return RelativeAccuracy(
        weights=weights, kv=kv, measure=measure, score=mean, float16_score=reference, percent=percent, low=low,
        high=high, samples=number,
    )  # fmt: skip


def _ratio_interval(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the 95 % interval of the ratio of two shares of right answers to the same questions, by the delta method.

    Half an observation is added for each pair of answers, right or wrong (Agresti and Min, 2005), so that few questions
    without a difference do not pass for certainty.
    """
    observed = [(pair, 1.0) for pair in pairs] + [((left, right), 0.5) for left in (0.0, 1.0) for right in (0.0, 1.0)]
    total = math.fsum(weight for _, weight in observed)
    mean, reference = (math.fsum(pair[at] * weight for pair, weight in observed) / total for at in (0, 1))
    ratio = mean / reference
    variance = math.fsum(weight * (left - ratio * right) ** 2 for (left, right), weight in observed) / total
    spread = _Z_95 * math.sqrt(variance / total) / reference
    return ratio - spread, ratio + spread


def _standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean."""
    if len(values) < 2:
        return math.inf
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def accuracy_rows(model: str, found: Sequence[RelativeAccuracy]) -> list[tuple[str, ...]]:
    """Return the rows of the table that `--accuracy` reads, under `ACCURACY_COLUMNS`."""
    return [
        (
            model, entry.weights.value, entry.kv.value, f"{entry.percent:.2f}", f"{entry.low:.2f}", f"{entry.high:.2f}",
            entry.measure.value, f"{entry.score:.4f}", f"{entry.float16_score:.4f}", str(entry.samples),
        )
        for entry in found
    ]  # fmt: skip
