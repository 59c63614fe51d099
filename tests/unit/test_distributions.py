"""Distributions that options name: their moments, and what is refused with one line."""

import math

import numpy as np
import pytest

from maveriq.errors import InputError
from maveriq.streams import generator
from maveriq.workload.distributions import parse_distribution

DRAWS = 200_000


def parse(text, *, whole=False, minimum=0.0, maximum=1e6):
    return parse_distribution(text, "prompt tokens", whole=whole, minimum=minimum, maximum=maximum)


@pytest.mark.parametrize(
    ("text", "mean", "deviation", "median"),
    [
        ("7", 7, 0, 7),
        ("uniform:2-6", 4, 4 / math.sqrt(12), 4),
        ("lognormal:200,0.5", 200 * math.exp(0.125), 200 * math.exp(0.125) * math.sqrt(math.expm1(0.25)), 200),
        ("exponential:5", 5, 5, 5 * math.log(2)),
        ("gamma:10,0.5", 10, 5, 9.18),
        ("gamma:10,2", 10, 20, 1.75),
    ],
)
def test_draws_have_the_moments_of_their_distribution(text, mean, deviation, median):
    distribution = parse(text)
    drawn = distribution.draw(generator(1, "test"), DRAWS)
    assert drawn.mean() == pytest.approx(mean, rel=0.02)
    assert drawn.std() == pytest.approx(deviation, rel=0.03)
    assert np.median(drawn) == pytest.approx(median, rel=0.03)
    assert distribution.median == pytest.approx(median, rel=0.05)
    assert drawn.min() >= 0


def test_whole_numbers_have_both_ends_equally_likely():
    drawn = parse("uniform:3-6", whole=True).draw(generator(1, "test"), DRAWS)
    numbers, counts = np.unique(drawn, return_counts=True)
    assert numbers.tolist() == [3, 4, 5, 6]
    assert counts / DRAWS == pytest.approx([0.25] * 4, rel=0.02)


def test_spaces_and_case_do_not_matter():
    assert parse(" Uniform: 3 - 6 ") == parse("uniform:3-6")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("unifrom:1-2", ("must be a number or uniform:LOW-HIGH", "did you mean 'uniform'")),
        ("uniform:1", ("uniform:LOW-HIGH",)),
        ("uniform:9-2", ("ends before it starts",)),
        ("uniform:-1-2", ("must be a number or",)),
        ("lognormal:200", ("lognormal:MEDIAN,SIGMA",)),
        ("lognormal:200,0", ("above 0 and at most 10",)),
        ("lognormal:200,11", ("above 0 and at most 10",)),
        ("gamma:1e7,1", ("from 0 to 1,000,000",)),
        ("exponential:nan", ("must be a number or",)),
        ("1e999", ("from 0 to 1,000,000",)),
        ("", ("must be a number or",)),
        ("5;6", ("must be a number or",)),
        ("٣", ()),
    ],
)
def test_what_is_no_distribution_is_refused_with_one_line(text, words):
    if not words:
        assert parse(text).median == 3  # a digit is a digit
        return
    with pytest.raises(InputError, match=r"^prompt tokens") as refused:
        parse(text)
    message = str(refused.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message


def test_fractions_are_refused_where_whole_numbers_are_meant():
    for text in ("2.5", "uniform:1-2.5"):
        with pytest.raises(InputError, match="whole numbers"):
            parse(text, whole=True)
