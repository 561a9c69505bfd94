"""From what a user types to a folder; the network is never touched here."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from zqfp_convert.checkpoint.source import hub
from zqfp_convert.errors import SourceError

Answer = Callable[..., str]


TransportError = HfHubHTTPError.__bases__[0]  # of the library below, whichever that is


def error_of(kind: type[Exception]) -> Exception:
    """An error as it arrives, without the response of a server that it was made from."""
    return kind.__new__(kind, "no")


def answers(monkeypatch: pytest.MonkeyPatch, answer: Exception | Path) -> list[dict[str, object]]:
    """Let downloads end in `answer`; returns with what they were asked for."""
    asked: list[dict[str, object]] = []

    def download(name: str, **options: object) -> str:
        asked.append({"name": name, **options})
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(hub, "snapshot_download", download)
    return asked


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, AssertionError("the Hub was asked"))


@pytest.mark.usefixtures("no_download")
def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.fetch(tmp_path) == tmp_path
    assert hub.fetch(str(tmp_path)) == tmp_path
    (tmp_path / "inspect").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub.fetch("./inspect").resolve() == tmp_path / "inspect"
    assert hub.fetch("inspect").resolve() == tmp_path / "inspect"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.fetch("~/inspect") == tmp_path / "inspect"


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize("name", ["./none", "/none", "~/none", "a/b/c", "../none", Path("none")])
def test_no_such_folder(name: str | Path) -> None:
    with pytest.raises(SourceError, match="no such folder") as raised:
        hub.fetch(name)
    assert raised.value.where == str(name)


@pytest.mark.usefixtures("no_download")
def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SourceError, match="a file"):
        hub.fetch(tmp_path / "model.safetensors")


@pytest.mark.usefixtures("no_download")
def test_a_file_in_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="a file") as raised:
        hub.fetch("model.gguf")
    assert "folder" in raised.value.do
    with pytest.raises(SourceError, match="a file"), hub.to_plan("model.gguf"):
        pass


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize(
    ("address", "do"),
    [
        ("https://huggingface.co/some/model", "Give some/model."),
        ("https://huggingface.co/some/model/", "Give some/model."),
        ("https://huggingface.co/some/model/tree/v2", "Give some/model --revision v2."),
        ("https://huggingface.co/gpt2", "Download it, and give the folder; of the Hub give"),
        ("https://example.org/some/model", "Download it, and give the folder; of the Hub give"),
    ],
)
def test_an_address(address: str, do: str) -> None:
    with pytest.raises(SourceError, match="an address") as raised:
        hub.fetch(address)
    assert do in raised.value.do
    with pytest.raises(SourceError, match="an address"), hub.to_plan(address):
        pass


def test_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch, tmp_path)
    assert hub.fetch("someone/model", "v2") == tmp_path
    assert asked[0]["name"] == "someone/model"
    assert asked[0]["revision"] == "v2"
    patterns = asked[0]["ignore_patterns"]

    def wanted(file: str) -> bool:
        return not any(fnmatch(file, pattern) for pattern in patterns)

    assert not wanted("pytorch_model.bin")
    assert not wanted("original/consolidated.00.pth")
    assert not wanted("model.gguf")
    for file in ("model.safetensors", "config.json", "tokenizer.model", "LICENSE", "modeling.py"):
        assert wanted(file)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (GatedRepoError, ["gated", "HF_TOKEN", "someone/model"]),
        (RepositoryNotFoundError, ["spelling", "hf auth login"]),
        (HFValidationError, ["spelling"]),
        (LocalEntryNotFoundError, ["HF_HUB_OFFLINE", "cache"]),
        (HfHubHTTPError, ["network"]),
        (TransportError, ["network"]),
        (ConnectionError, ["network"]),
    ],
)
def test_what_can_go_wrong(
    kind: type[Exception], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, error_of(kind))
    with pytest.raises(SourceError) as raised:
        hub.fetch("someone/model")
    assert raised.value.where == "someone/model"
    for word in words:
        assert word in str(raised.value)


def test_offline_and_not_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match="cannot be downloaded") as raised:
        hub.fetch("nobody/nothing-at-all")
    assert raised.value.where == "nobody/nothing-at-all"
