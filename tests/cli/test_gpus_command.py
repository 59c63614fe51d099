"""`maveriq gpus`: the catalogue, and what is known of one kind."""

import json

from command_results import Maveriq

from maveriq.domain.gpu_kinds import gpu_sheets


def test_the_catalogue(maveriq: Maveriq) -> None:
    ended = maveriq("gpus")
    assert ended.code == 0
    rows = {line.split()[0]: line.split() for line in ended.out.splitlines() if line.strip()}
    for name in gpu_sheets():
        assert name in rows
    assert rows["H100-SXM"][1:] == ["80", "3,350", "989", "1,979", "NVLink", "900", "8", "700", "2.99"]
    listed = json.loads(maveriq("gpus --json").out)
    assert list(listed) == list(gpu_sheets())
    assert all(entry["source"] and entry["price_source"] and entry["usd_per_hour"] > 0 for entry in listed.values())


def test_one_kind_by_any_of_its_names(maveriq: Maveriq) -> None:
    shown = maveriq("gpus h100")
    assert shown.code == 0
    for words in ("H100-SXM", "NVLink 900 GB/s", "dense TFLOP/s, fp8", "$2.99 an hour (Lambda", "data sheet"):
        assert words in shown.out
    found = json.loads(maveriq("gpus H100 --json").out)
    assert (found["gpu"], found["tflops"]["bfloat16"], found["other_names"]) == ("H100-SXM", 989, ["H100"])


def test_an_unknown_kind(maveriq: Maveriq) -> None:
    ended = maveriq("gpus H100-SMX")
    assert (ended.code, ended.out) == (2, "")
    assert "did you mean 'H100-SXM'" in ended.err
    assert len(ended.err.splitlines()) == 1
