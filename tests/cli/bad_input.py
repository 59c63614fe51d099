"""Cases of bad input: a command line, its files, and the expected message."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from command_results import Maveriq, everything_in, put
from testbed_fixtures import RUN, recorded_files

from maveriq.files import data_path

SCHEDULE = "arrival_s,endpoint,prompt_tokens,output_tokens\n"
TWO_REQUESTS = SCHEDULE + "100,1,10,20\n200,1,10,20\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:03,1,2\n"
CLUSTER = 'name = "mine"\ngpu = "A6000"\ncount = 2\n'
TINY_CLUSTER = CLUSTER + "memory_gib = 1\n"
MODELS = 'name = "mine"\n[[models]]\nmodel = "llama-2-7b"\nload_at = 0\n'
CONFIG = (
    '{"model_type": "llama", "_name_or_path": "llama-2-7b", "num_hidden_layers": 32, "hidden_size": 4096,'
    ' "num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 32000}'
)


MEASURED = {
    "t.csv": "model,tp,pp,layer_split,weight_dtype,int8_kv,output_tokens,batch_size,latency_s,memory_after_run_gib,"
    "prompt_tokens\nllama-2-7b,1,1,32,float16,0,10,1,0.5,14,923\n"
}
RULE = "def order(gpus):\n    "


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command line, its files, and phrases of its one-line message."""

    command: str
    words: tuple[str, ...]
    files: Mapping[str, str | bytes] = field(default_factory=dict)


def bad(command: str, *words: str, files: Mapping[str, str | bytes] | None = None) -> Case:
    return Case(command=command, words=words, files=files or {})


def cluster(text: str, *words: str) -> Case:
    return bad("plan llama-2-7b --gpus c.toml", "c.toml", *words, files={"c.toml": text})


def models(text: str, *words: str, more: str = "") -> Case:
    return bad(f"trace show --models m.toml {more}", *words, files={"m.toml": text, "x/config.json": CONFIG})


def trace(content: str | bytes, *words: str, name: str = "t.csv") -> Case:
    return bad(f"trace check {name}", name, *words, files={name: content})


def config(text: str, *words: str) -> Case:
    return bad("plan x/config.json", *words, files={"x/config.json": text})


def profile(table: str, old: str, new: str, *words: str) -> Case:
    """Use a copy of the A6000 files with one error."""
    files = {f"p/{path.name}": path.read_text() for path in data_path("a6000").iterdir()}
    spoilt = re.sub(old, new, files[f"p/{table}"], count=1)
    assert spoilt != files[f"p/{table}"]
    return bad("plan llama-2-7b --profile p/profile-short.toml", *words, files=files | {f"p/{table}": spoilt})


def policy(text: str, *words: str, rule: str = "r.py:order") -> Case:
    return bad(f"sim --policy {rule}", *words, files={"r.py": text, "t.csv": TWO_REQUESTS})


def recorded(command: str, *words: str, name: str = RUN, **changed: tuple[str, str]) -> Case:
    """Use a small testbed with one error."""
    files = {f"tb/{name}": content for name, content in recorded_files(**changed).items()}
    return bad(f"testbed {command} {name} --data tb --out runs", *words, files=files)


def refuse(case: Case, maveriq: Maveriq, folder: Path) -> None:
    """Run a command and check that it prints one line, exits with 2, and leaves no files."""
    put(folder, case.files)
    before = everything_in(folder)
    ended = maveriq(case.command)
    line = ended.only_line
    assert [word for word in case.words if word.lower() not in line.lower()] == [], line
    assert ended.code == 2
    assert everything_in(folder) == before
    assert len(line) < 1000
