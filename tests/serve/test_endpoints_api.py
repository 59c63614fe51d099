"""Models and endpoints over HTTP."""

import json
from pathlib import Path

import pytest
from running import MODEL, Running, running, until

from maveriq.serve.settings import ServeSettings

CONFIG = {
    "_name_or_path": "mine/tiny", "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
    "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 300,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A models folder with a model, and one outside of it."""
    for name in ("models/tiny", "outside"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "models" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "models" / "broken").mkdir()
    (tmp_path / "models" / "broken" / "config.json").write_text("{")
    return tmp_path / "models"


def test_endpoint_life_cycle(server: Running) -> None:
    with server.client() as http:
        requested = {
            "model": "gptj-6b", "intent": "min_latency", "slo_ms": 1500, "min_accuracy": 90, "float16_only": True,
            "placement": "last", "batch_size": 4, "output_tokens": 33,
        }  # fmt: skip
        answer = http.post("/endpoints", json=requested)
        made = answer.json()
        assert answer.status_code == 201
        assert {key: made[key] for key in requested} == requested | {"intent": "min-latency"}
        until(lambda: http.get(f"/endpoints/{made['id']}").json()["status"] == "up")
        [engine] = http.get(f"/endpoints/{made['id']}").json()["deployments"]
        assert (engine["gpus"], engine["layer_split"], engine["restarts"]) == ([3], [28], 0)
        assert made["id"] in [endpoint["id"] for endpoint in http.get("/endpoints").json()]
        http.post("/v1/completions", json={"model": "gptj-6b", "prompt": "a"})
        until(lambda: http.get(f"/endpoints/{made['id']}").json()["completed"] == 1)
        assert http.delete(f"/endpoints/{made['id']}").status_code == 204
        assert http.get(f"/endpoints/{made['id']}").status_code == 404
        assert http.delete(f"/endpoints/{made['id']}").status_code == 404
        assert http.post("/v1/completions", json={"model": "gptj-6b", "prompt": "a"}).status_code == 404


def test_the_former_path_of_endpoints_works_and_is_not_in_the_schema(server: Running) -> None:
    with server.client() as http:
        made = http.post("/deployments", json={"model": "gptj-6b"})
        assert made.status_code == 201
        until(lambda: http.get(f"/deployments/{made.json()['id']}").json()["status"] == "up")
        assert http.get("/deployments").json() == http.get("/endpoints").json()
        assert http.delete(f"/deployments/{made.json()['id']}").status_code == 204
        assert http.get(f"/endpoints/{made.json()['id']}").status_code == 404
        assert not [path for path in http.get("/openapi.json").json()["paths"] if path.startswith("/deployments")]


def test_endpoint_that_does_not_fit_is_rejected(server: Running) -> None:
    with server.client() as http:
        made = http.post("/endpoints", json={"model": "llama-2-70b"}).json()
        assert made["status"] == "rejected"
        assert "on one GPU" in made["reason"]
        assert http.get("/health").json()["status"] == "degraded"
        assert http.delete(f"/endpoints/{made['id']}").status_code == 204
        assert http.get("/health").json() == {"status": "ready", "problems": [], "endpoints": 1, "in_flight": 0}


@pytest.mark.parametrize(
    ("requested", "words"),
    [
        ({"model": "lama-2-7b"}, "did you mean 'llama-2-7b'"),
        ({"model": MODEL, "intent": "min-cots"}, "did you mean 'min-cost'"),
        ({"model": MODEL, "placement": "lats"}, "did you mean 'last'"),
        ({"model": MODEL, "slo_ms": 0}, "slo_ms"),
        ({"model": MODEL, "min_accuracy": 101}, "min_accuracy"),
        ({"model": MODEL, "batch_size": 0}, "batch_size"),
        ({"model": MODEL, "output_tokens": 10**7}, "output_tokens"),
        ({"model": MODEL, "gpus": 4}, "unknown field gpus"),
        ({"model": ""}, "model"),
        ({}, "model: field required"),
    ],
)
def test_invalid_endpoints(server: Running, requested: dict[str, object], words: str) -> None:
    with server.client() as http:
        before = len(http.get("/endpoints").json())
        answer = http.post("/endpoints", json=requested)
        assert answer.status_code in (400, 404)
        assert words in answer.json()["error"]["message"]
        assert len(http.get("/endpoints").json()) == before


def test_register_model(server: Running) -> None:
    with server.client() as http:
        first, again = (http.post("/models", json={"model": MODEL}).json() for _ in range(2))
        assert first == again, "a model keeps its number"
        assert (first["name"], first["architecture"], first["own_files"]) == (MODEL, "llama", False)
        assert first in http.get("/models").json()
        assert http.post("/endpoints", json={"model": str(first["id"])}).json()["model"] == MODEL


def test_unregister_model(server: Running) -> None:
    with server.client() as http:
        number = http.post("/models", json={"model": "gptj-6b"}).json()["id"]
        made = http.post("/endpoints", json={"model": "gptj-6b"}).json()
        refused = http.delete(f"/models/{number}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_deployed")
        http.delete(f"/endpoints/{made['id']}")
        assert http.delete(f"/models/{number}").status_code == 204
        assert http.delete(f"/models/{number}").status_code == 404
        assert number not in [model["id"] for model in http.get("/models").json()]
        assert http.post("/models", json={"model": "gptj-6b"}).json()["id"] > number


def test_a_model_of_the_models_folder(folder: Path, state: Path) -> None:
    with running(state, ServeSettings(models_folder=folder)) as server, server.client() as http:
        by_name = http.post("/models", json={"model": "tiny"}).json()
        assert (by_name["name"], by_name["vocab_size"], by_name["own_files"]) == ("tiny", 300, True)
        assert http.post("/models", json={"model": str(folder / "tiny" / "config.json")}).json() == by_name
        assert server.service.models.folder_of(server.service.models.by_id(1).spec) == folder / "tiny"
        number = server.deploy("tiny")
        answer = http.post("/v1/completions", json={"model": "tiny", "prompt": "hé", "max_tokens": 3})
        assert answer.json()["usage"]["prompt_tokens"] == 3
        assert number == 1
        (folder / "other").mkdir()
        (folder / "other" / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 3}))
        taken = http.post("/models", json={"model": "other"})
        assert (taken.status_code, taken.json()["error"]["code"]) == (409, "model_name_taken")
        broken = http.post("/models", json={"model": "broken"})
        assert (broken.status_code, "not valid JSON" in broken.text) == (400, True)


