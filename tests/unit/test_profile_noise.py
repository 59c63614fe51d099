"""How sure medians are, and what keeps a CPU quiet while they are measured."""

import os
from statistics import median

import pytest

from maveriq.estimate.profile_file import noise_of_median, noise_of_medians
from maveriq.profiling.machine import high_priority
from maveriq.streams import generator


def test_samples_that_agree_by_chance_do_not_make_a_median_sure() -> None:
    lucky, usual = (1.0, 1.0, 1.0), [(1.0, 1.1, 0.9), (2.0, 2.25, 1.8), (3.0, 3.3, 2.6)]
    pooled = noise_of_medians([lucky, *usual])
    assert noise_of_median(lucky) < 0.01 < 0.03 < pooled[0]
    assert pooled[0] < min(pooled[1:])


def test_more_samples_make_a_median_surer_and_one_batch_is_its_own_measure() -> None:
    batch = (1.0, 1.1, 0.9, 1.05)
    assert noise_of_medians([batch]) == pytest.approx([noise_of_median(batch)])
    assert noise_of_medians([batch, batch * 4])[1] < 0.6 * noise_of_medians([batch, batch * 4])[0]
    assert noise_of_medians([]) == []


def test_pooled_noise_is_what_medians_err_by() -> None:
    draw = generator(0, "medians")
    batches = [tuple(draw.lognormal(0.0, 0.1, 5).tolist()) for _ in range(400)]
    errors = [abs(median(batch) - 1) for batch in batches]
    noises = noise_of_medians(batches)
    assert 0.6 < sum(error < noise for error, noise in zip(errors, noises, strict=True)) / len(batches) < 0.76
    alone = list(map(noise_of_median, batches))
    assert max(noises) / min(noises) < max(alone) / min(alone) / 3


def test_priority_is_higher_inside_where_that_is_allowed_and_as_before_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with high_priority():
        assert os.getpriority(os.PRIO_PROCESS, 0) <= before
    assert os.getpriority(os.PRIO_PROCESS, 0) == before

    def refuse(which: int, who: int, priority: int) -> None:
        if priority < before:
            raise PermissionError

    monkeypatch.setattr(os, "setpriority", refuse)
    with high_priority():
        assert os.getpriority(os.PRIO_PROCESS, 0) == before
