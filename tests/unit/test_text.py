"""Names from outside, control characters, and cells that a spreadsheet would run."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maveriq.domain.models import ModelSpec, load_model
from maveriq.errors import InputError
from maveriq.report.requests_csv import csv_cell
from maveriq.text import check_name, check_path, escape_controls, protect_cell, unprotect_cell
from maveriq.workload.model_sets import load_model_set

BAD_NAMES = {
    "": "must not be empty",
    "a" * 201: "has 201 characters",
    "a\x1b[31m": "must be printable",
    "a\nb": "must be printable",
    "a\u202eb": "must be printable",
    "a\ud800": "must be printable",
    "-a": "must not begin with -",
    "a@1": "must not have an @",
}


@pytest.mark.parametrize(("name", "fault"), BAD_NAMES.items())
def test_names_that_cannot_be_used(name: str, fault: str) -> None:
    with pytest.raises(InputError, match=fault) as error:
        check_name(name, "model", remedy="set another")
    assert str(error.value).isprintable()
    assert str(error.value).endswith("; set another")


@pytest.mark.parametrize("name", ["llama-2-7b", "Qwen2.5 (tuned)", "модель", "a=b", "1", "x" * 200])
def test_names_that_can_be_used(name: str) -> None:
    check_name(name, "model")
    check_path(name, "model")


def test_a_path_may_have_an_at_sign_and_be_longer() -> None:
    check_path("/home/me@work/" + "x" * 200, "model")
    for path in ("-x", "x\0", "x" * 4_097, ""):
        with pytest.raises(InputError):
            check_path(path, "model")


def test_models_and_model_sets_check_their_names(tmp_path) -> None:
    shape = dict.fromkeys(
        ("layers", "hidden_size", "attention_heads", "kv_heads", "intermediate_size", "vocab_size"), 8
    )
    with pytest.raises(InputError, match=r"set _name_or_path in its config\.json"):
        ModelSpec(name="a@1", architecture="llama", **shape)
    with pytest.raises(InputError, match=r"model '-x/config\.json' must not begin with -"):
        load_model("-x/config.json")
    (tmp_path / "set.toml").write_text('name = "a\\u001b"\n[[models]]\nmodel = "llama-2-7b"\nload_at = 0\n')
    with pytest.raises(InputError, match=r"model set name .* must be printable"):
        load_model_set(str(tmp_path / "set.toml"))
    with pytest.raises(InputError, match="must not begin with -"):
        load_model_set("-x.toml")


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("plain", "plain"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b[31mred\x07\r", "\\x1b[31mred\\x07\\r"),
        ("\x9b31m \x7f", "\\x9b31m \\x7f"),
        ("\u202egnp.exe \u2028", "\\u202egnp.exe \\u2028"),
        ("\udcff", "\\udcff"),
        ("schön 模型 👩‍💻", "schön 模型 👩‍💻"),
    ],
)
def test_control_characters_are_escaped(text: str, escaped: str) -> None:
    assert escape_controls(text) == escaped
    assert escape_controls(escaped) == escaped


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-cmd", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''=1"])
def test_a_formula_is_no_formula_in_a_cell(text: str) -> None:
    assert protect_cell(text) == f"'{text}"
    assert unprotect_cell(f"'{text}") == text
    assert next(csv.reader(io.StringIO(csv_cell(text), newline=""))) == [f"'{text}"]


@pytest.mark.parametrize("text", ["-1", "+2.5", "-1e-9", "-.5", "a=1", "'quoted'", "it's", "'", ""])
def test_other_cells_stay(text: str) -> None:
    assert protect_cell(text) == text
    assert unprotect_cell(text) == text


@given(st.one_of(st.text(), st.text("'=+-@\t\r1a")))
def test_every_cell_reads_back(text: str) -> None:
    assert unprotect_cell(protect_cell(text)) == text
    assert not protect_cell(text).startswith(("=", "@", "\t", "\r"))