def test_nothing_outside_the_models_folder_is_read(folder: Path, state: Path) -> None:
    outside = str(folder.parent / "outside")
    places = ["../outside", "link", "tiny/../../outside/config.json", "/etc/passwd", outside, ".", "a" * 900]
    with running(state, ServeSettings(models_folder=folder)) as server, server.client() as http:
        answers = {place: http.post("/models", json={"model": place}).status_code for place in places}
        unprintable = http.post("/models", json={"model": "x\0y"})
    assert answers == dict.fromkeys(places, 404)
    assert (unprintable.status_code, unprintable.json()["error"]["param"]) == (400, "model")


def test_without_a_models_folder_no_path_is_read(server: Running, folder: Path) -> None:
    with server.client() as http:
        answer = http.post("/models", json={"model": str(folder / "tiny")})
    assert answer.status_code == 404
    assert "--models-folder" in answer.json()["error"]["message"]


def test_limits_of_endpoints_and_models(state: Path) -> None:
    with running(state, ServeSettings(max_endpoints=1, max_models=2)) as server, server.client() as http:
        codes = [
            http.post("/endpoints", json={"model": model}).status_code for model in (MODEL, "gptj-6b", "falcon-7b")
        ]
        assert codes == [201, 409, 409]


def test_the_status_of_a_request(server: Running) -> None:
    with server.client() as http:
        answer = http.post(
            "/v1/completions",
            json={"model": MODEL, "prompt": "abc", "max_tokens": 2},
            headers={"X-Request-Id": "mine-1"},
        )
        assert answer.headers["x-request-id"] == answer.json()["id"] == "mine-1"
        row = http.get("/requests/mine-1").json()
        expected = {
            "id": "mine-1",
            "model": MODEL,
            "status": "completed",
            "reason": "",
            "prompt_tokens": 3,
            "output_tokens": 2,
        }
        assert {key: row[key] for key in expected} == expected
        assert row["ended_s"] >= row["accepted_s"]
        assert http.get("/requests", params={"status": "completed", "limit": 1}).json() == [row]
        assert http.get("/requests/never").status_code == 404
        again = http.post("/v1/completions", json={"model": MODEL, "prompt": "abc"}, headers={"X-Request-Id": "mine-1"})
        assert (again.status_code, again.json()["error"]["code"]) == (409, "request_id_taken")
        odd = http.post("/v1/completions", json={"model": MODEL, "prompt": "abc"}, headers={"X-Request-Id": "a b"})
        assert odd.status_code == 400
