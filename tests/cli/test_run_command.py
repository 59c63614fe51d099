"""`maveriq run` on emulated engines: records like those of `maveriq sim`, and clean ends."""

import json
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from command_results import Maveriq, everything_in, put
from engine_fixtures import TIMEOUT_S, alive_in_group

from maveriq.domain.models import load_model
from maveriq.domain.requests import RequestStatus
from maveriq.exec import gpus
from maveriq.exec.model_files import hf_config_json
from maveriq.report.reading import read_meta, read_run
from maveriq.runs import load_run

HEAD = "arrival_s,endpoint,prompt_tokens,output_tokens\n"
SCHEDULE = HEAD + "".join(
    f"{400 + 0.45 * i:.2f},{1 + i % 2},{10 + i},20\n"
    for i in range(30)  # the second model joins after 90 s; a process may take 6 real seconds to start
)
LATE = HEAD + "9000,1,10,20\n"
SOON = HEAD + "".join(f"{30 + 0.1 * i:.1f},1,10,20\n" for i in range(50))
MODELS = (
    'name = "two"\n[[models]]\nmodel = "llama-2-7b"\nload_at = 0\n\n[[models]]\nmodel = "llama-2-13b"\nload_at = 0\n'
)
ONE_MODEL = MODELS.partition('\n[[models]]\nmodel = "llama-2-13b"')[0]
SYSTEM = "--trace t.csv --models m.toml --no-dispatch-overhead --load-s 3"
RUN = f"run {SYSTEM} --backend emulated --time-scale 0.02"


@pytest.fixture(autouse=True)
def _files(tmp_path: Path) -> None:
    put(tmp_path, {"t.csv": SCHEDULE, "late.csv": LATE, "soon.csv": SOON, "m.toml": MODELS, "one.toml": ONE_MODEL})


def test_a_policy_that_fails_gives_one_line(tmp_path: Path) -> None:
    put(tmp_path, {"r.py": "def order(gpus):\n    return gpus.mistake\n"})
    command = [sys.executable, "-m", "maveriq", *RUN.split(), "--policy", "r.py:order", "-q"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    [line] = ended.stderr.splitlines()
    assert "policy 'r.py:order' failed: AttributeError" in line
    assert "(r.py, line 2)" in line
    shown = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "MAVERIQ_TRACEBACK": "1"}
    )
    assert "return gpus.mistake" in shown.stderr


@pytest.mark.heavy
def test_clients_wait_for_the_end_of_their_requests_on_engines_too(maveriq: Maveriq, tmp_path: Path) -> None:
    load = "--concurrency 3 --num-prompts 12 --turns 2 --think-s 1 --prompt-tokens 20 --output-tokens 5"
    options = f"--models one.toml {load} --no-dispatch-overhead --load-s 3 -q --out r"
    assert maveriq(f"run {options} --backend emulated --time-scale 0.02").code == 0
    table = read_run(tmp_path / "r").requests
    assert table.counts()[RequestStatus.COMPLETED] == 12
    for number, sent_us in enumerate(table.arrival_us):
        before = table.finish_us[:number]
        assert (before > sent_us).sum() < 3
        # Every request but the first three follows the end of another, and the think time.
        assert number < 3 or (before + 1_000_000 <= sent_us).sum() >= number - 2


