"""The model to convert, as it lies in a folder: its configuration, shards and other files.

Everything here is looked at before any work begins.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.dequantized import METHODS, DequantizedShards
from zqfp_convert.checkpoint.shards import Shards, read_json
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
CHUNK = 1 << 17  # numbers looked at together, so that they stay in the cache
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
            raise SourceError(
                str(folder),
                f"no {layout.CONFIG_FILE}",
                needed="a folder with a Hugging Face model",
                do="Check the path, or give the name of a model on the Hub.",
            )
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

    def check_finite(self, names: Iterable[str] | None = None) -> dict[str, int]:
        """Read tensors, all or those named, once and refuse NaN and infinity.

        Returns:
            A checksum of each, by their names.

        Raises:
            SourceError: naming the first tensor that holds one.
        """

        def finite(name: str) -> tuple[bool, int]:
            flat = self.shards.read([name])[name].reshape(-1)
            checksum = 0
            for start in range(0, len(flat), CHUNK):
                part = flat[start : start + CHUNK]
                if part.is_floating_point() and not bool(part.float().isfinite().all()):
                    return False, 0
                checksum = zlib.crc32(part.view(torch.uint8).numpy().data, checksum)
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
        needed="the original weights (float32, float16 or bfloat16), FP8 weights with scales for "
        "blocks (weight_scale_inv), or MXFP4",
        do="Convert the model that this one was made from.",
    )


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
