"""End-to-end tuning of real models: closer to the original, or left alone."""

from __future__ import annotations

import dataclasses
from importlib.resources import as_file, files
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import QUICK, Maker
from dequantized import manifest, read_tensors
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

import zqfp_convert
from zqfp_convert import Recipe, conversion
from zqfp_convert.calibration import text
from zqfp_convert.checkpoint.output.series import Series
from zqfp_convert.conversion import pipeline
from zqfp_convert.conversion.tuning import Tuned
from zqfp_convert.conversion.work import Work
from zqfp_convert.distill import train, tunable
from zqfp_convert.distill.train import HELD_BACK
from zqfp_convert.errors import SourceError
from zqfp_convert.model import device
from zqfp_convert.numerics import fp8
from zqfp_convert.plan import Plan, make_plan, memory
from zqfp_convert.runtime import reference
from zqfp_convert.verify import verify

MODEL = files("zqfp_convert.demo") / "model"
SAMPLES, SEQ_LEN = 128, 256  # with much less there is nothing to learn but the text itself
CHOICES: dict[str, Any] = {"seq_len": SEQ_LEN, "device": "cpu", "rank": 4, "tune_samples": 0}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> zqfp_convert.Conversion:
    with as_file(MODEL) as model:
        out = tmp_path_factory.mktemp("tuned") / "out"
        return zqfp_convert.convert(model, out, samples=SAMPLES, tune=160, **CHOICES)


