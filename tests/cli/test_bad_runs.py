"""Bad custom policies, run folders and recordings."""

from pathlib import Path

import pytest
from bad_input import Case, bad, policy, recorded, refuse
from command_results import Maveriq
from testbed_fixtures import RUN

MALFORMED = [
    # Custom policies
    bad("sim --policy r.py:order", "policy 'r.py:order'", "r.py does not exist; check the path"),
    bad("sim --policy nosuchmodule:order", "cannot be imported", "No module named 'nosuchmodule'"),
    bad("sim --policy .x:order", "policy '.x:order'", "cannot be imported"),
    bad("sim --policy :order", "policy ':order'", "cannot be imported"),
    policy("def order(gpus) return", "cannot be imported", "SyntaxError"),
    policy("1 / 0", "cannot be imported", "ZeroDivisionError: division by zero (r.py, line 1)"),
    policy("import sys\nsys.exit()", "cannot be imported", "SystemExit"),
    policy("", "r.py has no function 'order'"),
    policy("order = 3", "r.py has no function 'order'"),
    # Comparisons
    bad("compare", "missing argument 'RUN... REFERENCE'", "see maveriq compare --help"),
    bad("report", "missing argument 'DIR...'", "see maveriq report --help"),
    bad("report no/where", "'no/where' does not exist"),
    bad("report d", "run file 'd/run.json' does not exist", files={"d/": ""}),
    bad("report a --out d", "report 'd' cannot be written: it is a folder", files={"d/": ""}),
    bad("report a --out f", "report 'f' exists already", "--overwrite", files={"f": "x"}),
    bad("report d e.json", "'e.json' is no run, and cannot be compared", files={"d/": "", "e.json": "{}"}),
    bad("report e.json", "sizing 'e.json' is not what maveriq size --json prints", files={"e.json": "{}"}),
    bad("report d", "sweep folder 'd': sweep.json is damaged", files={"d/sweep.json": "{}"}),
    bad("compare a", "at least two runs, not only 'a'"),
    bad("compare a b --data nowhere", "holds no recordings"),
    bad("compare f d", "'f/run.json' cannot be read", "not a directory", files={"f": "x", "d/": ""}),
    bad("compare d d", "run file 'd/run.json' does not exist", files={"d/": ""}),
    bad("compare d d", "is not what maveriq writes", files={"d/run.json": "{}"}),
    bad("compare d d --plot a.jpg", "plot 'a.jpg' must end in .png or .svg", files={"d/": ""}),
    bad("compare d d --tolerance mean", "name=limit", "mean=10%", "'mean'", files={"d/": ""}),
    bad("compare d d --tolerance ''", "name=limit", files={"d/": ""}),
    bad("compare d d --tolerance mena=1%", "unknown tolerance 'mena'", "did you mean 'mean'?", files={"d/": ""}),
    bad("compare d d --tolerance slo=3%", "tolerance on slo must be in pt, not in %", files={"d/": ""}),
    bad("compare d d --tolerance mean=-1", "must be a number from 0 with %, not '-1'", files={"d/": ""}),
    bad("compare d d --tolerance mean=nan", "must be a number from 0 with %, not 'nan'", files={"d/": ""}),
    bad("compare d d --tolerance mean=1,mean=2", "tolerance on mean stands twice", files={"d/": ""}),
    # Recorded runs
    bad("testbed importt", "no such command 'importt'", "see maveriq testbed --help"),
    bad("testbed import", "missing option '--out'"),
    bad("testbed import --out runs", "name the recorded runs, or give --all"),
    bad("testbed replay x --all --out runs", "not both"),
    bad("testbed import x --out runs --data nowhere", "'nowhere' holds no recordings", "testbed/runs.csv"),
    recorded("import", "unknown recorded run 'MaverIQ_tin'", f"did you mean '{RUN}'?", name="MaverIQ_tin"),
    recorded("import", "line 2: rate_scale must be a number, not 'lots'", runs=("code,0.1", "code,lots")),
    recorded("import", "line 4: latency_s must be a finite number", "'-1'", completed=("0.91", "-1")),
    recorded("replay", "line 2: service_s must be a finite number", "'0'", completed=("1.49", "0")),
    recorded("import", "line 3: scheduled_s must be a finite number", "1e300", scheduled=("330.0", "1e300")),
    recorded("import", "no column prompt_chars", scheduled=("prompt_chars", "chars")),
    recorded("import", "line 2: gpus must be numbers from 0 to 7, not '3 0 1 9'", deployments=("3 0 1 2", "3 0 1 9")),
    recorded("import", "layer split", "must add up to 60 layers", deployments=("32 28", "32 27")),
    recorded("replay", "completed by model 3 but scheduled for 2", completed=("1,2,330", "1,3,330")),
    recorded("import", "unknown policy of a recorded run 'magic'", runs=("MaverIQ,", "magic,")),
    recorded("import", "unknown model set 'huge'", runs=("large", "huge")),
]


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case.command[:60])
def test_bad_input_gives_one_line_and_leaves_no_files(case: Case, maveriq: Maveriq, tmp_path: Path) -> None:
    refuse(case, maveriq, tmp_path)
