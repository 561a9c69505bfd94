"""Errors say where, what was found, what is needed and what to do."""

from __future__ import annotations

import pytest

from zqfp_convert import errors
from zqfp_convert.errors import (
    CheckpointError,
    OptionError,
    OutputError,
    SourceError,
    ZqfpError,
)


@pytest.mark.parametrize("kind", [ZqfpError, OptionError, SourceError, OutputError])
def test_an_error_has_all_four_parts(kind: type[ZqfpError]) -> None:
    error = kind("down_proj", "K = 3", needed="an even K", do="Pad it.")
    assert (error.where, error.found) == ("down_proj", "K = 3")
    assert (error.needed, error.do) == ("an even K", "Pad it.")
    assert str(error) == "down_proj: K = 3; needed: an even K. Pad it."


@pytest.mark.parametrize("missing", ["needed", "do"])
def test_no_part_may_be_left_out(missing: str) -> None:
    parts = {"needed": "x", "do": "y"}
    del parts[missing]
    with pytest.raises(TypeError, match=missing):
        OptionError("where", "found", **parts)


def test_a_checkpoint_error_names_its_rule() -> None:
    error = CheckpointError("span", "down_proj", "a span of 12", needed="11", do="Convert again.")
    assert error.rule == "span"
    assert error.where == "down_proj"
    assert error.found == "a span of 12 [span]"
    assert str(error) == "down_proj: a span of 12 [span]; needed: 11. Convert again."


def test_every_error_of_the_user_is_one_kind() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, BaseException)
    ]
    assert len(kinds) >= 5
    assert issubclass(errors.Stopped, KeyboardInterrupt)  # Ctrl-C is no error
    for kind in set(kinds) - {errors.Stopped}:
        assert issubclass(kind, ZqfpError)
        assert not issubclass(kind, (OSError, ValueError, AssertionError))
        assert kind.__doc__
