"""The model to convert, as it lies in a folder: its configuration, shards and other files.

Everything here is looked at before any work begins.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.shards import Shards, read_json
from zqfp_convert.checkpoint.source.dequantized import METHODS, DequantizedShards
from zqfp_convert.errors import SourceError

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OTHER_WEIGHTS = (
    ".safetensors",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".tflite",
    ".ot",
)
ADAPTER = "adapter_config.json"  # of peft
# Bytes of a tensor that are read and looked at together: they stay in the cache, and are enough for
# threads not to wait for the interpreter's lock most of the time.
PIECE = 1 << 21
EXPONENTS = {  # all bits of it are set in infinity and NaN alone (IEEE 754, section 3.4)
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F80_0000),
}
REWRITTEN = (layout.CONFIG_FILE, layout.INDEX_FILE, layout.MANIFEST_FILE)


class Source:
    """A model folder that can be converted."""

    def __init__(self, folder: Path) -> None:
        """Open a folder and check its configuration and the headers of its shards.

        Raises:
            SourceError: no model here, pickled weights only, or already quantized.
            CheckpointError: a damaged shard or index.
        """
        self.folder = folder
        if not (folder / layout.CONFIG_FILE).is_file():
            raise _no_model(folder)
        self.config: dict[str, Any] = read_json(
            folder / layout.CONFIG_FILE, "bad-config", constants=True
        )
        method, block = _quantization(folder, self.config)
        _refuse_pickled(folder)
        self.shards: Shards = Shards.open(folder)
        if method is not None:
            dequantized = DequantizedShards(self.shards, block)
            if dequantized.quantized == 0:
                raise _quantized(folder, method)
            self.shards = dequantized
            for config in (self.config, self.config.get("text_config")):
                if isinstance(config, dict):
                    config.pop(layout.CONFIG_KEY, None)

    def other_files(self) -> list[Path]:
        """As the function of that name, of this folder."""
        return other_files(self.folder)

    def code_files(self) -> list[Path]:
        """Python files of the model's author: carried over, never run."""
        return [path for path in self.other_files() if path.suffix == ".py"]

    def check_finite(
        self, names: Iterable[str] | None = None, stopped: Event | None = None
    ) -> dict[str, int]:
        """Read tensors, all or those named, once and refuse NaN and infinity.

        Returns:
            A checksum of each, by their names; of no use once `stopped` is set, when no more are
            read.

        Raises:
            SourceError: naming the first tensor that holds one.
        """

        def finite(name: str) -> tuple[bool, int]:
            if stopped is not None and stopped.is_set():
                return True, 0
            checksum = 0
            for piece in self.shards.pieces(name, PIECE):
                checksum = zlib.crc32(piece.view(torch.uint8).numpy().data, checksum)
                if not _is_finite(piece):
                    return False, 0
            return True, checksum

        names = sorted(self.shards.tensors) if names is None else list(names)
        checksums: dict[str, int] = {}
        with ThreadPoolExecutor(4) as pool:
            found = zip(names, pool.map(finite, names), strict=True)
            for name, (is_finite, checksum) in found:
                checksums[name] = checksum
                if not is_finite:
                    raise SourceError(
                        name,
                        f"NaN or infinity in {self.shards.tensors[name].file}",
                        needed="finite weights",
                        do="The model is damaged: download it again, or ask its authors.",
                    )
        return checksums


def _is_finite(numbers: Tensor) -> bool:
    """Whether there is neither NaN nor infinity among numbers `[n]` on the CPU; these are lost."""
    if numbers.dtype not in EXPONENTS:
        return not numbers.is_floating_point() or bool(numbers.float().isfinite().all())
    words, exponent = EXPONENTS[numbers.dtype]
    # By numpy, which works in this thread alone: torch would start as many as there are cores.
    bits = numbers.view(words).numpy()
    bits &= exponent
    return int(bits.max(initial=0)) < exponent


def other_files(folder: Path) -> list[Path]:
    """Files to carry over, relative to the folder: all that are no weights and not hidden.

    Nor the model card, which is about another model than the one that is made of this.
    """
    return [
        path
        for path in sorted(p.relative_to(folder) for p in folder.rglob("*"))
        if (folder / path).is_file()
        and not any(part.startswith(".") for part in path.parts)
        and path.suffix not in (*PICKLED, *OTHER_WEIGHTS)
        and not path.name.endswith(".index.json")
        and str(path) not in REWRITTEN
        and str(path).lower() != layout.CARD.lower()
    ]


def fingerprint(checksums: Mapping[str, int]) -> str:
    """What tells weights of these checksums from others, whatever files they lie in."""
    lines = (f"{name} {checksum}\n" for name, checksum in sorted(checksums.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _quantization(
    folder: Path, config: dict[str, Any]
) -> tuple[str | None, tuple[int, int] | None]:
    """How the source is quantized, in a way that can be read, and the shape of its blocks.

    Raises:
        SourceError: quantized in another way.
    """
    quantization = config.get(layout.CONFIG_KEY)
    if quantization is None and isinstance(config.get("text_config"), dict):
        quantization = config["text_config"].get(layout.CONFIG_KEY)
    if quantization is None:
        return None, None
    if not isinstance(quantization, dict):
        raise _quantized(folder, None)
    method = quantization.get("quant_method")
    if method is None:  # bitsandbytes did not write its name at first
        early = any(key.startswith("load_in_") for key in quantization)
        raise _quantized(folder, "bitsandbytes" if early else None)
    if method not in METHODS:
        raise _quantized(folder, str(method))
    block = quantization.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2:
        return method, None
    whole = all(type(extent) is int and extent > 0 for extent in block)
    return method, (block[0], block[1]) if whole else None


def _quantized(folder: Path, method: str | None) -> SourceError:
    return SourceError(
        str(folder / layout.CONFIG_FILE),
        f"the model is already quantized ({method or 'unknown method'})",
        needed="the original weights (float32, float16 or bfloat16), FP8 weights with their "
        "scales (weight_scale_inv), or MXFP4",
        do="Convert the model that this one was made from.",
    )


def _no_model(folder: Path) -> SourceError:
    """The error for a folder without a configuration, by what else is there."""
    found, do = (
        f"no {layout.CONFIG_FILE}",
        "Check the path, or give the name of a model on the Hub.",
    )
    within = sorted(path.parent for path in folder.glob(f"*/{layout.CONFIG_FILE}"))
    if not folder.is_dir():
        found = "no such folder"
    elif (folder / ADAPTER).is_file():
        found = f"a LoRA adapter ({ADAPTER})"
        do = "Merge it into its model first (merge_and_unload() of peft), and convert what you get."
    elif any(folder.glob("*.gguf")):
        found = f"GGUF files, and no {layout.CONFIG_FILE}"
        do = "Convert the model that they were made from."
    elif within:
        do = f"Give the folder of the model itself, such as {within[0]}."
    return SourceError(str(folder), found, needed="a folder with a Hugging Face model", do=do)


def _refuse_pickled(folder: Path) -> None:
    if (folder / layout.SINGLE_SHARD).is_file() or (folder / layout.INDEX_FILE).is_file():
        return
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        raise SourceError(
            str(folder / pickled[0]),
            "pickled weights, which can run code when they are opened",
            needed=f"{layout.SINGLE_SHARD} or {layout.INDEX_FILE}",
            do="Convert them where you trust them: load with transformers and call "
            "save_pretrained(), which writes safetensors.",
        )
    raise SourceError(
        str(folder),
        "no weights",
        needed=f"{layout.SINGLE_SHARD} or {layout.INDEX_FILE}",
        do="Download the model's safetensors files.",
    )