def test_run_writes_the_same_records_as_sim(maveriq: Maveriq, tmp_path: Path) -> None:
    assert maveriq(f"sim {SYSTEM} -q").code == 0
    ended = maveriq(RUN)
    assert ended.code == 0
    simulated = "runs/hybrid-min-cost-m-t-load-s-3-no-dispatch-overhead"
    folder = f"{simulated}-emulated-time-scale-0.02"
    assert ended.out.splitlines()[-1] == f"compare with the simulator: maveriq compare {simulated} {folder}"
    sim, run = read_run(tmp_path / simulated), read_run(tmp_path / folder)
    assert [deployment.plan for deployment in run.deployments] == [deployment.plan for deployment in sim.deployments]
    assert run.requests.status.tolist() == sim.requests.status.tolist()
    assert run.requests.arrival_us.tolist() == sim.requests.arrival_us.tolist()
    service_us = run.requests.finish_us - run.requests.start_us
    # An emulated engine takes at least its service time.
    assert (service_us >= sim.requests.finish_us - sim.requests.start_us).all()
    compared = json.loads(maveriq(f"compare {simulated} {folder} --json").out)
    assert "simulated" not in compared["matching"]
    meta = read_meta(tmp_path / folder)
    assert (meta["kind"], meta["engines"]["backend"]) == ("run", "emulated")
    assert sorted(log.name for log in (tmp_path / folder / "engines").iterdir()) == ["1-1.log", "2-1.log"]
    engines = (tmp_path / folder / "engine_processes.csv").read_text().splitlines()
    assert [line.split(",")[:3] for line in engines[1:]] == [["1-1", "1", "emulated"], ["2-1", "2", "emulated"]]
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.name.startswith(".")] == []


@pytest.mark.heavy
def test_faults_and_removals_affect_real_engines(maveriq: Maveriq, tmp_path: Path) -> None:
    faults = "--fail deployment=1@403s,for=4s --remove endpoint=2@410s"
    ended = maveriq(f"{RUN} --out run {faults}")
    assert ended.code == 0
    # There is no simulation of the same options yet.
    assert ended.out.splitlines()[-1] == (
        "compare with the simulator: maveriq sim --quiet --trace t.csv --models m.toml --fail deployment=1@403s,for=4s "
        "--remove endpoint=2@410s --load-s 3 --no-dispatch-overhead && maveriq compare "
        "runs/hybrid-min-cost-m-t-fail-deployment=1@403s,for=4s-remove-endpoint=2@410s-load-s-3-no-dispatch-overhead"
        " run"
    )
    notes = read_meta(tmp_path / "run")["notes"]
    assert any("its engine was killed on purpose" in note for note in notes)
    run = read_run(tmp_path / "run")
    first, second = run.deployments
    assert (first.status, second.status) == ("up", "removed")
    assert "up again after" in first.reason
    labels = {run.requests.reasons[index] for index in run.requests.reason}
    assert labels == {"", "deployment 2 (llama-2-13b) was removed"}
    hit = run.requests.deployment_id == 1
    # A busy machine may kill it late, but then it is down for as long.
    assert np.diff(np.sort(run.requests.start_us[hit])).max() >= 3_900_000


class NoDriver:
    """NVML on a machine without GPUs."""

    class NVMLError(Exception):
        pass

    @classmethod
    def nvmlInit(cls) -> None:  # noqa: N802
        raise cls.NVMLError("Driver Not Loaded")


@pytest.mark.parametrize(
    ("options", "phrases"),
    [
        ("", ("--backend emulated", "maveriq sim")),
        ("--backend tortch", ("tortch", "torch")),
        ("--real", ("--real", "TensorRT-LLM")),
        ("--real --backend emulated", ("--real", "emulated")),
        ("--backend torch --time-scale 0.5", ("--time-scale 0.5", "emulated")),
        ("--backend emulated --time-scale 0", ("--time-scale", "0")),
        ("--backend emulated --time-scale nan", ("--time-scale", "nan")),
        ("--backend emulated --start-timeout-s -1", ("--start-timeout-s", "-1")),
        ("--backend emulated --max-restarts 0", ("--max-restarts", "0")),
        ("--backend emulated --engine-python emulated=nowhere/python", ("emulated=nowhere/python", "no file")),
        ("--backend emulated --engine-python nowhere/python", ("nowhere/python", "ENGINE=PATH")),
        ("--backend emulated --fail gpu=0@9s", ("GPU 0", "deployment=")),
        ("--backend emulated --gpus local", ("--gpus local: ", "NVIDIA")),
        ("--backend emulated --trace long.csv", ("2,000,000", "1,000,000")),
        ("--backend emulated --slo-ttft-ms 0", ("--slo-ttft-ms", "0")),
        ("--backend emulated --out t.csv", ("t.csv", "folder")),
    ],
)
def test_bad_options_get_one_line(
    maveriq: Maveriq, tmp_path: Path, monkeypatch, options: str, phrases: tuple[str, ...]
) -> None:
    put(tmp_path, {"long.csv": HEAD + "30,1,2000000,1\n"})
    monkeypatch.setattr(gpus, "_import_nvml", lambda: NoDriver)
    before = everything_in(tmp_path)
    ended = maveriq(f"run {SYSTEM} {options}")
    assert ended.code == 2
    for word in phrases:
        assert word in ended.only_line
    assert everything_in(tmp_path) == before


