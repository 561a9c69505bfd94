"""Streamed block by block, the figures are those of the two whole models."""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, QUICK, Maker, write_model, write_tokenizer
from dequantized import manifest, read_tensors, weight_of
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import zqfp_convert
from zqfp_convert.evaluate import plan as planning
from zqfp_convert.evaluate.divergence import compare
from zqfp_convert.evaluate.evaluation import Measured, evaluate, run
from zqfp_convert.evaluate.parts import SourceParts
from zqfp_convert.evaluate.plan import make_plan
from zqfp_convert.model.blocks import find_blocks

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "zqfp_convert" / "demo" / "model"
WINDOW, BATCH = 24, 3


def write_text(file: Path, characters: int, seed: int) -> Path:
    letters = random.Random(seed).choices([chr(code) for code in range(32, 127)], k=characters)
    file.write_text("".join(letters))
    return file


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two texts, of 7 and 4 windows and a rest."""
    folder = tmp_path_factory.mktemp("texts")
    return [write_text(folder / "a.txt", 7 * WINDOW + 5, 1), write_text(folder / "b.txt", 100, 2)]


def equal_to_whole_models(source: Path, packed: Path, ids: Tensor, measured: Measured) -> None:
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    loaded = zqfp_convert.load(packed, device="cpu", dtype=torch.float32)
    want = compare(original, loaded, ids, BATCH)
    figures = measured.figures
    assert figures.tokens == want.tokens == measured.windows * (WINDOW - 1)
    assert want.kl > 0
    assert figures.kl.mean == pytest.approx(want.kl, rel=1e-4)
    assert figures.perplexity == pytest.approx(want.perplexity, rel=1e-4)
    assert figures.original_perplexity == pytest.approx(want.original_perplexity, rel=1e-4)
    assert figures.same_top == pytest.approx(want.same_top, rel=1e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture(
    arch: str, texts: list[Path], tiny_model: Maker, converted: Maker
) -> None:
    source, packed = tiny_model(arch), converted(arch, "fast")
    found = evaluate(packed, source, texts[:1], window=WINDOW, batch=BATCH, device="cpu")
    equal_to_whole_models(source, packed, found.plan.texts[0].ids, found.texts[0])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_tied_and_untied_heads(arch: str, tied: bool, texts: list[Path], tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", arch, torch.bfloat16, tie_word_embeddings=tied)
    write_tokenizer(source)
    zqfp_convert.convert(source, tmp_path / "out", recipe="best", **QUICK)
    found = evaluate(tmp_path / "out", source, texts[:1], window=WINDOW, batch=BATCH, device="cpu")
    ids = found.plan.texts[0].ids
    assert ids.flatten().tolist() == [ord(letter) for letter in texts[0].read_text()][: ids.numel()]
    equal_to_whole_models(source, tmp_path / "out", ids, found.texts[0])


def test_several_texts_and_small_slices(
    texts: list[Path], tiny_model: Maker, converted: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 5 tokens a slice: slices cross windows, batches cross texts (7 and 4 windows, 3 together)
    monkeypatch.setitem(planning.LOGITS_AT_ONCE, "cpu", 5 * 384)
    source, packed = tiny_model("llama"), converted("llama", "fast")
    found = evaluate(packed, source, texts, window=WINDOW, batch=BATCH, device="cpu")
    assert found.plan.head_tokens == 5
    assert [measured.name for measured in found.texts] == ["a.txt", "b.txt"]
    for windows, measured in zip(found.plan.texts, found.texts, strict=True):
        assert windows.name == measured.name
        equal_to_whole_models(source, packed, windows.ids, measured)


def test_one_block_at_a_time(texts: list[Path], tiny_model: Maker, converted: Maker) -> None:
    plan = make_plan(
        converted("llama", "fast"), tiny_model("llama"), texts, window=WINDOW, device="cpu"
    )
    steps: list[tuple[str, int, int]] = []

    def look(text: str, done: int, total: int) -> None:
        steps.append((text, done, total))
        for parts in (plan.original, plan.packed):
            for module in find_blocks(parts.model).modules:
                assert all(parameter.is_meta for parameter in module.parameters())

    run(plan, look)
    assert [text for text, _, _ in steps] == [
        "original, block 1/2", "original, block 2/2", "quantized, block 1/2",
        "quantized, block 2/2", "comparing",
    ]  # fmt: skip
    assert [done for _, done, _ in steps] == [1, 2, 3, 4, 4]
    assert {total for _, _, total in steps} == {5}


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_the_original_against_itself(
    arch: str, texts: list[Path], tiny_model: Maker, converted: Maker
) -> None:
    source = tiny_model(arch)
    plan = make_plan(converted(arch, "fast"), source, texts, window=WINDOW, device="cpu")
    again = SourceParts(plan.original.source, plan.device, torch.float32)
    found = run(dataclasses.replace(plan, packed=again))
    for measured in found.texts:
        for figures in (measured.figures, *(bucket.figures for bucket in measured.positions)):
            assert (figures.kl.mean, figures.kl_999, figures.same_top) == (0.0, 0.0, 1.0)
            assert figures.loss_difference.mean == 0.0
            assert figures.perplexity == figures.original_perplexity


def test_against_its_own_dequantized_weights_only_fp8_activations_count(tmp_path: Path) -> None:
    packed = zqfp_convert.convert(DEMO, tmp_path / "out", recipe="fast", device="cpu").out
    dequantized = Path(shutil.copytree(DEMO, tmp_path / "dequantized"))
    tensors = read_tensors(packed)
    weights = {name: tensor.float() for name, tensor in read_tensors(DEMO).items()}
    for name, entry in manifest(packed)["layers"].items():
        weights[name + ".weight"] = weight_of(tensors, name, entry["shape"][1], 128).float()
    save_file(weights, dequantized / "model.safetensors", {"format": "pt"})
    text = tmp_path / "t.txt"
    text.write_text((ROOT / "formats" / "zqfp-1.md").read_text(encoding="utf-8"), encoding="utf-8")

    def kl(against: Path) -> float:
        found = evaluate(packed, against, [text], window=128, tokens=1024, device="cpu")
        return found.texts[0].figures.kl.mean

    activations, everything = kl(dequantized), kl(DEMO)
    assert 0 < activations < 0.1 * everything


def test_the_dtype_of_the_original(texts: list[Path], tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "llama", torch.bfloat16)
    write_tokenizer(source)
    zqfp_convert.convert(source, tmp_path / "out", recipe="fast", **QUICK)

    def original_perplexity(dtype: str | None) -> tuple[str, float]:
        found = evaluate(
            tmp_path / "out", source, texts[:1], window=WINDOW, device="cpu", dtype=dtype
        )
        return found.to_json()["original_dtype"], found.texts[0].figures.original_perplexity

    assert original_perplexity(None) == original_perplexity("float32")
    assert original_perplexity("stored") == original_perplexity("bfloat16")
    assert original_perplexity("stored")[0] == "bfloat16"
    assert original_perplexity("stored")[1] != original_perplexity("float32")[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 129}, ("--window", "129", "2 to 128")),
        ({"window": 1}, ("--window", "2 to 128")),
        ({"dtype": "int8"}, ("--dtype", "int8", "bfloat16", "stored")),
        ({"device": "nowhere"}, ("device", "nowhere")),
        ({"tokens": 20}, ("a.txt", "20 tokens", "--tokens")),
    ],
)
def test_bad_options(
    options: dict[str, object],
    words: tuple[str, ...],
    texts: list[Path],
    tiny_model: Maker,
    converted: Maker,
) -> None:
    given = {"window": WINDOW, "device": "cpu", **options}
    with pytest.raises(zqfp_convert.ZqfpError) as raised:
        make_plan(converted("llama", "fast"), tiny_model("llama"), texts, **given)  # type: ignore[arg-type]
    for word in words:
        assert word in str(raised.value)


def test_a_model_that_gives_nan(
    texts: list[Path], tiny_model: Maker, converted: Maker, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(tiny_model("llama"), tmp_path / "damaged"))
    weights = read_tensors(damaged)
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(zqfp_convert.ZqfpError, match=r"a\.txt: NaN or infinity"):
        evaluate(converted("llama", "fast"), damaged, texts, window=WINDOW, device="cpu")


def test_too_little_memory(
    texts: list[Path], tiny_model: Maker, converted: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zqfp_convert.model.device.free_memory", lambda device: 1000)
    with pytest.raises(zqfp_convert.ZqfpError, match="--tokens"):
        make_plan(converted("llama", "fast"), tiny_model("llama"), texts, device="cpu", window=8)
