"""What all tests share: no network, one thread, tiny models that are made once a session."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("ZQFP_PATH", None)
sys.path.insert(0, str(Path(__file__).parents[1] / "formats"))  # zqfp1_reader is a plain file

import torch

from zqfp_convert.runtime import expanded

if not (torch.cuda.is_available() and expanded.available(torch.device("cuda"))):
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import pytest
import transformers
from architectures import QUICK, Maker, write_model, write_tokenizer

import zqfp_convert

if importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_too(tensor: type, scope: interpreter._LangPatchScope) -> None:
        # numpy from 2.4 on makes no int of an array `[1]`, as Triton 3.6 does for a range
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_too

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """`tiny_model(arch)` is the folder of a random model with a tokenizer; do not change it."""
    made: dict[str, Path] = {}

    def make(arch: str = "llama") -> Path:
        if arch not in made:
            made[arch] = write_model(tmp_path_factory.mktemp("source") / arch, arch)
            write_tokenizer(made[arch])
        return made[arch]

    return make


@pytest.fixture(scope="session")
def converted(tiny_model: Maker, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """`converted(arch, recipe)` is the packed checkpoint of that tiny model; do not change it."""
    made: dict[tuple[str, str], Path] = {}

    def make(arch: str = "llama", recipe: str = "fast") -> Path:
        if (arch, recipe) not in made:
            out = tmp_path_factory.mktemp("packed") / f"{arch}-{recipe}"
            zqfp_convert.convert(tiny_model(arch), out, recipe=recipe, **QUICK)
            made[arch, recipe] = out
        return made[arch, recipe]

    return make
