"""Hostile files: every reader of users' files stays within its memory, waits for nothing, and says one line."""

import gzip
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from maveriq import simulate
from maveriq.errors import InputError

GIB = 1 << 30
HEADER = b"TIMESTAMP,ContextTokens,GeneratedTokens\n"


def zeros_in_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(bytes(64 << 20)) * 48)  # 3 MB, 3 GiB


def rows_in_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(HEADER) + gzip.compress(b"2023-11-16 18:17:03.9799600,4808,10\n" * 500_000) * 60)


def zeros_in_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("t.csv", "w") as member:
        member.write(HEADER)
        for _ in range(4):
            member.write(bytes(64 << 20))


def long_line(path: Path) -> None:
    with path.open("wb") as file:
        file.write(HEADER)
        file.truncate(GIB)  # one line of zeros, without their disk space


def no_line_end(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(GIB)


def open_quote(path: Path) -> None:
    path.write_bytes(HEADER + b'"' + b"2023-11-16 18:17:03,1,1\n" * 4_000_000)


def write_many(path: Path, first: bytes, line: bytes, lines: int, last: bytes) -> None:
    with path.open("wb") as file:
        file.write(first)
        for _ in range(lines):
            file.write(line)
        file.write(last)


def long_unused_cells(path: Path) -> None:
    header = b"arrival_s,prompt_tokens,output_tokens,why\n"
    write_many(path, header, b"1,1,1," + b"x" * 130_000 + b"\n", 6_000, b"0,1,1,\n")


def long_json_lines(path: Path) -> None:
    line = b'{"timestamp": 1, "input_length": 2, "output_length": 3, "hash_ids": [' + b"1," * 500_000 + b"1]}\n"
    write_many(path, b"", line, 500, b"{}")


HOSTILE: dict[str, Callable[[Path], object]] = {
    "zeros in gzip": zeros_in_gzip,
    "zeros in zip": zeros_in_zip,
    "a line of 1 GiB": long_line,
    "no line end": no_line_end,
    "an open quote": open_quote,
    "long cells": lambda path: path.write_bytes(HEADER + b"0" * 130_000 + b",1,1\n"),
    "pipe": os.mkfifo,
    "zeros without end": lambda path: path.symlink_to("/dev/zero"),
    "random without end": lambda path: path.symlink_to("/dev/urandom"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "folder": lambda path: path.mkdir(),
    "itself": lambda path: path.symlink_to(path.name),
}


WITH_PEAK = """
import atexit, pathlib, re, sys

@atexit.register
def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    pathlib.Path("peak").write_text(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])
"""
RUN_MAVERIQ = "import runpy; runpy.run_module('maveriq', run_name='__main__', alter_sys=True)"


def run_bounded(code: str, arguments: list[str], folder: Path) -> tuple[int, str, int]:
    """Run code in a process of its own; return its exit code, what it printed, and its peak memory in bytes."""
    command = [sys.executable, "-c", f"{WITH_PEAK}\n{code}", *arguments]
    ended = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return ended.returncode, ended.stdout, int((folder / "peak").read_text()) << 10


READ_ALL = """
import pathlib, sys
from maveriq.calibration.measurements import read_measurements
from maveriq.domain.models import load_model
from maveriq.errors import InputError
from maveriq.estimate.cluster_spec import cluster_from
from maveriq.estimate.hardware_profile import load_profile
from maveriq.scenario.placement_problems import load_problem, read_demand
from maveriq.workload.model_sets import load_model_set
from maveriq.workload.traces import read_trace

READERS = {
    "trace": lambda path: read_trace(pathlib.Path(path)),
    "model set": lambda path: load_model_set(path),
    "cluster": lambda path: cluster_from(path),
    "profile": lambda path: load_profile(path),
    "placement problem": lambda path: load_problem(pathlib.Path(path)),
    "placement requests": lambda path: read_demand(pathlib.Path(path), ["m"]),
    "measurements": lambda path: list(read_measurements(pathlib.Path(path))),
}
for reader in sys.argv[1].split(","):
    for path in sys.argv[2:]:
        try:
            READERS[reader](path)
            print("READ", reader, path)
        except InputError as error:
            print(error)
"""


def messages(readers: str, names: list[str], folder: Path) -> list[str]:
    """Read files with readers in one process of bounded memory; return what each says, a line each."""
    code, printed, peak_bytes = run_bounded(READ_ALL, [readers, *names], folder)
    assert code == 0, printed
    assert peak_bytes < GIB
    return printed.splitlines()


@pytest.mark.heavy
def test_hostile_traces_take_no_memory_and_say_one_line(tmp_path: Path) -> None:
    for name, make in HOSTILE.items():
        make(tmp_path / f"{name}.csv")
    lines = messages("trace", [f"{name}.csv" for name in HOSTILE], tmp_path)
    assert len(lines) == len(HOSTILE)
    for name, line in zip(HOSTILE, lines, strict=True):
        assert line.startswith(f"trace '{name}.csv"), line
        assert len(line) < 400


def test_every_reader_of_files_is_bounded(tmp_path: Path) -> None:
    kinds = ["zeros without end", "pipe", "no line end", "zeros in gzip"]
    for name in kinds:
        HOSTILE[name](tmp_path / f"{name}.toml")
    readers = "model set,cluster,profile,placement problem,placement requests,measurements"
    lines = messages(readers, [f"{name}.toml" for name in kinds], tmp_path)
    assert len(lines) == 6 * len(kinds)
    assert [line for line in lines if line.startswith("READ") or len(line) > 400] == []


def test_wide_files_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "wide.toml").write_text("a = [" + "[]," * (2 << 20) + "]")
    assert "holds more than 2 MiB" in messages("model set", ["wide.toml"], tmp_path)[0]


def test_a_policy_file_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rule.py")
    with pytest.raises(InputError, match=r"rule\.py' is not a regular file"):
        simulate(policy=f"{tmp_path / 'rule.py'}:order")


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (rows_in_gzip, "holds more than 64 MiB"),
        (long_unused_cells, "line 6002: arrival_s '0' is before"),
        (long_json_lines, "line 501: no timestamp"),
    ],
)
def test_large_files_are_read_within_their_memory(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    make(tmp_path / "t.csv")
    assert words in messages("trace", ["t.csv"], tmp_path)[0]
    packed = gzip.compress(b"arrival_s,model,slo_s\n") + gzip.compress(b"0,m,\n" * 3_000_000)
    (tmp_path / "requests.csv").write_bytes(packed)
    assert "more than 2,000,000 requests" in messages("placement requests", ["requests.csv"], tmp_path)[0]


@pytest.mark.parametrize("kind", ["zeros in gzip", "zeros without end", "pipe"])
def test_the_command_says_one_line(tmp_path: Path, kind: str) -> None:
    HOSTILE[kind](tmp_path / "t.csv")
    code, printed, peak_bytes = run_bounded(RUN_MAVERIQ, ["sim", "--trace", "t.csv"], tmp_path)
    [line] = printed.splitlines()
    assert line.startswith("maveriq: trace 't.csv'")
    assert code == 2
    assert peak_bytes < GIB


@pytest.mark.heavy
def test_a_trace_of_millions_of_requests_is_read_within_its_memory(tmp_path: Path) -> None:
    with (tmp_path / "t.csv").open("w") as file:
        file.write("arrival_s,prompt_tokens,output_tokens\n")
        for block in range(20):
            file.writelines(f"{(block * 100_000 + row) / 100:.2f},{row % 4000},{row % 700}\n" for row in range(100_000))
    code, printed, peak_bytes = run_bounded(RUN_MAVERIQ, ["trace", "check", "t.csv"], tmp_path)
    assert code == 0, printed
    assert "plain trace, 2,000,000 requests in 20,000 s" in printed
    assert peak_bytes < GIB
