"""docs/grafana/maveriq-serve.json asks for metrics, and for labels, that the server exports."""

import json
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client.parser import text_string_to_metric_families
from test_dashboard import outcome, progress, status

from maveriq.serve.metrics import Metrics
from maveriq.serve.profile_jobs import ProfileJobs

BOARD: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "docs" / "grafana" / "maveriq-serve.json").read_text(encoding="utf-8")
)
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
OF_PROMETHEUS = {"job", "le"}  # it adds the first to every metric; the second is that of buckets


def exported() -> dict[str, set[str]]:
    """The labels of each series that a server with an engine that batches continuously exports."""
    metrics = Metrics()
    metrics.add_model("tiny")
    metrics.add_cluster(lambda: progress(1, deployments=(status(1, running=1, kv_use=0.5),)), lambda: 0)
    metrics.add_connections(lambda: 1)
    metrics.add_profiles(cast("ProfileJobs", SimpleNamespace(states=list, total_s=0.0, total_gpu_s=0.0)))
    metrics.http_errors.labels("not_found").inc()
    metrics.accepted.labels("tiny").inc()
    metrics.count_ended("tiny", outcome(0), prompt_tokens=1, slo_us=1)
    labels: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            labels[sample.name] |= set(sample.labels)
    return labels


def test_every_query_names_a_metric_and_labels_that_are_exported() -> None:
    labels = exported()
    assert len(QUERIES) > 25
    for query in QUERIES + [
        variable["definition"] for variable in BOARD["templating"]["list"] if "definition" in variable
    ]:
        names = re.findall(r"\b(?:maveriq|process)_\w+", query)
        assert names, query
        assert set(names) <= labels.keys(), query
        known = set.union(*(labels[name] for name in names)) | OF_PROMETHEUS
        used = re.findall(r'[{,]\s*(\w+)\s*=~?"', query)
        used += [name.strip() for group in re.findall(r"\bby \(([^)]*)\)", query) for name in group.split(",")]
        assert set(used) <= known, query
        assert query.count("(") == query.count(")"), query


def test_legends_name_labels_that_their_query_keeps() -> None:
    labels = exported()
    for panel in PANELS:
        for target in panel["targets"]:
            groups = re.findall(r"\bby \(([^)]*)\)", target["expr"])
            names = re.findall(r"\b(?:maveriq|process)_\w+", target["expr"])
            kept = {name.strip() for group in groups for name in group.split(",")} if groups else labels[names[0]]
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept, target["expr"]


def test_every_metric_of_maveriq_is_on_the_board() -> None:
    series = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported() if name.startswith("maveriq_")}
    asked = " ".join(QUERIES)
    assert {name for name in series if not name.endswith("_created") and name not in asked} == set()


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
