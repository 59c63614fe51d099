"""The torch engine in real processes: ranks, their failures, and refusals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("torch", reason="the torch engine needs maveriq[torch]")
pytest.importorskip("transformers", reason="the expected tokens come from transformers")

import torch
from engine_fixtures import EngineCase, alive_in_group, run_async, started_engine, until
from torch_models import CONFIGS, PROMPTS, expected_tokens, load_worker, outputs, prompts_of, spec_of

from maveriq.exec.engine_protocol import BROKEN
from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.engines.torch import TorchEngine
from maveriq.exec.engines.torch.engine import RankLostError, _wait_until_loaded
from maveriq.exec.engines.torch.kv_cache import KvCache
from maveriq.exec.engines.torch.messages import RankFailed
from maveriq.exec.engines.torch.rank import memory_errors
from maveriq.exec.messages import Generate

ROOT = Path(__file__).parents[2]
DEATH_BOUND_S = 60.0  # usually seconds; a test machine may be busy


@pytest.fixture
def engine():
    engine = TorchEngine()
    yield engine
    engine.close()


def generate_of(execution_id=1, **requested):
    return Generate(execution_id=execution_id, sequences=prompts_of(**requested))


def too_large():
    """Return a batch whose KV cache takes terabytes per layer."""
    return generate_of(9, prompts=[PROMPTS[0]] * 10_000, output_tokens=1_000_000)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids):
    deadline = time.monotonic() + DEATH_BOUND_S
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "ranks outlive their engine"
        time.sleep(0.02)


@pytest.mark.heavy
def test_tensor_and_pipeline_parallel_over_processes_until_one_is_killed(engine):
    loaded = engine.load(spec_of(CONFIGS["llama"], tp=2, split=(1, 3)))
    assert (loaded.backend, loaded.weights_bytes > 0, loaded.kv_cache_bytes > 0) == ("torch", True, True)
    for execution in (1, 2):
        assert outputs(list(engine.generate(generate_of(execution)))) == expected_tokens("llama")

    pids = engine.pids
    steps = engine.generate(generate_of(3, output_tokens=5000))
    next(steps)
    os.kill(pids[2], signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RankLostError):
        list(steps)
    assert time.monotonic() - started < DEATH_BOUND_S
    with pytest.raises(RankLostError):
        list(engine.generate(generate_of(4)))
    engine.close()
    wait_until_gone(pids)


@pytest.mark.heavy
def test_three_uneven_stages_over_processes(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)  # a user may have a module with the name of one of ours
    (tmp_path / "safetensors.py").write_text("raise SystemExit", encoding="utf-8")
    (tmp_path / "torch.py").write_text("raise SystemExit", encoding="utf-8")
    engine.load(spec_of(CONFIGS["falcon-40b"], split=(2, 1, 1)))
    steps = engine.generate(generate_of())
    assert next(steps) == [tokens[0] for tokens in expected_tokens("falcon-40b")]
    steps.close()  # closing the steps does not affect the next execution
    with pytest.raises(EngineError) as raised:
        list(engine.generate(too_large()))
    assert raised.value.kind is FailureKind.OUT_OF_MEMORY
    assert outputs(list(engine.generate(generate_of(2)))) == expected_tokens("falcon-40b")
    groups = {os.getpgid(pid) for pid in engine.pids}
    assert groups == {os.getpgrp()}


def test_one_process_continues_after_a_failed_execution(engine):
    engine.load(spec_of(CONFIGS["gpt-j"]))
    with pytest.raises(EngineError, match="not in the vocabulary"):
        list(engine.generate(generate_of(prompts=[(1, 5000)])))
    with pytest.raises(EngineError) as raised:
        list(engine.generate(too_large()))
    assert raised.value.kind is FailureKind.OUT_OF_MEMORY
    assert outputs(list(engine.generate(generate_of(3)))) == expected_tokens("gpt-j")
    engine.close()
    engine.close()
    with pytest.raises(RankLostError):
        list(engine.generate(generate_of(4)))


@pytest.mark.heavy
def test_ranks_end_with_their_engine():
    script = (
        "import sys, msgspec\n"
        "from maveriq.exec.engines.torch import TorchEngine\n"
        "from maveriq.exec.messages import EngineSpec\n"
        "engine = TorchEngine(); engine.load(msgspec.json.decode(sys.argv[1], type=EngineSpec))\n"
        "print(*engine.pids, flush=True); input()\n"
    )
    spec = msgspec.json.encode(spec_of(CONFIGS["llama"], split=(3, 1))).decode()
    host = subprocess.Popen(
        [sys.executable, "-c", script, spec], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    with host:
        pids = [int(pid) for pid in host.stdout.readline().split()]
        assert len(pids) == 2
        assert all(alive(pid) for pid in pids)
        host.kill()
    wait_until_gone(pids)


def test_ranks_that_cannot_start_leave_no_processes(engine, tmp_path, monkeypatch):
    started = []

    def start(*command, popen=subprocess.Popen, **how):
        if started:
            raise BlockingIOError("no more processes")
        started.append(popen(["sleep", "60"], **how))
        return started[0]

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("maveriq.exec.engines.torch.engine.subprocess.Popen", start)
    with pytest.raises(EngineError, match="could not start: no more processes"):
        engine.load(spec_of(CONFIGS["llama"], split=(3, 1)))
    assert started[0].returncode is not None
    assert not list(tmp_path.iterdir())


def test_cached_memory_is_freed_for_the_next_execution(monkeypatch):
    """A long batch after a wide one fits, because the cache of the earlier one is freed."""
    allot = KvCache._allocate

    def limited(cache, batch, tokens):
        if batch * tokens > 1000:
            raise MemoryError
        allot(cache, batch, tokens)

    monkeypatch.setattr(KvCache, "_allocate", limited)
    worker = load_worker(spec_of(CONFIGS["llama"]))
    for requested in ([PROMPTS[0] * 120], PROMPTS * 5):
        list(worker.run(prompts_of(requested, output_tokens=1)))


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "NCCL error\nCuda failure 2 'out of memory'"])
def test_gpu_out_of_memory_is_recognized_by_its_message(words):
    with pytest.raises(EngineError) as raised, memory_errors():
        raise RuntimeError(words)
    assert raised.value.kind is FailureKind.OUT_OF_MEMORY


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_not_retried():
    with pytest.raises(EngineError, match="sees 0 GPUs") as raised:
        load_worker(spec_of(CONFIGS["llama"], devices=("cuda:0",)))
    assert raised.value.kind is FailureKind.UNSUPPORTED


@pytest.mark.heavy
def test_an_idle_engine_ends_when_a_rank_is_killed(tmp_path, monkeypatch):
    scratch = tmp_path / "t"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", None)

    async def check():
        async with started_engine(EngineCase(backend="torch"), tmp_path, pp=2, layer_split=(6, 2)) as engine:
            ranks = [pid for pid in alive_in_group(engine.connection.pid) if pid != engine.connection.pid]
            os.kill(ranks[1], signal.SIGKILL)
            assert await engine.exit_code() == BROKEN
            await until(lambda: not alive_in_group(engine.connection.pid))

    run_async(check)
    assert not list(scratch.iterdir())


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("config", "split", "kind", "reason"),
    [
        ({}, (4,), FailureKind.ERROR, "cannot be read"),
        ({"vocab_size": 10**8, "hidden_size": 8 * 10**6}, (3, 1), FailureKind.OUT_OF_MEMORY, "memory"),
    ],
)
def test_a_rank_that_cannot_load_reports_the_reason(engine, tmp_path, config, split, kind, reason):
    folder = "" if kind is FailureKind.OUT_OF_MEMORY else str(tmp_path)
    with pytest.raises(EngineError, match=reason) as raised:
        engine.load(spec_of({**CONFIGS["llama"], **config}, split=split, weights_folder=folder))
    assert raised.value.kind is kind
    assert engine.pids == ()


def test_out_of_memory_of_a_rank_is_the_reported_cause():
    missed = RankFailed(kind="error", message="connection closed by peer")
    short = RankFailed(kind="out-of-memory", message="no memory left")

    class Heard:
        pids = (1, 2)

        def receive(self):
            return 0, missed

        def pending_failures(self):
            return [short]

    with pytest.raises(EngineError, match="no memory left") as raised:
        _wait_until_loaded(Heard())
    assert raised.value.kind is FailureKind.OUT_OF_MEMORY
