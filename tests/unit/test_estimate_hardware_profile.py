"""Hardware profiles, their validation, and clusters."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from maveriq.domain.cluster import LoadWindow
from maveriq.domain.models import KvType, WeightType, known_models, load_model
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate.cluster_spec import cluster_from
from maveriq.estimate.hardware_profile import HardwareProfile, LoadFit, known_profiles, load_gpu_kind, load_profile
from maveriq.files import data_path, traces_path
from maveriq.units import bytes_from_gib

Edit = Callable[[str, str, str], Path]


@pytest.fixture(scope="module")
def short() -> HardwareProfile:
    return load_profile("a6000-short")


@pytest.fixture
def edited(tmp_path: Path) -> Edit:
    """A copy of the A6000 data with one text replaced in one file; returns the profile's path."""

    def edit(name: str, old: str, new: str) -> Path:
        folder = shutil.copytree(data_path("a6000"), tmp_path / "mine")
        text = (folder / name).read_text()
        assert old in text, f"{old!r} is not in {name}; the test would test nothing"
        (folder / name).write_text(text.replace(old, new, 1))
        return folder / "profile-short.toml"

    return edit


def test_profiles_are_found_by_name() -> None:
    assert {name: load_profile(name).name for name in known_profiles()} == {
        "a6000-short": "a6000-short",
        "a6000-long": "a6000-long",
    }


def test_the_testbed_is_as_measured(short: HardwareProfile) -> None:
    assert (short.gpu_kind, short.prompt_tokens, load_profile("a6000-long").prompt_tokens) == ("A6000", 10, 923)
    assert (short.capacity_bytes, short.idle_bytes) == (bytes_from_gib(47.988), bytes_from_gib(0.465))
    assert short.timing.tick_us == 10_300
    assert (short.timing.after_arrival_us, short.timing.after_release_us) == (1_400, 2_200)
    assert (short.timing.registration_delay_us, short.drain_us) == (10_000_000, 300_000_000)
    assert short.load_window == LoadWindow(
        samples=120, sample_us=1_000_000, look_us=166_667, busy_share=0.01, max_phase_us=166_667
    )


def test_accuracy_is_of_the_stored_model(short: HardwareProfile) -> None:
    assert short.accuracy("llama-2-70b", WeightType.INT8, KvType.NATIVE) == 99.0
    assert short.accuracy("llama-2-70b", WeightType.INT8, KvType.INT8) == 98.8
    assert short.accuracy("gptj-6b", WeightType.FLOAT16, KvType.INT8) is None
    assert short.accuracy("unknown-model", WeightType.FLOAT16, KvType.NATIVE) == 100  # by definition
    assert short.accuracy("unknown-model", WeightType.INT8, KvType.NATIVE) is None


@pytest.mark.parametrize("kv", KvType)
def test_an_empty_kv_means_any(short: HardwareProfile, kv: KvType) -> None:
    def supports(name: str, tp: int, pp: int, weights: WeightType) -> bool:
        return short.supports(name, ParallelConfig(tp=tp, pp=pp, weights=weights, kv=kv))

    assert not supports("llama-2-70b", 1, 1, WeightType.INT8)
    assert supports("llama-2-70b", 1, 2, WeightType.INT8)
    assert not supports("llama-2-7b", 8, 1, WeightType.INT4)
    assert supports("llama-2-7b", 8, 1, WeightType.FLOAT16)


def test_load_time_is_measured_or_fitted(short: HardwareProfile) -> None:
    falcon = load_model("falcon-40b")
    measured = ParallelConfig(tp=4, pp=2, weights=WeightType.FLOAT16)
    assert short.load_time_s(falcon, measured, gib_per_gpu=1000) == 35.0
    fit = short.facts.load_fit
    other = ParallelConfig(tp=2, pp=2, weights=WeightType.FLOAT16)
    assert short.load_time_s(falcon, other, gib_per_gpu=20.0) == fit.fixed_s + 4 * fit.per_gpu_s + 20 * fit.per_gib_s
    assert LoadFit(fixed_s=1, per_gpu_s=2, per_gib_s=3).seconds(gpus=4, gib_per_gpu=5) == 24


