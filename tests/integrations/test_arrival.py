"""Watching for modules of others: before they are imported, after, and when it goes wrong."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from kinds import Packed

from zqfp_convert.integrations import arrival


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two packages: `<name>_theirs.part`, and `<name>_ours`, whose `register` counts its calls."""
    name = tmp_path.name.replace("-", "_")
    (tmp_path / f"{name}_theirs").mkdir()
    (tmp_path / f"{name}_theirs" / "__init__.py").write_text("")
    (tmp_path / f"{name}_theirs" / "part.py").write_text("value = 1\n")
    (tmp_path / f"{name}_ours.py").write_text(
        f"import {name}_theirs.part as part\ncalls = 0\n"
        "def register():\n    global calls\n    assert part.value == 1\n    calls += 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_before_it_is_imported(modules: str) -> None:
    arrival.watch(f"{modules}_theirs.part", f"{modules}_ours")
    assert f"{modules}_theirs" not in sys.modules
    assert importlib.util.find_spec(f"{modules}_theirs.part") is not None  # looked for is not there
    assert f"{modules}_ours" not in sys.modules
    part = importlib.import_module(f"{modules}_theirs.part")
    ours = sys.modules[f"{modules}_ours"]
    assert ours.calls == 1
    importlib.reload(part)
    assert ours.calls == 1


def test_after_it_is_imported(modules: str) -> None:
    importlib.import_module(f"{modules}_theirs.part")
    arrival.watch(f"{modules}_theirs.part", f"{modules}_ours")
    assert sys.modules[f"{modules}_ours"].calls == 1


def test_what_goes_wrong_leaves_the_other_package_alone(modules: str) -> None:
    arrival.watch(f"{modules}_theirs.part", f"{modules}_nowhere")
    with pytest.warns(UserWarning, match=f"{modules}_nowhere"):
        part = importlib.import_module(f"{modules}_theirs.part")
    assert part.value == 1


FIRST = """
import sys
import zqfp_convert
heavy = [m for m in ("torch", "transformers", "huggingface_hub", "peft") if m in sys.modules]
assert not heavy, heavy
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "QuantizedLinear" in {type(module).__name__ for module in model.modules()}
"""


def test_zqfp_convert_before_transformers(packed: Packed) -> None:
    command = [sys.executable, "-c", FIRST, str(packed("llama"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
