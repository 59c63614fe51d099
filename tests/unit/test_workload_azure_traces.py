"""Public Azure traces: rounding, accepted formats, and errors with their line."""

import gzip
import time

import numpy as np
import pytest

from maveriq.errors import InputError
from maveriq.workload.trace_formats import read_requests

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
GOOD = "2023-11-16 18:17:03.9799600,4808,10\n"


def trace_file(tmp_path, rows, header=HEADER):
    path = tmp_path / "trace.csv"
    path.write_text(header + rows, encoding="utf-8")
    return path


def test_minutes_are_the_nearest_and_halves_even(tmp_path):
    stamps = [
        "00:00:30.0000000",  # half of minute 0: down to 0, which is even
        "00:00:30.0000001",
        "00:01:29.9999999",
        "00:01:30.0000000",  # half of minute 1: up to 2
        "00:02:30.0000000",  # half of minute 2: down to 2
        "00:05:00.0000000",
    ]
    path = trace_file(tmp_path, "".join(f"2023-11-16 {stamp},1,1\n" for stamp in stamps))
    assert read_requests(path).requests_per_minute.tolist() == [1, 2, 2, 0, 0, 1]


def test_token_rows_keep_the_order_and_hold_at_least_one_token(tmp_path):
    trace = read_requests(trace_file(tmp_path, GOOD + "2023-11-16 18:17:04.0319600,0,8\n"))
    assert trace.prompt_tokens.tolist() == [4808, 1]
    assert trace.output_tokens.tolist() == [10, 8]
    assert trace.requests_without_tokens == 1


@pytest.mark.parametrize(
    "rows",
    [
        GOOD.rstrip("\n"),
        GOOD.replace("\n", "\r\n"),
        "2023-11-16 18:17:03,4808,10\n",
        "2023-11-16T18:17:03.979960123,4808,10\n",
        "2024-05-10 00:00:00.009930+00:00,4808,10\n",
        '"2023-11-16 18:17:03.9799600","4808","10"\n',
        "\n" + GOOD + "\n",
    ],
)
def test_formats_of_other_tools(tmp_path, rows):
    assert read_requests(trace_file(tmp_path, rows)).prompt_tokens.tolist() == [4808]


def test_columns_in_another_order_and_compressed(tmp_path):
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(b"GeneratedTokens,TIMESTAMP,ContextTokens\n10,2023-11-16 18:17:03,4808\n"))
    assert read_requests(path).output_tokens.tolist() == [10]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (GOOD + "2023-11-16 18:17:04,x,8\n", "line 3: ContextTokens must be a number, not 'x'"),
        (GOOD + "2023-11-16 18:17:04,1.5,8\n", "line 3: ContextTokens must be a whole number"),
        (GOOD + "2023-11-16 18:17:04,5,-8\n", "line 3: GeneratedTokens must be a whole number from 0"),
        (GOOD + "2023-11-16 18:17:04,5,nan\n", "line 3: GeneratedTokens must be a finite number"),
        (GOOD + "2023-11-16 18:17:04,5,1e300\n", "line 3: GeneratedTokens must be a whole number"),
        (GOOD + "2023-11-16 18:17:04,5\n", "line 3: 2 cells where the header has 3"),
        (GOOD + "2023-11-16 18:17:04,5,6,7\n", "line 3: 4 cells where the header has 3"),
        (GOOD + "2023-11-16 18:17,5,6\n", "line 3: TIMESTAMP must look like"),
        (GOOD + "2023-02-30 18:17:04,5,6\n", "line 3: TIMESTAMP must look like"),
        (GOOD + "2023-11-16 18:17:04+5,5,6\n", "line 3: TIMESTAMP must look like"),
        (GOOD + "2023-11-16 18:17:04+25:00,5,6\n", "an offset such as Z or +02:00"),
        (GOOD + "2023-11-16 18:17:04+00:01,5,6\n", "is before that of the row above"),
        (GOOD + "3023-11-16 18:17:04,5,6\n", "line 3: TIMESTAMP must look like"),
        (GOOD + "NaT,5,6\n", "line 3: TIMESTAMP must look like"),
        (GOOD + "2023-11-16 18:17:04.00000000001,5,6\n", "line 3: TIMESTAMP must look like"),
        (GOOD + "2023-11-16 18:17:02,5,6\n", "line 3: TIMESTAMP '2023-11-16 18:17:02' is before"),
        (GOOD + "2223-11-16 18:17:02,5,6\n", "spans more than 1,000,000 minutes"),
        ("", "has a header but no row"),
        ("\n\n", "has a header but no row"),
    ],
)
def test_errors_name_their_line(tmp_path, rows, says):
    with pytest.raises(InputError) as refused:
        read_requests(trace_file(tmp_path, rows))
    assert says in str(refused.value)
    assert "trace.csv" in str(refused.value)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("TIMESTAMP,ContextTokens\n", "no column GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens,Region\n", "line 2: 3 cells where the header has 4"),
        ("TIMESTAMP,TIMESTAMP,ContextTokens,GeneratedTokens\n", "stands twice"),
        ("", "neither an Azure trace nor a schedule"),
    ],
)
def test_wrong_headers(tmp_path, header, says):
    with pytest.raises(InputError, match=says):
        read_requests(trace_file(tmp_path, GOOD, header))


def test_large_files_are_read_fast(tmp_path):
    # 19,000 rows take about 20 ms; the bound only catches a return to reading row by row.
    rows = 19_000
    moments = np.datetime64("2023-11-16T18:00:00", "ms") + np.arange(rows) * 180
    path = trace_file(tmp_path, "".join(f"{moment},100,20\n" for moment in moments.astype(str).tolist()))
    started = time.process_time()
    assert read_requests(path).requests_per_minute.sum() == rows
    assert time.process_time() - started < 0.3
