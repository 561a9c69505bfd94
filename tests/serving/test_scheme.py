from __future__ import annotations

from pathlib import Path

import pytest
from architectures import Maker

from zqfp_convert.checkpoint.reader import PackedCheckpoint
from zqfp_convert.errors import CheckpointError, OptionError
from zqfp_convert.numerics import codebook
from zqfp_convert.serving import scheme
from zqfp_convert.serving.scheme import Entry, Scheme

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def of(*names: str, group_size: int | None = 32) -> Scheme:
    layers = {name: Entry(name, 8, False) for name in names}
    return Scheme("m2", group_size, (codebook.E2M1,), "e4m3", False, layers)


def test_what_a_checkpoint_says(converted: Maker) -> None:
    folder: Path = converted("opt", "best")
    read = scheme.read(folder)
    checkpoint = PackedCheckpoint(folder)
    assert (read.kind, read.group_size, read.books) == ("m2", 32, codebook.PAIR)
    assert (read.factors, read.input_offset) == ("e4m3", False)
    assert sorted(read.layers) == checkpoint.layers
    for name, entry in read.layers.items():
        assert entry == Entry(name, checkpoint.layer(name).rank, False)


def test_biases_without_a_place(converted: Maker) -> None:
    folder: Path = converted("falcon", "best")
    changed = PackedCheckpoint(folder).manifest["changed"]
    added = {name for name, entry in scheme.read(folder).layers.items() if entry.bias_added}
    assert added == {name[:-5] for name, kind in changed.items() if kind == "bias_added"}
    assert added


def test_a_damaged_manifest_is_refused(converted: Maker, tmp_path: Path) -> None:
    folder: Path = converted()
    for name in ("config.json", "zqfp_manifest.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    (tmp_path / "zqfp_manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="bad-manifest"):
        scheme.read(tmp_path)


def test_parts_of_a_fused_linear() -> None:
    names = [f"model.layers.1.self_attn.{part}" for part in FUSED["qkv_proj"]]
    about = of(*names, "model.layers.1.mlp.gate_up_proj")
    found = about.sources("model.layers.1.self_attn.qkv_proj", FUSED)
    assert [entry.name for entry in found] == names
    on_disk = about.sources("model.layers.1.mlp.gate_up_proj", FUSED)
    assert [entry.name for entry in on_disk] == ["model.layers.1.mlp.gate_up_proj"]
    assert about.sources("model.layers.0.self_attn.qkv_proj", FUSED) == []
    assert about.sources("qkv_proj", FUSED) == []


def test_a_linear_that_is_quantized_in_part_is_refused() -> None:
    about = of("a.q_proj", "a.v_proj")
    with pytest.raises(OptionError, match=r"a\.q_proj, a\.v_proj quantized and a\.k_proj not"):
        about.sources("a.qkv_proj", FUSED)


def test_names_of_the_model() -> None:
    about = of("transformer.h.0.c_fc")
    about.rename(lambda layers: {f"model.{name}": entry for name, entry in layers.items()})
    for name in ("transformer.h.0.c_fc", "model.transformer.h.0.c_fc"):
        assert [entry.name for entry in about.sources(name, {})] == ["transformer.h.0.c_fc"]


@pytest.mark.parametrize(
    ("group_size", "columns", "part", "groups"),
    [
        (32, 172, 172, 6),  # the last one shorter
        (32, 128, 64, 2),
        (None, 172, 172, 1),
        (None, 172, 86, 1),  # each part has the row's scale
        (256, 96, 48, 1),  # as here
    ],
)
def test_groups(group_size: int | None, columns: int, part: int, groups: int) -> None:
    assert of(group_size=group_size).groups("layer", columns, part) == groups


@pytest.mark.parametrize(
    ("group_size", "columns", "part"), [(32, 172, 86), (128, 384, 192), (None, 54, 27)]
)
def test_a_group_that_would_be_cut_is_refused(
    group_size: int | None, columns: int, part: int
) -> None:
    with pytest.raises(OptionError, match=r"each rank would have .*--tensor-parallel-size"):
        of(group_size=group_size).groups("layer", columns, part)
