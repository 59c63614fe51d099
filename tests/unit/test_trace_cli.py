"""`maveriq trace`: its output and errors."""

import json

import pytest
import typer
from typer.testing import CliRunner

from maveriq.cli.trace import app, rate_plot
from maveriq.errors import InputError
from maveriq.workload.schedules import read_schedule

COMMAND = typer.Typer()
COMMAND.add_typer(app, name="trace")


def run(*arguments):
    result = CliRunner().invoke(COMMAND, ["trace", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_show_prints_counts_rate_models_and_lengths():
    shown = run("show")
    assert "code on large: 3,508 requests from 101.2 s to 2,099.4 s" in shown
    assert "█" in shown
    assert "llama-2-70b" in shown
    assert "median" in shown


def test_show_json_has_the_same_figures():
    shown = json.loads(run("show", "conversation", "--scale", "0.1", "--models", "regular", "--json"))
    assert shown["requests"] == sum(shown["requests_per_bin"]) == 1913
    assert sum(endpoint["requests"] for endpoint in shown["endpoints"]) == 1913
    assert shown["output_tokens"]["maximum"] == 20
    assert shown["mean_rate_per_s"] == pytest.approx(1913 / (shown["last_arrival_s"] - shown["first_arrival_s"]))


def test_export_can_be_checked_and_shown_again(tmp_path):
    out = tmp_path / "schedule.csv"
    assert "1,913 requests" in run("export", "conversation", "--scale", "0.1", "--out", str(out))
    assert run("check", str(out)).startswith(f"OK {out}: schedule, 1,913 requests in ")
    assert "schedule.csv on large: 1,913 requests" in run("show", str(out))
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.csv"]


def test_a_very_long_schedule_is_summarised_in_wider_bins(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text("arrival_s,endpoint,prompt_tokens,output_tokens\n0,1,1,1\n1000000000,1,1,1\n")
    shown = json.loads(run("show", str(path), "--json"))
    assert sum(shown["requests_per_bin"]) == 2
    assert len(shown["requests_per_bin"]) <= 10_000
    assert shown["bin_s"] % 30 == 0


def test_check_counts_an_azure_trace(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:03,1,2\n2023-11-16 18:02:03,1,2\n")
    assert run("check", str(path)) == f"OK {path}: Azure trace, 2 requests in 3 minutes\n"
    assert json.loads(run("check", str(path), "--json"))["requests"] == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("check", "nowhere.csv"), "does not exist"),
        (("show", "--scale", "-1"), "scale must be a positive number"),
        (("show", "--models", "huge"), "unknown model set 'huge'"),
        (("export", "--out", "nowhere/schedule.csv"), "cannot be written"),
    ],
)
def test_errors_are_raised(arguments, says):
    with pytest.raises(InputError, match=says):
        run(*arguments)


def test_the_plot_fits_and_its_columns_are_as_high_as_the_rate():
    lines = rate_plot((0, 15, 30, 60), 30, width=80).splitlines()
    columns = ["".join(line[9 + index : 10 + index] for line in lines[:-1]).strip() for index in range(4)]
    assert [len(column) for column in columns] == [0, 2, 4, 8]
    assert lines[0].startswith("  2.00/s")
    assert max(map(len, rate_plot((1,) * 1000, 30, width=80).splitlines())) <= 80


def test_an_export_contains_the_slos_of_its_scale(tmp_path) -> None:
    file = tmp_path / "slo.csv"
    run("export", "code", "--scale", "0.05", "--slo-scale", "5", "--out", str(file))
    # llama-2-70b: 5 * (1.031805 + 20 * 0.204316) s
    assert read_schedule(file).arrivals.slo_us[0] == 25_590_625
