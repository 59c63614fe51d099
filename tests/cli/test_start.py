"""Ctrl-C during the imports of the command."""

import builtins
from typing import Any

import pytest

from maveriq.__main__ import main


def test_ctrl_c_during_imports_prints_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    default = builtins.__import__

    def interrupted(name: str, *more: Any, **named: Any) -> Any:
        if name == "maveriq.cli.app":
            raise KeyboardInterrupt
        return default(name, *more, **named)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
