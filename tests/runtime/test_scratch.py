"""The buffer that all layers of a model share."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from zqfp_convert.runtime.scratch import Scratch, scratch

CPU = torch.device("cpu")


def test_one_buffer_that_only_grows() -> None:
    made = Scratch()
    large = made.matrix(64, 160, CPU)
    assert large.shape == (64, 160)
    assert large.dtype == torch.uint8
    small = made.matrix(16, 32, CPU)
    assert small.shape == (16, 32)
    assert small.is_contiguous()
    assert small.data_ptr() == large.data_ptr()
    assert made.matrix(128, 160, CPU).shape == (128, 160)


def test_it_is_found_by_its_key_while_it_lives() -> None:
    first, second = Scratch(), Scratch()
    assert scratch(first.key) is first
    assert scratch(second.key) is second
    key = first.key
    del first
    gc.collect()
    with pytest.raises(KeyError):
        scratch(key)


def test_a_copy_is_another() -> None:
    made = Scratch()
    first, second = copy.deepcopy([made, made])
    assert first is second
    assert first is not made
    assert scratch(first.key) is first


def test_it_can_be_written_outside_of_inference_mode() -> None:
    made = Scratch()
    with torch.inference_mode():
        buffer = made.matrix(16, 16, CPU)
    buffer[0] = 1
    assert not made.matrix(16, 16, CPU).is_inference()
