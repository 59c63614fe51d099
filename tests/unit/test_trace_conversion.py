"""Traces of other tools: what is written is read again, up to the resolution and the columns of each format."""

import json
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from maveriq.errors import InputError
from maveriq.workload.prefixes import ListedHashes
from maveriq.workload.requests import requests_of
from maveriq.workload.schedules import Schedule
from maveriq.workload.sharegpt import read_conversations
from maveriq.workload.trace_formats import RequestTrace
from maveriq.workload.trace_writers import WRITTEN_FORMATS, WritableRequests, lost_in, writable, write_trace
from maveriq.workload.traces import read_trace

RESOLUTION_NS = {"azure": 100, "burstgpt": 1_000, "mooncake": 1_000_000, "vidur": 1_000, "splitwise": 1_000}
CONTENT = ("prompt_id", "session_id", "think_us")


@st.composite
def requests(draw) -> WritableRequests:
    count = draw(st.integers(1, 12))

    def column(low: int, high: int):
        return np.array(draw(st.lists(st.integers(low, high), min_size=count, max_size=count)), np.int64)

    counts = column(0, 4)
    hashes = draw(st.lists(st.integers(0, 9), min_size=int(counts.sum()), max_size=int(counts.sum())))
    optional = st.booleans()
    return WritableRequests(
        time_ns=np.sort(column(0, 10**13)),
        has_dates=draw(st.booleans()),
        has_times=True,
        prompt_tokens=column(1, 100_000),
        output_tokens=column(1, 5_000),
        prompt_id=column(0, 5) if draw(optional) else None,
        session_id=column(0, 5) if draw(optional) else None,
        think_us=column(0, 10**9) if draw(optional) else None,
        prefix_hashes=ListedHashes.counted(np.array(hashes, np.int64), counts, 512) if draw(optional) else None,
    )


def partition(ids: np.ndarray) -> list[list[int]]:
    """Return the rows of each number but 0, in the order of their first row."""
    groups: dict[int, list[int]] = {}
    for row, number in enumerate(ids.tolist()):
        if number:
            groups.setdefault(number, []).append(row)
    return list(groups.values())