def test_a_run_ends_early_when_no_engine_is_left(maveriq: Maveriq, tmp_path: Path, monkeypatch) -> None:
    put(tmp_path, {"big.toml": ONE_MODEL.replace("llama-2-7b", "llama-2-70b")})
    monkeypatch.setenv("PATH", "")  # the other ranks of an emulated engine are `cat`
    ended = maveriq(
        "run --trace late.csv --models big.toml --backend emulated --time-scale 0.02 --max-restarts 1 --out run"
    )
    assert ended.code == 1
    line = ended.err.splitlines()[-1]
    assert "no engine came up: its engine could not load (error): FileNotFoundError" in line
    assert line.endswith("records: run")
    [deployment] = read_run(tmp_path / "run").deployments
    assert deployment.status == "down"


@pytest.mark.heavy
def test_a_model_folder_provides_the_weights(maveriq: Maveriq, tmp_path: Path) -> None:
    """The weights of the folder cannot be read, so loading them fails; random ones would load."""
    pytest.importorskip("torch")
    config = json.loads(hf_config_json(load_model("llama-2-7b"))) | {"_name_or_path": "me/llama-2-7b"}
    put(tmp_path, {
        "mine/config.json": json.dumps(config),
        "mine/model.safetensors": "these are no weights",
        "mine.toml": 'name = "mine"\n[[models]]\nmodel = "./mine"\nload_at = 0\n',
        "wait.csv": HEAD + "600,1,5,2\n",
    })  # fmt: skip
    ended = maveriq(
        "run --backend torch --trace wait.csv --models mine.toml --max-restarts 1 --no-dispatch-overhead --out run -q"
    )
    assert ended.code == 1
    line = ended.err.splitlines()[-1]
    assert f"weights {tmp_path / 'mine' / 'model.safetensors'} cannot be read" in line


