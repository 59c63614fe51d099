"""Control characters of names, files and servers never reach the terminal, nor a pipe."""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from command_results import Maveriq, put

from maveriq.cli.serve import EscapingFormatter
from maveriq.report.terminal import open_console
from maveriq.report.view import Facts, Panel, Table, Text, View, number_column, row

ESCAPE = "\x1b[31m\x9b"
HOSTILE = {"id": 1, "name": f"evil{ESCAPE}", "model": f"evil{ESCAPE}", "model_id": 1}
ENDPOINT = HOSTILE | {"status": f"up{ESCAPE}", "deployments": [], "waiting": 0, "completed": 0, "reason": ESCAPE}
ANSWERS = {
    "/health": {"status": f"ready{ESCAPE}", "problems": [f"bad{ESCAPE}"]},
    "/models": [HOSTILE],
    "/endpoints": [ENDPOINT],
}
CONFIG = {
    "_name_or_path": f"meta/evil{ESCAPE}", "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64,
    "num_attention_heads": 4, "vocab_size": 100, "intermediate_size": 128,
}  # fmt: skip


def assert_harmless(text: str) -> None:
    assert all(character.isprintable() or character in "\n\t" for character in text), repr(text)


@pytest.mark.parametrize("command", ["engines --model model", "plan model", "sim --models evil.toml -q"])
def test_a_name_from_a_file(maveriq: Maveriq, tmp_path: Path, command: str) -> None:
    entry = 'name = "x"\n[[models]]\nmodel = "model"\nload_at = 0\n'
    put(tmp_path, {"model/config.json": json.dumps(CONFIG), "evil.toml": entry})
    ended = maveriq(command)
    assert ended.code == 2
    assert "\\x1b[31m" in ended.only_line
    assert "must be printable" in ended.only_line
    assert_harmless(ended.err)


@pytest.mark.parametrize(
    "command",
    ["trace check 'a\x1b[31m.csv'", "sim --models 'a\x1b[31m.toml'", "sim --policy 'a\x1b[31m'", "'a\x1b[31m'"],
)
def test_arguments_in_messages(maveriq: Maveriq, command: str) -> None:
    ended = maveriq(command)
    assert ended.code == 2
    assert "\\x1b[31m" in ended.err
    assert_harmless(ended.err)


def test_a_file_name_in_a_result(maveriq: Maveriq, tmp_path: Path) -> None:
    head = "arrival_s,endpoint,prompt_tokens,output_tokens\n"
    put(tmp_path, {"a\x1b[31m.csv": f"{head}1,1,10,20\n"})
    ended = maveriq("trace check 'a\x1b[31m.csv'")
    assert (ended.code, ended.err) == (0, "")
    assert "a\\x1b[31m.csv" in ended.out
    assert_harmless(ended.out)


class Hostile(BaseHTTPRequestHandler):
    """A server that answers with control characters everywhere."""

    def do_GET(self) -> None:
        self._send(ANSWERS[self.path])

    def do_POST(self) -> None:
        self._send({"error": {"message": f"no{ESCAPE}\nmaveriq: fine"}}, 400)

    def _send(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hostile() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Hostile)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hostile_server_behind_the_console(maveriq: Maveriq, hostile: str) -> None:
    pytest.importorskip("httpx")
    ended = maveriq(f"console --url {hostile} -c models -c endpoints -c health -c 'register x'")
    assert ended.code == 2
    assert_harmless(ended.out + ended.err)
    assert "evil\\x1b[31m\\x9b" in ended.out
    assert len(ended.err.splitlines()) == 1


def test_every_part_of_a_view(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(ESCAPE, [number_column(ESCAPE)], [row(ESCAPE), row(Text(ESCAPE))])
    parts = [Text(ESCAPE), table, Facts([(ESCAPE, ESCAPE)])]
    open_console().print(View([*parts, Panel(ESCAPE, parts, "red", 40)]))
    open_console().print(f"plain {ESCAPE}", markup=False)
    shown = capsys.readouterr().out
    assert_harmless(shown)
    assert "plain \\x1b[31m" in shown


def test_log_lines() -> None:
    record = logging.LogRecord("maveriq", logging.ERROR, "", 0, "bad %s", (f"{ESCAPE}\nmaveriq: forged",), None)
    line = EscapingFormatter("maveriq: %(message)s").format(record)
    assert line == "maveriq: bad \\x1b[31m\\x9b\\nmaveriq: forged"


def test_the_reported_case(measured_data: Path) -> None:
    case = measured_data / "cases" / "20-escape-in-name" / "model"
    environment = os.environ | {"COLUMNS": "120"}
    command = [sys.executable, "-m", "maveriq", "engines", "--model", str(case)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert_harmless(ended.stdout + ended.stderr)
    assert "\\x1b" in ended.stdout + ended.stderr
