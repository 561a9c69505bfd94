"""What is needed next is read while the last is worked with."""

from __future__ import annotations

import threading

import pytest
import torch

from zqfp_convert.checkpoint.shards import Shards
from zqfp_convert.conversion.ahead import read_ahead

CPU = torch.device("cpu")


class Spy:
    """Shards that know how far they were read, and by which thread."""

    def __init__(self) -> None:
        self.read_so_far: list[str] = []
        self.another = threading.Event()
        self.threads: set[int] = set()

    def read(self, names: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        if "bad" in names:
            raise OSError("cannot be read")
        self.read_so_far += names
        self.threads.add(threading.get_ident())
        self.another.set()
        return {name: torch.ones(3, 0 if name == "empty" else 5000).t() for name in names}


def ahead(spy: Spy, groups: list[list[str]]) -> list[list[str]]:
    shards: Shards = spy  # type: ignore[assignment]
    return [list(tensors) for tensors in read_ahead(shards, groups, CPU)]


def test_the_next_one_is_read_meanwhile() -> None:
    spy = Spy()
    shards: Shards = spy  # type: ignore[assignment]
    reader = read_ahead(shards, [["a"], ["b"], ["c"]], CPU)
    assert list(next(reader)) == ["a"]
    while "b" not in spy.read_so_far:
        assert spy.another.wait(10)
        spy.another.clear()
    assert "c" not in spy.read_so_far
    assert [list(tensors) for tensors in reader] == [["b"], ["c"]]
    assert threading.get_ident() not in spy.threads


def test_groups_of_all_kinds() -> None:
    for groups in ([], [["a", "b"]], [["a"], [], ["empty", "c"]]):
        assert ahead(Spy(), groups) == groups


def test_an_error_is_raised_where_it_was_needed() -> None:
    spy = Spy()
    shards: Shards = spy  # type: ignore[assignment]
    reader = read_ahead(shards, [["a"], ["bad"], ["c"]], CPU)
    assert list(next(reader)) == ["a"]
    with pytest.raises(OSError, match="cannot be read"):
        next(reader)


@pytest.mark.parametrize(
    "lack",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_what_did_not_fit_is_read_when_it_is_asked_for(lack: RuntimeError) -> None:
    spy, failed = Spy(), []
    read = spy.read

    def once(names: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        if names == ["b"] and not failed:
            failed.append(names)
            raise lack
        return read(names, device)

    spy.read = once  # type: ignore[method-assign]
    assert ahead(spy, [["a"], ["b"], ["c"]]) == [["a"], ["b"], ["c"]]
    assert failed
    spy.read = lambda names, device: (_ for _ in ()).throw(lack)  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        ahead(spy, [["a"], ["b"]])
