"""docs/serving.md lists the routes and console commands, the reference the metrics, and the example works."""

import re
from pathlib import Path

import openai
import pytest
from running import Running

from maveriq.cli.console_commands import USAGE

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "serving.md").read_text(encoding="utf-8")


def test_every_route_is_listed(server: Running) -> None:
    with server.client() as http:
        paths = http.get("/openapi.json").json()["paths"]
    for path in paths:
        assert any(re.sub(r"\{\w+\}", name, path) in TEXT for name in ("ID", "NAME")), path


@pytest.mark.parametrize("usage", USAGE.values())
def test_every_command_is_listed(usage: str) -> None:
    assert usage in TEXT.partition("## The console")[2]


def test_exactly_the_existing_metrics_are_listed(server: Running, client: openai.OpenAI) -> None:
    client.completions.create(model="llama-2-7b", prompt="a", max_tokens=2, extra_body={"slo_ms": 1000})
    with server.client() as http:
        http.get("/nowhere")
        shown = http.get("/metrics").text
    ours = {
        name for name in re.findall(r"^# TYPE maveriq_(\w+) ", shown, re.MULTILINE) if not name.endswith("_created")
    }
    reference = (DOCS / "reference" / "metrics.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `maveriq_(\w+)`", reference, re.MULTILINE))
    assert {name for name in listed if not name.startswith("profile")} == ours  # this server has no folder for profiles


def test_the_example_runs(server: Running) -> None:
    [example] = re.findall(r"^```py\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    scope: dict[str, openai.OpenAI] = {}
    exec(example.replace("http://127.0.0.1:8000", server.url), scope)  # noqa: S102
    scope["client"].close()
