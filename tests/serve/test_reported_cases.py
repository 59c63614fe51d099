"""Requests of the reported cases: the payloads of each case's run.sh, sent to a server."""

import re
from pathlib import Path

import httpx
import pytest
from running import Running

POST = re.compile(r"""^post '([^']+)'(?: (/\S+))?$""", re.MULTILINE)
FILE = re.compile(r"""^printf '([^']+)' >""", re.MULTILINE)


def answers(server: Running, measured_data: Path, case: str) -> list[httpx.Response]:
    """Send the payloads of a case as its script does."""
    [script] = (measured_data / "cases").glob(f"{case}-*/run.sh")
    text = script.read_text(encoding="utf-8")
    payloads = [(body.encode(), path or "/v1/completions") for body, path in POST.findall(text)]
    payloads += [(_printed(body), "/v1/completions") for body in FILE.findall(text)]
    assert payloads
    with server.client() as http:
        headers = {"Content-Type": "application/json"}
        return [http.post(path, content=body, headers=headers) for body, path in payloads]


def _printed(text: str) -> bytes:
    return re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes((int(found[1], 16),)), text.encode())


def test_text_that_cannot_be_encoded(server: Running, measured_data: Path) -> None:
    errors = [answer.json()["error"] for answer in answers(server, measured_data, "01")]
    assert [error["code"] for error in errors] == ["invalid_value"] * 3
    assert [error["param"] for error in errors] == ["prompt", "messages.0.content", "messages.0.content.0.text"]


@pytest.mark.parametrize("case", ["02", "04"])
def test_parameters_that_change_nothing(server: Running, measured_data: Path, case: str) -> None:
    for answer in answers(server, measured_data, case):
        assert answer.status_code == 200, answer.text
        assert "text" in answer.text or "content" in answer.text


def test_a_body_that_is_not_utf8(server: Running, measured_data: Path) -> None:
    [answer] = answers(server, measured_data, "21")
    assert answer.status_code == 400
    assert "the body is not UTF-8" in answer.json()["error"]["message"]
