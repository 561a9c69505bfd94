"""What can be wrong is told before work begins, by name, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from architectures import QUICK, Maker, random_model, token_ids, write_model, write_tokenizer
from dequantized import manifest, read_tensors
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file

import zqfp_convert
from zqfp_convert import ZqfpError
from zqfp_convert.checkpoint.source import hub


@pytest.fixture
def source(tiny_model: Maker, tmp_path: Path) -> Path:
    """A model in one shard, to be spoiled."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "source"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model in several shards, to be spoiled."""
    return write_model(tmp_path / "sharded", shard_size="100KB")


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where to write; nothing may be there in the end."""
    parent = tmp_path / "parent"
    parent.mkdir()
    yield parent / "out"
    assert [path.name for path in parent.iterdir()] == []


def refused(source: str | Path, out: Path, *words: str, **options: Any) -> ZqfpError:
    """Convert; the error must name these words, and say what to do."""
    with pytest.raises(ZqfpError) as raised:
        zqfp_convert.convert(source, out, **{**QUICK, "samples": 2, "recipe": "fast", **options})
    for word in words:
        assert word in str(raised.value)
    assert raised.value.needed
    assert raised.value.do
    return raised.value


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = read_tensors(folder)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# The source's files


def test_missing_shard(sharded: Path, out: Path) -> None:
    shard = max(sharded.glob("*.safetensors"))
    shard.unlink()
    refused(sharded, out, shard.name, "no such file")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_shard(keep: int, sharded: Path, out: Path) -> None:
    shard = max(sharded.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(sharded, out, shard.name, "not a whole safetensors file")


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_index_that_names_files_elsewhere(file: str, sharded: Path, out: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = file
    path.write_text(json.dumps(index))
    refused(sharded, out, file, "index.json")


def test_wrong_shape(source: Path, out: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensor(source, name, lambda weight: weight[:-1])
    error = refused(source, out, name, "[171, 64]", "[172, 64]")
    assert isinstance(error, zqfp_convert.errors.CheckpointError)


def test_transposed_weight(source: Path, out: Path) -> None:
    change_tensor(source, "model.layers.1.mlp.up_proj.weight", torch.t)
    refused(source, out, "model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight",
     "model.layers.0.input_layernorm.weight"],
)  # fmt: skip
@pytest.mark.parametrize("recipe", ["fast", "best"])
def test_weights_that_are_not_finite(
    value: str, name: str, recipe: str, source: Path, out: Path
) -> None:
    def spoil(weight: torch.Tensor) -> torch.Tensor:
        weight.view(-1)[-1] = float(value)
        return weight

    change_tensor(source, name, spoil)
    refused(source, out, name, "NaN or infinity", recipe=recipe)


def test_missing_tensor(source: Path, out: Path) -> None:
    tensors = read_tensors(source)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, source / "model.safetensors")
    refused(source, out, "model.layers.1.self_attn.k_proj.weight")


def test_pickled_weights(source: Path, out: Path) -> None:
    torch.save(read_tensors(source), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    refused(source, out, "pytorch_model.bin", "save_pretrained")


def test_no_weights(source: Path, out: Path) -> None:
    (source / "model.safetensors").unlink()
    refused(source, out, str(source), "no weights")


def test_no_model(tmp_path: Path, out: Path) -> None:
    refused(tmp_path, out, str(tmp_path), "config.json")
    refused(tmp_path / "none", out, "no such folder")
    refused("./none", out, "./none", "no such folder")


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1, "a": 2}'])
def test_a_config_that_cannot_be_read(text: str, source: Path, out: Path) -> None:
    (source / "config.json").write_text(text)
    refused(source, out, str(source / "config.json"))


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_already_quantized(
    quantization: dict[str, Any], named: str, source: Path, out: Path
) -> None:
    change_config(source, quantization_config=quantization)
    refused(source, out, f"already quantized ({named}", "config.json")


# The kind of model


def test_no_recognisable_blocks(tmp_path: Path, out: Path) -> None:
    write_model(tmp_path / "m", num_hidden_layers=0)
    refused(tmp_path / "m", out, "LlamaForCausalLM", "no list of decoder blocks")


def test_mixture_of_unknown_experts(tmp_path: Path, out: Path) -> None:
    config = transformers.DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=384,
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    )  # fmt: skip
    random_model(config).save_pretrained(tmp_path / "m")
    refused(tmp_path / "m", out, "DbrxForCausalLM", "mixture of experts")


def test_blocks_that_do_not_feed_each_other(tmp_path: Path, out: Path) -> None:
    """XLM has its attentions in one list and its feed-forwards in another: no block of blocks."""
    config = transformers.XLMConfig(vocab_size=384, emb_dim=32, n_layers=2, n_heads=2)
    random_model(config).save_pretrained(tmp_path / "m")
    refused(tmp_path / "m", out, "XLM", recipe="best")


def test_weights_that_are_used_without_their_layer(tmp_path: Path, out: Path) -> None:
    """Mamba multiplies with `dt_proj.weight` itself: it works when converted, or is refused."""
    config = transformers.MambaConfig(
        vocab_size=384, hidden_size=32, num_hidden_layers=2, state_size=4
    )
    random_model(config).save_pretrained(tmp_path / "m")
    target = tmp_path / "mamba"
    try:
        zqfp_convert.convert(tmp_path / "m", target, recipe="fast", **QUICK)
    except ZqfpError:
        assert not target.exists()
    else:
        zqfp_convert.load(target, device="cpu")(token_ids())


def test_an_unknown_architecture_with_code_of_its_own(
    source: Path, out: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    for name in ("configuration_own.py", "modeling_own.py"):
        (source / name).write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    change_config(
        source,
        model_type="own",
        architectures=["OwnForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    )
    refused(source, out, str(source / "config.json"), "own code")
    assert not marker.exists()


def test_no_language_model(source: Path, out: Path) -> None:
    change_config(source, model_type="vit", architectures=["ViTModel"])
    refused(source, out, str(source / "config.json"), "causal language model")


# Room


def test_too_little_disk(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        total: int = 10**12
        used: int = 10**12 - 1000
        free: int = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage())
    refused(source, out, str(out.parent), "disk space")


@pytest.mark.parametrize("recipe", ["best", "paper"])
def test_too_little_memory_to_write_its_own_text(
    recipe: str, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zqfp_convert.model.device.free_memory", lambda device: 100_000)
    refused(source, out, "memory of cpu", "--calibration", recipe=recipe)


def test_too_little_memory_even_for_a_block(
    source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("abc " * 100)
    monkeypatch.setattr("zqfp_convert.model.device.free_memory", lambda device: 100_000)
    error = refused(
        source, out, "memory of cpu", "--samples", recipe="best", calibration=tmp_path / "a.txt"
    )
    assert "--calibration" not in error.do


# The Hub


def test_gated_repository(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: object, **options: object) -> str:
        raise GatedRepoError.__new__(GatedRepoError, "gated")

    monkeypatch.setattr(hub, "snapshot_download", download)
    refused("someone/secret", out, "someone/secret", "gated", "HF_TOKEN")


def test_offline_without_a_cached_copy(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    refused("someone/model", out, "someone/model", "HF_HUB_OFFLINE")


# OUT


def test_existing_out(source: Path, converted: Maker, tmp_path: Path) -> None:
    target = Path(shutil.copytree(converted("llama", "fast"), tmp_path / "target"))
    before = sorted(path.name for path in target.iterdir())
    refused(source, target, str(target), "exists", "--overwrite")
    assert sorted(path.name for path in target.iterdir()) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_not_ours(overwrite: bool, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    refused(source, target, str(target), overwrite=overwrite)
    assert [path.name for path in target.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_its_place(overwrite: bool, source: Path, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    refused(source, tmp_path / "target", str(tmp_path / "target"), overwrite=overwrite)
    assert (tmp_path / "target").read_text() == "mine"


@pytest.mark.parametrize("place", ["", "out", "sub/out"])
def test_out_inside_the_model(place: str, source: Path) -> None:
    before = sorted(path.name for path in source.iterdir())
    refused(source, source / place, str(source))
    refused(source, source / place, str(source), overwrite=True)
    assert sorted(path.name for path in source.iterdir()) == before


def test_a_failed_overwrite_keeps_what_was_there(
    source: Path, converted: Maker, tmp_path: Path
) -> None:
    target = Path(shutil.copytree(converted("llama", "fast"), tmp_path / "target"))
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def spoil(weight: torch.Tensor) -> torch.Tensor:
        return weight * float("nan")

    change_tensor(source, "model.norm.weight", spoil)
    refused(source, target, "model.norm.weight", overwrite=True)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert not (tmp_path / "target.partial").exists()


# Calibration


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", ["0 tokens", "empty.txt"]),
        ("short.txt", b"Hello.", ["6 tokens", "short.txt", "--seq-len"]),
        ("latin.txt", "Grüße ".encode("latin-1") * 50, ["latin.txt", "UTF-8"]),
        ("empty.jsonl", b"\n\n", ["0 tokens"]),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', ["bad.jsonl, line 2"]),
        ("other.jsonl", b'{"content": "a"}\n', ["other.jsonl, line 1", "'text'"]),
        ("table.csv", b"text\nabc\n", ["table.csv", ".csv", ".jsonl"]),
    ],
)
def test_calibration_files(
    name: str, content: bytes, words: list[str], source: Path, out: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(source, out, *words, recipe="best", calibration=tmp_path / name)


def test_no_calibration_file(source: Path, out: Path) -> None:
    refused(source, out, "none.txt", "no such file", recipe="best", calibration="none.txt")


def test_a_data_set_without_the_extra(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(
        source, out, "someone/texts", "zqfp-convert[datasets]",
        recipe="best", calibration="someone/texts",
    )  # fmt: skip


def test_no_tokenizer(source: Path, out: Path, tmp_path: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / file).unlink()
    (tmp_path / "a.txt").write_text("abc " * 100)
    calibration = tmp_path / "a.txt"
    refused(source, out, str(source), "tokenizer", recipe="best", calibration=calibration)


def test_a_tokenizer_of_another_vocabulary(source: Path, out: Path, tmp_path: Path) -> None:
    """Its tokens are beyond the embedding: told, not an index error."""
    (tmp_path / "a.txt").write_text("abc " * 100)
    write_model(tmp_path / "small", vocab_size=64)
    write_tokenizer(tmp_path / "small")
    refused(tmp_path / "small", out, "tokenizer", recipe="best", calibration=tmp_path / "a.txt")


# Options


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("recipe", "better"),
        ("scales", "m3"),
        ("scale_rounding", "up"),
        ("group_size", 48),
        ("group_size", 0),
        ("group_size", "rows"),
        ("group_size", 32.0),
        ("rank", -1),
        ("rank", 1025),
        ("rank", 2.5),
        ("rank", "automatic"),
        ("samples", 0),
        ("samples", "4"),
        ("seq_len", 1),
        ("seed", -1),
        ("seed", 0.5),
        ("damping", 0.0),
        ("damping", float("nan")),
        ("asymmetry", 1.5),
        ("sweeps", -1),
        ("factors", "int8"),
        ("solver", "magic"),
        ("low_rank", "pca"),
        ("device", "nonsense"),
        ("device", "cuda:99"),
        ("no_such_option", 0),
    ],
)
def test_option_values(option: str, value: object, source: Path, out: Path) -> None:
    error = refused(source, out, option, **{option: value})
    assert isinstance(error, zqfp_convert.errors.OptionError)
    assert option == "no_such_option" or str(value) in error.found


def test_options_that_do_not_go_together(source: Path, out: Path) -> None:
    refused(source, out, "scale_rounding", "free", scales="free", scale_rounding="ceil")


def test_nothing_left_to_quantize(source: Path, out: Path) -> None:
    refused(source, out, "--ignore", ignore=["*"])


# Reading


@pytest.fixture
def packed(converted: Maker, tmp_path: Path) -> Path:
    """A packed checkpoint, to be spoiled."""
    return Path(shutil.copytree(converted("llama", "fast"), tmp_path / "packed"))


def unreadable(folder: Path, rule: str, *words: str) -> None:
    with pytest.raises(zqfp_convert.errors.CheckpointError) as raised:
        zqfp_convert.load(folder, device="cpu")
    assert raised.value.rule == rule
    for word in words:
        assert word in str(raised.value)


def test_a_newer_version(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (packed / "config.json").write_text(json.dumps(config))
    unreadable(packed, "newer-version", "format version 2", "pip install -U zqfp-convert")


def test_an_unknown_feature(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["required_features"] = ["telepathy"]
    (packed / "config.json").write_text(json.dumps(config))
    unreadable(packed, "unknown-feature", "telepathy")


def spoil_scale(folder: Path, layer: str, byte: int) -> None:
    """Set one exponent of a layer, in its shard and in the manifest's hash."""
    name = f"{layer}.weight_scale"
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            row = tensors[name][0]
            row[int(row.argmin())] = byte
            save_file(tensors, shard, metadata={"format": "pt"})
            notes = manifest(folder)
            digest = hashlib.sha256(shard.read_bytes()).hexdigest()
            notes["shards"][shard.name] = {"size": shard.stat().st_size, "sha256": digest}
            (folder / "zqfp_manifest.json").write_text(json.dumps(notes))


