"""What blocks hand on beside hidden states reaches the blocks that want it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from architectures import token_ids
from small_models import model_types, small_model
from torch import Tensor, nn

from zqfp_convert.calibration.beside import Beside
from zqfp_convert.calibration.stream import Entrance, Stream
from zqfp_convert.errors import SourceError
from zqfp_convert.model.blocks import find_blocks, first_tensor


def last_states(model: nn.Module, ids: Tensor) -> Tensor:
    """Hidden states behind the last block, from one pass of the whole model."""
    found: list[Tensor] = []
    last = find_blocks(model).modules[-1]
    handle = last.register_forward_hook(lambda m, a, out: found.append(first_tensor(out)))
    model(input_ids=ids, use_cache=False)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("model_type", ["zamba", "gemma3n_text", "rwkv", "llama"])
@torch.no_grad()
def test_streamed_states_are_those_of_the_whole_model(model_type: str, tmp_path: Path) -> None:
    if model_type not in model_types():
        pytest.skip("not in this transformers")
    model = small_model(model_type)
    batches = [token_ids(2, 24), token_ids(1, 24, seed=5)]
    want = [last_states(model, batch) for batch in batches]
    blocks = find_blocks(model)
    real = copy.deepcopy(blocks.modules)
    entrance = Entrance(blocks, batches)
    stream = Stream(entrance.first())
    for index, block in enumerate(real):
        entrance.try_block(index, block)
        if index == 1:  # what was handed on is split with the windows
            dimension = entrance.dimension(stream.hidden[0])
            assert dimension == (1 if model_type == "gemma3n_text" else 0)
            entrance.split(1)
            stream.split(1, dimension)
        trial = entrance.trial(index, stream.hidden[0])[1]
        assert (trial is stream.hidden[0]) is entrance.hands_on
        stream.advance(block, entrance.calls(index))
    hand_on = {"rwkv"} if transformers.__version__.startswith("5.0.") else {"rwkv", "gemma3n_text"}
    assert entrance.hands_on is (model_type in hand_on)
    single = [one for states in want for one in torch.split(states, 1, dimension)]
    for have, states in zip(stream.hidden, single, strict=True):
        torch.testing.assert_close(have, states, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_decoder_that_goes_its_own_way_is_refused() -> None:
    model = small_model("xlm")
    blocks = find_blocks(model)
    entrance = Entrance(blocks, [token_ids()])
    entrance.first()
    with pytest.raises(SourceError, match="cannot be run block by block"):
        entrance.try_block(0, copy.deepcopy(blocks.modules[0]))


def test_containers_and_outputs_by_batch() -> None:
    beside = Beside()
    assert not beside.anything
    given = beside.filled(0, {"shared": {}, "other": 1})
    given["shared"]["key"] = torch.arange(6).view(3, 2)
    assert beside.filled(0, {"shared": {}})["shared"] is given["shared"]
    assert beside.filled(1, {"shared": {}})["shared"] == {}
    assert beside.anything
    beside.outputs[0] = (torch.arange(3), None)
    beside.split(2, [3, 1])
    assert [beside.containers[i]["shared"]["key"].tolist() for i in (0, 1)] == [
        [[0, 1], [2, 3]],
        [[4, 5]],
    ]
    assert beside.containers[2]["shared"] == {}
    assert beside.outputs[1][0].tolist() == [2]
