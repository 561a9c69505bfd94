"""What a checkpoint says of where it comes from, and what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from zqfp_convert.checkpoint.source.origin import origin, without_own_path

REVISION = "5" * 40


def test_a_folder_has_its_bare_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    found = {"name": "mine", "repository": None, "revision": None, "card": {}}
    assert origin(folder) == found
    monkeypatch.chdir(folder)
    assert origin(Path()) == found


@pytest.mark.parametrize("name", ["maker/model", "gpt2", "a--b/c"])
def test_a_repository_in_the_cache(tmp_path: Path, name: str) -> None:
    folder = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / REVISION
    folder.mkdir(parents=True)
    found = origin(folder)
    if "--" not in name:  # which the Hub does not allow in names
        assert (found["name"], found["repository"]) == (name, name)
    assert found["revision"] == REVISION


@pytest.mark.parametrize(
    ("card", "known"),
    [
        ("no front matter", {}),
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\nlicense: [mit, apache-2.0]\ntags: x\n---\n", {"license": ["mit", "apache-2.0"]}),
        ("---\nlicense: {a: 1}\nlanguage: en\n---\n", {"language": "en"}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- a\n---\n", {}),
        ("", {}),
    ],
)
def test_licences(tmp_path: Path, card: str, known: dict[str, object]) -> None:
    (tmp_path / "README.md").write_text(card)
    assert origin(tmp_path)["card"] == known


def test_paths_of_a_machine() -> None:
    for path in ("/home/me/model", "~/model", "./model", "C:\\model"):
        assert without_own_path({"_name_or_path": path, "a": 1}) == {"a": 1}
    for kept in ({"_name_or_path": "maker/model"}, {"_name_or_path": ""}, {"a": 1}):
        assert without_own_path(kept) == kept
