"""Whole comparisons: what streams through simulated blocks is what whole models would give."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, Maker
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from zqfp_convert.compare import plan as planning
from zqfp_convert.compare.configuration import Configuration
from zqfp_convert.compare.formats import FORMATS
from zqfp_convert.compare.placement import place
from zqfp_convert.compare.plan import make_plan
from zqfp_convert.compare.presets import ORIGINAL
from zqfp_convert.compare.study import Study, compare, run
from zqfp_convert.errors import OptionError
from zqfp_convert.evaluate import divergence
from zqfp_convert.model.blocks import find_blocks, linears, weight_matrix

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "zqfp_convert" / "demo" / "model"
ROUNDED = Configuration(label="rounded", weights="e2m1", group_size=64, solver="round")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "some.txt"
    file.write_text((ROOT / "formats" / "zqfp-1.md").read_text(encoding="utf-8"), encoding="utf-8")
    return file


def kls(study: Study) -> dict[str, float]:
    return {row.configuration.label: row.figures[0].kl.mean for row in study.rows}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture(arch: str, text: Path, tiny_model: Maker) -> None:
    everything = Configuration(
        label="everything",
        weights="int4-asym",
        activations="int8-asym",
        activation_scale="tensor",
        smooth=0.5,
        rank=2,
        group_size=32,
    )
    found = compare(
        tiny_model(arch),
        [ORIGINAL, ROUNDED, everything],
        [text],
        samples=4,
        seq_len=24,
        window=20,
        tokens=100,
        device="cpu",
    )
    assert found.texts[0].ids.shape == (5, 20)
    assert kls(found)["W16A16"] == 0.0
    assert found.rows[0].bits == 32
    assert 0 < kls(found)["rounded"] < 1
    assert 0 < kls(found)["everything"] < 1
    assert 4 < found.rows[1].bits < found.rows[2].bits < 9

    model = AutoModelForCausalLM.from_pretrained(tiny_model(arch), dtype=torch.float32).eval()
    original = AutoModelForCausalLM.from_pretrained(tiny_model(arch), dtype=torch.float32).eval()
    for block in find_blocks(model).modules:
        for _, linear in linears(block):
            weight = weight_matrix(linear)
            weight.data.copy_(place(weight.data, FORMATS["e2m1"], 64).quantize(weight.data))
    whole = divergence.compare(original, model, found.texts[0].ids)
    assert kls(found)["rounded"] == pytest.approx(whole.kl, rel=1e-4)
    figures = found.rows[1].figures[0]
    assert figures.perplexity == pytest.approx(whole.perplexity, rel=1e-4)
    assert figures.original_perplexity == pytest.approx(whole.original_perplexity, rel=1e-4)


def test_gptq_distillation_and_low_rank_compensation_help_the_demo_model(text: Path) -> None:
    w4a8 = {"weights": "e2m1", "activations": "e4m3", "group_size": 64}
    found = compare(
        DEMO,
        [
            Configuration(label="round", solver="round", **w4a8),
            Configuration(label="gptq", **w4a8),
            Configuration(label="distilled", solver="distill", **w4a8),
            Configuration(label="lorc", rank=16, **w4a8),
            Configuration(label="activations", activations="e4m3"),
        ],
        samples=16,
        seq_len=128,
        window=128,
        device="cpu",
    )
    kl = kls(found)
    assert kl["gptq"] < 0.9 * kl["round"]
    assert kl["distilled"] < 0.9 * kl["round"]
    assert kl["lorc"] < kl["gptq"]
    assert kl["activations"] < 0.2 * kl["lorc"]


def test_with_outlier_channels_integer_activations_fail_and_floating_ones_do_not(
    text: Path, tmp_path: Path
) -> None:
    script = ROOT / "tests" / "benchmarks" / "outliers.py"
    spec = importlib.util.spec_from_file_location("outliers", script)
    outliers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(outliers)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    ids = torch.arange(64)[None]
    before = model(ids).logits
    assert outliers.blow_up(model, 4, 64.0, seed=0) == 8
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    folder = tmp_path / "outliers"
    folder.mkdir()
    for file in DEMO.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    rows = [
        Configuration(label=name, activations=name, solver="round")
        for name in ("int8", "int8-asym", "e4m3")
    ]
    shared = {"window": 128, "tokens": 1024, "device": "cpu"}
    plain = kls(compare(DEMO, rows, [text], **shared))
    blown = kls(compare(folder, rows, [text], **shared))
    assert blown["e4m3"] < 2 * plain["e4m3"]
    assert blown["int8"] > 10 * blown["e4m3"]
    assert blown["int8-asym"] > 3 * blown["e4m3"]


def test_several_texts_one_seed_and_what_is_done_once(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 20)
    again = Configuration(section="again", label="again", weights="e2m1", group_size=64)
    rows = [Configuration(label="gptq", weights="e2m1", group_size=64), again]
    steps: list[tuple[str, int, int]] = []
    shared = {"calibration": text, "samples": 4, "seq_len": 64, "window": 64, "tokens": 256}
    found = compare(
        DEMO,
        rows,
        [text, other],
        device="cpu",
        progress=lambda *step: steps.append(step),
        **shared,
    )
    assert [windows.name for windows in found.texts] == ["some.txt", "other.txt"]
    first, second = found.rows
    assert first.figures == second.figures
    assert first.figures[0] != first.figures[1]
    assert second.seconds == 0 < first.seconds
    assert {total for _, _, total in steps} == {8}
    assert max(done for _, done, _ in steps) == 7
    assert found.calibration == {"source": "some.txt", "samples": 4, "seq_len": 64, "seed": 0}
    alone = compare(DEMO, rows[:1], [other], device="cpu", **shared)
    assert alone.rows[0].figures[0] == first.figures[1]


def test_nothing_is_calibrated_or_written_without_need(text: Path) -> None:
    plan = make_plan(DEMO, [ORIGINAL, ROUNDED], [text], window=64, tokens=128, device="cpu")
    assert not plan.writes
    assert not plan.calibrates
    found = run(plan)
    assert found.calibration is None
    for module in find_blocks(plan.parts.model).modules:
        assert all(parameter.is_meta for parameter in module.parameters())


def test_too_little_memory(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        planning, "too_little_memory", lambda host, device, on: ("memory of cpu", "1 MB", f"{host}")
    )
    with pytest.raises(OptionError, match=r"memory of cpu.*--text and --calibration"):
        make_plan(DEMO, [ROUNDED], device="cpu")
    with pytest.raises(OptionError, match=r"memory of cpu.*fewer --tokens"):
        make_plan(DEMO, [ROUNDED], [text], device="cpu")
