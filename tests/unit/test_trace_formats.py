"""Trace files as they are found: other quoting, orders, offsets, packings and formats; what is not read is named."""

import gzip
import io
import json
import zipfile
from pathlib import Path

import pytest

from maveriq.errors import InputError
from maveriq.workload.schedules import Schedule
from maveriq.workload.trace_formats import RequestTrace
from maveriq.workload.traces import read_trace

PLAIN = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.000000+00:00,2162,5\n"
    "2024-05-10 00:00:00.500000+00:00,2399,6\n"
    "2024-05-10 00:01:02.250000+00:00,76,15\n"
)
ARRIVALS_US = [0, 500_000, 62_250_000]
PROMPTS, OUTPUTS = [2162, 2399, 76], [5, 6, 15]


def read(tmp_path: Path, content: str | bytes, name: str = "t.csv") -> RequestTrace:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    trace = read_trace(path)
    assert isinstance(trace, RequestTrace)
    return trace


def zipped(**files: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return packed.getvalue()


def reordered(text: str, order: tuple[int, ...]) -> str:
    return "".join(",".join(line.split(",")[i] for i in order) + "\n" for line in text.splitlines())


OFFSETS = ["Z", "z", " UTC", " GMT", "+00:00", "+0000", "+00", "-00:00"]
AZURE_FORMS = {
    "plain": PLAIN,
    "crlf": PLAIN.replace("\n", "\r\n"),
    "no newline at the end": PLAIN.rstrip("\n"),
    "bom": "\ufeff" + PLAIN,
    "quoted times": "".join(
        f'"{line.split(",")[0]}",{line.split(",", 1)[1]}\n' if line[0] == "2" else f"{line}\n"
        for line in PLAIN.splitlines()
    ),
    "all quoted": "".join(",".join(f'"{cell}"' for cell in line.split(",")) + "\n" for line in PLAIN.splitlines()),
    "reordered": reordered(PLAIN, (1, 2, 0)),
    "reversed": reordered(PLAIN, (2, 1, 0)),
    "spaces": PLAIN.replace(",", " , "),
    "t": PLAIN.replace("10 0", "10T0"),
    "no fraction where it is 0": PLAIN.replace(":00.000000", ":00"),
    "nanoseconds": PLAIN.replace("00+", "00000+"),
    "no offset": PLAIN.replace("+00:00", ""),
    "east": PLAIN.replace("2024-05-10 00", "2024-05-10 02").replace("+00:00", "+02:00"),
    "west": PLAIN.replace("2024-05-10 00", "2024-05-09 18").replace("+00:00", "-06:00"),
    "other case": PLAIN.replace("TIMESTAMP,ContextTokens,GeneratedTokens", "timestamp,context_tokens,Generated Tokens"),
    "extra columns": "".join(
        f"{line},{'Region' if line[0] == 'T' else 'eu, west'!r}\n".replace("'", '"') for line in PLAIN.splitlines()
    ),
    "gzip": gzip.compress(PLAIN.encode()),
    "zip": zipped(**{"a24.csv": PLAIN}),
    **{f"offset {offset}": PLAIN.replace("+00:00", offset) for offset in OFFSETS},
}


@pytest.mark.parametrize("form", AZURE_FORMS)
def test_one_trace_in_many_forms_is_read_alike(tmp_path: Path, form: str) -> None:
    trace = read(tmp_path, AZURE_FORMS[form])
    assert trace.format_name == "Azure trace"
    assert trace.arrival_us.tolist() == ARRIVALS_US
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == (PROMPTS, OUTPUTS)
    assert trace.requests_per_minute.tolist() == [2, 1]
    assert trace.ignored_columns == (("Region",) if form == "extra columns" else ())


def test_offsets_of_one_file_may_differ(tmp_path: Path) -> None:
    mixed = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-03-31 01:59:59+01:00,1,1\n2024-03-31T03:00:00.25+02:00,1,1\n"
        "2024-03-31 01:00:00.5Z,1,1\n2024-03-30 19:30:01-05:30,1,1\n"
    )
    assert read(tmp_path, mixed).arrival_us.tolist() == [0, 1_250_000, 1_500_000, 2_000_000]


