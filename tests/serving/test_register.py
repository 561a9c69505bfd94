from __future__ import annotations

import sys

import pytest

from zqfp_convert import serving


def test_a_vllm_that_is_not_known_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin is called wherever both are installed, for every model."""
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.linear", None)
    monkeypatch.delitem(sys.modules, "zqfp_convert.serving.config", raising=False)
    with pytest.warns(UserWarning, match=r"cannot be served.*vllm==0\.32\.0"):
        serving.register()
