"""Model files that attack the service: it answers others meanwhile, refuses them in one line, and stops when told."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from running import Running, running, until

from maveriq.errors import InputError
from maveriq.serve.settings import ServeSettings
from maveriq.serve.tokenizer_process import TokenizerFailedError, TokenizerLimits, TokenizerPool, TokenizerProcess
from maveriq.serve.tokenizer_worker import LoadTokenizer, encode

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
    "intermediate_size": 128, "vocab_size": 300,
}  # fmt: skip
CHAT = [{"role": "user", "content": "a"}]
ENDLESS = (
    "{% for a in range(90000) %}{% for b in range(90000) %}{% for c in range(90000) %}{% endfor %}{% endfor %}"
    "{% endfor %}"
)
LIMITS = TokenizerLimits(call_s=3.0)


def put_model(
    models: Path, name: str, *, template: str = "", change: Callable[[dict[str, object]], None] | None = None
) -> Path:
    """Put a model with a tokenizer into the models folder."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = models / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, "<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    content = json.loads(inner.to_str())
    if change is not None:
        change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    if template:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def backtracking(content: dict[str, object]) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a|a|aa)+$"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = split


def failed(folder: Path, use: Callable[[TokenizerProcess], Awaitable[object]], limits: TokenizerLimits = LIMITS) -> str:
    """Return the message of what a tokenizer's process refuses."""

    async def run() -> str:
        process = TokenizerProcess(str(folder), TokenizerPool(limits))
        try:
            with pytest.raises((InputError, TokenizerFailedError)) as refused:
                await use(process)
            return str(refused.value)
        finally:
            await process.close()

    return asyncio.run(run())


@pytest.mark.heavy
def test_an_endless_template_stops_at_the_deadline(tmp_path: Path) -> None:
    folder = put_model(tmp_path, "endless", template=ENDLESS)
    message = failed(folder, lambda process: process.encode_chat(CHAT))
    assert message == f"{folder}: its tokenizer or chat template took more than 3 s"


@pytest.mark.heavy
def test_an_endless_template_stops_at_its_cpu_time_whatever_the_server_does(tmp_path: Path) -> None:
    folder = put_model(tmp_path, "endless", template=ENDLESS)
    message = failed(folder, lambda process: process.encode_chat(CHAT), TokenizerLimits(call_s=100.0, cpu_s=1))
    assert "crashed, perhaps out of memory or CPU time" in message


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 'x' * 3000000000 }}", "needs too much memory"),
        ("{{ messages[0].content * 3000000000 }}", "needs too much memory"),
    ],
)
def test_a_template_that_fills_the_memory_is_refused(tmp_path: Path, template: str, words: str) -> None:
    folder = put_model(tmp_path, "big", template=template)
    message = failed(folder, lambda process: process.encode_chat([{"role": "user", "content": "a "}]))
    assert words in message
    assert "\n" not in message


