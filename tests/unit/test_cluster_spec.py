"""Clusters of several nodes and kinds of GPU: how they are written, and what is refused."""

from pathlib import Path

import pytest

from maveriq.domain.cluster import DEFAULT_NETWORK_GBPS
from maveriq.errors import InputError
from maveriq.estimate.cluster_profiles import profiles_for
from maveriq.estimate.cluster_spec import cluster_from, gpu_kinds_in
from maveriq.estimate.hardware_profile import load_gpu_kind
from maveriq.files import traces_path
from maveriq.scenario.build import cluster_for
from maveriq.scenario.cluster_notes import note_on_cluster
from maveriq.units import bytes_from_gib

H100 = '[[nodes]]\ngpu = "H100"\ncount = 8\n'
L40S = '[[nodes]]\ngpu = "L40S"\ncount = 2\n'


def written(folder: Path, *tables: str) -> str:
    path = folder / "mine.toml"
    path.write_text('name = "mine"\n' + "".join(tables))
    return str(path)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("8xA6000", [8]),
        ("9xA6000", [8, 1]),
        ("16xH100", [8, 8]),
        ("10xA10", [4, 4, 2]),
        ("72xGB200", [72]),
        ("16 X h100", [8, 8]),
    ],
)
def test_the_short_form_has_nodes_of_the_kinds_usual_size(text: str, sizes: list[int]) -> None:
    nodes = [gpu.node for gpu in cluster_from(text).gpus]
    assert [nodes.count(node) for node in sorted(set(nodes))] == sizes
    assert nodes == sorted(nodes)


def test_nodes_of_several_kinds(tmp_path: Path) -> None:
    path = written(tmp_path, H100, "network_gbps = 400\nrepeat = 2\n", L40S, "used_gib = [0, 3]\nusd_per_hour = 1.5\n")
    cluster = cluster_from(path)
    assert cluster.kinds == ("H100-SXM", "L40S")
    assert gpu_kinds_in(path) == ("H100", "L40S")
    assert [gpu.node for gpu in cluster.gpus] == [0] * 8 + [1] * 8 + [2] * 2
    assert [gpu.gpu_id for gpu in cluster.gpus] == list(range(18))
    assert [node.network_gbps for node in cluster.nodes] == [400, 400, DEFAULT_NETWORK_GBPS]
    assert cluster.gpus[0].capacity_bytes == load_gpu_kind("H100-SXM").capacity_bytes
    assert cluster.gpus[17].idle_bytes - cluster.gpus[16].idle_bytes == bytes_from_gib(3)
    assert cluster.usd_per_hour(cluster.gpus[0]) == 2.99
    assert cluster.usd_per_hour(cluster.gpus[16]) == 1.5
    (note,) = note_on_cluster(cluster)
    assert "16 x H100-SXM on 2 nodes with 400 Gbit/s between them, 2 x L40S on 1 node; $50.84 an hour" in note


def test_memory_of_a_node(tmp_path: Path) -> None:
    cluster = cluster_from(written(tmp_path, H100, L40S, "memory_gib = 40\n"))
    assert [gpu.capacity_bytes for gpu in cluster.gpus[8:]] == [bytes_from_gib(40)] * 2


def test_equal_nodes_are_the_short_form(tmp_path: Path) -> None:
    short = cluster_from("16xH100")
    both = cluster_from(written(tmp_path, H100, "repeat = 2\n")), cluster_from(written(tmp_path, H100, H100))
    for cluster in both:
        assert (cluster.gpus, cluster.nodes) == (short.gpus, short.nodes)


def test_the_old_format_has_network_and_price_too(tmp_path: Path) -> None:
    cluster = cluster_from(written(tmp_path, 'gpu = "L40S"\ncount = 16\nnetwork_gbps = 25\nusd_per_hour = 2\n'))
    assert [gpu.node for gpu in cluster.gpus] == [0] * 8 + [1] * 8
    assert cluster.network_gbps("L40S") == 25
    assert {cluster.usd_per_hour(gpu) for gpu in cluster.gpus} == {2}


def test_the_example_is_read() -> None:
    assert cluster_from(str(traces_path("cluster-mixed.toml"))).kinds == ("H100-SXM", "L40S")


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (["nodes = []\n"], "nodes"),
        ([H100, "colour = 3\n"], "unknown key `colour`"),
        ([H100.replace("count", "coun")], "coun"),
        (['gpu = "H100"\n', H100], "unknown key `gpu`"),
        ([H100.replace("H100", "H1000")], "unknown kind of GPU 'H1000'.*did you mean 'H100-SXM'"),
        ([H100.replace("8", "0")], "count must be a whole number of at least 1"),
        ([H100, "network_gbps = 0\n"], "network_gbps"),
        ([H100, "usd_per_hour = -1\n"], "usd_per_hour"),
        ([H100, "repeat = 0\n"], "repeat"),
        ([H100, "repeat = 2000\n"], "16000 GPUs are too many; at most 10000"),
        ([H100, L40S, "used_gib = [1]\n"], "entry 2 of nodes: used_gib has 1 numbers for 2 GPUs"),
        ([H100, L40S, "used_gib = [1, 99]\n"], "GPU 9 .L40S.*lower used_gib or raise memory_gib"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, tables: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        cluster_from(written(tmp_path, *tables))
    assert "\n" not in str(raised.value)


def test_a_profile_of_its_own_for_each_kind(tmp_path: Path) -> None:
    path = written(tmp_path, L40S, '[[nodes]]\ngpu = "a6000"\ncount = 4\n')
    profiles = profiles_for("a6000-short", path)
    assert list(profiles.by_kind) == ["L40S", "A6000"]
    assert profiles.main.name == "data sheet of L40S"
    assert profiles.by_kind["A6000"].name == "a6000-short"
    assert profiles_for("a6000-long", path).by_kind["A6000"].name == "a6000-long"
    assert cluster_for(path, profiles).kinds == ("L40S", "A6000")


def test_a_profile_of_a_kind_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"measured on A6000, and cluster .* has only H100-SXM, L40S"):
        profiles_for("a6000-long", written(tmp_path, H100, L40S))
