"""Reports of real checkpoints: their numbers are the files' own, their page stands alone."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import mixtures
import pytest
from architectures import Maker
from safetensors import safe_open
from typer.testing import CliRunner

import zqfp_convert
from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.reader import PackedCheckpoint
from zqfp_convert.cli.main import app
from zqfp_convert.errors import OptionError
from zqfp_convert.evaluate.evaluation import evaluate
from zqfp_convert.push.card import card
from zqfp_convert.report import evaluated, picture
from zqfp_convert.report.advice import findings
from zqfp_convert.report.facts import Facts, Layer, spread
from zqfp_convert.report.page import page
from zqfp_convert.report.run import report
from zqfp_convert.verify import verify


class Page(HTMLParser):
    """Tags that are open, all that were seen with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag != "meta":  # which has no end
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def made(
    converted: Maker, tiny_model: Maker, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A checkpoint, and its evaluation; do not change them."""
    folder = tmp_path_factory.mktemp("report")
    out = Path(shutil.copytree(converted("llama", "best"), folder / "out"))
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    found = evaluate(out, tiny_model(), [text], window=64, device="cpu")
    figures = folder / "figures.json"
    figures.write_text(json.dumps(found.to_json()))
    return out, figures


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    mixtures.write_mixture(folder / "source", "qwen3_moe")
    zqfp_convert.convert(folder / "source", folder / "out", **mixtures.QUICK)
    return folder / "out"


def facts_of(out: Path, figures: Path | None = None) -> Facts:
    packed = PackedCheckpoint(out)
    return Facts.of(packed, out.name, evaluated.read(packed, figures))


def test_sizes_are_those_of_the_files(made: tuple[Path, Path], tiny_model: Maker) -> None:
    facts = facts_of(made[0])

    def stored(folder: Path) -> int:
        total = 0
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as shard:
                total += sum(shard.get_tensor(name).nbytes for name in shard.keys())  # noqa: SIM118
        return total

    assert facts.bytes_after == stored(made[0])
    assert facts.bytes_before == stored(tiny_model())
    manifest = json.loads((made[0] / layout.MANIFEST_FILE).read_text())["layers"]
    assert facts.weights == sum(math.prod(entry["shape"]) for entry in manifest.values())
    quantized = facts.bytes_after - facts.sizes["not quantized"]
    assert facts.bits == pytest.approx(8 * quantized / facts.weights)


def test_kinds_and_blocks(made: tuple[Path, Path], mixture: Path) -> None:
    dense = facts_of(made[0])
    assert [kind.name for kind in dense.kinds][:3] == [f"self_attn.{x}_proj" for x in "qkv"]
    assert dense.blocks == (0, 1)
    entries = json.loads((made[0] / layout.MANIFEST_FILE).read_text())["layers"]
    for (kind, block), error in dense.grid.items():
        assert error == pytest.approx(entries[f"model.layers.{block}.{kind}"]["output_error"])
    entries = json.loads((mixture / layout.MANIFEST_FILE).read_text())["layers"]
    sparse = facts_of(mixture)
    (kind,) = (kind for kind in sparse.kinds if kind.name.endswith("experts.*.down_proj"))
    names = [n for n in entries if n.endswith("down_proj")]
    assert sorted(layer.name for layer in kind.layers) == sorted(names)
    errors = [entries[n]["output_error"] for n in names if n.startswith("model.layers.1.")]
    mean = math.sqrt(sum(error**2 for error in errors) / len(errors))
    assert sparse.grid[kind.name, 1] == pytest.approx(mean)
    seen = [entries[n]["tokens"] for n in names if n.startswith("model.layers.0.")]
    assert sorted(sparse.tokens[0]) == sorted(seen)


def test_spread() -> None:
    assert spread([5]) == (5, 5, 5, 5, 5)
    assert spread([4, 0, 1, 3, 2]) == (0, 1, 2, 3, 4)


def check_page(text: str) -> Page:
    """Whole, by itself, and readable without seeing it."""
    found = Page(text)
    assert not found.open
    tags = {tag for tag, _ in found.seen}
    assert not tags & {"script", "link", "iframe", "img", "object", "embed"}
    assert not re.search(r"url\((?!#)|@import|https?://", text)
    assert ("html", {"lang": "en"}) in found.seen
    assert all(about["aria-label"] for tag, about in found.seen if tag == "svg")
    assert all(about.get("scope") for tag, about in found.seen if tag == "th")
    assert [tag for tag, _ in found.seen if tag in ("h1", "main")] == ["h1", "main"]
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert "nan" not in re.findall(r'="([^"]*)"', text)
    return found


def test_a_page_and_a_picture(made: tuple[Path, Path]) -> None:
    out, figures = made
    done = CliRunner().invoke(app, ["report", str(out), "--evaluation", str(figures), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    text = Path(told["page"]).read_text()
    shown = check_page(text).text
    entries = json.loads((out / layout.MANIFEST_FILE).read_text())["layers"]
    worst = max(entries, key=lambda name: entries[name]["output_error"])
    measured = json.loads(figures.read_text())["texts"][0]
    for said in (
        worst, f"{entries[worst]['output_error']:.2%}", "self_attn.k_proj",
        f"{measured['perplexity']:.3f}", f"{measured['kl']['mean']:.4f}", "text.txt",
        "KL by position", "Distribution of KL", "spans".title(), "16-31",
    ):  # fmt: skip
        assert said in shown, said
    assert all(found["title"] in shown for found in told["findings"])
    image = Path(told["picture"]).read_bytes()
    assert image.startswith(b"\x89PNG")
    assert int.from_bytes(image[16:20], "big") > 1000  # pixels across
    kept = (out / layout.EVALUATION_FILE).read_text()
    assert str(out.parent) not in kept + text
    again = report(out)  # finds what is kept, and says the same
    assert again.page.read_text() == text
    assert again.picture is not None
    assert again.picture.read_bytes() == image
    verify(out)
    assert (
        json.loads(kept)["manifest_sha256"]
        == hashlib.sha256((out / layout.MANIFEST_FILE).read_bytes()).hexdigest()
    )


def test_a_mixture(mixture: Path, tmp_path: Path) -> None:
    done = report(mixture, to=tmp_path)
    shown = check_page(done.page.read_text()).text
    assert "Experts" in shown
    assert "mlp.experts.*" in shown
    assert not (mixture / layout.REPORT_PAGE).exists()
    assert done.evaluation is None


def layer(name: str, block: int, kind: str, **about: Any) -> Layer:
    usual: dict[str, Any] = {
        "rows": 64, "columns": 64, "rank": 0, "bits": 4.1, "span": 3, "raised": 0,
        "weight_error": 0.1, "output_error": 0.05, "activation_error": 0.02, "tokens": None,
        "pooled": False, "damping_retries": 0,
    }  # fmt: skip
    return Layer(name, block, kind, **(usual | about))


def test_many_blocks_and_experts(mixture: Path, tmp_path: Path) -> None:
    """94 blocks of 128 experts: the page stays one that a browser and a person can take."""
    kinds = [f"mlp.experts.*.{part}_proj" for part in ("gate", "up", "down")]
    layers = tuple(
        layer(kind.replace("*", str(expert)), block, kind, tokens=expert)
        for block in range(94)
        for expert in range(128)
        for kind in kinds
    )
    found = replace(facts_of(mixture), layers=layers)
    text = page(found)
    check_page(text)
    assert len(text) < 150_000
    picture.draw(found, tmp_path / "many.png")


def test_names_are_text(made: tuple[Path, Path]) -> None:
    facts = replace(facts_of(*made), name="<b>&\"'</b>")
    assert "<b>&\"'</b>" in check_page(page(facts)).text


def test_the_same_model_differs_by_nothing(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Zeros have no place on logarithmic axes, and one window has no interval."""
    found = json.loads(made[1].read_text())
    (text,) = found["texts"]
    for each in (text, *text["positions"]):
        each |= {"kl": {"mean": 0.0, "low": None, "high": None}, "kl_median": 0.0, "kl_99": 0.0}
        each |= {"kl_999": 0.0, "loss_difference": {"mean": -0.0, "low": None, "high": None}}
        each["kl_histogram"] = [each["tokens"], *[0] * len(found["kl_edges"])]
    facts = replace(facts_of(made[0]), evaluation=found)
    check_page(page(facts))
    picture.draw(facts, tmp_path / "zeros.png")
    text["positions"] = text["positions"][:1]
    check_page(page(facts))
    for each in (text, *text["positions"]):
        del each["kl_histogram"]
    check_page(page(facts))
    picture.draw(facts, tmp_path / "less.png")


def test_free_scales(tiny_model: Maker, tmp_path: Path) -> None:
    zqfp_convert.convert(tiny_model(), tmp_path / "out", recipe="fast", scales="free", device="cpu")
    shown = check_page(report(tmp_path / "out").page.read_text()).text
    assert "Free scales run on the reference path only" in shown
    assert "Spans" not in shown


@pytest.mark.parametrize("junk", [None, 3, {}, [], {"source": 3, "name": [], "samples": "x"}])
def test_what_the_format_leaves_open(made: tuple[Path, Path], tmp_path: Path, junk: Any) -> None:
    """Other programs may write checkpoints, with other things on record."""
    out = Path(shutil.copytree(made[0], tmp_path / "out"))
    config = json.loads((out / layout.CONFIG_FILE).read_text())
    described = config[layout.CONFIG_KEY]
    for key in ("calibration", "tuning", "source", "made_on"):
        described[key] = junk
    (out / layout.CONFIG_FILE).write_text(json.dumps(config))
    facts = facts_of(out)
    check_page(page(facts))
    assert "# b\n" in card(facts, "a/b", base_model=None, license_name=None, picture=False)


def titles(facts: Facts) -> set[str]:
    return {found.title for found in findings(facts)}


def changed(facts: Facts, **about: Any) -> Facts:
    """The same facts, the first layer changed."""
    return replace(facts, layers=(replace(facts.layers[0], **about), *facts.layers[1:]))


def test_what_limited_it(made: tuple[Path, Path], mixture: Path, converted: Maker) -> None:
    plain, measured = facts_of(made[0]), facts_of(*made)
    config = measured.quantization

    def told(**keys: Any) -> set[str]:
        return titles(replace(measured, quantization=config | keys))

    assert "Not measured as a whole" in titles(replace(plain, evaluation=None))
    assert "Not measured as a whole" not in titles(measured)
    assert "Not calibrated" in titles(facts_of(converted("llama", "fast")))
    assert "Not calibrated" not in titles(plain)
    calibration = config["calibration"] | {"source": "text.txt"}
    assert "Measured on the text that it was calibrated on" in told(calibration=calibration)
    assert "Calibrated on text that the model wrote" not in told(calibration=calibration)
    few = config["calibration"] | {"samples": 1, "seq_len": 32}
    assert "Too little calibration text" in told(calibration=few)
    much = config["calibration"] | {"samples": 64, "seq_len": 128}
    assert "Too little calibration text" not in told(calibration=much)
    assert "A few layers stand out" in titles(changed(plain, output_error=0.9))
    assert "FP8 activations cost more than FP4 weights" in titles(
        changed(plain, activation_error=0.9)
    )
    assert "Groups raised to keep the span" in titles(changed(plain, raised=3))
    assert "Statistics that could not be factorized at once" in titles(
        changed(plain, damping_retries=1)
    )
    assert "Scales are powers of two" in told(weights=config["weights"] | {"scales": "m1"})
    tuning = {"kl_before": 0.1, "kl_after": 0.2, "kept": False}
    assert "Tuning did not help" in told(tuning=tuning)
    assert "Tuning did not help" not in told(tuning=tuning | {"kept": True})
    ones = {name: replace(one, pooled=2) for name, one in facts_of(mixture).coverage.items()}
    assert "Experts that saw too few tokens" in titles(replace(facts_of(mixture), coverage=ones))


def test_evaluations_that_are_refused(
    made: tuple[Path, Path], converted: Maker, tmp_path: Path
) -> None:
    out, figures = made
    other = PackedCheckpoint(converted("opt", "fast"))
    with pytest.raises(OptionError, match="another checkpoint"):
        evaluated.read(other, figures)
    for text in ("", "{}", "[]", '{"texts": [{}]}', '{"texts": []}'):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(OptionError, match="evaluate"):
            evaluated.read(PackedCheckpoint(out), tmp_path / "wrong.json")
    with pytest.raises(OptionError, match="cannot be read"):
        evaluated.read(PackedCheckpoint(out), tmp_path / "none.json")


def test_without_what_draws(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    written = report(made[0], to=tmp_path)
    assert written.picture is None
    assert not list(tmp_path.glob("*.png"))
    check_page(written.page.read_text())
    told = CliRunner().invoke(app, ["report", str(made[0]), "--to", str(tmp_path)])
    assert "zqfp-convert[report]" in told.stdout


def test_a_checkpoint_with_a_report_can_be_overwritten(
    tiny_model: Maker, made: tuple[Path, Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(made[0], tmp_path / "out"))
    report(out, evaluation=made[1])
    zqfp_convert.convert(tiny_model(), out, recipe="fast", overwrite=True, device="cpu")
    assert not (out / layout.REPORT_PAGE).exists()
