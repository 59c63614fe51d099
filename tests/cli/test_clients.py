"""Loads and clients on the command line: closed loops, conversations, shared prefixes, files, conversions."""

import csv
import json

import numpy as np
import pytest
from bad_input import bad, refuse

SET = """name = "one"
[[models]]
model = "llama-2-7b"
tp = 1
weights = "bfloat16"
[models.engine]
kind = "vllm"
version = "0.23.0"
max_num_seqs = 8
num_gpu_blocks = 4096
"""
SIM = "sim --models m.toml --gpus 1xH100-SXM --service-times physics --quiet"


@pytest.fixture
def sim(maveriq, tmp_path):
    """Return what simulates with some options, and returns the rows of requests.csv as columns."""
    (tmp_path / "m.toml").write_text(SET)

    def sim(options: str, out: str = "out") -> dict[str, np.ndarray]:
        assert maveriq(f"{SIM} {options} --out {out}").code == 0
        with (tmp_path / out / "requests.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert {row["status"] for row in rows} == {"completed"}
        names = ("arrival_s", "finish_s", "prompt_tokens", "cached_tokens", "output_tokens")
        return {name: np.array([float(row[name]) for row in rows]) for name in names}

    return sim


def in_flight(rows: dict[str, np.ndarray]) -> np.ndarray:
    """Return how many requests are in flight when each has been sent, itself included."""
    return np.array([
        ((rows["arrival_s"] <= sent) & (rows["finish_s"] > sent)).sum() for sent in rows["arrival_s"]
    ])  # fmt: skip


LENGTHS = "--prompt-tokens uniform:100-300 --output-tokens lognormal:20,0.5"


def test_a_closed_loop_keeps_its_clients_busy(sim, tmp_path):
    rows = sim(f"--trace synthetic --concurrency 6 --num-prompts 60 {LENGTHS}")
    assert len(rows["arrival_s"]) == 60
    assert in_flight(rows).tolist() == [6] * 60
    assert set(rows["arrival_s"][6:]) <= set(rows["finish_s"])
    described = json.loads((tmp_path / "out" / "run.json").read_text())
    assert "A closed loop cannot fall behind: its 6 clients" in described["summary"]["saturation"]["sentence"]
    assert (described["trace"]["concurrency"], described["trace"]["requests"]) == (6, 60)


def test_a_limit_in_flight_holds_for_every_load(sim):
    for load in ("--rate 50 --num-prompts 60", "--concurrency 6 --num-prompts 60"):
        rows = sim(f"--trace synthetic {load} {LENGTHS} --max-in-flight 4", load.split()[0].strip("-"))
        assert in_flight(rows).max() == 4


def test_the_same_options_give_the_same_bytes(sim, tmp_path):
    load = f"--trace synthetic --concurrency 3 --num-prompts 30 --turns uniform:1-4 --think-s exponential:1 {LENGTHS}"
    for out in ("one", "two"):
        sim(load, out)
    for table in ("requests.csv", "deployments.csv", "gpus.csv"):
        assert (tmp_path / "one" / table).read_bytes() == (tmp_path / "two" / table).read_bytes()


def test_turns_find_their_conversation_in_the_prefix_cache(sim):
    rows = sim("--trace synthetic --concurrency 1 --num-prompts 8 --turns 4 --prompt-tokens 100 --output-tokens 21")
    assert rows["prompt_tokens"].tolist() == [100, 221, 342, 463] * 2
    # All but the last token of the turn before is in the cache, in whole blocks of 16.
    before = [0, 100 + 20, 221 + 20, 342 + 20] * 2
    assert rows["cached_tokens"].tolist() == [tokens // 16 * 16 for tokens in before]


def test_a_shared_prefix_is_computed_once(sim):
    rows = sim(
        "--trace synthetic --concurrency 1 --num-prompts 6 --prefix-tokens 1000 --prompt-tokens 50 --output-tokens 5"
    )
    assert set(rows["prompt_tokens"]) == {1050}
    assert rows["cached_tokens"].tolist() == [0] + [1000 // 16 * 16] * 5


def test_think_time_passes_between_turns(sim):
    rows = sim("--trace synthetic --concurrency 1 --num-prompts 5 --think-s 2.5 --prompt-tokens 50 --output-tokens 5")
    assert (rows["arrival_s"][1:] - rows["finish_s"][:-1]).round(6).tolist() == [2.5] * 4


def test_hash_ids_of_a_mooncake_trace_are_found_in_the_prefix_cache(sim, tmp_path):
    lines = [
        {"timestamp": 1000 * row, "input_length": 1536, "output_length": 5, "hash_ids": hashes}
        for row, hashes in enumerate(([1, 2, 3], [1, 2, 4], [9, 2, 3], [1, 2, 3]))
    ]
    (tmp_path / "m.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    rows = sim("--trace m.jsonl")
    assert rows["arrival_s"].tolist() == [0, 1, 2, 3]
    assert rows["cached_tokens"].tolist() == [0, 1024, 0, 1520]  # one token is always computed, so one block


FILE = "arrival_s,prompt_tokens,output_tokens\n" + "".join(
    f"{row / 10},{50 + row},{row % 7 + 1}\n" for row in range(40)
)


def test_a_file_is_replayed_as_it_stands_and_the_summary_says_so(sim, tmp_path):
    (tmp_path / "r.csv").write_text(FILE)
    rows = sim("--trace r.csv")
    assert rows["arrival_s"].tolist() == [row / 10 for row in range(40)]
    assert rows["prompt_tokens"].tolist() == [50 + row for row in range(40)]
    assert rows["output_tokens"].tolist() == [row % 7 + 1 for row in range(40)]
    trace = json.loads((tmp_path / "out" / "run.json").read_text())["trace"]
    assert (trace["scale"], trace["arrivals"], trace["requests"]) == (1, "trace", 40)


def test_a_file_is_a_closed_loop_in_its_own_order(sim, tmp_path):
    (tmp_path / "r.csv").write_text(FILE)
    rows = sim("--trace r.csv --concurrency 2")
    assert rows["prompt_tokens"].tolist() == [50 + row for row in range(40)]
    assert in_flight(rows).tolist() == [2] * 40


def test_requests_without_times_need_a_rate_or_clients(sim, maveriq, tmp_path):
    (tmp_path / "r.csv").write_text("prompt_tokens,output_tokens\n" + "40,3\n" * 20)
    assert len(sim("--trace r.csv --rate 4", "open")["arrival_s"]) == 20
    assert len(sim("--trace r.csv --concurrency 4", "closed")["arrival_s"]) == 20
    refuse(bad(f"{SIM} --trace r.csv", "needs a rate", "--rate", "--concurrency"), maveriq, tmp_path)


def test_an_exported_load_is_replayed_alike(sim, maveriq, tmp_path):
    load = f"--rate 5 --num-prompts 40 --turns 2 --think-s 1 --prefix-tokens 64 {LENGTHS}"
    before = sim(f"--trace synthetic {load}", "one")
    assert maveriq(f"trace export synthetic {load} --models m.toml --out s.csv").code == 0
    after = sim("--trace s.csv", "two")
    for name, column in before.items():
        assert after[name].tolist() == column.tolist(), name


def test_the_requests_of_a_run_are_a_trace_of_their_own(sim):
    before = sim(f"--trace synthetic --rate 5 --num-prompts 20 {LENGTHS}", "one")
    after = sim("--trace one/requests.csv", "two")
    for name in ("arrival_s", "finish_s", "prompt_tokens", "output_tokens"):
        assert after[name].tolist() == before[name].tolist(), name


@pytest.mark.parametrize("name", ["vllm-bench", "aiperf"])
def test_a_run_is_written_as_load_generators_do_and_read_again(sim, maveriq, tmp_path, name):
    rows = sim(f"--trace synthetic --rate 5 --num-prompts 20 {LENGTHS}", "one")
    assert "20 requests of one" in maveriq(f"trace convert one w.json --to {name}").out
    again = sim("--trace w.json", "two")
    assert (again["arrival_s"] - (rows["arrival_s"] - rows["arrival_s"][0])).round(6).tolist() == [0] * 20
    for column in ("prompt_tokens", "output_tokens"):
        assert again[column].tolist() == rows[column].tolist()
    if name == "vllm-bench":
        written = json.loads((tmp_path / "w.json").read_text())
        ends = [ttft + sum(gaps) for ttft, gaps in zip(written["ttfts"], written["itls"], strict=True)]
        assert ends == pytest.approx((rows["finish_s"] - rows["arrival_s"]).tolist(), abs=1e-5)
        assert written["mean_e2el_ms"] == pytest.approx(1e3 * np.mean(ends), rel=1e-4)


REFUSED = (
    bad("trace convert r.csv out.json --to aiperf", "give the folder of a run"),
    bad(f"{SIM} --trace synthetic", "needs a rate", "--concurrency"),
    bad("sim --trace synthetic --concurrency 4 --policy alpaserve", "plans for the times of arrivals", "--policy"),
    bad("sim --trace s.csv --service-times recorded", "turns of sessions", "leave it out"),
    bad(f"{SIM} --concurrency 4 --rate 3", "leave one of them out"),
    bad(f"{SIM} --trace synthetic --rate 3 --limit 4 --num-prompts 5", "--limit and --num-prompts are the same"),
    bad(f"{SIM} --trace synthetic --rate 3 --prompt-tokens unifrm:1-2", "prompt tokens", "did you mean 'uniform'"),
    bad("trace convert r.csv out.csv --to mooncak", "unknown format 'mooncak'", "did you mean 'mooncake'"),
    bad("trace convert r.csv r.csv", "r.csv", "--overwrite"),
    bad("trace convert c.json out.csv", "holds texts", "--tokenizer", "--chars-per-token"),
    bad("trace convert r.csv out.csv --chars-per-token 4", "holds no conversations"),
    bad("trace convert r.csv out.csv --benchmark 2", "leave out --benchmark"),
)
SESSIONS = "arrival_s,endpoint,prompt_tokens,output_tokens,service_s,session_id\n0,1,9,9,1,a\n1,1,9,9,1,a\n"
CHATS = '[{"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hello, you"}]}]'


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.command[-50:])
def test_what_does_not_fit_is_refused_with_one_line(case, maveriq, tmp_path):
    for name, text in (("m.toml", SET), ("r.csv", FILE), ("c.json", CHATS), ("s.csv", SESSIONS)):
        (tmp_path / name).write_text(text)
    refuse(case, maveriq, tmp_path)


def test_conversations_are_converted_and_replayed(sim, maveriq, tmp_path):
    (tmp_path / "c.json").write_text(CHATS)
    converted = maveriq("trace convert c.json c.csv --chars-per-token 4")
    assert "1 request of c.json (conversations) as plain, without times" in converted.out
    rows = sim("--trace c.csv --concurrency 1")
    assert (rows["prompt_tokens"].tolist(), rows["output_tokens"].tolist()) == ([2], [3])


def test_a_conversion_says_what_is_not_in_the_file(maveriq, tmp_path):
    text = "arrival_s,prompt_tokens,output_tokens,session_id,think_s\n0,10,2,a,1\n5,20,2,a,1\n"
    (tmp_path / "s.csv").write_text(text)
    printed = maveriq("trace convert s.csv v.csv --to vidur").out
    assert "as vidur, times to 1 µs; not in the file: session_id, think_s" in printed
    assert (tmp_path / "v.csv").read_text() == (
        "arrived_at,num_prefill_tokens,num_decode_tokens\n0.000000,10,2\n5.000000,20,2\n"
    )
