"""The whole way on mixtures of experts: names, routers, coverage, and the dequantized model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import token_ids
from dequantized import manifest, read_tensors
from mixtures import (
    EXPERT,
    EXPERTS,
    FUSED_ON_DISK,
    QUICK,
    architectures,
    original,
    reference,
    write_mixture,
)
from torch import Tensor, nn
from typer.testing import CliRunner

import zqfp_convert
from zqfp_convert.checkpoint.coverage import coverage
from zqfp_convert.cli.main import app
from zqfp_convert.errors import OptionError, Stopped
from zqfp_convert.evaluate.evaluation import evaluate
from zqfp_convert.runtime.linear import QuantizedLinear
from zqfp_convert.verify import verify

RECIPES = ("fast", "best")


class Made:
    """Mixtures and what became of them, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def source(self, arch: str) -> Path:
        path = self.folder / arch
        return path if path.exists() else write_mixture(path, arch)

    def packed(self, arch: str, recipe: str) -> Path:
        path = self.folder / f"{arch}-{recipe}"
        if not path.exists():
            zqfp_convert.convert(self.source(arch), path, recipe=recipe, **QUICK)
        return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("mixtures"))


def relative(error: Tensor, whole: Tensor) -> float:
    return float(error.double().norm() / whole.double().norm())


def assert_same(have: Tensor, want: Tensor) -> None:
    """Logits of each token are the same, save where another FP8 rounding sent it elsewhere.

    Those behind it in its window, which look back at it, go with it.
    """
    error = (have - want).norm(dim=-1) / want.norm(dim=-1)
    assert float(error.flatten().quantile(0.9)) < 1e-5
    assert float(error.max()) < 0.5


@pytest.mark.parametrize("arch", architectures())
def test_the_whole_way(arch: str, made: Made, tmp_path: Path) -> None:
    """One test for an architecture: what it needs is made once, wherever it runs."""
    source = made.source(arch)
    error, ids = {}, token_ids(32)  # so many that a window or two with another rounding are few
    for recipe in RECIPES:
        packed = made.packed(arch, recipe)
        check_names(arch, source, packed)
        assert verify(packed, source).errors.keys() == manifest(packed)["layers"].keys()
        model = zqfp_convert.load(packed, device="cpu")
        check_routers(model)
        with torch.no_grad():
            have = model(ids).logits
            want = original(source)(ids).logits
        assert_same(have, reference(source, packed, tmp_path / recipe)(ids))
        error[recipe] = relative(have - want, want)
    assert 0 < error["best"] < 0.9 * error["fast"], error
    assert not coverage(manifest(made.packed(arch, "fast"))["layers"])
    check_coverage(made.packed(arch, "best"))


def check_names(arch: str, source: Path, packed: Path) -> None:
    """Experts are named as on disk, or after the tensor that holds them; all else is as it was."""
    before, after, notes = read_tensors(source), read_tensors(packed), manifest(packed)
    experts = {name for name in notes["layers"] if EXPERT.match(f"{name}.weight")}
    numbers = {EXPERT.match(f"{name}.weight").group(2) for name in experts}
    assert numbers == {str(expert) for expert in range(EXPERTS)}
    if arch in FUSED_ON_DISK:
        leaves = {name.rpartition(".")[2] for name in experts}
        assert leaves == {"gate_proj", "up_proj", "down_proj"}
        assert not any(name.endswith(("gate_up_proj", "down_proj")) for name in after)
    else:
        assert {f"{name}.weight" for name in experts} == {n for n in before if EXPERT.match(n)}
    assert {f"{name}.weight_packed" for name in experts} <= after.keys()
    for name in (before.keys() & after.keys()) - notes["changed"].keys():  # routers among them
        assert torch.equal(before[name], after[name]), name


def check_routers(model: nn.Module) -> None:
    quantized = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(quantized) > 3 * EXPERTS
    assert all(layer.out_features not in (1, EXPERTS) for layer in quantized)


def check_coverage(packed: Path) -> None:
    layers = manifest(packed)["layers"]
    found = coverage(layers)
    assert found
    for name, one in found.items():
        assert name.endswith(".experts")
        assert one.experts == EXPERTS
        assert 0 <= one.fewest <= one.most <= QUICK["samples"] * QUICK["seq_len"]
        assert one.matrices == 3 * EXPERTS
    for name, entry in layers.items():
        assert ("tokens" in entry) is bool(EXPERT.match(f"{name}.weight"))
        if "tokens" in entry:
            assert entry["pooled"] is (entry["tokens"] < entry["shape"][1])


