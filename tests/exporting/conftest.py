"""Packed checkpoints that other formats can hold, made once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import QUICK, configuration, random_model, write_tokenizer
from exported_models import DEMO, Packer
from mixtures import write_mixture

import zqfp_convert

EXACT: dict[str, Any] = {"scales": "m1", "codebooks": "e2m1"}


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packer:
    """`packed(arch, **options)` is a checkpoint in bfloat16 of a random model; do not change it.

    Options are those of `convert`; `config` changes the model's configuration.
    """
    made: dict[str, Path] = {}

    def make(arch: str = "qwen2", config: dict[str, Any] | None = None, **options: Any) -> Path:
        key = f"{arch} {config} {options}"
        if key not in made:
            folder = tmp_path_factory.mktemp("exported")
            if arch == "demo":
                shutil.copytree(DEMO, folder / "source")
            elif arch in ("mixtral", "qwen3_moe", "gpt_oss", "llama4"):
                write_mixture(folder / "source", arch, torch.bfloat16, **(config or {}))
            else:
                model = random_model(configuration(arch, **(config or {})), torch.bfloat16)
                model.save_pretrained(folder / "source")
                write_tokenizer(folder / "source")
            chosen = {"recipe": "fast", **QUICK, **EXACT, **options}
            zqfp_convert.convert(folder / "source", folder / "packed", **chosen)
            made[key] = folder / "packed"
        return made[key]

    return make
