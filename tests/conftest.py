"""Fixtures that all tests share."""

import os
from pathlib import Path

import pytest

from maveriq.files import measured_data_path


@pytest.fixture(scope="session")
def measured_data() -> Path:
    """The folder of measured data of others; skips where it is absent.

    It fails instead where MAVERIQ_REQUIRE_DATA=1 says that the data must be there (CI).
    """
    folder = measured_data_path()
    if folder is None:
        reason = "the measured data is absent; set MAVERIQ_DATA to its folder"
        if os.environ.get("MAVERIQ_REQUIRE_DATA") == "1":
            pytest.fail(f"MAVERIQ_REQUIRE_DATA=1, but {reason}")
        pytest.skip(reason)
    return folder
