"""`save_pretrained` of packed models: a whole packed checkpoint again."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from architectures import token_ids
from dequantized import manifest, quantization_config, read_tensors
from kinds import Packed
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import zqfp_convert
from zqfp_convert.errors import OptionError
from zqfp_convert.verify import verify


def described(folder: Path) -> tuple[str, list[object]]:
    """The whole `quantization_config`, spelled out, and what the manifest says of layers."""
    about = json.dumps(quantization_config(folder), sort_keys=True)
    return about, [manifest(folder)[key] for key in ("layers", "changed")]


@pytest.mark.parametrize("kind", ["llama", "opt", "rotated", "added", "mixtral", "gpt_oss", "left"])
def test_round_trip(kind: str, packed: Packed, source: Packed, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed(kind))
    model.save_pretrained(tmp_path / "saved")
    verify(tmp_path / "saved", against=source(kind))
    assert described(tmp_path / "saved") == described(packed(kind))
    before, after = read_tensors(packed(kind)), read_tensors(tmp_path / "saved")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    with torch.no_grad():
        want = model(token_ids()).logits
        for load in (zqfp_convert.load, AutoModelForCausalLM.from_pretrained):
            assert torch.equal(load(tmp_path / "saved").cpu()(token_ids()).logits, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_that_is_on_record_stays(dtype: torch.dtype, packed: Packed, tmp_path: Path) -> None:
    """Keys that another version of the program may write too, through two round trips."""
    folder = Path(shutil.copytree(packed("llama"), tmp_path / "packed"))
    config = json.loads((folder / "config.json").read_text())
    about = config["quantization_config"]
    assert about.keys() > {"source", "made_on", "tuning", "calibration", "recipe", "producer"}
    about["tuning"] = {"kl_before": 0.5, "kl_after": 0.25, "kept": True}
    about["source"]["card"] = {"license": "mit", "language": ["en", "de"]}
    about |= {"modules_to_not_convert": ["x"], "bits": None, "of later": {}}
    (folder / "config.json").write_text(json.dumps(config))
    plain = AutoModelForCausalLM.from_pretrained
    plain(folder, dtype=dtype, device_map="cpu").save_pretrained(tmp_path / "once")
    option = zqfp_convert.ZqfpConfig()
    plain(tmp_path / "once", quantization_config=option).save_pretrained(tmp_path / "twice")
    for saved in ("once", "twice"):
        assert described(tmp_path / saved) == described(folder)
    assert plain(tmp_path / "once").dtype == dtype


def test_shards_and_one_file_take_turns(packed: Packed, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed("llama"))
    folder = tmp_path / "saved"
    for size, many in (("40KB", True), ("5GB", False), ("60KB", True)):
        model.save_pretrained(folder, max_shard_size=size)
        assert (folder / "model.safetensors.index.json").exists() == many
        assert (folder / "model.safetensors").exists() != many
        verify(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)  # and saved over what it came from


def test_after_pickling(packed: Packed, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(AutoModelForCausalLM.from_pretrained(packed("opt")), buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=False).save_pretrained(tmp_path / "saved")
    assert verify(tmp_path / "saved").layers


def test_a_head_of_its_own_is_saved_too(packed: Packed, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(packed("llama"), num_labels=3)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.score.weight, model.score.weight)
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)


def test_a_pipeline_from_what_was_saved(packed: Packed, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(packed("llama")).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(packed("llama")).save_pretrained(tmp_path)
    assert zqfp_convert.load(tmp_path, device="cpu").generate(max_new_tokens=2) is not None


def test_pushing_goes_by_its_own_method(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed("llama"))
    with pytest.raises(OptionError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True)
    with pytest.raises(OptionError, match="fp8"):
        model.save_pretrained(tmp_path / "saved", variant="fp8")
    assert not (tmp_path / "saved").exists()


def test_a_failed_save_is_no_checkpoint(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(packed("llama"), tmp_path / "saved"))
    model = AutoModelForCausalLM.from_pretrained(folder)

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(folder)
    with pytest.raises(zqfp_convert.ZqfpError, match="zqfp_manifest"):
        zqfp_convert.load(folder, device="cpu")
