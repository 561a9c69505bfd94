"""Architectures of every kind: converted, loaded, and the logits of the dequantized model.

Each time those of `CHOSEN`, which are quick and unlike each other; all of transformers' with
ZQFP_BREADTH=all, or by `python tests/benchmarks/breadth.py`, which prints the README's table.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import whole_way
from small_models import model_types
from whole_way import RECIPES, REFUSED, UNBUILT, WORKS, WRONG, try_type

CHOSEN = (
    "bert",  # an encoder's blocks, as a decoder
    "gpt_bigcode",
    "openai-gpt",  # blocks return a list
    "pegasus",  # half of an encoder and decoder, without a token to begin with
    "prophetnet",  # a linear is called twice in a block
    "rwkv",  # blocks return a state too
    "jamba",  # blocks of two classes, experts in some
    "recurrent_gemma",  # matrices in no linear; it cannot write in this size
    "modernbert-decoder",  # its head is called its decoder
    "gemma3n_text",  # later blocks take keys and values of earlier ones
    "glm_moe_dsa",  # blocks hand on what they look at
    "olmo_hybrid",  # convolutions are merged while it is loaded
    "hrm_text",  # matrices are split while it is loaded
    "zamba",  # blocks share linears
    "git",  # a tower for pictures beside the decoder
)
NOT = {"xlnet": (REFUSED, REFUSED), "xlm": (WORKS, REFUSED)}  # converted, with `fast` and `best`
ALL = os.environ.get("ZQFP_BREADTH") == "all"


def types() -> list[str]:
    """Those to try that the installed transformers has."""
    wanted = model_types() if ALL else [*CHOSEN, *NOT]
    return [name for name in wanted if name in model_types()]


@pytest.mark.parametrize("model_type", types())
def test_converts(model_type: str, tmp_path: Path) -> None:
    found = try_type(model_type, tmp_path)
    kinds = tuple(found[recipe].kind for recipe in RECIPES)
    if UNBUILT in kinds:
        pytest.skip(found["fast"].reason)
    if ALL:  # what is refused is in the README; nothing may be wrong or end in a traceback
        assert set(kinds) <= {WORKS, REFUSED}, found
        return
    assert kinds == NOT.get(model_type, (WORKS, WORKS)), found


def test_a_wrong_weight_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = whole_way.zqfp_convert.load

    def loaded(*args: object, **kwargs: object) -> object:
        model = load(*args, **kwargs)
        layer = model.model.layers[1].mlp.down_proj
        layer.weight_packed.data = layer.weight_packed.data.flip(0)
        return model

    monkeypatch.setattr(whole_way.zqfp_convert, "load", loaded)
    found = try_type("llama", tmp_path)
    assert {one.kind for one in found.values()} == {WRONG}, found
