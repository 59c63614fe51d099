"""`maveriq profile`: refusals. tests/exec/test_profiling.py tests the measurements."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from maveriq.cli.app import app
from maveriq.errors import InputError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama-2-7b", "-c", "2*1"], "write TPxPP"),
        (["llama-2-7b", "-c", "2x1:fp7"], "weights must be one of float16"),
        (["llama-2-7b", "-c", "falcon-7b=2x1"], "'falcon-7b' is not among the models"),
        (["llama-2-7b", "-c", "1x40"], "too few for 40 stages"),
        (["llama-2-7b", "-c", "0x1"], "tp must be at least 1"),
        (["llama-2-7b", "-c", "3x1"], "torch cannot run llama-2-7b"),
        (["falcon-7b", "-c", "2x1"], "torch cannot run falcon-7b"),
        (["llama-2-7c", "-c", "1x1"], "unknown model 'llama-2-7c'; did you mean"),
        (["llama-2-7b", "-c", "1x1", "--prompt-tokens", "16,x"], "--prompt-tokens must be whole numbers"),
        (["llama-2-7b", "-c", "1x1", "--batch-size", "0"], "--batch-size must be whole numbers"),
        (["llama-2-7b", "-c", "1x1", "--memory-gib", "nan"], "--memory-gib must be a positive number"),
        (["llama-2-7b", "-c", "1x1", "--backend", "emulated"], "there is nothing to measure"),
        (["llama-2-7b", "-c", "1x1", "--backend", "torhc"], "torhc"),
        (["llama-2-7b", "-c", "1x1", "--backend", "trtllm"], "cannot run here"),
        (["llama-2-7b", "-c", "1x1", "--engine-python", "torch=/no/python"], "there is no file /no/python"),
    ],
)
def test_wrong_input_is_refused_before_anything_starts(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["profile", *arguments, "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()
