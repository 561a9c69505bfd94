"""Recipes: the named ones, what is refused and how, what is ignored, and the way into JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from zqfp_convert.errors import OptionError, ZqfpError
from zqfp_convert.recipe import Recipe

NAMES = ("fast", "paper", "best", "max")


def test_best_is_the_default_of_every_choice() -> None:
    best = Recipe.named("best")
    assert best == Recipe(name="best")
    assert (best.scales, best.scale_rounding, best.group_size) == ("m2", "search", 128)
    assert (best.solver, best.damping, best.activation_order) == ("gptq", 0.01, True)
    assert (best.asymmetry, best.sweeps) == (0.5, 3)
    assert (best.rank, best.low_rank, best.low_rank_rounds) == (8, "hessian", 4)
    assert best.factors == "e4m3"
    assert best.center_norms
    assert best.ignore == ("lm_head",)
    assert best.needs_calibration


def test_fast_needs_no_calibration() -> None:
    fast = Recipe.named("fast")
    assert (fast.scales, fast.scale_rounding, fast.solver) == ("m2", "floor", "round")
    assert (fast.rank, fast.sweeps, fast.asymmetry) == (0, 0, 0.0)
    assert not fast.center_norms
    assert not fast.needs_calibration


def test_paper_is_zeroquant_fp() -> None:
    paper = Recipe.named("paper")
    assert (paper.scales, paper.scale_rounding, paper.group_size) == ("m1", "ceil", 256)
    assert (paper.solver, paper.damping, paper.activation_order) == ("gptq", 0.01, False)
    assert (paper.asymmetry, paper.sweeps, paper.center_norms) == (0.0, 0, False)
    assert (paper.rank, paper.low_rank, paper.low_rank_rounds) == (8, "svd", 0)
    assert paper.needs_calibration


def test_choices_replace_those_of_the_recipe_and_none_keeps_them() -> None:
    recipe = Recipe.named("paper", group_size="row", rank=None, ignore=["a", "b"])
    assert recipe.group_size == "row"
    assert recipe.rank == 8
    assert recipe.ignore == ("a", "b")
    assert recipe.name == "paper"
    assert recipe.scales == "m1"


def test_a_single_pattern_is_one_pattern() -> None:
    assert Recipe.named("best", ignore="lm_head") == Recipe.named("best", ignore=["lm_head"])


def test_a_recipe_can_be_changed() -> None:
    paper = Recipe.named("paper")
    changed = paper.changed(rank=4, group_size=None)
    assert changed == Recipe.named("paper", rank=4)
    assert paper.rank == 8
    assert paper.changed() == paper
    with pytest.raises(OptionError, match="rank"):
        paper.changed(rank=-1)


def test_free_scales_take_no_power_of_two_from_the_recipe() -> None:
    assert Recipe.named("paper", scales="free").scale_rounding == "nearest"
    assert Recipe.named("fast", scales="free").scale_rounding == "nearest"
    assert Recipe.named("best", scales="free").scale_rounding == "search"
    assert Recipe.named("fast", scales="free", scale_rounding="search").scale_rounding == "search"


@pytest.mark.parametrize("rounding", ["ceil", "floor"])
def test_free_scales_with_a_rounding_that_was_asked_for(rounding: str) -> None:
    with pytest.raises(OptionError) as raised:
        Recipe.named("best", scales="free", scale_rounding=rounding)
    assert raised.value.where == "scale_rounding"
    assert "free" in raised.value.found


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scales", "m3"),
        ("scales", ["m1"]),
        ("scale_rounding", "up"),
        ("group_size", 0),
        ("group_size", 100),
        ("group_size", "128"),
        ("group_size", 128.0),
        ("solver", "awq"),
        ("damping", 0),
        ("damping", 1),
        ("damping", -0.01),
        ("damping", math.nan),
        ("damping", "0.01"),
        ("asymmetry", -0.1),
        ("asymmetry", 1.1),
        ("asymmetry", math.nan),
        ("asymmetry", "0.5"),
        ("sweeps", -1),
        ("sweeps", 1.5),
        ("codebooks", "nf4"),
        ("rank", -1),
        ("rank", 1025),
        ("rank", 2.5),
        ("rank", "8"),
        ("rank", "all"),
        ("rank", True),
        ("low_rank", "pca"),
        ("low_rank_rounds", -1),
        ("low_rank_rounds", 0.5),
        ("factors", "fp16"),
        ("samples", 0),
        ("samples", 1.5),
        ("seq_len", 1),
        ("seq_len", 2.5),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 0.5),
    ],
)
def test_bad_values_are_named(field: str, value: Any) -> None:
    with pytest.raises(OptionError) as raised:
        Recipe.named("best", **{field: value})
    error = raised.value
    assert isinstance(error, ZqfpError)
    assert error.where == field
    assert repr(value) in error.found
    assert error.needed
    assert field in error.do


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("fast", {}),
        ("paper", {}),
        ("best", {"scales": "free"}),
        ("best", {"scale_rounding": "floor"}),
    ],
)
def test_two_codebooks_take_a_search_and_powers_of_two(name: str, choices: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="rounding 'search'") as raised:
        Recipe.named(name, codebooks="pair", **choices)
    assert raised.value.where == "codebooks"


@pytest.mark.parametrize("choices", [{"scales": "free"}, {"scale_rounding": "floor"}], ids=str)
def test_a_pair_that_nobody_named_gives_way(choices: dict[str, Any]) -> None:
    assert Recipe.named("best").codebooks == "pair"
    assert Recipe.named("best", **choices).codebooks == "e2m1"
    assert Recipe.named("best", scale_rounding="search").codebooks == "pair"


@pytest.mark.parametrize(
    "choices",
    [
        {"codebooks": "e2m1"},
        {"codebooks": "pair"},
        {"codebooks": "pair", "scales": "m1"},
        {"group_size": 32},
        {"group_size": "row"},
        {"damping": 1e-6},
        {"damping": 0.99},
        {"asymmetry": 0},
        {"asymmetry": 1},
        {"sweeps": 0},
        {"rank": 0},
        {"rank": 1024},
        {"rank": "auto"},
        {"low_rank_rounds": 0},
        {"samples": 1},
        {"seq_len": 2},
        {"seed": 2**63 - 1},
        {"ignore": []},
    ],
    ids=str,
)
def test_values_at_the_edge_are_taken(choices: dict[str, Any]) -> None:
    recipe = Recipe.named("best", **choices)
    for field, value in choices.items():
        taken = getattr(recipe, field)
        assert taken == (tuple(value) if isinstance(value, list) else value)


def test_unknown_names_and_choices() -> None:
    with pytest.raises(OptionError, match="fast, paper, best") as raised:
        Recipe.named("fastest")
    assert "'fastest'" in str(raised.value)
    for choice in ("groupsize", "name_", "scale"):
        with pytest.raises(OptionError, match=choice) as raised:
            Recipe.named("best", **{choice: 1})
        assert "group_size" in raised.value.needed


def test_values_are_checked_without_a_name_too() -> None:
    with pytest.raises(OptionError, match="rank"):
        dataclasses.replace(Recipe.named("best"), rank=-1)


@pytest.mark.parametrize(
    ("choices", "needed"),
    [
        ({"solver": "gptq"}, True),
        ({"rank": 8, "low_rank": "hessian"}, True),
        ({"rank": 8, "low_rank": "svd"}, False),
        ({"rank": "auto", "low_rank": "hessian"}, True),
        ({"rank": "auto"}, False),
        ({"low_rank": "hessian"}, False),
        ({"scale_rounding": "search"}, False),
        ({"sweeps": 3}, True),
        ({"center_norms": True}, True),
        ({"asymmetry": 0.5}, True),
    ],
    ids=str,
)
def test_what_looks_at_activations_needs_calibration(choices: dict[str, Any], needed: bool) -> None:
    """From `fast` on; a choice that calibration alone can carry out must not be dropped."""
    assert Recipe.named("fast", **choices).needs_calibration is needed


@pytest.mark.parametrize(
    ("patterns", "layer", "ignored"),
    [
        (["lm_head"], "lm_head", True),
        (["lm_head"], "model.lm_head", True),
        (["lm_head"], "lm_head.inner", False),
        (["lm_head"], "my_lm_head", False),
        (["down_proj"], "model.layers.3.mlp.down_proj", True),
        (["mlp.down_proj"], "model.layers.3.mlp.down_proj", True),
        (["down_proj"], "model.layers.3.mlp.down_proj_2", False),
        (["model.layers.0.*"], "model.layers.0.mlp.down_proj", True),
        (["model.layers.0.*"], "model.layers.10.mlp.down_proj", False),
        (["*.3.mlp.*"], "model.layers.3.mlp.down_proj", True),
        (["*.3.mlp.*"], "model.layers.13.mlp.down_proj", False),
        (["*_proj"], "model.layers.3.mlp.down_proj", True),
        (["[qk]_proj"], "model.layers.3.self_attn.k_proj", True),
        (["[qk]_proj"], "model.layers.3.self_attn.v_proj", False),
        (["DOWN_PROJ"], "model.layers.3.mlp.down_proj", False),
        (["down*proj"], "down.proj", True),
        (["x", "gate"], "model.layers.3.mlp.gate", True),
        ([], "lm_head", False),
        ([""], "lm_head", False),
    ],
)
def test_ignored_layers(patterns: list[str], layer: str, ignored: bool) -> None:
    assert Recipe.named("best", ignore=patterns).ignores(layer) is ignored


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "choices", [{}, {"rank": "auto"}, {"group_size": "row", "ignore": ["a.*", "b"], "seed": 7}]
)
def test_json_and_back(name: str, choices: dict[str, Any]) -> None:
    recipe = Recipe.named(name, **choices)
    data = recipe.to_json()
    assert set(data) == {field.name for field in dataclasses.fields(Recipe)}
    read = json.loads(json.dumps(data))
    assert read == data
    again = Recipe(**read)
    assert again.to_json() == data
    assert again == recipe
    assert hash(again) == hash(recipe)


def test_a_recipe_is_immutable() -> None:
    recipe = Recipe.named("best")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.rank = 4  # type: ignore[misc]
    recipe.to_json()["ignore"].append("more")
    assert recipe.ignore == ("lm_head",)
    assert Recipe.named("best").ignore == ("lm_head",)
