"""Model sets with continuous engines on the command line: the run, and what is refused by name."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from bad_input import bad, refuse

from maveriq.domain.gpu_kinds import gpu_sheet

ENGINE = '[models.engine]\nkind = "vllm"\nversion = "0.23.0"\nmax_num_seqs = 8\nnum_gpu_blocks = 4096\n'
MODEL = '[[models]]\nmodel = "llama-2-7b"\ntp = 1\nweights = "bfloat16"\n'
SGLANG = '[models.engine]\nkind = "sglang"\nmax_total_tokens = 65536\n'
SET = f'name = "one"\n{MODEL}{ENGINE}'
COLUMNS = "arrival_s,endpoint,prompt_tokens,output_tokens,prompt_id\n"
REQUESTS = COLUMNS + "".join(
    f"{number / 50:.2f},1,{200 + number % 7},{20 + number % 5},p{number % 10}\n" for number in range(60)
)
SIM = "sim --models m.toml --gpus 1xH100-SXM --trace r.csv --service-times physics --quiet --out"


def put(folder: Path, models: str = SET, requests: str = REQUESTS) -> None:
    (folder / "m.toml").write_text(models)
    (folder / "r.csv").write_text(requests)


def rows(folder: Path, table: str = "requests.csv") -> list[dict[str, str]]:
    with (folder / table).open(newline="") as file:
        return list(csv.DictReader(file))


def test_all_requests_complete_from_the_first_on_and_twice_alike(maveriq, tmp_path):
    put(tmp_path)
    for name in ("one", "two"):
        assert maveriq(f"{SIM} {name}").code == 0
    found = rows(tmp_path / "one")
    assert [row["status"] for row in found] == ["completed"] * 60
    assert float(found[0]["arrival_s"]) == 0
    for table in ("requests.csv", "deployments.csv", "gpus.csv"):
        assert (tmp_path / "one" / table).read_bytes() == (tmp_path / "two" / table).read_bytes()


def test_a_configuration_that_is_named_is_taken(maveriq, tmp_path):
    put(tmp_path, SET.replace("tp = 1", "tp = 2"))
    assert maveriq(f"{SIM.replace('1xH100', '2xH100')} out").code == 0
    [deployment] = json.loads((tmp_path / "out" / "run.json").read_text())["summary"]["deployments"]
    assert (deployment["configuration"]["tp"], deployment["configuration"]["weights"]) == (2, "float16")
    assert deployment["gib_per_gpu"] == pytest.approx([0.92 * 79.18] * 2, rel=1e-3)


def test_an_engine_takes_its_share_of_the_gpu_that_it_runs_on(maveriq, tmp_path):
    engine = '[models.engine]\nkind = "sglang"\nmax_total_tokens = 8192\n'
    put(tmp_path, f'name = "one"\n{MODEL}{engine}')
    assert maveriq(f"{SIM.replace('1xH100-SXM', '1xL40S')} out").code == 0
    [deployment] = json.loads((tmp_path / "out" / "run.json").read_text())["summary"]["deployments"]
    reserve_gib = (512 + 1.5 * 4096 + 128) / 1024  # SGLang's, with chunks of 4096 tokens as on GPUs below 60 GiB
    assert deployment["gib_per_gpu"] == pytest.approx([gpu_sheet("L40S").usable_gib - reserve_gib], rel=1e-3)


def test_engines_on_gpus_of_two_kinds_each_take_the_share_of_their_kind(maveriq, tmp_path):
    engine = '[models.engine]\nkind = "sglang"\nmax_total_tokens = 8192\n'
    put(tmp_path, f'name = "two"\n{MODEL}{engine}{MODEL}{engine}')
    nodes = "".join(f'[[nodes]]\ngpu = "{kind}"\ncount = 1\n' for kind in ("L40S", "H100-SXM"))
    (tmp_path / "c.toml").write_text(f'name = "mixed"\n{nodes}')
    assert maveriq(f"{SIM.replace('1xH100-SXM', 'c.toml')} out").code == 0
    found = {row["gpus"]: float(row["gib_per_gpu"]) for row in rows(tmp_path / "out", "deployments.csv")}
    # SGLang keeps 512 MB, 128 and 1.5 for each token of a chunk: of 4096 tokens below 60 GiB, of 8192 above.
    for gpu, kind, chunk in (("0", "L40S", 4096), ("1", "H100-SXM", 8192)):
        kept_gib = (512 + 1.5 * chunk + 128) / 1024
        assert found[gpu] == pytest.approx(gpu_sheet(kind).usable_gib - kept_gib, rel=1e-3)


def test_a_limit_of_requests_in_flight_delays_when_they_are_sent(maveriq, tmp_path):
    put(tmp_path)
    assert maveriq(f"{SIM} out --max-in-flight 2").code == 0
    found = rows(tmp_path / "out")
    ends = sorted(float(row["finish_s"]) for row in found)
    for number, row in enumerate(found):
        assert row["status"] == "completed"
        if number >= 2:  # two are in flight at most when it is sent
            assert float(row["arrival_s"]) >= ends[number - 2]


def test_replicas_share_the_requests(maveriq, tmp_path):
    put(tmp_path, SET.replace("tp = 1", "tp = 1\nreplicas = 3"))
    assert maveriq(f"{SIM.replace('1xH100', '4xH100')} out").code == 0
    assert [row["gpus"] for row in rows(tmp_path / "out", "deployments.csv")] == ["0", "1", "2"]
    served = Counter(row["deployment_id"] for row in rows(tmp_path / "out"))
    assert all(served[number] >= 15 for number in "123")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["options"]["router"] == "least-outstanding"


def test_replicas_that_do_not_all_fit_are_rejected(maveriq, tmp_path):
    put(tmp_path, SET.replace("tp = 1", "tp = 1\nreplicas = 3"))
    assert maveriq(f"{SIM.replace('1xH100', '2xH100')} out").code == 1  # no request is served
    [row] = rows(tmp_path / "out", "deployments.csv")
    assert row["status"] == "rejected"
    assert "only 2 of 3 replicas fit" in row["reason"]


def test_the_policy_chooses_configuration_and_replicas_for_the_expected_load(maveriq, tmp_path):
    def replicas(load: str, *options: str) -> list[dict[str, str]]:
        put(tmp_path, SET.replace("tp = 1\n", load))
        assert maveriq(" ".join([SIM.replace("1xH100", "4xH100"), "out --overwrite", *options])).code == 0
        assert {row["status"] for row in rows(tmp_path / "out")} == {"completed"}
        return rows(tmp_path / "out", "deployments.csv")

    few, many = replicas("expected_rps = 1\n"), replicas("expected_rps = 40\n")
    assert (len(few), few[0]["tp"], few[0]["pp"], few[0]["weights"]) == (1, "1", "1", "float16")
    assert replicas("pp = 2\nexpected_rps = 1\n")[0]["pp"] == "2"
    assert sum(int(row["tp"]) for row in many) > 1
    fast = replicas("expected_rps = 1\n", "--intent min-latency --slo-tpot-ms 9")
    assert int(fast[0]["tp"]) > 1
    assert float(fast[0]["est_latency_s"]) < float(few[0]["est_latency_s"])


def test_a_fault_of_a_replica_that_the_policy_did_not_make_is_noted(maveriq, tmp_path):
    put(tmp_path, SET.replace("tp = 1\n", "expected_rps = 1\n"))
    faults = "--fail deployment=1@0.5s,for=0.1s --fail deployment=4@0.7s"
    assert maveriq(f"{SIM.replace('1xH100', '4xH100')} out {faults}").code == 0
    notes = json.loads((tmp_path / "out" / "run.json").read_text())["notes"]
    [note] = [note for note in notes if "fault" in note]
    assert note == "fault of deployment 4 at 0.7 s hit nothing: the run made deployments 1 to 1"


def test_pipelines_run_also_with_uneven_stages(maveriq, tmp_path):
    for keys, layers in (("pp = 2", "16 16"), ("pp = 2\nlayer_split = [28, 4]", "28 4"), ("pp = 3", "11 11 10")):
        put(tmp_path, SET.replace("tp = 1", f"tp = 1\n{keys}"))
        assert maveriq(f"{SIM.replace('1xH100', '4xH100')} out --overwrite").code == 0
        assert {row["status"] for row in rows(tmp_path / "out")} == {"completed"}
        assert [row["layer_split"] for row in rows(tmp_path / "out", "deployments.csv")] == [layers]


def test_exclusive_engines_stand_beside_continuous_ones_on_gpus_of_their_own(maveriq, tmp_path):
    both = REQUESTS.replace("0.50,1,", "0.50,2,").replace("0.70,1,", "0.70,2,")
    put(tmp_path, SET + MODEL.replace("7b", "13b"), both)
    assert maveriq(f"{SIM.replace('1xH100', '2xH100')} out").code == 0
    assert {row["status"] for row in rows(tmp_path / "out")} == {"completed"}
    assert [row["gpus"] for row in rows(tmp_path / "out", "deployments.csv")] == ["0", "1"]
    assert maveriq(f"{SIM} small").code == 0
    assert [row["status"] for row in rows(tmp_path / "small", "deployments.csv")] == ["up", "rejected"]


def test_engines_share_a_gpu_by_their_memory(maveriq, tmp_path):
    half = SET.replace("num_gpu_blocks = 4096", "gpu_memory_utilization = 0.45\nmax_model_len = 1024")
    second = half.split("\n", 1)[1].replace("llama-2-7b", "mistral-7b")
    put(tmp_path, half + second, REQUESTS.replace("1,1,", "1,2,"))
    assert maveriq(f"{SIM} out").code == 0
    assert {row["status"] for row in rows(tmp_path / "out")} == {"completed"}
    assert [row["gpus"] for row in rows(tmp_path / "out", "deployments.csv")] == ["0", "0"]


def test_requests_of_a_gpu_that_fails_are_computed_again(maveriq, tmp_path):
    put(tmp_path)
    assert maveriq(f"{SIM} out --fail gpu=0@0.5s,for=1s --load-s 2").code == 0
    found = rows(tmp_path / "out")
    assert [row["status"] for row in found] == ["completed"] * 60
    assert all(float(row["finish_s"]) <= 0.5 or float(row["start_s"]) >= 3.5 for row in found)
    assert maveriq(f"{SIM} failing --fail gpu=0@0.5s,for=1s --on-failure fail").code == 0
    failed = [row for row in rows(tmp_path / "failing") if row["status"] == "failed"]
    assert {row["reason"] for row in failed} == {"deployment 1 (llama-2-7b): GPU 0 failed"}


def test_engines_have_as_many_kv_blocks_as_their_memory_holds(maveriq, tmp_path):
    put(tmp_path, SET.replace("num_gpu_blocks = 4096\n", ""))
    assert maveriq(f"{SIM} out").code == 0


FILES = {"m.toml": SET, "r.csv": REQUESTS}
RUN = SIM.removesuffix(" --out")
REFUSED = (
    bad(f"{RUN} --fail gpu=1@1s", "GPU 1", "GPUs 0 to 0", files=FILES),
    bad(f"{RUN} --policy alpaserve", "alpaserve", "--policy", files=FILES),
    bad(f"{RUN} --router least-work", "--router least-work", "least-outstanding", files=FILES),
    bad(RUN.replace("physics", "paper"), "--service-times physics", files=FILES),
    bad("run --backend torch --models m.toml --gpus 1xH100-SXM --trace r.csv", "--backend emulated", files=FILES),
)
SETS = (
    (SET.replace("tp = 1", "tp = 1\npp = 2").replace(ENGINE, SGLANG), ("SGLang", "pipeline")),
    (SET.replace("tp = 1", "tp = 1\npp = 2\nlayer_split = [20, 13]"), ("20+13", "32 layers")),
    (SET.replace("tp = 1", "layer_split = [20, 12]"), ("layer_split", "tp and pp")),
    (SET.replace("tp = 1", "tp = 1\npp = 2\nlayer_split = [20, 12]").replace(ENGINE, ""), ("layer_split", "an engine")),
    (SET.replace("num_gpu_blocks = 4096", "gpu_memory_utilization = 0.1"), ("KV blocks", "llama-2-7b")),
    (SET + MODEL, ("llama-2-7b", "one kind of engine")),
    (SET.replace("tp = 1", "tp = 2").replace("max_num_seqs = 8", "tensor_parallel_size = 4"), ("tp is 2", "is 4")),
    (SET.replace("bfloat16", "int3"), ("int3",)),
    (SET.replace('"vllm"', '"vlm"'), ("vlm",)),
)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.command[-40:])
def test_what_does_not_work_yet_is_refused_by_name(case, maveriq, tmp_path):
    refuse(case, maveriq, tmp_path)


@pytest.mark.parametrize(("models", "words"), SETS, ids=lambda value: str(value)[-30:])
def test_model_sets_that_do_not_fit_are_refused(models, words, maveriq, tmp_path):
    files = {"m.toml": models, "r.csv": REQUESTS}
    refuse(bad(RUN.replace("1xH100", "2xH100"), *words, files=files), maveriq, tmp_path)
