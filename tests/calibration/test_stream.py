"""Hidden states carried from block to block are those of the whole model."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, LAYERS, configuration, random_model, token_ids
from torch import Tensor, nn

from zqfp_convert.calibration.stream import Call, Entrance, Stream, batches_of, inputs_of, stop_at
from zqfp_convert.model import skeleton
from zqfp_convert.model.blocks import find_blocks, first_tensor


def states_of(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """The hidden states before each block and behind the last, from one pass of the whole model."""
    states: list[Tensor] = []
    modules = find_blocks(model).modules
    last = modules[-1]
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, kwargs: states.append((args or (kwargs["hidden_states"],))[0].clone()),
            with_kwargs=True,
        )
        for module in modules
    ]
    handles.append(last.register_forward_hook(lambda m, a, out: states.append(first_tensor(out))))
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return states


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_streamed_states_are_those_of_the_whole_model(arch: str) -> None:
    # Three windows in batches of two: the last batch is smaller. 40 tokens exceed sliding windows.
    model = random_model(configuration(arch))
    windows = token_ids(3, 40)
    batches = batches_of(windows, 80, torch.device("cpu"))
    want = [states_of(model, batch) for batch in batches]
    assert len(want[0]) == LAYERS + 1

    blocks = find_blocks(model)
    real = copy.deepcopy(blocks.modules)
    for module in blocks.modules:
        skeleton.empty(module)  # as in a conversion: no block is there but the one at hand
    entrance = Entrance(blocks, batches)
    stream = Stream(entrance.first())
    entrance.try_block(0, real[0])
    for index, block in enumerate(real):
        for have, states in zip(stream.hidden, want, strict=True):
            assert torch.equal(have, states[index])
        call, window = entrance.trial(index, stream.hidden[0])
        assert len(window) == 1
        assert window.untyped_storage().nbytes() == window.nbytes  # the batch itself may go
        torch.testing.assert_close(
            call.run(block, window), want[0][index + 1][:1], rtol=1e-4, atol=1e-5
        )
        stream.advance(block, entrance.calls(index))
    for have, states in zip(stream.hidden, want, strict=True):
        assert torch.equal(have, states[-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [12, 7])  # the last dimension: a multiple of 8 bytes, or not
def test_checksums_tell_states_by_their_bits_alone(dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, width, generator=generator).to(dtype)
    size = hidden.element_size()
    whole = width * size % 8 == 0
    words = np.frombuffer(hidden.view(torch.uint8).numpy().tobytes(), f"<i{8 if whole else size}")
    want = sum(int(word) for word in words)
    found = Stream([hidden]).checksum()
    assert found == (want + (1 << 63)) % (1 << 64) - (1 << 63)
    assert Stream([hidden, hidden]).checksum() == 2 * found
    turned = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    odd = torch.cat([hidden.new_zeros(1), hidden.flatten()])[1:].view(hidden.shape)
    assert Stream([turned]).checksum() == Stream([odd]).checksum() == found
    hidden.view(torch.int16)[2, 4, -1] ^= 1
    assert Stream([hidden]).checksum() != found


@torch.no_grad()
def test_blocks_work_as_before_afterwards() -> None:
    model = random_model(configuration("llama"))
    want = model(token_ids()).logits
    entrance = Entrance(find_blocks(model), [token_ids()])
    entrance.first()
    entrance.calls(1)(0)
    assert torch.equal(model(token_ids()).logits, want)


def test_a_call_with_a_tuple() -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor, factor: float, *, shift: float) -> tuple[Tensor, None]:
            return x * factor + shift, None

    x = torch.ones(1, 2, 3)
    assert torch.equal(Call((2.0,), {"shift": 1.0}).run(Block(), x), 3 * x)


def test_inputs_of_and_stop_at() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 5))
    x, seen = torch.randn(6, 2), dict[str, Tensor]()
    behind: list[Tensor] = []
    model[2].register_forward_pre_hook(lambda m, args: behind.append(args[0]))
    with inputs_of({"first": model[0], "second": model[1]}, seen), stop_at(model[1]):
        model(x)
    assert seen["first"] is x
    assert torch.equal(seen["second"], model[0](x))
    assert not behind
    seen.clear()
    model(x)
    assert not seen
    assert len(behind) == 1


@pytest.mark.parametrize(
    ("windows", "tokens", "sizes"),
    [(5, 64, [2, 2, 1]), (4, 64, [2, 2]), (2, 10, [1, 1]), (3, 1000, [3])],
)
def test_batches(windows: int, tokens: int, sizes: list[int]) -> None:
    ids = torch.arange(windows * 32).view(windows, 32)
    batches = batches_of(ids, tokens, torch.device("cpu"))
    assert [len(batch) for batch in batches] == sizes
    assert torch.equal(torch.cat(batches), ids)


def test_nothing_of_a_call_that_was_left_stays() -> None:
    """Not even until Python looks for cycles: on a GPU that would be gigabytes by then."""
    model = random_model(configuration("llama"))
    block = find_blocks(model).modules[0]
    entrance = Entrance(find_blocks(model), [torch.ones(1, 5, dtype=torch.long)])
    hidden, call = entrance.first()[0], entrance.calls(0)(0)
    down = block.get_submodule("mlp.down_proj")
    kept: list[weakref.ref[torch.Tensor]] = []
    handle = block.get_submodule("mlp.gate_proj").register_forward_hook(
        lambda module, args, out: kept.append(weakref.ref(out))
    )
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad(), stop_at(down):
            call.run(block, hidden)
        assert kept[0]() is None
    finally:
        gc.enable()
        handle.remove()
