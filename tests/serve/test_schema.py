"""Schemathesis over the OpenAPI schema of a real server: no 5xx, and responses match the schema."""

import os
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from running import MODEL, Running, running
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

CHECKS = [not_a_server_error, response_schema_conformance, status_code_conformance]
EXAMPLES = int(os.environ.get("MAVERIQ_FUZZ_EXAMPLES", "8"))
ROUTES = {
    "GET /v1/models", "GET /v1/models/{model}", "POST /v1/completions", "POST /v1/chat/completions",
    "GET /models", "POST /models", "GET /models/{model_id}", "DELETE /models/{model_id}",
    "POST /models/{model_id}/profile", "DELETE /models/{model_id}/profile", "GET /endpoints", "POST /endpoints",
    "GET /endpoints/{endpoint_id}", "DELETE /endpoints/{endpoint_id}",
    "GET /requests", "GET /requests/{request_id}", "GET /health", "GET /metrics",
}  # fmt: skip


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of its own, because fuzzing creates models and endpoints."""
    with running(tmp_path_factory.mktemp("fuzzed") / "s.db") as server:
        server.deploy()
        yield server


@pytest.fixture(scope="module")
def operations(fuzzed: Running) -> dict[str, schemathesis.schemas.APIOperation]:
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    found = [operation.ok() for operation in schema.get_all_operations()]
    return {operation.label: operation for operation in found}


@pytest.mark.parametrize("route", sorted(ROUTES))
def test_no_request_breaks_the_server(operations: dict[str, schemathesis.schemas.APIOperation], route: str) -> None:
    assert operations.keys() == ROUTES

    @given(operations[route].as_strategy())
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def holds(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = MODEL  # a made-up name would hide all that comes after it
        case.call_and_validate(checks=CHECKS)

    holds()