Started = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    """Start `maveriq run` in its own process, which is killed after the test."""
    processes = []

    def start(more: str, **how) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "maveriq", *f"{RUN} --out run {more}".split()]
        process = subprocess.Popen(
            command, **{"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **how}
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def engines_of(process: subprocess.Popen[str]) -> list[int]:
    """Wait until a run has its first engine, and return the group."""
    latest_s = time.monotonic() + TIMEOUT_S
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while time.monotonic() < latest_s:
        pids = [int(pid) for pid in listed.read_text().split()]
        if any(alive_in_group(pid) for pid in pids):
            return pids
        time.sleep(0.02)
    raise AssertionError("the engines did not start")


def gone(groups: list[int]) -> bool:
    latest_s = time.monotonic() + TIMEOUT_S
    while any(alive_in_group(pid) for pid in groups):
        if time.monotonic() > latest_s:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_an_interrupted_run_writes_its_records(started: Started, tmp_path: Path, number: int) -> None:
    process = started("--trace late.csv -q")
    groups = engines_of(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out) == (130, "")
    assert "stopped" in err
    run = read_run(tmp_path / "run")
    assert len(run.requests) < 31
    assert any("ended early by the user" in note for note in read_meta(tmp_path / "run")["notes"])
    assert load_run(tmp_path / "run").interrupted
    assert gone(groups)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "late.csv",
        "m.toml",
        "one.toml",
        "run",
        "soon.csv",
        "t.csv",
    ]


def test_a_run_that_is_stopped_replaces_no_earlier_one(started: Started, tmp_path: Path) -> None:
    put(tmp_path, {"run/run.json": "{}", **{f"run/{name}.csv": "" for name in ("requests", "deployments", "gpus")}})
    before = everything_in(tmp_path / "run")
    process = started("--trace late.csv --overwrite -q")
    engines_of(process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert everything_in(tmp_path / "run") == before
    assert read_meta(tmp_path / "run-2")["kind"] == "run"


def test_a_closed_terminal_leaves_the_records(started: Started, tmp_path: Path) -> None:
    terminal, of_run = pty.openpty()
    process = started("--trace late.csv", stdin=of_run, stdout=of_run, stderr=of_run, start_new_session=True)
    os.close(of_run)
    groups = engines_of(process)
    os.close(terminal)
    process.send_signal(signal.SIGHUP)  # as the kernel and the shell do
    process.wait(timeout=TIMEOUT_S)
    assert any("ended early by the user" in note for note in read_meta(tmp_path / "run")["notes"])
    assert gone(groups)


@pytest.mark.heavy
def test_a_lost_deployment_is_replaced(maveriq: Maveriq, tmp_path: Path) -> None:
    put(tmp_path, {"one.csv": HEAD + "".join(f"{400 + 0.45 * number:.2f},1,10,20\n" for number in range(30))})
    ended = maveriq(f"{RUN} --models one.toml --trace one.csv --out run --fail deployment=1@403s --on-loss replace -q")
    assert ended.code == 0
    run = read_run(tmp_path / "run")
    lost, replacement = run.deployments
    assert (lost.status, replacement.status) == ("down", "up")
    assert lost.reason.endswith("; replaced by deployment 2")
    assert lost.plan is not None
    assert replacement.plan is not None
    assert not set(lost.plan.gpu_ids) & set(replacement.plan.gpu_ids)
    assert {run.requests.reasons[index] for index in run.requests.reason} == {""}


@pytest.mark.parametrize("gap_s", [0.005, 0.1])
def test_repeated_interrupts_lose_no_records(started: Started, tmp_path: Path, gap_s: float) -> None:
    """Ctrl-C several times, while engines stop and records are written."""
    process = started("--trace late.csv -q")
    groups = engines_of(process)
    while process.poll() is None and not (tmp_path / "run").exists():
        process.send_signal(signal.SIGINT)
        time.sleep(gap_s)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert read_meta(tmp_path / "run")["kind"] == "run"
    assert gone(groups)


def test_a_tilde_in_out_means_the_home_folder(maveriq: Maveriq, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    ended = maveriq(f"{RUN} --trace soon.csv --models one.toml -q --out '~/a/run'")
    assert ended.code == 0
    assert (tmp_path / "home" / "a" / "run" / "engines" / "1-1.log").exists()
    assert not (tmp_path / "~").exists()


def test_engines_end_when_the_run_is_killed(started: Started) -> None:
    process = started("--trace late.csv -q")
    groups = engines_of(process)
    process.send_signal(signal.SIGKILL)
    assert gone(groups)


def test_a_full_disk_gives_one_line_and_leaves_no_files(started: Started, tmp_path: Path) -> None:
    def no_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    process = started(
        "--trace soon.csv --models one.toml -q", preexec_fn=no_room, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    )
    out, err = process.communicate(timeout=3 * TIMEOUT_S)
    assert (process.returncode, out) == (1, "")
    [line] = err.splitlines()
    assert "cannot be written" in line
    assert "make room" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["late.csv", "m.toml", "one.toml", "soon.csv", "t.csv"]
