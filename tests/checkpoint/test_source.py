"""The model to convert as it lies in a folder: what is read, carried over and refused."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors.torch import save_file

from zqfp_convert.checkpoint.source.source import Source
from zqfp_convert.errors import CheckpointError, SourceError

TENSORS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "a.bias": torch.ones(3, dtype=torch.bfloat16),
    "mask": torch.ones(2, 2, dtype=torch.bool),
}


def write(folder: Path, config: dict[str, object] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    save_file(TENSORS, folder / "model.safetensors")
    return folder


def write_shards(folder: Path, weight_map: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in set(weight_map.values()):
        members = {name: TENSORS[name] for name, where in weight_map.items() if where == file}
        save_file(members, folder / file)
    return folder


SHARDED = {"a.weight": "one.safetensors", "a.bias": "two.safetensors", "mask": "two.safetensors"}


@pytest.mark.parametrize("sharded", [False, True])
def test_tensors(sharded: bool, tmp_path: Path) -> None:
    source = Source(write_shards(tmp_path, SHARDED) if sharded else write(tmp_path))
    assert source.shards.tensors.keys() == TENSORS.keys()
    info = source.shards.tensors["a.bias"]
    assert (info.dtype, info.shape, info.bytes) == ("BF16", (3,), 6)
    assert info.file == ("two.safetensors" if sharded else "model.safetensors")
    read = source.shards.read(["mask", "a.weight"])
    assert list(read) == ["mask", "a.weight"] or set(read) == {"mask", "a.weight"}
    for name, tensor in read.items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])
    source.check_finite()


def test_files_that_are_carried_over(tmp_path: Path) -> None:
    write(tmp_path)
    carried = [
        "LICENSE", "NOTICE.txt", "chat_template.jinja", "generation_config.json",
        "merges.txt", "modeling_own.py", "sub/configuration_own.py", "sub/image.png",
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip
    left = [
        ".gitattributes", ".cache/huggingface/x.json", "model-00001-of-00002.safetensors",
        "consolidated.00.pth", "flax_model.msgpack", "model.safetensors.index.json.bak",
        "README.md", "onnx/model.onnx", "original/params.pt", "pytorch_model.bin",
        "pytorch_model.bin.index.json", "tf_model.h5", "weights.gguf",
    ]  # fmt: skip
    for name in carried + left:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (tmp_path / "model.safetensors.index.json.bak").unlink()
    source = Source(tmp_path)
    assert [path.as_posix() for path in source.other_files()] == sorted(carried)
    code = [path.as_posix() for path in source.code_files()]
    assert code == ["modeling_own.py", "sub/configuration_own.py"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    """The Hub's cache is made of links."""
    blob = tmp_path / "blob"
    blob.write_text("licence")
    folder = write(tmp_path / "snapshot")
    (folder / "LICENSE").symlink_to(blob)
    assert Path("LICENSE") in Source(folder).other_files()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    write(tmp_path)
    bad = torch.zeros(3, 5, dtype=dtype)
    bad[1, 4] = value
    save_file({**TENSORS, "b.weight": bad}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError) as raised:
        Source(tmp_path).check_finite()
    assert raised.value.where == "b.weight"
    assert "model.safetensors" in raised.value.found


def test_nobody_waits_for_the_rest_of_a_check(tmp_path: Path) -> None:
    bad = {**TENSORS, "b.weight": torch.full((2,), float("nan"))}
    write(tmp_path)
    save_file(bad, tmp_path / "model.safetensors")
    source, stopped = Source(tmp_path), Event()
    with pytest.raises(SourceError):
        source.check_finite(stopped=stopped)
    stopped.set()
    source.check_finite(stopped=stopped)  # reads nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_weights_are_finite(dtype: torch.dtype, tmp_path: Path) -> None:
    write(tmp_path)
    largest = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    save_file({"b.weight": torch.cat([largest, -largest])}, tmp_path / "model.safetensors")
    assert Source(tmp_path).check_finite().keys() == {"b.weight"}


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"config\.json") as raised:
        Source(tmp_path)
    assert raised.value.where == str(tmp_path)
    with pytest.raises(SourceError, match="no such folder"):
        Source(tmp_path / "none")


@pytest.mark.parametrize(
    ("file", "found", "do"),
    [
        ("adapter_config.json", "LoRA adapter", "Merge it"),
        ("model-Q4_K_M.gguf", "GGUF", "made from"),
        ("checkpoint-500/config.json", "config.json", "checkpoint-500"),
    ],
)
def test_no_model_but_something_else(file: str, found: str, do: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    with pytest.raises(SourceError, match=do) as raised:
        Source(tmp_path)
    assert found in raised.value.found


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match="no weights"):
        Source(tmp_path)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights(file: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_bytes(b"\x80\x04.")
    with pytest.raises(SourceError, match="save_pretrained") as raised:
        Source(tmp_path)
    assert raised.value.where == str(tmp_path / file)
    write(tmp_path)  # beside safetensors they are not looked at
    assert Source(tmp_path).shards.tensors.keys() == TENSORS.keys()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}'])
def test_a_config_that_is_no_json_object(text: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as raised:
        Source(tmp_path)
    assert raised.value.where == str(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": {"load_in_8bit": False, "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "zqfp"}}, "zqfp"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ({"quantization_config": {}}, "unknown"),
        ({"quantization_config": "?"}, "unknown"),
    ],
)
def test_already_quantized(config: dict[str, object], named: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="already quantized") as raised:
        Source(write(tmp_path, config))
    assert named in raised.value.found
    assert raised.value.where == str(tmp_path / "config.json")


def rule_of(folder: Path) -> tuple[str, str]:
    with pytest.raises(CheckpointError) as raised:
        Source(folder)
    return raised.value.rule, str(raised.value)


def test_missing_shard(tmp_path: Path) -> None:
    write_shards(tmp_path, SHARDED)
    (tmp_path / "two.safetensors").unlink()
    rule, message = rule_of(tmp_path)
    assert rule == "missing-file"
    assert "two.safetensors" in message


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_truncated_shard(keep: int, tmp_path: Path) -> None:
    write_shards(tmp_path, SHARDED)
    shard = tmp_path / "one.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    rule, message = rule_of(tmp_path)
    assert rule == "bad-shard"
    assert "one.safetensors" in message


@pytest.mark.parametrize(
    "file", ["../two.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "a\\b", "c:x", "x\0"]
)
def test_index_that_names_files_elsewhere(file: str, tmp_path: Path) -> None:
    write_shards(tmp_path, SHARDED)
    index = {"weight_map": {**SHARDED, "mask": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    rule, message = rule_of(tmp_path)
    assert rule == "outside-folder"
    assert repr(file) in message


@pytest.mark.parametrize(
    "text", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[]", "no json"]
)
def test_index_without_a_map(text: str, tmp_path: Path) -> None:
    write_shards(tmp_path, SHARDED)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    rule, message = rule_of(tmp_path)
    assert rule == "bad-shard"
    assert "index.json" in message


def test_a_tensor_that_is_not_where_the_index_says(tmp_path: Path) -> None:
    write_shards(tmp_path, SHARDED)
    index = {"weight_map": {**SHARDED, "a.weight": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    rule, message = rule_of(tmp_path)
    assert rule == "bad-shard"
    assert "a.weight" in message
    assert "two.safetensors" in message
