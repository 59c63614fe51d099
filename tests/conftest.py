"""Fixtures that all tests share, and hypothesis' profiles.

"ci" is the default: the same examples in every run. "soak" draws at random and keeps failing examples in .hypothesis;
`make soak` uses it.
"""

import os
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from maveriq.files import measured_data_path

os.environ["XDG_DATA_HOME"] = str(Path(tempfile.gettempdir()) / "maveriq-no-such-folder")  # hides users' environments

SLOW_MACHINE = (HealthCheck.too_slow,)
settings.register_profile("ci", derandomize=True, database=None, deadline=None, suppress_health_check=SLOW_MACHINE)
settings.register_profile("soak", deadline=None, print_blob=True, suppress_health_check=SLOW_MACHINE)
settings.load_profile("ci")

# Under nohup, SIGHUP is ignored, and every process that a test starts would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def measured_data() -> Path:
    """Return the folder of measured data; skip the test if it is absent.

    It fails instead where MAVERIQ_REQUIRE_DATA=1 says that the data must be there (CI).
    """
    folder = measured_data_path()
    if folder is None:
        reason = "the measured data is absent; set MAVERIQ_DATA to its folder"
        if os.environ.get("MAVERIQ_REQUIRE_DATA") == "1":
            pytest.fail(f"MAVERIQ_REQUIRE_DATA=1, but {reason}")
        pytest.skip(reason)
    return folder