def test_slo_grows_with_output_tokens(short: HardwareProfile) -> None:
    assert short.slo_s("llama-2-7b", 20) == pytest.approx(0.118064 + 20 * 0.022633)
    assert short.slo_s("unknown-model", 20) is None
    assert set(short.facts.slo) == {"falcon-7b", "falcon-40b", "gptj-6b", "llama-2-7b", "llama-2-13b", "llama-2-70b"}
    assert set(short.facts.slo) < set(known_models())


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("profile-short.toml", "prompt_tokens = 10", "prompt_tokens = 0", "must be a whole number of at least 1"),
        ("profile-short.toml", "prompt_tokens", "prompt_token", "prompt_token"),
        ("profile-short.toml", "fingerprints-short.csv", "nowhere.csv", "does not exist"),
        ("hardware.toml", "tick_ms = 10.3", "tick_ms = nan", "tick_ms"),
        ("hardware.toml", "memory_gib = 47.988", "memory_gib = inf", "memory_gib"),
        ("hardware.toml", 'slo = "slo.csv"', 'slow = "slo.csv"', "unknown key `slow`"),
        ("fingerprints-short.csv", "tpot_layer_s", "tpot_layer_ms", "no column tpot_layer_s"),
        ("fingerprints-short.csv", ",float16,native,1,1,1,", ",float16,native,1,1,1,nan", "line 2: ttft_layer_s"),
        ("fingerprints-short.csv", ",float16,native,1,1,2,", ",float16,native,1,1,1,", "line 3: this row says again"),
        ("fingerprints-short.csv", ",float16,native,", ",float17,native,", "weights must be one of float16, int8"),
        ("fingerprints-short.csv", "gptj-6b,int4,native,1,1,1,", "gptj-6b,int4,native,0,1,1,", "tp must be a whole"),
        ("exponents.csv", "int4,native,0.155457,0.813981,0.506217,0.321953\n", "", "exponents has no row"),
        ("exponents.csv", "0.155457", "-0.155457", "a must be a finite number from 0 to 10"),
        ("accuracy.csv", "gptj-6b,int4,", "gtpj-6b,int4,", "unknown model 'gtpj-6b'; did you mean 'gptj-6b'"),
        ("accuracy.csv", "gptj-6b,int4,native,96.4\n", "", "the accuracy table has no row"),
        ("accuracy.csv", "96.4", "196.4", "percent must be at most 100"),
        ("unsupported.csv", "falcon-40b,1,1,float16,", "llama-2-7b,4,1,int4_gptq,int8", "says again"),
        ("slo.csv", "falcon-7b", "falcon-8b", "unknown model 'falcon-8b'"),
        ("load_times.csv", "35,42", "42,35", "high_s must be a finite number from 42 to"),
        ("load_fit.toml", "fixed_s = ", "fixed_s = -", "fixed_s"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_refused(edited: Edit, name: str, old: str, new: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_profile(str(edited(name, old, new)))


def test_an_empty_accuracy_was_never_measured(edited: Edit) -> None:
    mine = load_profile(str(edited("accuracy.csv", "gptj-6b,int4,native,96.4", "gptj-6b,int4,native,")))
    assert mine.accuracy("gptj-6b", WeightType.INT4, KvType.NATIVE) is None


def test_an_unknown_profile_suggests_a_similar_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'a6000-short'"):
        load_profile("a6000-shrot")


def test_the_short_form_of_a_cluster() -> None:
    cluster = cluster_from("8xA6000")
    kind = load_gpu_kind("a6000")
    assert (cluster.name, len(cluster), cluster_from("8xa6000")) == ("8xA6000", 8, cluster)
    assert {(gpu.kind, gpu.capacity_bytes, gpu.idle_bytes, gpu.node) for gpu in cluster.gpus} == {
        ("A6000", kind.capacity_bytes, kind.idle_bytes, 0)
    }


def test_the_example_file_is_the_short_form() -> None:
    assert cluster_from(str(traces_path("cluster-8xA6000.toml"))) == cluster_from("8xA6000")


def test_a_cluster_file_has_nodes_memory_and_used_memory(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\ngpu = "A6000"\ncount = 3\ngpus_per_node = 2\nmemory_gib = 24\nused_gib = [0, 1.5, 0]\n'
    )
    cluster = cluster_from(str(path))
    assert [gpu.node for gpu in cluster.gpus] == [0, 0, 1]
    assert cluster.gpus[0].capacity_bytes == bytes_from_gib(24)
    assert cluster.gpus[1].idle_bytes - cluster.gpus[0].idle_bytes == bytes_from_gib(1.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0xA6000", "between 1 and"),
        ("99999999xA6000", "between 1 and"),
        ("8xB300", "unknown kind of GPU 'B300'"),
        ("-1xA6000", "write count and kind"),
        ("eight", "write count and kind"),
        ("nowhere.toml", "does not exist"),
    ],
)
def test_a_wrong_cluster_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cluster_from(text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("count = 0", "count"),
        ("count = 2\nused_gib = [1]", "1 numbers for 2 GPUs"),
        ("count = 2\nused_gib = [nan, 0]", "used_gib"),
        ("count = 1\nused_gib = [50]", "capacity 47.988 GiB must be more than"),
        ("count = 2\ncolour = 3", "unknown key `colour`"),
        ("count = 2\nmemory_gib = 0.1", "must be more than the 0.465 GiB"),
    ],
)
def test_a_wrong_cluster_file_is_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'name = "mine"\ngpu = "A6000"\n{line}\n')
    with pytest.raises(InputError, match=message):
        cluster_from(str(path))
