"""The comparisons with the recordings, made once for all tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from configurations import Compared, compare_all
from queue_model import QueueErrors, replay_all


@pytest.fixture(scope="session")
def compared(measured_data: Path) -> Sequence[Compared]:
    return list(compare_all(measured_data))


@pytest.fixture(scope="session")
def replayed(measured_data: Path) -> Mapping[str, QueueErrors]:
    return {errors.run: errors for errors in replay_all(measured_data)}