OTHER_FORMATS = {
    "BurstGPT trace": (
        (
            "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
            "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,API log\n"
        ),
        [0, 40_000_000],
        [472, 1087],
        [18, 1],
    ),
    "Mooncake trace": (
        (
            '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0,1]}\n\n'
            '{"timestamp": 3000, "input_length": 7319, "output_length": 490, "hash_ids": [0]}\n'
        ),
        [0, 3_000_000],
        [6758, 7319],
        [500, 490],
    ),
    "Qwen-Bailian trace": (
        (
            '{"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 10, "output_length": 20}\n'
            '{"chat_id": 2, "parent_chat_id": -1, "timestamp": 2.0, "input_length": 11, "output_length": 21}\n'
        ),
        [0, 1_500_000],
        [10, 11],
        [20, 21],
    ),
    "vidur trace": (
        "arrived_at,num_prefill_tokens,num_decode_tokens\n0.1,200,20\n0.35,100,10\n",
        [0, 250_000],
        [200, 100],
        [20, 10],
    ),
    "Splitwise trace": (
        (
            "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n"
            "0,2,0,0.0,1,100,20\n1,2,0,1.5,1,90,10\n"
        ),
        [0, 1_500_000],
        [100, 90],
        [20, 10],
    ),
    "plain trace": (
        "arrival_s,prompt_tokens,output_tokens\n1700158623.25,7,8\n1700158624,9,10\n",
        [0, 750_000],
        [7, 9],
        [8, 10],
    ),
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_other_formats_are_recognised(tmp_path: Path, name: str) -> None:
    text, arrivals_us, prompts, outputs = OTHER_FORMATS[name]
    trace = read(tmp_path, text, "t.txt")
    assert trace.format_name == name
    assert trace.arrival_us.tolist() == arrivals_us
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == (prompts, outputs)


def test_a_schedule_is_still_a_schedule(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("endpoint,arrival_s,output_tokens,prompt_tokens\n2,1.5,3,4\n")
    schedule = read_trace(tmp_path / "s.csv")
    assert isinstance(schedule, Schedule)
    assert schedule.arrivals.endpoint_id.tolist() == [2]


README = "traces/README.md"
REFUSED = [
    ("id,when_ts,n_in_tokens,new_tokens\n1,2,3,4\n", ("'when_ts'", README, "'new_tokens' to output_tokens")),
    ("created_at,input_tokens,completion_tokens\n1,2,3\n", ("'input_tokens' to prompt_tokens", README)),
    ("num_prefill_tokens,num_decode_tokens\n1,2\n", ("vidur trace", "no column arrived_at", README)),
    (
        "arrival_timestamp,prompt_size,token_size,batch_size\n0,1,1,1\n0,1,1,2\n",
        ("line 3: batch_size must be a whole number from 1 to 1, not '2'",),
    ),
    ("a;b\n1;2\n", ("separated by semicolons",)),
    ("TIMESTAMP\tContextTokens\tGeneratedTokens\n", ("separated by tabs",)),
    ("a|b\n", ("separated by vertical bars",)),
    ('[{"id":"x","conversations":[{"from":"human","value":"hi"}]}]', ("ShareGPT", "tokenizer", "--rate", README)),
    ('[\n  {\n  "id": "x",\n "conversations": []}]', ("ShareGPT",)),
    ('{"messages": [{"role": "user", "content": "hi"}]}\n', ("conversations", "tokenizer")),
    ('{"prompt": "hi", "output_tokens": 4}\n', ("prompts", "tokenizer")),
    ('{"messages": [], "input_length": 1}', ("conversations",)),
    ('[{"timestamp": 1}]', ("one JSON document", "one JSON object a line", README)),
    ('{"timestamp": 1,\n', ("one JSON document",)),
    ('{"timestamp": 1, "input_length": 2, "output_length": 3}\n{"timestamp": 2}\n', ("line 2: no input_length",)),
    ('{"timestamp": 1, "input_length": 2, "output_length": 3}\nx\n', ("line 2: not a JSON object",)),
    ('{"timestamp": 1, "input_length": null, "output_length": 3}\n', ("line 1: input_length", "'null'")),
    ("".join(f'{{"timestamp": {time}, "input_length": 2, "output_length": 3}}\n' for time in (9, 9, 8)), ("line 3",)),
    (b"\x28\xb5\x2f\xfd" + b"x" * 40, ("packed with zstd", "zstd -d")),
    (b"\xfd7zXZ\x00" + b"x" * 40, ("packed with xz",)),
    (b"BZh9" + b"x" * 40, ("packed with bzip2",)),
    (b"PAR1" + b"x" * 40, ("Parquet", "CSV")),
    (b"\x1f\x8b" + b"x" * 40, ("cannot be read",)),
    (b"PK\x03\x04" + b"x" * 40, ("cannot be read",)),
    (zipped(a="1", b="2"), ("zip archive of 2 files",)),
    (zipped(**{"[Content_Types].xml": "", "xl/workbook.xml": ""}), ("spreadsheet", "save it as CSV")),
    (PLAIN.encode("utf-16"), ("UTF-16",)),
]  # fmt: skip


@pytest.mark.parametrize(("content", "words"), REFUSED, ids=[str(words) for _, words in REFUSED])
def test_what_is_not_read_is_named(tmp_path: Path, content: str | bytes, words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as refused:
        read(tmp_path, content)
    message = str(refused.value)
    assert [word for word in words if word not in message] == [], message
    assert len(message) < 700


def test_long_batches_keep_their_order_and_name_their_line(tmp_path: Path) -> None:
    rows = [f"{index / 8},{index % 100},{index % 7}" for index in range(40_000)]
    head = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
    assert read(tmp_path, head + "\n".join(rows)).arrival_us[-1] == 39_999 * 125_000
    rows[35_000] = "1,5,5"
    with pytest.raises(InputError, match="line 35002: arrived_at '1' is before"):
        read(tmp_path, head + "\n".join(rows))


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "requests"),
    [("quoted", 2), ("reordered", 2), ("z", 1), ("gzip-as-csv", 2)],
)
def test_case_15(measured_data: Path, name: str, requests: int) -> None:
    trace = read_trace(measured_data / "cases" / "15-azure-quoted-reordered-z" / f"{name}.csv")
    assert isinstance(trace, RequestTrace)
    assert (trace.format_name, len(trace)) == ("Azure trace", requests)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("burst.csv", "BurstGPT trace"),
        ("mooncake.jsonl", "Mooncake trace"),
        ("splitwise.csv", "Splitwise trace"),
        ("vidur.csv", "vidur trace"),
    ],
)
def test_case_16(measured_data: Path, name: str, kind: str) -> None:
    trace = read_trace(measured_data / "cases" / "16-other-trace-formats" / name)
    assert isinstance(trace, RequestTrace)
    assert trace.format_name == kind


@pytest.mark.data
def test_case_16_without_times_or_tokens(measured_data: Path) -> None:
    with pytest.raises(InputError, match=r"ShareGPT.*traces/README\.md"):
        read_trace(measured_data / "cases" / "16-other-trace-formats" / "sharegpt.json")


def test_the_json_of_a_check_says_what_was_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from maveriq.cli.trace import check

    (tmp_path / "b.csv").write_text(OTHER_FORMATS["BurstGPT trace"][0])
    check(tmp_path / "b.csv", as_json=True)
    assert json.loads(capsys.readouterr().out) == {
        "file": str(tmp_path / "b.csv"),
        "kind": "BurstGPT trace",
        "requests": 2,
        "span": "40 s",
        "requests_without_tokens": 1,
        "ignored_columns": ["Model", "Total tokens", "Log Type"],
    }
    check(tmp_path / "b.csv")
    assert capsys.readouterr().out.endswith(
        "BurstGPT trace, 2 requests in 40 s; 0 tokens count as 1, in 1 request; "
        "columns not read: Model, Total tokens, Log Type\n"
    )