def test_a_regular_expression_that_backtracks_is_stopped(tmp_path: Path) -> None:
    folder = put_model(tmp_path, "backtracking", change=backtracking)
    message = failed(folder, lambda process: process.encode("a" * 60 + "b"))
    assert "took more than 3 s" in message or "the tokenizer failed" in message


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a link out of"),
        (lambda path: path.symlink_to(path.parent.parent / "secret.json"), "is a link out of"),
        (lambda path: path.symlink_to(path), "cannot be read"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: (path.touch(), os.truncate(path, 1 << 40)), "is larger than 64 MiB"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is not a text file in UTF-8"),
        (lambda path: path.write_text("{" * 100_000), "cannot be read"),
    ],
    ids=["fifo", "device", "link", "loop", "folder", "huge", "bytes", "deep"],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_no_files_are_refused(
    tmp_path: Path, make: Callable[[Path], object], words: str, name: str
) -> None:
    folder = put_model(tmp_path / "models", "odd", template="{{ 1 }}")
    (tmp_path / "models" / "secret.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (folder / name).unlink()
    make(folder / name)
    message = failed(folder, lambda process: process.encode("a"))
    assert words in message or ("deep" in words, "not valid JSON" in message) == (False, True)


def test_a_link_within_the_cache_of_hugging_face_is_read(tmp_path: Path) -> None:
    folder = put_model(tmp_path / "models--me--tiny" / "snapshots", "abc")
    blob = tmp_path / "models--me--tiny" / "blobs" / "123"
    blob.parent.mkdir()
    (folder / "tokenizer.json").rename(blob)
    (folder / "tokenizer.json").symlink_to("../../blobs/123")

    async def run() -> tuple[int, ...]:
        process = TokenizerProcess(str(folder), TokenizerPool(LIMITS))
        try:
            return await process.encode("a b")
        finally:
            await process.close()

    assert asyncio.run(run()) == (1, 2)


def test_the_process_knows_no_token_and_ends_with_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAVERIQ_TOKEN", "very-secret-token")
    folder = put_model(tmp_path, "endless", template=ENDLESS)

    async def environment() -> bytes:
        process = TokenizerProcess(str(folder), TokenizerPool(LIMITS))
        await process.start()
        try:
            return Path(f"/proc/{process.pid}/environ").read_bytes()
        finally:
            await process.close()

    assert b"very-secret-token" not in asyncio.run(environment())
    command = [sys.executable, "-m", "maveriq.serve.tokenizer_worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdin is not None
        worker.stdin.write(encode(LoadTokenizer(number=1, folder=str(folder), cpu_s=60, memory_bytes=1 << 31)))
        worker.stdin.close()  # as the end of the server does
        assert worker.wait(60) == 0


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def serving(models: Path, state: Path) -> Running:
    return running(state, ServeSettings(models_folder=models, grace_period_s=1), LIMITS)  # type: ignore[return-value]


@pytest.mark.heavy
def test_others_are_served_while_a_template_loops(models: Path, state: Path) -> None:
    put_model(models, "endless", template=ENDLESS)
    with serving(models, state) as server, server.client() as http:  # type: ignore[attr-defined]
        server.deploy("endless")
        answers: list[tuple[int, str]] = []

        def chat() -> None:
            with server.client() as other:
                answer = other.post("/v1/chat/completions", json={"model": "endless", "messages": CHAT})
                answers.append((answer.status_code, answer.json()["error"]["message"]))

        asking = threading.Thread(target=chat)
        asking.start()
        for _ in range(5):
            assert http.get("/health").status_code == 200
            assert not answers, "the server must answer before the template has ended"
            time.sleep(0.1)
        asking.join(60)
        [(status, message)] = answers
        assert (status, "took more than 3 s" in message) == (503, True)
        answer = http.post("/v1/completions", json={"model": "endless", "prompt": "a b", "max_tokens": 2})
        assert (answer.status_code, answer.json()["usage"]["prompt_tokens"]) == (200, 2)


def test_the_service_stops_while_a_template_loops(models: Path, state: Path) -> None:
    put_model(models, "endless", template=ENDLESS)
    patient = TokenizerLimits(call_s=600.0, cpu_s=600)
    answers: list[int] = []
    with running(state, ServeSettings(models_folder=models, grace_period_s=1), patient) as server:
        server.deploy("endless")

        def chat() -> None:
            with server.client() as other:
                answer = other.post("/v1/chat/completions", json={"model": "endless", "messages": CHAT})
                answers.append(answer.status_code)

        asking = [threading.Thread(target=chat) for _ in range(3)]
        for thread in asking:
            thread.start()
        [tokenizer] = server.service.models._tokenizers.values()
        until(lambda: tokenizer.is_busy)  # type: ignore[attr-defined]
        time.sleep(0.3)
    for thread in asking:
        thread.join(30)
    assert answers == [503] * 3


def test_a_process_that_is_not_needed_makes_room(tmp_path: Path) -> None:
    pool = TokenizerPool(LIMITS, max_processes=1)

    async def run() -> None:
        first, second = (TokenizerProcess(str(put_model(tmp_path, name)), pool) for name in ("first", "second"))
        try:
            assert await first.encode("a b") == (1, 2)
            assert await second.encode("b a") == (2, 1)
            assert (first.pid, second.pid is None) == (None, False)
            assert await first.encode("a b") == (1, 2), "it starts again"
            stream = first.stream()
            assert await stream.feed([1, 2]) == ["a", " b"]
        finally:
            await first.close()
            await second.close()

    asyncio.run(run())


def test_hostile_models_hold_up_no_registration(models: Path, state: Path) -> None:
    fifo = put_model(models, "fifo")
    (fifo / "tokenizer.json").unlink()
    os.mkfifo(fifo / "tokenizer.json")
    put_model(models, "syntax", template="{% for %}")
    put_model(models, "good")
    with serving(models, state) as server, server.client() as http:  # type: ignore[attr-defined]
        for name, words in (("fifo", "is not a regular file"), ("syntax", "chat template")):
            refused = http.post("/models", json={"model": name})
            assert (refused.status_code, words in refused.json()["error"]["message"]) == (400, True)
        assert http.post("/models", json={"model": "good"}).status_code == 201
        assert [model["name"] for model in http.get("/models").json()] == ["good"]
