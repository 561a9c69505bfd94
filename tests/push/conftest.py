"""The real client of the Hub, speaking to the double."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_double import Hub, hub


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub() as state:
        constants = "huggingface_hub.constants."
        monkeypatch.setattr(constants + "ENDPOINT", state.url)
        monkeypatch.setattr(
            constants + "HUGGINGFACE_CO_URL_TEMPLATE",
            state.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants + "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants + "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants + "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants + "HF_TOKEN_PATH", str(tmp_path / "no token here"))
        monkeypatch.setenv("HF_TOKEN", state.token)
        huggingface_hub.close_session()
        yield state
    huggingface_hub.close_session()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture, which takes a second."""
    monkeypatch.setattr("zqfp_convert.report.picture.available", lambda: False)
