"""Fixtures: comparisons with the recordings, computed once for all tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from configurations import Compared, compare_all
from queue_model import QueueErrors, read_recordings, replay_all

from maveriq.domain.records import RunRecord


@pytest.fixture(scope="session")
def compared(measured_data: Path) -> Sequence[Compared]:
    return list(compare_all(measured_data))


@pytest.fixture(scope="session")
def recordings(measured_data: Path) -> Mapping[str, RunRecord]:
    return read_recordings(measured_data)


@pytest.fixture(scope="session")
def replayed(recordings: Mapping[str, RunRecord]) -> Mapping[str, QueueErrors]:
    return {errors.run: errors for errors in replay_all(recordings)}
