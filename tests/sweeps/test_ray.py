"""Sweeps on a Ray cluster of this machine; skipped where Ray is not installed."""

import pytest

import maveriq
from maveriq.errors import InputError
from maveriq.sweeps.run import make_pool

SMALL = {"options": {"limit": 20}, "grid": {"policy": ["llf", "packing"], "seed": [1, 2]}}


@pytest.mark.heavy
def test_a_sweep_on_ray_equals_one_on_local_processes():
    pytest.importorskip("ray")
    here, there = (maveriq.sweep(SMALL, on=on, workers=2).drop(columns="simulated_in_s") for on in ("local", "ray"))
    assert here.equals(there)


def test_without_ray_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'maveriq\[ray\]'"):
        make_pool("ray", None)
