"""What a conversion makes: the same bytes each time, files that every reader can read."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import zqfp1_reader
from architectures import ARCHITECTURES, QUICK, Maker, token_ids, write_model, write_tokenizer
from dequantized import dense, manifest, quantization_config, read_tensors
from huggingface_hub import metadata_load
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import zqfp_convert
from zqfp_convert import Recipe
from zqfp_convert.calibration.simulated import SimulatedLinear
from zqfp_convert.checkpoint.output import partial
from zqfp_convert.checkpoint.reader import PackedCheckpoint
from zqfp_convert.conversion import passage, states, work
from zqfp_convert.errors import OutputError
from zqfp_convert.numerics import codebook
from zqfp_convert.runtime.linear import QuantizedLinear
from zqfp_convert.verify import verify

FORMATS = Path(__file__).parents[1] / "formats"
SCHEMA = json.loads((FORMATS / "zqfp-1.schema.json").read_text())
FEW = {**QUICK, "samples": 4}


def convert(model: Path, out: Path, **choices: Any) -> zqfp_convert.Conversion:
    return zqfp_convert.convert(model, out, **{**FEW, **choices})


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    path = tmp_path / "letters.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return path


@pytest.mark.parametrize(
    ("recipe", "from_file"),
    [("fast", False), ("paper", True), ("best", False), ("best", True)],
)
def test_same_bytes_twice(
    recipe: str, from_file: bool, tiny_model: Maker, letters: Path, tmp_path: Path
) -> None:
    source = tiny_model("gpt2")
    elsewhere = Path(shutil.copytree(source, tmp_path / "elsewhere" / source.name))
    calibration = letters if from_file else None
    choices = {"recipe": recipe, "calibration": calibration, "low_rank_rounds": None}
    torch.manual_seed(1)
    convert(source, tmp_path / "one", **choices)
    torch.manual_seed(2)
    convert(elsewhere, tmp_path / "deep" / "two", **choices)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "deep" / "two")
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    told = quantization_config(tmp_path / "one")["calibration"]
    if recipe == "fast":
        assert told is None
    else:
        assert told["source"] == ("letters.txt" if from_file else "self-generated")
        assert (told["samples"], told["seq_len"]) == (4, 32)
        assert len(told["sha256"]) == 64


def test_another_seed_gives_another_calibration(tiny_model: Maker, tmp_path: Path) -> None:
    for seed in (0, 1):
        convert(tiny_model(), tmp_path / str(seed), recipe="best", seed=seed, rank=0)
    one, two = (quantization_config(tmp_path / str(seed))["calibration"] for seed in (0, 1))
    assert one["sha256"] != two["sha256"]
    name = "model.layers.0.mlp.up_proj.weight_packed"
    one, two = (read_tensors(tmp_path / str(seed))[name] for seed in (0, 1))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("recipe", ["fast", "best"])
def test_source_in_one_shard_or_in_many(recipe: str, tmp_path: Path) -> None:
    whole = write_model(tmp_path / "whole", "opt")
    parts = write_model(tmp_path / "parts", "opt", shard_size="60KB")
    assert len(list(parts.glob("*.safetensors"))) > 3
    results = [convert(source, tmp_path / f"{source.name}-out", recipe=recipe)
               for source in (whole, parts)]  # fmt: skip
    one, two = (read_tensors(result.out) for result in results)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype
        assert torch.equal(one[name].view(torch.uint8), two[name].view(torch.uint8)), name
    assert manifest(results[0].out)["layers"] == manifest(results[1].out)["layers"]


CODE = "from pathlib import Path\nPath({marker!r}).touch()\n"


def test_files_are_carried_over_and_code_is_not_run(tmp_path: Path) -> None:
    source, marker = write_model(tmp_path / "source"), tmp_path / "ran"
    write_tokenizer(source)
    (source / "LICENSE").write_bytes(b"Some terms.\r\n")
    (source / "NOTICE").write_text("Somebody made this.")
    (source / "README.md").write_text(
        "---\nlicense: mit\nlanguage: en\nwidget: x\n---\nThe best model of all.\n"
    )
    (source / "sub").mkdir()
    for name in ("modeling_llama.py", "configuration_llama.py", "sub/__init__.py"):
        (source / name).write_text(CODE.format(marker=str(marker)))
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_llama.LlamaConfig",
        "AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM",
    }
    (source / "config.json").write_text(json.dumps(config))
    (source / "pytorch_model.bin").write_bytes(b"pickled")
    result = convert(source, tmp_path / "out", recipe="best")
    zqfp_convert.load(tmp_path / "out", device="cpu")
    assert not marker.exists()
    before, after = contents(source), contents(tmp_path / "out")
    carried = {
        "LICENSE", "NOTICE", "chat_template.jinja", "configuration_llama.py",
        "generation_config.json", "modeling_llama.py", "sub/__init__.py", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    ours = {"README.md", "config.json", "model.safetensors.index.json", "zqfp_manifest.json"}
    weights = {name for name in after if name.endswith(".safetensors")}
    assert after.keys() == carried | ours | weights
    assert all(after[name] == before[name] for name in carried)
    card = after["README.md"].decode()  # not the source's, which is about another model
    data = metadata_load(tmp_path / "out" / "README.md")
    assert (data["license"], data["language"], data["library_name"]) == (
        "mit",
        "en",
        "zqfp-convert",
    )
    assert not {"widget", "base_model"} & data.keys()
    assert "best model" not in card
    assert all(said in card for said in ("source with 4-bit", 'load("FOLDER"', "recipe best"))
    assert str(tmp_path) not in card
    listed = json.loads(after["zqfp_manifest.json"])["files"]
    assert set(listed) == carried | {"README.md"}
    assert result.plan.to_json()["code_files_not_run"] == [
        "configuration_llama.py", "modeling_llama.py", "sub/__init__.py"
    ]  # fmt: skip
    for key, value in config.items():
        assert json.loads(after["config.json"])[key] == value
    assert not list(tmp_path.glob("*.partial"))


def test_a_configuration_with_infinity(tmp_path: Path) -> None:
    """Python's JSON has it, and some models' configurations do: it is kept."""
    source = write_model(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["time_step_limit"] = [0.0, float("inf")]
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out", recipe="fast")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["time_step_limit"] == [0.0, float("inf")]
    zqfp_convert.load(tmp_path / "out", device="cpu")


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
EVERY = {f"{index}.{leaf}" for index in (0, 1)
         for leaf in (*ATTENTION, "gate_proj", "up_proj", "down_proj")}  # fmt: skip


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["down_proj"], {"0.down_proj", "1.down_proj"}),
        (["*.1.mlp.*"], {"1.gate_proj", "1.up_proj", "1.down_proj"}),
        (["model.layers.0.*"], {name for name in EVERY if name.startswith("0.")}),
        (["self_attn.[qk]_proj", "lm_head"], {"0.q_proj", "0.k_proj", "1.q_proj", "1.k_proj"}),
        ([], set()),
    ],
)
@pytest.mark.parametrize("choices", [{"recipe": "fast"}, {"recipe": "best", "rank": 0}])
def test_ignored_layers(
    patterns: list[str],
    left: set[str],
    choices: dict[str, Any],
    tiny_model: Maker,
    tmp_path: Path,
) -> None:
    source, out = tiny_model(), tmp_path / "out"
    result = convert(source, out, ignore=patterns, **choices)
    before, after = read_tensors(source), read_tensors(out)

    def short(name: str) -> str:
        parts = name.split(".")
        return f"{parts[2]}.{parts[-1]}"

    assert {short(name) for name in result.layers} == EVERY - left
    assert {short(name) for name in result.plan.left_alone if name != "lm_head"} == left
    told = quantization_config(out)["ignore"]
    assert set(told) == set(result.plan.left_alone)
    for name in told:
        assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
    assert "lm_head" in told
    zqfp1_reader.read(out)
    with torch.no_grad():
        assert zqfp_convert.load(out, device="cpu")(token_ids()).logits.isfinite().all()


def test_a_pattern_that_is_no_list(tiny_model: Maker, tmp_path: Path) -> None:
    """One pattern, or refused: never its letters."""
    try:
        result = convert(tiny_model(), tmp_path / "out", recipe="fast", ignore="down_proj")
    except zqfp_convert.ZqfpError:
        assert not (tmp_path / "out").exists()
    else:
        assert len(result.layers) == 12


def assert_readers_agree(out: Path) -> None:
    """The schema, the package and the standard-library reader see the same checkpoint."""
    jsonschema.validate(quantization_config(out), SCHEMA)
    read = zqfp1_reader.read(out)  # checks every rule and every hash
    packed = PackedCheckpoint(out, check_hashes=True)
    assert sorted(read.layers) == packed.layers
    for name, layer in read.layers.items():
        mine = packed.layer(name)
        weight = np.frombuffer(layer.dequantize(), dtype="<u4")
        assert (weight == mine.dequantize().numpy().reshape(-1).view("<u4")).all()
        assert layer.bits_per_weight == mine.bits == packed.bits(name)
        assert layer.span == mine.scales().span
        assert layer.rank == mine.rank
        if layer.rank:
            A, B, scale = (torch.tensor(values) for values in layer.lorc() or ())
            assert torch.equal(A.view(layer.rank, -1), mine.lorc_A.float())
            assert torch.equal(B.view(-1, layer.rank), mine.lorc_B.float())
            if mine.lorc_scale is not None:
                assert torch.equal(scale, mine.lorc_scale)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_reader_reads_it(arch: str, converted: Maker) -> None:
    assert_readers_agree(converted(arch, "best"))


GROUP_SIZES = (32, 64, 128, 256, "row")
SCALES = ("m1", "m2", "free")


@pytest.mark.parametrize(
    ("recipe", "scales", "group_size"),
    [
        *(("fast", scales, size) for scales in SCALES for size in GROUP_SIZES),
        ("best", "m1", 64),
        ("best", "m2", "row"),
        ("best", "free", 128),
        ("paper", "m2", 256),
    ],
)
def test_group_sizes_and_scales(
    group_size: int | str, scales: str, recipe: str, tiny_model: Maker, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = convert(tiny_model(), out, recipe=recipe, group_size=group_size, scales=scales)
    config = quantization_config(out)
    described = {"format": "e2m1", "group_size": group_size, "scales": scales}
    if recipe == "best" and scales != "free":
        described |= {"format": "codebooks", "codebooks": [list(book) for book in codebook.PAIR]}
    assert config["weights"] == described
    assert config["recipe"] == result.plan.recipe.to_json()
    for name, entry in result.layers.items():
        rows, columns = entry["shape"]
        size = columns if group_size == "row" else group_size
        scale = read_tensors(out)[f"{name}.weight_scale"]
        assert scale.shape == (rows, -(-columns // size))
        assert (entry["span"] is None) is (scales == "free")
        assert 0 < entry["weight_error"] < 0.3
    assert_readers_agree(out)
    with torch.no_grad():
        assert zqfp_convert.load(out, device="cpu")(token_ids()).logits.isfinite().all()


@pytest.mark.parametrize("choices", [{"scales": "m1"}, {"group_size": 32}, {"tune": 2}], ids=str)
def test_two_codebooks(choices: dict[str, Any], tiny_model: Maker, tmp_path: Path) -> None:
    out, plain, source = tmp_path / "out", tmp_path / "plain", tiny_model()
    result = convert(source, out, **choices)
    config = quantization_config(out)
    assert config["required_features"] == ["lorc", "codebooks"]
    assert config["weights"]["format"] == "codebooks"
    assert config["weights"]["codebooks"] == [list(book) for book in codebook.PAIR]
    assert_readers_agree(out)
    one = convert(source, plain, codebooks="e2m1", **choices)
    assert result.bits > one.bits
    error = {name: entry["weight_error"] for name, entry in one.layers.items()}
    closer = [entry["weight_error"] < error[name] for name, entry in result.layers.items()]
    assert sum(closer) > 0.8 * len(closer)
    model = zqfp_convert.load(out, device="cpu")
    tensors = read_tensors(out)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            x = torch.randn(3, module.in_features)
            want = dense(out, tensors, name)(x)
            torch.testing.assert_close(module(x).double(), want, rtol=1e-4, atol=1e-4)
    assert verify(out, source).layers == len(result.layers)


@pytest.mark.parametrize(
    ("choices", "lorc"),
    [
        ({"rank": 0}, None),
        ({"rank": 3}, {"rank": 3, "factors": "e4m3"}),
        ({"rank": 2, "factors": "bf16"}, {"rank": 2, "factors": "bf16"}),
        ({"rank": 1000}, {"rank": 1000, "factors": "e4m3"}),
        ({"recipe": "paper"}, {"rank": 8, "factors": "e4m3"}),
        ({"recipe": "fast", "rank": 4}, {"rank": 4, "factors": "e4m3"}),
    ],
)
def test_ranks(choices: dict[str, Any], lorc: object, tiny_model: Maker, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = convert(tiny_model(), out, codebooks="e2m1", **choices)
    config = quantization_config(out)
    assert config["lorc"] == lorc
    assert config["required_features"] == (["lorc"] if lorc else [])
    rank = lorc["rank"] if isinstance(lorc, dict) else 0
    for entry in result.layers.values():
        assert entry["rank"] == min(rank, *entry["shape"])
    assert_readers_agree(out)


def with_low_rank_errors(source: Path, folder: Path, *layers: str) -> Path:
    """The model, but layers in which each group has a weight so large that all others become 0.

    What its codes miss is the others, and these have rank 4.
    """
    shutil.copytree(source, folder)
    tensors = read_tensors(folder)
    for name in layers:
        rows, columns = tensors[name + ".weight"].shape
        weight = torch.randn(rows, 4) @ torch.randn(4, columns) / 1000
        weight[:, ::32] = 1.0
        tensors[name + ".weight"] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


ALL = tuple(f"model.layers.0.self_attn.{name}_proj" for name in "kqv")
ONE_OF_THREE = "model.layers.1.self_attn.k_proj"
ALONE = "model.layers.1.self_attn.o_proj"


FAST = {"recipe": "fast"}


@pytest.mark.parametrize("choices", [FAST, {**FAST, "factors": "bf16"}, {}, {"tune": 2}], ids=str)
def test_ranks_where_they_are_worth_it(
    choices: dict[str, Any], tiny_model: Maker, tmp_path: Path
) -> None:
    strange = *ALL, ALONE, ONE_OF_THREE
    source = with_low_rank_errors(tiny_model(), tmp_path / "source", *strange)
    out = tmp_path / "out"
    result = convert(source, out, rank="auto", **choices)
    found = {name: entry["rank"] for name, entry in result.layers.items() if entry["rank"]}
    wanted = {*strange}
    if "recipe" not in choices:
        # Calibration shows which layers have one input: the error of q and v outweighs that of k.
        # And values that are all alike leave the next layer with inputs in one direction.
        wanted = wanted - {ONE_OF_THREE} | {"model.layers.0.self_attn.o_proj"}
    assert found == dict.fromkeys(wanted, 8)
    assert result.ranks == {0: 14 - len(found), 8: len(found)}
    config = quantization_config(out)
    assert config["lorc"] == {"rank": 8, "factors": choices.get("factors", "e4m3")}
    assert config["recipe"]["rank"] == "auto"
    assert_readers_agree(out)
    packed = PackedCheckpoint(out)
    assert 4 < result.bits < result.plan.bits
    assert result.bits == pytest.approx(packed_bits(packed))
    assert verify(out, source).layers == 14
    tensors = read_tensors(out)
    for name, module in zqfp_convert.load(out, device="cpu").named_modules():
        if isinstance(module, QuantizedLinear):
            assert module.rank == found.get(name, 0)
            x = torch.randn(3, module.in_features)
            want = dense(out, tensors, name)(x)
            torch.testing.assert_close(module(x).double(), want, rtol=1e-4, atol=1e-4)


def packed_bits(packed: PackedCheckpoint) -> float:
    """Bits a weight over all layers, from the bytes in the file."""
    counts = {name: packed.layer(name).rows * packed.layer(name).columns for name in packed.layers}
    return sum(packed.bits(name) * count for name, count in counts.items()) / sum(counts.values())


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_rank_that_is_found_is_the_rank_that_is_given(tiny_model: Maker, tmp_path: Path) -> None:
    """Nothing but the choice is different: the bytes of rank 0, and of rank 8, where it is that."""
    source = tiny_model()
    result = convert(source, tmp_path / "auto", rank="auto")
    assert result.ranks == {0: 14}
    convert(source, tmp_path / "none", rank=0)
    assert shards(tmp_path / "auto") == shards(tmp_path / "none")
    config = quantization_config(tmp_path / "auto")
    assert config["lorc"] is None
    assert "lorc" not in config["required_features"]

    source = with_low_rank_errors(source, tmp_path / "source", *result.layers)
    assert convert(source, tmp_path / "some", recipe="fast", rank="auto").ranks == {8: 14}
    convert(source, tmp_path / "eight", recipe="fast", rank=8)
    assert shards(tmp_path / "some") == shards(tmp_path / "eight")


def test_what_comes_back(tiny_model: Maker, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    result = convert(
        tiny_model(),
        tmp_path / "out",
        recipe="best",
        progress=lambda text, done, total: calls.append((text, done, total)),
    )
    assert result.out == tmp_path / "out"
    assert result.layers == manifest(tmp_path / "out")["layers"]
    files = (tmp_path / "out").glob("*.safetensors")
    assert result.bytes_after == sum(path.stat().st_size for path in files)
    assert result.seconds > 0
    worst = result.worst(3)
    errors = sorted((entry["output_error"] for entry in result.layers.values()), reverse=True)
    assert [entry["output_error"] for _, entry in worst] == errors[:3]
    assert json.loads(json.dumps(result.to_json()))["layers"] == 14
    done = [count for _, count, _ in calls]
    assert done == sorted(done)
    assert {total for _, _, total in calls} == {result.plan.weights}
    assert calls[-1][1] == result.plan.weights
    for name in ("q_proj", "down_proj"):
        assert any(name in text for text, _, _ in calls)


def test_errors_in_the_manifest_are_those_of_the_weights(
    tiny_model: Maker, converted: Maker
) -> None:
    before, out = read_tensors(tiny_model("gpt2")), converted("gpt2", "best")
    checkpoint = PackedCheckpoint(out)
    for name, entry in manifest(out)["layers"].items():
        layer = checkpoint.layer(name)
        weight = before[f"{name}.weight"].t().double()  # GPT-2's lie transposed in the file
        have = layer.dequantize().double() + layer.lorc_product().double()
        error = float((have - weight).norm() / weight.norm())
        assert entry["weight_error"] == pytest.approx(error, rel=1e-3)


@torch.no_grad()
def test_what_the_solver_sees(
    tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations behind the already quantized prefix, and beside them those of the original."""
    seen: list[tuple[list[str], set[str], torch.Tensor, torch.Tensor]] = []
    windows: list[torch.Tensor] = []
    real, real_batches = work.statistics, states.batches_of

    def statistics(stage: list[str], student: Any, stream: Any, *rest: Any, **how: Any) -> Any:
        done = {n for n, m in student.named_modules() if isinstance(m, SimulatedLinear)}
        seen.append((stage, done, stream.hidden[0].clone(), rest[1].hidden[0].clone()))
        return real(stage, student, stream, *rest, **how)

    def batches_of(ids: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
        windows.append(ids)
        return real_batches(ids, *rest)

    monkeypatch.setattr(work, "statistics", statistics)
    monkeypatch.setattr(states, "batches_of", batches_of)
    monkeypatch.setattr(passage, "halfway", lambda *_: None)  # states stay where the model has them
    convert(tiny_model("opt"), tmp_path / "out", recipe="best")
    monkeypatch.undo()

    def hidden_states(model: Any) -> list[torch.Tensor]:
        return model(windows[0], output_hidden_states=True, use_cache=False).hidden_states

    original = hidden_states(AutoModelForCausalLM.from_pretrained(tiny_model("opt")).eval())
    packed = hidden_states(zqfp_convert.load(tmp_path / "out", device="cpu"))
    assert len(seen) == 8
    for index, (stage, done, student, teacher) in enumerate(seen):
        block = index // 4
        earlier = {name for other, *_ in seen[4 * block : index] for name in other}
        assert done == earlier
        assert not done & set(stage)
        torch.testing.assert_close(teacher, original[block], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(student, packed[block], rtol=1e-3, atol=1e-3)
    assert (original[1] - packed[1]).abs().max() > 1e-2


def test_a_whole_recipe(tiny_model: Maker, tmp_path: Path) -> None:
    recipe = Recipe.named("fast", group_size=64, scales="m1", seq_len=16)
    zqfp_convert.convert(tiny_model(), tmp_path / "out", recipe=recipe, device="cpu")
    assert quantization_config(tmp_path / "out")["recipe"] == recipe.to_json()


def test_a_whole_recipe_with_other_choices(tiny_model: Maker, tmp_path: Path) -> None:
    """They count, or they are refused: they do not vanish."""
    recipe = Recipe.named("fast", group_size=64)
    try:
        zqfp_convert.convert(
            tiny_model(), tmp_path / "out", recipe=recipe, device="cpu", scales="m1"
        )
    except (zqfp_convert.ZqfpError, TypeError):
        assert not (tmp_path / "out").exists()
    else:
        assert quantization_config(tmp_path / "out")["weights"]["scales"] == "m1"


def test_windows_are_no_longer_than_the_model_can_read(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", max_position_embeddings=24)
    convert(source, tmp_path / "out", recipe="best", seq_len=1000, samples=2)
    config = quantization_config(tmp_path / "out")
    assert config["calibration"]["seq_len"] == config["recipe"]["seq_len"] == 24


def test_half_precision(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", dtype=torch.float16)
    convert(source, tmp_path / "out", recipe="best")
    assert_readers_agree(tmp_path / "out")
    model = zqfp_convert.load(tmp_path / "out", device="cpu")
    assert model.dtype == torch.float16
    with torch.no_grad():
        assert model(token_ids()).logits.isfinite().all()


def test_a_model_of_one_block(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "gpt2", n_layer=1)
    assert len(convert(source, tmp_path / "out", recipe="best").layers) == 4
    assert_readers_agree(tmp_path / "out")


def test_weights_of_zeros(tmp_path: Path) -> None:
    """Rows, groups and whole matrices of zeros, and an embedding that makes dead features."""
    source = write_model(tmp_path / "source")
    tensors = read_tensors(source)
    tensors["model.layers.0.self_attn.q_proj.weight"][3] = 0
    tensors["model.layers.0.mlp.up_proj.weight"][:, :32] = 0
    tensors["model.layers.1.mlp.gate_proj.weight"].zero_()
    tensors["model.layers.0.input_layernorm.weight"][5] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for recipe in ("fast", "paper", "best"):
        convert(source, tmp_path / recipe, recipe=recipe)
        assert_readers_agree(tmp_path / recipe)
        with torch.no_grad():
            model = zqfp_convert.load(tmp_path / recipe, device="cpu")
            assert model(token_ids()).logits.isfinite().all()
    zeros = PackedCheckpoint(tmp_path / "fast").layer("model.layers.1.mlp.gate_proj")
    assert not zeros.dequantize().any()


def test_weights_far_apart(tmp_path: Path) -> None:
    """Groups that differ by more than the span are raised, counted, and still readable."""
    source = write_model(tmp_path / "source")
    tensors = read_tensors(source)
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight"][:, :32] *= 2.0**16
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for scales in ("m1", "m2"):
        result = convert(source, tmp_path / scales, recipe="fast", scales=scales)
        assert result.layers[name]["raised_groups"] == tensors[f"{name}.weight"].shape[0]
        assert result.layers[name]["span"] <= 11
        assert_readers_agree(tmp_path / scales)


def test_overwriting(tiny_model: Maker, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(tiny_model(), out, recipe="fast")
    convert(tiny_model("opt"), out, recipe="fast", overwrite=True)
    assert json.loads((out / "config.json").read_text())["model_type"] == "opt"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_packed_checkpoint_is_not_converted_again(converted: Maker, tmp_path: Path) -> None:
    with pytest.raises(zqfp_convert.ZqfpError, match=r"already quantized \(zqfp\)"):
        convert(converted(), tmp_path / "out")


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_full_disk_leaves_nothing_under_the_final_name(
    at: int, tiny_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = partial.save_file, 0

    def save_file(*args: Any, **options: Any) -> None:
        nonlocal written
        if written == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        written += 1
        real(*args, **options)

    monkeypatch.setattr(partial, "save_file", save_file)
    with pytest.raises(OutputError, match="disk is full") as raised:
        convert(tiny_model(), tmp_path / "out", recipe="fast")
    assert raised.value.where == str(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == (["out.partial"] if at else [])
    monkeypatch.undo()
    convert(tiny_model(), tmp_path / "out", recipe="fast")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
