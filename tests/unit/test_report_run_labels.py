"""Short labels of runs in tables: all different, and short."""

import pytest

from maveriq.report.run_labels import RunLabel, short_labels


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["a/with-int4", "b/float16"], ["with-int4", "float16"]),
        (["runs/x/", "runs/y"], ["x", "y"]),
        (["old/run", "new/run"], ["run #1", "run #2"]),
        (
            ["hybrid-min-cost-one-model-requests", "hybrid-min-cost-one-model-requests-emulated"],
            ["requests", "reques..emulated"],
        ),
        (["hybrid-min-cost-large-code-0.2", "llf-min-cost-large-code-0.2"], ["hybrid..code-0.2", "llf-mi..code-0.2"]),
        (["x" * 40, "x" * 40], ["xxxxxx..xxxxx #1", "xxxxxx..xxxxx #2"]),
    ],
)
def test_short_labels(names: list[str], short: list[str]) -> None:
    found = short_labels([RunLabel(name=name, kind="run") for name in names])
    assert found == short
    assert max(map(len, found)) <= 16
    assert len(set(found)) == len(found)
