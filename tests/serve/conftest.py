"""Servers that tests of the service share."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from running import Running, running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with llama-2-7b as endpoint 1."""
    with running(tmp_path_factory.mktemp("serve") / "state.db") as server:
        server.deploy()
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    """The official client, without retries."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Path of a state file."""
    return tmp_path / "state.db"
