"""Files are written in a thread, in order, one at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from zqfp_convert.checkpoint.output.partial import Partial
from zqfp_convert.checkpoint.output.series import Series

FILES = [f"checkpoint/{number}.safetensors" for number in range(4)]


def tensors(number: int) -> dict[str, torch.Tensor]:
    return {"x": torch.full((2, 3), float(number))}


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before it is set."""
    found = threading.Event()
    real = Partial.save

    def save(self: Partial, *rest: object) -> None:
        assert found.wait(10)
        real(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Partial, "save", save)
    return found


def test_in_order_and_beside_the_work(tmp_path: Path, go: threading.Event) -> None:
    with Partial(tmp_path / "out", {}) as partial:
        with Series(partial, FILES) as series:
            series.add(tensors(0), {"about": 0})  # comes back before it is written
            assert not partial.is_whole(FILES[0])
            go.set()
            for number in range(1, 4):
                series.add(tensors(number), {"about": number})
                assert partial.is_whole(FILES[number - 1])  # the one before is
            assert series.done == 4
            for number in range(4):
                assert series.about(number) == {"about": number}
                assert torch.equal(series.load(number)["x"], tensors(number)["x"])
        assert Series(partial, FILES).done == 4
        (partial.folder / FILES[1]).unlink()
        assert Series(partial, FILES).done == 1


def test_so_many_may_wait(tmp_path: Path, go: threading.Event) -> None:
    with Partial(tmp_path / "out", {}) as partial, Series(partial, FILES) as series:
        for number in range(3):
            series.add(tensors(number), waiting=2)  # all come back before the first is written
        assert not any(map(partial.is_whole, FILES))
        threading.Timer(0.2, go.set).start()
        series.add(tensors(3), waiting=2)  # only when it is
        assert partial.is_whole(FILES[0])


def test_an_error_comes_back_with_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def save(self: Partial, file: str, *rest: object) -> None:
        threading.Timer(0.2, failed.set).start()  # when its error is known
        raise OSError(file)

    monkeypatch.setattr(Partial, "save", save)
    with Partial(tmp_path / "out", {}) as partial:
        with pytest.raises(OSError, match=FILES[0]), Series(partial, FILES) as series:
            series.add(tensors(0), waiting=2)
            assert failed.wait(10)
            series.add(tensors(1), waiting=2)
        assert series.done == 1  # it was not taken


def test_an_error_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(self: Partial, *rest: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(Partial, "save", save)
    with Partial(tmp_path / "out", {}) as partial:
        with pytest.raises(OSError, match="no"), Series(partial, FILES) as series:
            series.add(tensors(0))
            series.add(tensors(1))
        with pytest.raises(OSError, match="no"), Series(partial, FILES) as series:
            series.add(tensors(0))  # the last one's error comes with the end of the context
        with pytest.raises(KeyboardInterrupt), Series(partial, FILES) as series:
            series.add(tensors(0))
            raise KeyboardInterrupt  # goes before it