def test_generates(made: Made) -> None:
    model = zqfp_convert.load(made.packed("qwen3_moe", "best"), device="cpu")
    first = model.generate(token_ids(1, 5), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert first.shape == (1, 10)
    with torch.no_grad():  # with the cache it goes on as without
        assert torch.equal(model(first).logits[0, 4:-1].argmax(-1), first[0, 5:])


def test_bfloat16(tmp_path: Path) -> None:
    source = write_mixture(tmp_path / "source", "qwen3_moe", torch.bfloat16)
    zqfp_convert.convert(source, tmp_path / "out", recipe="best", **QUICK)
    model = zqfp_convert.load(tmp_path / "out", device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        have, want = model(token_ids()).logits, original(source)(token_ids()).logits
    assert relative(have - want, want) < 0.4


def never_chosen(model: nn.Module) -> None:
    model.model.layers[1].mlp.gate.e_score_correction_bias.data[2] = -100.0


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose third expert never gets a token, converted."""
    folder = tmp_path_factory.mktemp("idle")
    source = write_mixture(folder / "source", "glm4_moe", change=never_chosen)
    zqfp_convert.convert(source, folder / "out", recipe="best", **QUICK)
    return folder


def test_an_expert_without_tokens_is_pooled(idle: Path) -> None:
    layers = manifest(idle / "out")["layers"]
    path = "model.layers.1.mlp.experts"
    for part in ("gate_proj", "up_proj", "down_proj"):
        for expert in range(EXPERTS):
            entry = layers[f"{path}.{expert}.{part}"]
            assert (entry["tokens"] == 0) is (expert == 2)
            assert entry["pooled"] is (expert == 2)
            assert entry["output_error"] < 1  # of the others' tokens too
    found = coverage(layers)[path]
    assert (found.fewest, found.pooled, found.matrices) == (0, 3, 12)


def test_coverage_is_shown(idle: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(idle / "out")])
    assert shown.exit_code == 0
    assert "fewest tokens" in shown.stdout
    assert "3 of 12" in shown.stdout
    found = json.loads(CliRunner().invoke(app, ["inspect", str(idle / "out"), "--json"]).stdout)
    assert found["experts"]["model.layers.1.mlp.experts"]["pooled"] == 3
    words = ["convert", str(idle / "source"), str(tmp_path / "out"), "--device", "cpu"]
    words += ["--samples", "4", "--seq-len", "32", "--group-size", "32"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "Pooled matrices" in done.stdout
    plan = CliRunner().invoke(app, [*words[:2], str(tmp_path / "other"), "--dry-run"])
    assert "mlp.experts.*.gate_proj" in plan.stdout


def test_tuned_as_a_whole(tmp_path: Path) -> None:
    """All experts answer each token: else the KL is about who does, in a model that is random."""
    settings = {**QUICK, "tune_samples": 64}
    source = write_mixture(tmp_path / "source", "mixtral", num_experts_per_tok=EXPERTS)
    done = zqfp_convert.convert(source, tmp_path / "out", recipe="max", tune=40, **settings)
    assert done.plan.recipe.rotation == "none"
    assert done.tuning is not None
    assert done.tuning.kl_after < done.tuning.kl_before
    want = reference(source, tmp_path / "out", tmp_path / "dequantized")(token_ids())
    with torch.no_grad():
        have = zqfp_convert.load(tmp_path / "out", device="cpu")(token_ids()).logits
    assert_same(have, want)


def test_goes_on_where_it_was_stopped(made: Made, tmp_path: Path) -> None:
    """Finished experts are run from what lies on disk, in this run and in the next one alike."""

    def stop(text: str, done: int, total: int) -> None:
        if text.startswith("block 2"):
            raise KeyboardInterrupt

    source, out = made.source("gpt_oss"), tmp_path / "out"
    with pytest.raises(Stopped):
        zqfp_convert.convert(source, out, recipe="best", progress=stop, **QUICK)
    zqfp_convert.convert(source, out, recipe="best", **QUICK)
    for path in made.packed("gpt_oss", "best").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_evaluates(made: Made, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    for arch in ("mixtral", "gpt_oss"):
        packed = made.packed(arch, "best")
        found = evaluate(packed, made.source(arch), [text], window=32, device="cpu").to_json()
        assert 0 < found["texts"][0]["kl"]["mean"] < 1


def test_rotations_are_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="MixtralForCausalLM"):
        zqfp_convert.convert(
            made.source("mixtral"), tmp_path / "out", **{**QUICK, "rotation": "residual"}
        )


def test_ignored_experts_keep_their_weights(made: Made, tmp_path: Path) -> None:
    for arch in ("mixtral", "llama4"):
        out = tmp_path / arch
        done = zqfp_convert.convert(
            made.source(arch), out, recipe="best", ignore=("experts.*",), **QUICK
        )
        assert not done.coverage
        model = zqfp_convert.load(out, device="cpu")
        assert model(token_ids()).logits.isfinite().all()
        verify(out, made.source(arch))
