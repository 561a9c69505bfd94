"""What a configuration admits, how it is written, and the presets."""

from __future__ import annotations

import re
from typing import Any

import pytest

from zqfp_convert.compare.configuration import Configuration
from zqfp_convert.compare.presets import ORIGINAL, PRESETS, preset
from zqfp_convert.errors import OptionError


def test_written_and_read() -> None:
    text = "weights=e2m1,activations=e4m3 scales=m2,scale-rounding=floor,rank=8,smooth=0.5"
    found = Configuration.parse(text)
    want = Configuration(
        weights="e2m1",
        activations="e4m3",
        scales="m2",
        scale_rounding="floor",
        rank=8,
        smooth=0.5,
    )
    assert found.unnamed() == want
    assert found.label == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("weights", "NAME=VALUE"),
        ("weights=", "NAME=VALUE"),
        ("color=red", "group_size"),
        ("section=x", "NAME=VALUE"),
        ("rank=many", "a number"),
        ("rank=-1", "0 to 1024"),
        ("group_size=-2", "0 for the row"),
        ("smooth=1.5", "less than 1"),
        ("weights=int5", "int4-asym"),
        ("activations=int4", "mxfp8"),
        ("solver=magic", "gptq"),
        ("weights=int4-asym,scales=m1", "scales free"),
        ("weights=mxfp4,scales=m2", "scales free"),
        ("scales=m2", "weights none"),
        ("activations=mxfp8,activation_scale=tensor", "each of its blocks"),
    ],
)
def test_refused(text: str, said: str) -> None:
    with pytest.raises(OptionError, match=re.escape(said)) as error:
        Configuration.parse(text)
    assert error.value.needed
    assert error.value.do


@pytest.mark.parametrize(
    ("choices", "observes", "solves", "calibrates"),
    [
        ({}, False, False, False),
        ({"weights": "e2m1", "solver": "distill"}, False, False, True),
        ({"weights": "e2m1"}, False, True, True),
        ({"weights": "e2m1", "solver": "round"}, False, False, False),
        ({"activations": "int8"}, False, False, False),
        ({"activations": "int8", "activation_scale": "tensor"}, True, False, True),
        ({"smooth": 0.5, "solver": "round"}, True, False, True),
    ],
)
def test_what_has_to_be_known_beforehand(
    choices: dict[str, Any], observes: bool, solves: bool, calibrates: bool
) -> None:
    found = Configuration(**choices)
    assert (found.observes, found.solves) == (observes, solves)
    assert found.calibrates == calibrates


@pytest.mark.parametrize("name", PRESETS)
def test_presets_start_with_the_original_and_name_their_rows(name: str) -> None:
    rows = preset(name, 128, 4)
    assert rows[0] == ORIGINAL
    assert len({(row.section, row.label) for row in rows}) == len(rows)
    assert all(row.section and row.label for row in rows)


def test_zeroquant_fp_is_the_papers_table() -> None:
    rows = preset("zeroquant-fp", 128, 4)
    pairs = [(row.weights, row.activations) for row in rows[1:7]]
    assert pairs == [
        ("int8", "int8"), ("int8", "e4m3"), ("e4m3", "e4m3"),
        ("int4", "int8"), ("int4", "e4m3"), ("e2m1", "e4m3"),
    ]  # fmt: skip
    constrained = {(row.scales, row.rank) for row in rows if row.weights == "e2m1"}
    assert constrained == {(s, r) for s in ("free", "m1", "m2") for r in (0, 4)}
    assert {row.rank for row in rows if row.weights == "e3m0"} == {0, 4}
    assert {row.group_size for row in rows[1:]} == {128}


def test_an_unknown_preset() -> None:
    with pytest.raises(OptionError, match="zeroquant-fp, fp8-formats, zeroquant-v2, mx"):
        preset("gptq", 128, 8)
