"""Packed checkpoints of several kinds, each made once: `packed(kind)`."""

from __future__ import annotations

from pathlib import Path

import mixtures
import pytest
from architectures import QUICK, Maker, write_tokenizer
from kinds import KINDS, Packed

import zqfp_convert


@pytest.fixture(scope="session")
def source(tiny_model: Maker, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """`source(kind)` is the folder of the model that `packed(kind)` is made from."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        arch = KINDS[kind][0]
        if arch not in mixtures.MIXTURES:
            return tiny_model(arch)
        if arch not in made:
            made[arch] = mixtures.write_mixture(tmp_path_factory.mktemp("mixture") / arch, arch)
            write_tokenizer(made[arch])
        return made[arch]

    return make


@pytest.fixture(scope="session")
def packed(source: Packed, converted: Maker, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """`packed(kind)` is the folder of a packed checkpoint; do not change it."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        arch, options = KINDS[kind]
        if arch not in mixtures.MIXTURES and options.keys() == {"recipe"}:
            return converted(arch, options["recipe"])
        if kind not in made:
            quick = mixtures.QUICK if arch in mixtures.MIXTURES else QUICK
            made[kind] = tmp_path_factory.mktemp("packed") / kind
            zqfp_convert.convert(source(kind), made[kind], **{**quick, **options})
        return made[kind]

    return make