def test_a_span_of_more_than_11(packed: Path) -> None:
    layer = "model.layers.1.mlp.down_proj"
    spoil_scale(packed, layer, 127 - 12)
    unreadable(packed, "span", layer, "12", "11")


def test_a_forbidden_exponent(packed: Path) -> None:
    layer = "model.layers.0.self_attn.q_proj"
    spoil_scale(packed, layer, 255)
    unreadable(packed, "scale-forbidden", layer)


def test_a_shard_that_was_cut_off(packed: Path) -> None:
    shard = min(packed.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-5])
    unreadable(packed, "shard-size", shard.name)


def test_a_shard_that_is_gone(packed: Path) -> None:
    shard = max(packed.glob("*.safetensors"))
    shard.unlink()
    unreadable(packed, "missing-file", shard.name)


def test_a_forced_path_without_fp8(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zqfp_convert.load(packed, device="cpu", dtype=torch.bfloat16)
    monkeypatch.setenv("ZQFP_PATH", "expanded")
    with pytest.raises(ZqfpError, match="ZQFP_PATH=expanded") as raised:
        model(token_ids())
    assert "FP8" in raised.value.needed


def test_errors_say_where_what_and_what_to_do() -> None:
    error = ZqfpError("here", "this", needed="that", do="Do so.")
    assert str(error) == "here: this; needed: that. Do so."
    assert (error.where, error.found, error.needed, error.do) == ("here", "this", "that", "Do so.")
    for kind in ("OptionError", "SourceError", "OutputError", "CheckpointError"):
        assert issubclass(getattr(zqfp_convert.errors, kind), ZqfpError)
    assert dataclasses.is_dataclass(zqfp_convert.Recipe)


def test_what_is_read_lies_in_the_output(tmp_path: Path) -> None:
    """Overwriting would take the source away with the old checkpoint."""
    first = write_model(tmp_path / "first")
    zqfp_convert.convert(first, tmp_path / "out", recipe="fast", device="cpu")
    source = write_model(tmp_path / "out" / "source")
    with pytest.raises(ZqfpError, match=r"which is to be read|would be lost"):
        zqfp_convert.convert(source, tmp_path / "out", recipe="fast", device="cpu", overwrite=True)
    assert (source / "model.safetensors").is_file()


def test_overwriting_spares_what_is_not_ours(tmp_path: Path) -> None:
    source, target = write_model(tmp_path / "source"), tmp_path / "out"
    zqfp_convert.convert(source, target, recipe="fast", device="cpu")
    zqfp_convert.convert(source, target, recipe="fast", device="cpu", overwrite=True)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ZqfpError, match=r"notes\.txt"):
        zqfp_convert.convert(source, target, recipe="fast", device="cpu", overwrite=True)
    assert (target / "notes.txt").read_text() == "mine"
    assert (target / "config.json").is_file()


def of_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. And so on")


@pytest.mark.parametrize(
    ("lack", "said"),
    [
        (of_a_gpu, "memory of cpu: CUDA out of memory; needed: about "),
        (lambda: torch.empty(1 << 60), "memory of cpu: can't allocate memory: you tried to"),
    ],
    ids=["gpu", "cpu"],
)
def test_out_of_memory_on_the_way(
    lack: Callable[[], object],
    said: str,
    source: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "zqfp_convert.conversion.layers.quantize_together", lambda *args, **how: lack()
    )
    error = refused(source, out, said, "--samples", "goes on")
    assert "about 0 MB" not in error.needed
    partial = out.with_name("out.partial")
    assert partial.is_dir()  # to go on when there is more memory
    shutil.rmtree(partial)


@pytest.mark.parametrize("device", ["meta", "nonsense", "cuda:99"])
def test_devices_that_cannot_be_had(device: str, source: Path, out: Path) -> None:
    refused(source, out, "device", device.split(":")[0], device=device)
