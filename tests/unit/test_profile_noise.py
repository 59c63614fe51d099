"""How sure medians are, and what keeps other processes off while they are measured."""

import os
from statistics import median

import pytest

from maveriq.errors import MaveriqError
from maveriq.estimate.profile_file import noise_of_median, noise_of_medians
from maveriq.profiling.machine import real_time
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


def test_real_time_is_for_the_block_alone_and_refused_in_one_line_where_it_is_not_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, asked = os.sched_getscheduler(0), []
    monkeypatch.setattr(os, "sched_setscheduler", lambda _process, policy, _parameters: asked.append(policy))
    with real_time():
        assert asked == [os.SCHED_FIFO]
    assert asked == [os.SCHED_FIFO, before]

    def refuse(process: int, policy: int, parameters: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with pytest.raises(MaveriqError, match="--real-time: this system lets root alone do that"), real_time():
        pass
