"""The official OpenAI client against a real server."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from fakes import token
from running import MODEL, TIMEOUT_S, Running, running, until

from maveriq.serve.job_writer import StoreError
from maveriq.serve.store import EndedRequest
from maveriq.serve.tokenizers import ByteTokenizer, decode

BYTES = ByteTokenizer(32_000)


def expected_text(prompt: str | tuple[int, ...], count: int) -> str:
    """Return the output of the fake engine for a prompt."""
    ids = asyncio.run(BYTES.encode(prompt)) if isinstance(prompt, str) else prompt
    return asyncio.run(decode(BYTES, [token(ids, position, 32_000) for position in range(count)]))


def test_list_and_retrieve_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "maveriq"
    with pytest.raises(openai.NotFoundError, match="did you mean 'llama-2-7b'"):
        client.models.retrieve("lama-2-7b")


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Hello", max_tokens=4)
    assert answer.choices[0].text == expected_text("Hello", 4)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 4, 9)


def test_default_of_max_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Hello")
    assert answer.choices[0].text == expected_text("Hello", 6)


def test_longer_than_the_context_of_the_model(client: openai.OpenAI) -> None:
    with pytest.raises(
        openai.BadRequestError, match="5020 tokens is longer than the 4096 positions of llama-2-7b"
    ) as at:
        client.completions.create(model=MODEL, prompt=[7] * 5000, max_tokens=20)
    assert (at.value.code, at.value.param) == ("context_length_exceeded", "prompt")
    answer = client.completions.create(model=MODEL, prompt=[7] * 4093)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3, "an output of no given length fits the rest of the context"


@pytest.mark.parametrize("prompt", [[7, 8, 9], [[7, 8, 9]]])
def test_token_ids_as_prompt(client: openai.OpenAI, prompt: list[int]) -> None:
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=3, extra_body={"return_token_ids": True})
    assert answer.choices[0].text == expected_text((7, 8, 9), 3)
    assert answer.choices[0].model_extra["token_ids"] == [token((7, 8, 9), n, 32_000) for n in range(3)]


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]},
        ],
        max_completion_tokens=3,
        temperature=0.7,
    )
    assert answer.choices[0].message.content == expected_text("system: Be kind.\nuser: Hi!\nassistant:", 3)
    assert answer.choices[0].message.role == "assistant"


def test_stream(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model=MODEL, prompt="Hello", max_tokens=5, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected_text("Hello", 5)
    assert len(chunks) == 6
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 5 + ["length"]


def test_a_server_without_memory(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(_submission: object) -> None:
        raise MemoryError

    with running(state) as server, server.client() as http:
        server.deploy()
        works = server.service.requests.accept
        monkeypatch.setattr(server.service.requests, "accept", lambda *_: no_memory(None))
        answer = http.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "out_of_memory")
        monkeypatch.setattr(server.service.requests, "accept", works)
        monkeypatch.setattr(server.cluster, "submit", no_memory)
        answer = http.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_failed")
        assert http.get("/requests").json()[0]["status"] == "failed"


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_that_cannot_be_stored(state: Path, monkeypatch: pytest.MonkeyPatch, *, stream: bool) -> None:
    async def full(_ended: EndedRequest) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr("maveriq.serve.requests._STORE_TIMEOUT_S", 0.0)
    with running(state) as server, server.client() as http:
        server.deploy()
        works = server.service.store.end
        monkeypatch.setattr(server.service.store, "end", full)
        body = {"model": MODEL, "prompt": "a", "max_tokens": 3, "stream": stream}
        answer = http.post("/v1/completions", json=body)
        monkeypatch.setattr(server.service.store, "end", works)
        until(lambda: http.get("/health").json()["in_flight"] == 0)
        stored = http.get(f"/requests/{answer.headers['X-Request-Id']}").json()
    assert answer.status_code == (200 if stream else 503)
    *texts, last = answer.text.strip().split("\n\n") if stream else [answer.text]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["code"] == "outcome_not_stored"
    assert len(texts) == (3 if stream else 0)
    assert all(json.loads(text.removeprefix("data: "))["choices"][0]["finish_reason"] is None for text in texts)
    assert (stored["status"], stored["reason"]) == ("failed", error["message"])


def test_chat_stream_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *texts, counts = chunks
    assert texts[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in texts) == expected_text("user: Hi\nassistant:", 4)
    assert counts.choices == []
    assert counts.usage is not None
    assert counts.usage.completion_tokens == 4


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_ends_the_text(client: openai.OpenAI, *, stream: bool) -> None:
    whole = expected_text("Hello", 6)
    stop = whole[2:4]
    answer = client.completions.create(model=MODEL, prompt="Hello", stop=["never said", stop], stream=stream)
    if stream:
        chunks = list(answer)
        text, finish = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        text, finish = answer.choices[0].text, answer.choices[0].finish_reason
    assert (text, finish) == (whole[: whole.index(stop)], "stop")


def test_stop_string_of_one_token_stops_the_engine(server: Running, client: openai.OpenAI) -> None:
    whole = expected_text("Hello", 6)
    answer = client.completions.create(model=MODEL, prompt="Hello", stop=whole[2])
    assert answer.choices[0].text == whole[: whole.index(whole[2])]
    assert server.cluster.submitted[-1].stop_token_ids == asyncio.run(BYTES.encode(whole[2]))


def test_priority_and_slo_from_body_and_header(server: Running, client: openai.OpenAI) -> None:
    client.completions.create(model=MODEL, prompt="a", max_tokens=1)
    assert (server.cluster.submitted[-1].priority, server.cluster.submitted[-1].slo_us) == (False, 0)
    client.completions.create(model=MODEL, prompt="a", max_tokens=1, extra_body={"priority": True, "slo_ms": 250})
    assert (server.cluster.submitted[-1].priority, server.cluster.submitted[-1].slo_us) == (True, 250_000)
    headers = {"X-Priority": "true", "X-SLO-Ms": "1.5"}
    client.completions.create(model=MODEL, prompt="a", max_tokens=1, extra_headers=headers)
    assert (server.cluster.submitted[-1].priority, server.cluster.submitted[-1].slo_us) == (True, 1_500)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"n": 2}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True}, "echo"),
        ({"logprobs": 0}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"suffix": "end"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1_000_000}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [32_000]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"temprature": 1}, "temprature"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"slo_ms": -1}, "slo_ms"),
        ({"prompt": "x" * 40_000}, "prompt"),
    ],
)
def test_unsupported_parameters_are_refused(client: openai.OpenAI, extra: dict[str, object], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt="a", extra_body=extra)
    assert str(refused.value.param).split(".")[0] == param
    assert refused.value.body["message"]
    assert refused.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "x", "stop": list("abcde")}, "stop: list should have at most 4 items"),
        ({"prompt": [-1]}, "prompt.0: input should be greater than or equal to 0"),
        ({"prompt": []}, "prompt: list should have at least 1 item"),
        ({"prompt": 5}, "prompt: input should be a valid string"),
        ({"prompt": "x", "str": 1}, "unknown field str"),
        ({"prompt": "x", "logprobs": 3}, "it may only be false"),
    ],
)
def test_validation_errors_name_the_field(server: Running, body: dict[str, object], message: str) -> None:
    with server.client() as http:
        answer = http.post("/v1/completions", json={"model": MODEL, **body})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_unknown_route(server: Running) -> None:
    with server.client() as http:
        answer = http.get("/nowhere")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert "GET /openapi.json lists the routes" in answer.json()["error"]["message"]


def test_parameters_without_effect_are_accepted(client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=1,
        n=1,
        temperature=0.2,
        top_p=0.9,
        seed=7,
        user="me",
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        tool_choice="none",
    )


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="is not deployed"):
        client.completions.create(model="gpt-5", prompt="a")


def test_several_endpoints_of_a_model(state: Path) -> None:
    with running(state) as server:
        assert [server.deploy(), server.deploy()] == [1, 2]
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == [MODEL, f"{MODEL}@1", f"{MODEL}@2"]
        for number in (1, 2):
            answer = client.completions.create(model=f"{MODEL}@{number}", prompt="a", max_tokens=1)
            assert answer.model == f"{MODEL}@{number}"
            assert server.cluster.submitted[-1].endpoint_id == number
        server.call(lambda: server.cluster.lose_engine(1))
        client.completions.create(model=MODEL, prompt="a", max_tokens=1)
        assert server.cluster.submitted[-1].endpoint_id == 2, "one that is up is preferred"
        client.close()


@pytest.mark.parametrize("stream", [True, False])
def test_failed_and_refused_requests(state: Path, *, stream: bool) -> None:
    with running(state) as server:
        server.deploy()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        server.cluster.breaks = 1
        with pytest.raises(openai.APIStatusError, match="its engine failed twice") as failed:
            client.completions.create(model=MODEL, prompt="a", stream=stream)
        assert (failed.value.status_code, failed.value.code) == (502, "engine_failed")
        server.call(lambda: server.cluster.lose_engine(1))
        with pytest.raises(openai.APIStatusError, match="down") as refused:
            client.completions.create(model=MODEL, prompt="a", stream=stream)
        assert (refused.value.status_code, refused.value.code) == (503, "refused")
        assert refused.value.response.headers["retry-after"] == "5"
        name = refused.value.response.headers["x-request-id"]
        assert httpx.get(f"{server.url}/requests/{name}").json()["status"] == "refused"
        client.close()


def test_engine_failure_ends_a_stream_with_an_error(state: Path) -> None:
    with running(state) as server:
        server.deploy()
        server.hold_tokens()
        server.release_tokens(1)
        body = {"model": MODEL, "prompt": "a", "stream": True}
        with server.client() as http, http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert "choices" in next(lines)
            server.cluster.breaks = 1
            server.release_tokens()
            rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "engine_failed"
    assert "[DONE]" not in "".join(rest)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("waiting", [True, False])
def test_a_disconnected_client_cancels_its_request(state: Path, *, stream: bool, waiting: bool) -> None:
    with running(state) as server:
        server.deploy()
        server.hold_tokens()
        with contextlib.ExitStack() as connections:
            if waiting:
                connections.enter_context(_sent(server, stream=True))
                until(lambda: len(server.cluster.submitted) == 1)
            with _sent(server, stream=stream) as connection:
                until(lambda: len(server.cluster.submitted) == 1 + waiting)
                if stream and not waiting:
                    server.release_tokens(1)
                    assert b"data: " in _received(connection, b"data: ")
            until(lambda: len(server.cluster.cancelled) == 1)
            server.release_tokens()
        until(lambda: len(server.service.requests) == 0)
        with server.client() as http:
            statuses = {row["status"] for row in http.get("/requests").json()}
        assert statuses == ({"completed", "failed"} if waiting else {"completed"})


@contextlib.contextmanager
def _sent(server: Running, *, stream: bool) -> Iterator[socket.socket]:
    """Send a completion request and give its connection, which is closed at the end."""
    body = json.dumps({"model": MODEL, "prompt": "a", "stream": stream, "max_tokens": 8}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        yield connection


def _received(connection: socket.socket, part: bytes) -> bytes:
    """Return what a server sends up to a part of it, or to its end."""
    received = b""
    while part not in received and (piece := connection.recv(4_096)):
        received += piece
    return received