def divergence(packed: Path, samples: int = SAMPLES) -> float:
    """Mean token KL on the windows held back, of whole models."""
    with as_file(MODEL) as model:
        original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = text.generate(original, samples, SEQ_LEN, 0)[-(samples // HELD_BACK) :]
    loaded = zqfp_convert.load(packed, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        p, q = (m(ids).logits.double().log_softmax(-1) for m in (original, loaded))
    return float(kl_div(q, p, reduction="none", log_target=True).sum(-1).mean())


def test_what_was_measured_is_what_was_written(tuned: zqfp_convert.Conversion) -> None:
    assert tuned.tuning is not None
    assert tuned.tuning.kept
    assert tuned.tuning.kl_after < 0.97 * tuned.tuning.kl_before
    # The order of additions differs, and with it some roundings of activations.
    assert divergence(tuned.out) == pytest.approx(tuned.tuning.kl_after, rel=2e-2)
    told = tuned.to_json()["tuning"]
    assert told["kl_after"] == tuned.tuning.kl_after
    assert told["roundings"] is True
    assert 0 < 60 * told["minutes"] < tuned.seconds
    changed = manifest(tuned.out)["changed"]
    assert set(changed.values()) == {"norm_changed"}
    assert any(name.startswith("model.norm") for name in changed)  # outside of the blocks
    assert all(entry["output_error"] is None for entry in tuned.layers.values())


def test_where_no_roundings_of_activations_flip_it_is_the_same_to_a_ten_thousandth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = {"simulate": lambda x: x, "quantize": lambda x: (x, 1.0), "decode": lambda x: x}
    plain = SimpleNamespace(**{**vars(fp8), **exact})
    monkeypatch.setattr(tunable, "fp8", plain)
    monkeypatch.setattr(reference, "fp8", plain)
    with as_file(MODEL) as model:
        made = zqfp_convert.convert(model, tmp_path / "out", samples=48, tune=40, **CHOICES)
    assert made.tuning is not None
    assert made.tuning.kept
    assert divergence(made.out, 48) == pytest.approx(made.tuning.kl_after, rel=1e-4)


def test_the_checkpoint_keeps_all_rules(tuned: zqfp_convert.Conversion) -> None:
    with as_file(MODEL) as model:
        verify(tuned.out, model)


def test_what_does_not_help_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "RATES", dict.fromkeys(train.RATES, 1.0))
    with as_file(MODEL) as model:
        plain = zqfp_convert.convert(model, tmp_path / "plain", samples=4, **CHOICES)
        made = zqfp_convert.convert(model, tmp_path / "tuned", samples=4, tune=2, **CHOICES)
    assert made.tuning is not None
    assert not made.tuning.kept
    assert made.tuning.kl_after > made.tuning.kl_before
    want, have = (
        {name: tensor.view(torch.uint8) for name, tensor in read_tensors(result.out).items()}
        for result in (plain, made)
    )
    assert want.keys() == have.keys()
    assert all(torch.equal(want[name], have[name]) for name in want)


def test_text_to_tune_on(tmp_path: Path) -> None:
    """First the rest of the file, held back from calibration; then what the model writes."""
    source = tmp_path / "text.txt"
    source.write_text(" ".join(f"Line {i} is {7 * i} words long." for i in range(140)))
    tuned_on: list[torch.Tensor] = []

    real = pipeline.tune

    def tune(work: Work, files: Series) -> Tuned:
        assert work.windows is not None
        tuned_on.append(torch.cat(work.windows.every))
        return real(work, files)

    with pytest.MonkeyPatch.context() as patch, as_file(MODEL) as model:
        patch.setattr(pipeline, "tune", tune)
        choices = CHOICES | {"seq_len": 64, "samples": 3, "tune": 1, "sweeps": 0, "rank": 0}
        for samples in (5, 40):
            choices["tune_samples"] = samples
            out = tmp_path / str(samples)
            made = zqfp_convert.convert(model, out, calibration=source, **choices)
            told = made.calibration
            assert told is not None
            assert told["samples"] == 3
            assert told["tuning"]["more_text"] + told["tuning"]["self_written"] == samples - 3
            assert (told["tuning"]["self_written"] > 0) is (samples == 40)
            assert tuned_on[-1].shape == (samples, 64)
    few, many = tuned_on
    assert torch.equal(few[:3], many[:3])
    rest = made.calibration["tuning"]["more_text"] if made.calibration else 0
    assert len(torch.cat([many[:3], many[-rest:]]).unique(dim=0)) == 3 + rest


@pytest.mark.parametrize("arch", ["gpt2", "opt", "gemma3", "bloom", "phi3"])
def test_the_same_bytes_twice_for_any_model(
    arch: str, tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept whatever came of it, so that it is written."""
    better = count(0, -1)
    monkeypatch.setattr(train, "_divergence", lambda *about: float(next(better)))
    shards = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        choices = {**QUICK, "samples": 4, "recipe": "max", "tune": 3, "rank": 2}
        made = zqfp_convert.convert(tiny_model(arch), tmp_path / str(seed), **choices)
        assert made.tuning is not None
        assert made.tuning.kept
        verify(made.out, tiny_model(arch))
        shards.append(manifest(made.out)["shards"])
        changed = manifest(made.out)["changed"]
        assert "norm_changed" in changed.values()
    assert shards[0] == shards[1]


def test_divergence_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "TOKENS_AT_ONCE", 3)
    heads = torch.randn(2, 7, 11)
    wanted, hidden = torch.randn(10, 7), torch.randn(10, 7, requires_grad=True)
    p = (wanted.double() @ heads[0].double()).log_softmax(-1)
    q = (hidden.double() @ heads[1].double()).log_softmax(-1)
    truth = kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()
    (gradient,) = torch.autograd.grad(truth, hidden)
    loss = train.kl(lambda x: x @ heads[0], lambda x: x @ heads[1], wanted, hidden)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(truth.detach()), rel=1e-5)
    torch.testing.assert_close(hidden.grad, gradient.float())


def test_with_too_little_memory_roundings_stay(
    tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    better = count(0, -1)
    monkeypatch.setattr(train, "_divergence", lambda *about: float(next(better)))
    monkeypatch.setattr(
        train, "RATES", dict.fromkeys(train.RATES, 0.01)
    )  # more than bfloat16 hides
    choices = {**QUICK, "samples": 4, "rank": 2}
    plain = zqfp_convert.convert(tiny_model(), tmp_path / "plain", **choices)
    recipe = Recipe.named("max", tune=3, **{k: v for k, v in choices.items() if k != "device"})

    def planned() -> Plan:
        return make_plan(tiny_model(), tmp_path / "tuned", recipe=recipe, device="cpu")

    full = planned()
    assert full.tunes_roundings
    assert "roundings, row scales" in full.tuning
    spilled = memory.peaks(dataclasses.replace(full, states="file"))[0]
    monkeypatch.setattr(device, "free_memory", lambda place: spilled - 1)
    plan = planned()
    assert not plan.tunes_roundings
    assert "too little memory for roundings" in plan.to_json()["tuning"]
    assert plan.host_memory < full.host_memory
    monkeypatch.setattr(device, "free_memory", lambda place: plan.host_memory - 1)
    with pytest.raises(SourceError, match="memory"):
        planned()
    made = conversion.run(plan)
    assert made.tuning is not None
    assert made.tuning.kept
    assert made.to_json()["tuning"]["roundings"] is False
    verify(made.out, tiny_model())
    want, have = read_tensors(plain.out), read_tensors(made.out)
    same = {name for name in want if torch.equal(want[name].float(), have[name].float())}
    assert {name for name in want if name.endswith("weight_packed")} <= same
    assert not {name for name in want if name.endswith("weight_row_scale")} & same
