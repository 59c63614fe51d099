"""Results do not change: the tables of recorded runs, byte for byte."""

import pytest
from golden_runs import differences, hashes, runs

QUICK_EVERY = 8  # `make test` takes one run in so many


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.heavy] if at % QUICK_EVERY else []) for at, name in enumerate(runs())],
)
def test_the_tables_are_as_recorded(name: str) -> None:
    assert differences(name, hashes(name)) == []


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["twentyone-memory", "batch-16-paper"])
def test_the_fast_kernel_writes_the_same_tables(name: str) -> None:
    found = hashes(name, "fast")
    assert found
    assert differences(name, found) == []
