"""Errors: their messages, and pickling."""

import copy

from maveriq.errors import InputError, MaveriqError, UnknownNameError


def test_an_unknown_name_suggests_a_similar_name() -> None:
    error = UnknownNameError("policy", "hybird", ["llf", "hybrid"], hint="or a file")
    assert str(error) == "unknown policy 'hybird'; did you mean 'hybrid'? (known: hybrid, llf) or a file"
    assert error.exit_code == 2


def test_errors_can_be_pickled() -> None:
    for error in (UnknownNameError("policy", "x", ["llf"]), InputError("bad"), MaveriqError("failed")):
        again = copy.copy(error)  # uses the pickle protocol
        assert (str(again), again.exit_code) == (str(error), error.exit_code)


def test_of_many_names_the_nearest_are_shown() -> None:
    known = [f"run-{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    message = str(UnknownNameError("run", "run-zz", known))
    assert message.startswith("unknown run 'run-zz'; did you mean 'run-z'? (known: run-z, ")
    assert message.endswith(" and 21 more)")
