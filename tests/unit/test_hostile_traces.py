"""Damaged trace files and options: whatever is in them, they are read, or refused with one line."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from maveriq.errors import InputError
from maveriq.workload.distributions import parse_distribution
from maveriq.workload.options import WorkloadOptions, parse_process
from maveriq.workload.requests import Arrivals
from maveriq.workload.schedules import Schedule
from maveriq.workload.sharegpt import read_conversations
from maveriq.workload.traces import read_trace

T = TypeVar("T")

PLAIN = "arrival_s,prompt_tokens,output_tokens,session_id,think_s,prefix_hashes,prefix_hash_tokens,prompt_id\n"
FILES = {
    "plain": PLAIN + "0,100,5,a,0.5,1 2,64,x\n1,160,5,a,0.5,1 2 3,64,y\n2,10,5,,0,,64,\n",
    "schedule": "arrival_s,endpoint,prompt_tokens,output_tokens,session_id,prefix_hashes\n0,1,9,9,s,1;2\n1,2,9,9,s,\n",
    "mooncake": "".join(
        f'{{"timestamp": {row}, "input_length": 900, "output_length": 2, "hash_ids": [1, {row}], "delay": 1}}\n'
        for row in range(3)
    ),
    "qwen": '{"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 1, "output_length": 2}\n' * 2,
    "vllm": json.dumps({"input_lens": [9, 8], "output_lens": [1, 2], "start_times": [1.5, 2.5], "errors": ["", ""]}),
    "guidellm": json.dumps({"benchmarks": [{"requests": {"successful": [
        {"prompt_tokens": 3, "output_tokens": 4, "start_time": 5.5}]}}]}),
    "aiperf": json.dumps({"metadata": {"request_start_ns": 5}, "metrics": {
        "input_sequence_length": {"value": 3}, "output_sequence_length": {"value": 4}}, "error": None}) + "\n",
}  # fmt: skip
CHATS = json.dumps([{"conversations": [{"from": "human", "value": "hé"}, {"from": "gpt", "value": "yes"}]}] * 3)
JUNK = st.sampled_from(
    [*'{}[]",:;|\n\r\0\\', "null", "nan", "1e999", "-1", "9" * 30, "é", "\ufeff", "[" * 50, "true", "1.5", " ", ""]
)


@st.composite
def damaged(draw, text: str) -> bytes:
    """Return a text of which some pieces were cut out, and some junk put in."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        text = text[:start] + draw(JUNK) + text[start + draw(st.integers(0, 12)) :]
    data = text.encode()
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + b"\xff\xfe" + data[at:]
    return data


def attempt(call: Callable[[], T]) -> tuple[T | None, str]:
    """Return what a call returns, or None and the one line with which it refuses."""
    try:
        return call(), ""
    except InputError as error:
        message = str(error)
    assert message
    assert "\n" not in message
    assert len(message) < 800
    return None, message


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_read_or_refused_with_one_line(tmp_path: Path, name: str, data) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(data.draw(damaged(FILES[name])))
    trace, refused = attempt(lambda: read_trace(path))
    if trace is None:
        assert "t.csv" in refused
        return
    arrivals = trace.arrivals if isinstance(trace, Schedule) else trace
    assert arrivals.prompt_tokens.min() >= 1
    assert arrivals.output_tokens.min() >= 1
    hashes = arrivals.prefix_hashes
    if hashes is not None:
        assert len(hashes) == len(arrivals.prompt_tokens)
        assert all(isinstance(number, int) for row in range(len(hashes)) for number in hashes.of(row))
    for column in (arrivals.session_id, arrivals.think_us, arrivals.prompt_id):
        assert column is None or column.min() >= 0


@pytest.mark.parametrize("name", FILES)
def test_an_undamaged_file_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "t.csv").write_text(FILES[name])
    read_trace(tmp_path / "t.csv")


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_conversations_are_read_or_refused_with_one_line(tmp_path: Path, data) -> None:
    (tmp_path / "c.json").write_bytes(data.draw(damaged(CHATS)))
    found, refused = attempt(lambda: read_conversations(tmp_path / "c.json", len))
    assert "c.json" in refused if found is None else isinstance(found[0], Arrivals)


WORDS = st.text(st.sampled_from("uniform:lgamaexpt0123456789.,-eE+ nif\0é"), max_size=20)


@given(WORDS | st.sampled_from(["uniform:", "gamma:1,2", "lognormal:5,5"]))
def test_any_text_is_a_distribution_or_refused_with_one_line(text: str) -> None:
    for whole in (True, False):
        found, _ = attempt(partial(parse_distribution, text, "turns", whole=whole, minimum=1, maximum=1000))
        assert found is None or found.median >= 0


@given(WORDS)
def test_any_text_is_an_arrival_process_or_refused_with_one_line(text: str) -> None:
    found, _ = attempt(lambda: parse_process(text))
    assert found is None or (found[0] in ("poisson", "constant", "gamma") and found[1] >= 0)


@given(st.integers(-5, 5), st.integers(-5, 5))
def test_counts_of_clients_and_prefixes_are_positive(clients: int, prefixes: int) -> None:
    found, _ = attempt(lambda: WorkloadOptions(trace="synthetic", concurrency=clients, prefixes=prefixes))
    assert (found is None) == (min(clients, prefixes) < 1)