@pytest.mark.parametrize("name", WRITTEN_FORMATS)
@given(written=requests())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read_again(tmp_path: Path, name: str, written: WritableRequests) -> None:
    path = tmp_path / "out"
    write_trace(written, name, path, overwrite=True)
    read = read_trace(path)
    assert isinstance(read, RequestTrace)
    assert name in read.format_name.lower()
    assert read.prompt_tokens.tolist() == written.prompt_tokens.tolist()
    assert read.output_tokens.tolist() == written.output_tokens.tolist()
    error_ns = np.abs((read.time_ns - read.time_ns[0]) - (written.time_ns - written.time_ns[0]))
    assert error_ns.max() <= RESOLUTION_NS.get(name, 1_000)
    if name == "azure" and written.has_dates:
        assert np.abs(read.time_ns - written.time_ns).max() <= 100
    lost = lost_in(written, name)
    for column in CONTENT:
        before, after = getattr(written, column), getattr(read, column)
        if before is None or column.replace("_us", "_s") in lost or name == "mooncake":
            assert after is None
        elif column == "think_us":
            assert after.tolist() == before.tolist()
        else:
            assert partition(after) == partition(before)
    if name in ("plain", "mooncake") and written.prefix_hashes is not None:
        assert read.prefix_hashes is not None
        for row in range(len(written)):
            # No more hashes are kept than a request has tokens for, and one for the block that its output begins.
            tokens = int(written.prompt_tokens[row]) + int(written.output_tokens[row])
            blocks = -(-int(written.prompt_tokens[row]) // 512) if name == "mooncake" else -(-tokens // 512) + 1
            assert list(read.prefix_hashes.of(row)) == list(written.prefix_hashes.of(row))[:blocks]


def test_prompts_of_one_id_share_their_mooncake_hashes(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(
        "arrival_s,prompt_tokens,output_tokens,prompt_id\n0,1000,1,a\n1,700,1,b\n2,1000,1,a\n"
    )
    write_trace(writable(read_trace(tmp_path / "p.csv")), "mooncake", tmp_path / "m.jsonl")
    first, second, third = (json.loads(line)["hash_ids"] for line in (tmp_path / "m.jsonl").read_text().splitlines())
    assert first == third
    assert set(first).isdisjoint(second)
    assert [len(first), len(second)] == [2, 2]


PLAIN = "arrival_s,prompt_tokens,output_tokens"


def read(tmp_path: Path, text: str, name: str = "t.csv") -> RequestTrace:
    (tmp_path / name).write_text(text)
    trace = read_trace(tmp_path / name)
    assert isinstance(trace, RequestTrace)
    return trace


@pytest.mark.parametrize("cell", ["7 8 9", "7;8;9", "7|8|9", '"[7, 8, 9]"', '"7,8,9"', "\"['7', '8', '9']\""])
def test_lists_of_hashes_may_be_written_in_any_usual_way(tmp_path: Path, cell: str) -> None:
    trace = read(tmp_path, f"{PLAIN},prefix_hashes\n0,1500,1,{cell}\n1,10,1,\n2,600,1,abc 7\n3,600,1,abc\n")
    assert trace.prefix_hashes is not None
    rows = [list(trace.prefix_hashes.of(row)) for row in range(4)]
    assert rows[:2] == [[7, 8, 9], []]
    assert rows[2][0] == rows[3][0] < 0
    assert rows[2][1] == 7
    assert trace.prefix_hashes.tokens_per_hash == 512


def test_a_file_may_say_how_many_tokens_a_hash_stands_for(tmp_path: Path) -> None:
    head = f"{PLAIN},prefix_hashes,prefix_hash_tokens\n"
    trace = read(tmp_path, f"{head}0,64,1,1 2,16\n1,64,1,1 3,16\n")
    assert trace.prefix_hashes is not None
    assert trace.prefix_hashes.tokens_per_hash == 16
    with pytest.raises(InputError, match="line 3: prefix_hash_tokens must be the same in all rows: 16, not 32"):
        read(tmp_path, f"{head}0,64,1,1 2,16\n1,64,1,1 3,32\n")


def test_a_list_of_hashes_is_read_as_far_as_its_request_goes(tmp_path: Path) -> None:
    many = " ".join(map(str, range(20_000)))
    trace = read(tmp_path, f"{PLAIN},prefix_hashes\n0,1000,20,{many}\n")
    assert trace.prefix_hashes is not None
    assert list(trace.prefix_hashes.of(0)) == [0, 1, 2]
    with pytest.raises(InputError, match="line 3: prefix_hashes is longer than 65,536 characters"):
        read(tmp_path, f"{PLAIN},prefix_hashes\n0,1000,20,1\n1,10000000,20,{many}\n")


def test_chats_of_qwen_bailian_are_followed_to_their_first_turn(tmp_path: Path) -> None:
    rows = [(1, -1, 0), (2, -1, 1), (3, 1, 2), (4, 3, 3), (5, 99, 4)]
    lines = [
        json.dumps({
            "chat_id": chat, "parent_chat_id": parent, "timestamp": time, "input_length": 10 + time,
            "output_length": 5, "turn": 1, "hash_ids": [chat],
        })
        for chat, parent, time in rows
    ]  # fmt: skip
    trace = read(tmp_path, "\n".join(lines), "q.jsonl")
    assert trace.session_id is not None
    assert partition(trace.session_id) == [[0, 2, 3], [1], [4]]
    assert trace.prefix_hashes is not None
    assert trace.prefix_hashes.tokens_per_hash == 16


def test_hashes_sessions_and_delays_of_mooncake(tmp_path: Path) -> None:
    text = (
        '{"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [1, 2], "session_id": "x"}\n'
        '{"timestamp": 10, "input_length": 1500, "output_length": 5, "hash_ids": [1, 2, 3], "session_id": "x"}\n'
    )
    trace = read(tmp_path, text, "m.jsonl")
    assert trace.session_id is not None
    assert trace.session_id.tolist() == [1, 1]
    with_delay = text.replace('"x"}', '"x", "delay": 500}')
    assert read(tmp_path, with_delay, "m.jsonl").think_us.tolist() == [500_000, 500_000]  # type: ignore[union-attr]
    with pytest.raises(InputError, match="line 2: delay must be a finite number"):
        read(tmp_path, with_delay[::-1].replace("005", "1-", 1)[::-1], "m.jsonl")


# Load generators


def vllm(**changes) -> str:
    result = {
        "date": "x", "duration": 3.0, "completed": 2, "request_throughput": 1.0, "input_lens": [100, 200, 300],
        "output_lens": [10, 20, 0], "ttfts": [0.1, 0.2, 0], "itls": [[0.01], [0.02], []],
        "start_times": [105.5, 100.25, 101.0], "errors": ["", "", "boom"],
    }  # fmt: skip
    return json.dumps({name: value for name, value in (result | changes).items() if value is not None})


def guidellm(benchmarks: int = 1, **changes) -> str:
    request = {"prompt": "...", "prompt_tokens": 100, "output_tokens": 10, "start_time": 50.5} | changes
    kept = {name: value for name, value in request.items() if value is not None}
    later = kept | {"start_time": 50.0, "prompt_tokens": 7}
    requests = {"successful": [kept, later], "incomplete": [{}], "errored": []}
    return json.dumps({"benchmarks": [{"args": {}, "requests": requests}] * benchmarks}, indent=1)


def aiperf(**metrics) -> str:
    def record(start_ns: int, prompt: int, error: object = None) -> str:
        values = {"input_sequence_length": prompt, "output_sequence_length": 5} | metrics
        known = {name: count for name, count in values.items() if count is not None}
        return json.dumps({
            "metadata": {"session_num": 0, "request_start_ns": start_ns, "request_end_ns": start_ns + 9},
            "metrics": {name: {"value": count, "unit": "tokens"} for name, count in known.items()},
            "error": error,
        })  # fmt: skip

    lines = [record(1_700_000_002_000_000_000, 20), record(1_700_000_000_500_000_000, 10), record(1, 1, {"code": 500})]
    return "\n".join(lines)


def test_results_of_load_generators_are_replayed_as_they_were_sent(tmp_path: Path) -> None:
    trace = read(tmp_path, vllm(), "r.json")
    assert (trace.format_name, trace.arrival_us.tolist()) == ("vLLM benchmark", [0, 5_250_000])
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([200, 100], [20, 10])
    assert trace.remarks == ("1 request that failed left out",)
    trace = read(tmp_path, guidellm(), "g.json")
    assert (trace.format_name, trace.arrival_us.tolist()) == ("GuideLLM report", [0, 500_000])
    assert trace.prompt_tokens.tolist() == [7, 100]
    trace = read(tmp_path, aiperf(), "a.jsonl")
    assert (trace.format_name, trace.arrival_us.tolist()) == ("AIPerf records", [0, 1_500_000])
    assert trace.prompt_tokens.tolist() == [10, 20]


def test_a_result_without_start_times_has_no_times(tmp_path: Path) -> None:
    assert not read(tmp_path, vllm(start_times=None, errors=None), "r.json").has_times


def test_one_of_several_benchmarks_is_taken_by_number(tmp_path: Path) -> None:
    (tmp_path / "g.json").write_text(guidellm(3))
    trace = read_trace(tmp_path / "g.json", benchmark=2)
    assert isinstance(trace, RequestTrace)
    assert len(trace) == 2
    for wrong, says in ((None, "holds 3 benchmarks; take one with maveriq trace convert"), (4, "has no benchmark 4")):
        with pytest.raises(InputError, match=says):
            read_trace(tmp_path / "g.json", benchmark=wrong)


BAD_LOADS = [
    (vllm(input_lens=None, output_lens=None), "--save-detailed"),
    (vllm(output_lens=[1]), "input_lens has 3 entries, and output_lens has 1"),
    (vllm(input_lens=[1, -2, 3]), "request 2 of those that succeeded: prompt tokens must be a whole number"),
    (vllm(input_lens=[1, "x", 3]), r"input_lens\[1\] must be a whole number"),
    (vllm(start_times=[0, 1e300, 2]), "a time is out of range"),
    (vllm(errors=["a", "b", "c"]), "no request that succeeded"),
    (vllm()[:-40], "is not valid JSON"),
    (guidellm(output_tokens=None), r"benchmarks\[0\].requests.successful\[0\] must have prompt_tokens"),
    (guidellm(prompt_tokens="x"), "prompt_tokens must be a whole number"),
    (aiperf(input_sequence_length=None), "line 1: metrics must have input_sequence_length"),
    (aiperf() + "\nx", "line 4 is not valid JSON"),
    (aiperf(output_sequence_length=1.5), "output tokens must be a whole number from 0 to 100000000, not 1.5"),
]


@pytest.mark.parametrize(("text", "says"), BAD_LOADS, ids=[says[:40] for _, says in BAD_LOADS])
def test_a_bad_result_is_refused_with_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as refused:
        read(tmp_path, text, "r.json")
    assert str(refused.value).startswith("trace ")
    assert len(str(refused.value)) < 400


# Conversations

CHATS = [
    {"id": "a", "conversations": [
        {"from": "human", "value": "x" * 8}, {"from": "gpt", "value": "y" * 4}, {"from": "human", "value": "z" * 12},
        {"from": "gpt", "value": "w" * 20},
    ]},
    {"id": "b", "conversations": [{"from": "gpt", "value": "hello"}]},
    {"id": "c", "messages": [
        {"role": "system", "content": "s" * 40}, {"role": "user", "content": "ü" * 4},
        {"role": "assistant", "content": "v" * 8},
    ]},
]  # fmt: skip


def chats(tmp_path: Path, text: str, **options):
    (tmp_path / "c.json").write_text(text, encoding="utf-8")
    return read_conversations(tmp_path / "c.json", lambda message: len(message) // 4, **options)


def test_each_answer_is_a_request_whose_prompt_is_all_text_before_it(tmp_path: Path) -> None:
    arrivals, left_out = chats(tmp_path, json.dumps(CHATS, ensure_ascii=False, indent=2))
    assert left_out == 1
    assert arrivals.session_id is not None
    assert arrivals.session_id.tolist() == [1, 1, 2]
    assert arrivals.prompt_tokens.tolist() == [2, 2 + 1 + 3, 10 + 1]
    assert arrivals.output_tokens.tolist() == [1, 5, 2]
    first, second, other = (list(request.prefix_hashes) for request in requests_of(arrivals))
    assert first[0] == second[0] != other[0]


def test_first_turns_alone_are_no_sessions(tmp_path: Path) -> None:
    arrivals, _ = chats(tmp_path, json.dumps(CHATS), first_turn_only=True)
    assert arrivals.session_id is None
    assert arrivals.prompt_tokens.tolist() == [2, 11]
    assert len(chats(tmp_path, json.dumps(CHATS), limit=1)[0]) == 2


def test_long_arrays_are_read_piece_by_piece(tmp_path: Path) -> None:
    many = [{"conversations": [{"from": "human", "value": "é" * 4_000}, {"from": "gpt", "value": "b" * n}]} for n in
            range(4, 700)]  # fmt: skip
    arrivals, left_out = chats(tmp_path, json.dumps(many, ensure_ascii=False))
    assert (len(arrivals), left_out) == (696, 0)
    assert arrivals.output_tokens.tolist() == [n // 4 for n in range(4, 700)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a JSON array"),
        ("{}", "is not a JSON array"),
        ("[1]", "conversation 1 is not a JSON object"),
        ('[{"id": 1}]', "conversation 1 has no list"),
        ('[{"conversations": [{"from": 1, "value": "x"}]}]', "conversation 1, message 1: from and value"),
        ('[{"conversations": []}', "conversation 2 is not valid JSON, or ends too soon"),
        ('[{"conversations": [}]', "conversation 1 is not valid JSON"),
        ("[]", "no conversation in which a prompt is answered"),
        ("[" * 100_000, "conversation 1 is not valid JSON"),
    ],
)
def test_bad_conversations_are_refused_with_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        chats(tmp_path, text)


def test_a_schedule_converts_and_says_what_is_lost(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("arrival_s,endpoint,prompt_tokens,output_tokens,slo_s\n1,2,3,4,5\n")
    schedule = read_trace(tmp_path / "s.csv")
    assert isinstance(schedule, Schedule)
    assert lost_in(writable(schedule), "vidur") == ["slo_s", "endpoint"]
