"""Sources in FP8 blocks and MXFP4: the very values that transformers dequantizes to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import write_model
from dequantized import manifest, read_tensors
from mixtures import QUICK, write_mixture
from safetensors.torch import save_file
from torch import Tensor

import zqfp_convert
from zqfp_convert.checkpoint.source import dequantized
from zqfp_convert.checkpoint.source.dequantized import from_blocks, from_mxfp4
from zqfp_convert.checkpoint.source.source import Source
from zqfp_convert.errors import SourceError
from zqfp_convert.verify import verify

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP8 = torch.float8_e4m3fn


def fp8_blocks(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """An FP8 weight and the scales of its blocks, made one block after the other."""
    down, across = (-(-n // size) for n, size in zip(weight.shape, block, strict=True))
    codes, scales = torch.empty(weight.shape, dtype=FP8), torch.empty(down, across)
    for i in range(down):
        for j in range(across):
            here = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[here].abs().max().float() / 448
            codes[here] = (weight[here].float() / scales[i, j]).to(FP8)
    return codes, scales


def dequantized_blocks(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Element by element, rounded once."""
    weight = torch.empty(codes.shape, dtype=torch.bfloat16)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            scale = scales[i // block[0], j // block[1]]
            weight[i, j] = (codes[i, j].float() * scale).to(torch.bfloat16)
    return weight


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks uint8 `[experts, N, K / 32, 16]` and scales of a weight `[experts, K, N]`."""
    rows = weight.transpose(1, 2).float().unflatten(-1, (-1, 32))  # [experts, N, K / 32, 32]
    exponent = rows.abs().amax(-1).clamp_min(2.0**-100).log2().floor() - 2
    scaled = rows / 2.0 ** exponent[..., None]
    nearest = (scaled.abs()[..., None] - torch.tensor(E2M1)).abs().argmin(-1)
    codes = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (exponent + 127).to(torch.uint8)


def dequantized_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])
    pairs = torch.stack([values[(blocks % 16).long()], values[(blocks // 16).long()]], -1)
    rows = pairs.flatten(-2) * 2.0 ** (scales.float() - 127)[..., None]
    return rows.flatten(-2).transpose(1, 2).to(torch.bfloat16)


@pytest.mark.parametrize("shape", [(32, 48), (40, 56), (16, 16), (5, 3)])
def test_fp8_blocks(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    weight = torch.randn(shape) * torch.logspace(-3, 2, shape[1])
    codes, scales = fp8_blocks(weight, (16, 16))
    have = from_blocks(codes, scales, (16, 16))
    assert have.dtype == torch.bfloat16
    assert torch.equal(have, dequantized_blocks(codes, scales, (16, 16)))


def test_scales_as_exponents_and_several_matrices() -> None:
    torch.manual_seed(1)
    codes = torch.randn(2, 6, 64).to(FP8)
    exponents = torch.randint(110, 130, (2, 6, 2), dtype=torch.uint8)  # MXFP8
    have = from_blocks(codes, exponents, None)
    scales = 2.0 ** (exponents.float() - 127)
    want = [dequantized_blocks(c, s, (1, 32)) for c, s in zip(codes, scales, strict=True)]
    assert torch.equal(have, torch.stack(want))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("block", [None, (16, 16)])
def test_one_scale_for_a_weight(
    shape: tuple[int, ...],
    block: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(1)
    monkeypatch.setattr(dequantized, "ROWS", 16)  # of 40: more than one piece
    codes, scale = torch.randn(40, 56).to(FP8), torch.tensor(0.3).bfloat16()
    want = (codes.float() * scale.float()).to(torch.bfloat16)
    assert torch.equal(from_blocks(codes, scale.reshape(shape), block), want)


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1)])
def test_one_scale_for_each_of_several_matrices(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    codes, scales = torch.randn(3, 8, 24).to(FP8), torch.tensor([0.3, 1.0, 7.0])
    want = [
        (one.float() * scale).to(torch.bfloat16) for one, scale in zip(codes, scales, strict=True)
    ]
    assert torch.equal(from_blocks(codes, scales.reshape(shape), None), torch.stack(want))


def test_fp8_as_transformers_does() -> None:
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    operation = getattr(module, "Fp8Dequantize", None)
    if operation is None or not hasattr(operation, "_dequantize_one"):
        pytest.skip("this transformers dequantizes elsewhere")
    codes, scales = fp8_blocks(torch.randn(64, 96), (32, 32))
    want = operation(None)._dequantize_one(codes, scales, torch.bfloat16)
    assert torch.equal(from_blocks(codes, scales, (32, 32)), want)
    want = operation(None)._dequantize_one(codes, scales[0, 0], torch.bfloat16)
    assert torch.equal(from_blocks(codes, scales[0, 0], None), want)


def test_mxfp4_as_transformers_does() -> None:
    module = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.randint(256, (3, 10, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 150, (3, 10, 2), dtype=torch.uint8)
    want = module.convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    have = from_mxfp4(blocks, scales)
    assert have.shape == (3, 64, 10)
    assert torch.equal(have, want)
    assert torch.equal(have, dequantized_mxfp4(blocks, scales))
    assert torch.equal(from_mxfp4(blocks[1], scales[1]), want[1])


def quantized(
    folder: Path, plain: Path, method: dict[str, object], make: Callable[[str, Tensor], dict]
) -> None:
    """Write a source with some tensors quantized, and one with what they stand for."""
    config = json.loads((plain / "config.json").read_text())
    tensors = read_tensors(plain)
    made = {name: make(name, tensor) for name, tensor in tensors.items()}
    folder.mkdir()
    stored = {key: value for parts in made.values() for key, value in parts["stored"].items()}
    for path in plain.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    save_file(
        {key: value.contiguous() for key, value in stored.items()}, folder / "model.safetensors"
    )
    dense = {name: parts["dense"].contiguous() for name, parts in made.items()}
    save_file(dense, plain / "model.safetensors", metadata={"format": "pt"})


def as_fp8(name: str, tensor: Tensor) -> dict[str, object]:
    if tensor.ndim != 2 or "proj" not in name:
        return {"stored": {name: tensor}, "dense": tensor}
    codes, scales = fp8_blocks(tensor, (16, 16))
    stored = {name: codes, f"{name}_scale_inv": scales}
    return {"stored": stored, "dense": dequantized_blocks(codes, scales, (16, 16))}


def as_static_fp8(name: str, tensor: Tensor) -> dict[str, object]:
    """One scale for a weight, and one for its inputs."""
    if "proj" not in name:
        return {"stored": {name: tensor}, "dense": tensor}
    scale = tensor.abs().max().float() / 448
    codes = (tensor.float() / scale).to(FP8)
    place = name.removesuffix(".weight")
    inputs = f"{place}.activation_scale" if "q_proj" in name else f"{place}.input_scale"
    stored = {name: codes, f"{name}_scale_inv": scale, inputs: torch.tensor(0.5)}
    return {"stored": stored, "dense": (codes.float() * scale).to(torch.bfloat16)}


def as_mxfp4(name: str, tensor: Tensor) -> dict[str, object]:
    if tensor.ndim != 3:
        return {"stored": {name: tensor}, "dense": tensor}
    blocks, scales = mxfp4(tensor)
    stored = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return {"stored": stored, "dense": dequantized_mxfp4(blocks, scales)}


FP8_METHOD = {"quant_method": "fp8", "weight_block_size": [16, 16], "fmt": "e4m3"}
MXFP4_METHOD = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
SOURCES = {
    "deepseek_v3": (FP8_METHOD, as_fp8, {}),
    "gpt_oss": (MXFP4_METHOD, as_mxfp4, {"intermediate_size": 64}),
}


def test_static_scales(tmp_path: Path) -> None:
    """Those of inputs are not carried over: activations have scales for each token."""
    dense = write_model(tmp_path / "dense", dtype=torch.bfloat16)
    method = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
    quantized(tmp_path / "stored", dense, method, as_static_fp8)
    outs = [tmp_path / "a", tmp_path / "b"]
    for folder, out in zip((tmp_path / "stored", dense), outs, strict=True):
        zqfp_convert.convert(folder, out, recipe="fast", **QUICK)
    one, other = (read_tensors(out) for out in outs)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)), name


def test_scales_of_experts_inputs(tmp_path: Path) -> None:
    codes, scales = torch.ones(3, 8, 16).to(FP8), torch.tensor([1.0, 2.0, 3.0])
    tensors = {"e.up": codes, "e.up_scale_inv": scales, "e.up_activation_scale": scales + 1}
    method = {"quant_method": "fp8", "activation_scheme": "static"}
    found = Source(write(tmp_path / "m", method, {**tensors, "x.input_scale": -scales})).shards
    assert found.tensors.keys() == {"e.up", "x.input_scale"}  # this one is of no FP8 weight
    assert torch.equal(found.read(["e.up"])["e.up"][:, 0, 0], scales.bfloat16())
    assert torch.equal(found.read_at("e.up", 2), torch.full((8, 16), 3.0).bfloat16())


@pytest.mark.parametrize("arch", SOURCES)
@pytest.mark.parametrize("recipe", ["fast", "best"])
def test_converts_as_what_it_stands_for(arch: str, recipe: str, tmp_path: Path) -> None:
    method, make, changes = SOURCES[arch]
    dense = write_mixture(tmp_path / "dense", arch, torch.bfloat16, **changes)
    stored = tmp_path / "stored"
    quantized(stored, dense, method, make)
    if recipe == "fast":
        source = Source(stored)
        assert source.shards.tensors.keys() == read_tensors(dense).keys()
        assert source.shards.stored_bytes < Source(dense).shards.stored_bytes
        assert source.shards.stored_bytes == sum(t.nbytes for t in read_tensors(stored).values())
        for name, want in read_tensors(dense).items():
            info = source.shards.tensors[name]
            assert torch.equal(source.shards.read([name])[name], want), name
            assert (info.dtype, info.shape, info.bytes) == ("BF16", tuple(want.shape), want.nbytes)
            assert torch.equal(source.shards.read_at(name, 1), want[1])
    outs = []
    for folder in (stored, dense):
        out = tmp_path / f"{folder.name}-packed"
        done = zqfp_convert.convert(folder, out, recipe=recipe, **QUICK)
        assert done.plan.bytes_before == Source(folder).shards.stored_bytes
        outs.append(out)
    one, other = (read_tensors(out) for out in outs)
    assert one.keys() == other.keys()
    for name in one:
        same = torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
        assert same, name
    assert manifest(outs[0])["layers"] == manifest(outs[1])["layers"]
    config = json.loads((outs[0] / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "zqfp"
    verify(outs[0], stored)
    model = zqfp_convert.load(outs[0], device="cpu")
    assert model(torch.arange(4, 12)[None]).logits.isfinite().all()


def write(folder: Path, method: dict[str, object], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"model_type": "llama", "quantization_config": method}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


CODES = torch.ones(20, 40).to(FP8)
BLOCKS = torch.zeros(2, 3, 4, 16, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("method", "tensors", "found"),
    [
        (FP8_METHOD, {"a.weight": CODES}, "no scales"),
        (FP8_METHOD, {"a.weight": CODES, "a.weight_scale_inv": torch.ones(3, 7)}, "scales [3, 7]"),
        (FP8_METHOD, {"a.weight": CODES, "a.weight_scale_inv": torch.ones(2)}, "scales [2]"),
        (FP8_METHOD, {"a.weight": CODES[None], "a.weight_scale_inv": torch.ones(2)}, "scales [2]"),
        (FP8_METHOD, {"a.weight": CODES[0], "a.weight_scale_inv": torch.ones(())}, "scales []"),
        (MXFP4_METHOD, {"a_blocks": BLOCKS, "a_scales": BLOCKS[0, :, :, 0]}, "scales U8 [3, 4]"),
        (MXFP4_METHOD, {"a_blocks": BLOCKS[..., :8], "a_scales": BLOCKS[..., 0]}, "[2, 3, 4, 8]"),
        (MXFP4_METHOD, {"a_blocks": BLOCKS.float(), "a_scales": BLOCKS[..., 0]}, "F32"),
        (FP8_METHOD, {"a.weight": torch.ones(3, 3)}, "already quantized (fp8)"),
        ({"quant_method": "fbgemm_fp8"}, {"a.weight": CODES}, "already quantized (fbgemm_fp8)"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(
    method: dict[str, object], tensors: dict[str, Tensor], found: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError) as raised:
        Source(write(tmp_path / "m", method, {k: v.contiguous() for k, v in tensors.items()}))
    assert found in raised.value.found
