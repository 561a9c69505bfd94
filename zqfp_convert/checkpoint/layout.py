"""How a packed checkpoint is spelled on disk: the only file that knows these names.

The normative text is `formats/zqfp-1.md`.
"""

from __future__ import annotations

FORMAT = "zqfp"
FORMAT_VERSION = 1
KNOWN_FEATURES = ("lorc", "input_offset", "codebooks")

CONFIG_FILE = "config.json"
CONFIG_KEY = "quantization_config"
MANIFEST_FILE = "zqfp_manifest.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_SHARD = "model.safetensors"
CARD = "README.md"
REPORT_PAGE = "report.html"
REPORT_PICTURE = "report.png"
EVALUATION_FILE = "zqfp_evaluation.json"

WEIGHT = ".weight"
BIAS = ".bias"
PACKED = ".weight_packed"
SCALE = ".weight_scale"
ROW_SCALE = ".weight_row_scale"
CODEBOOK = ".weight_codebook"
LORC_A = ".lorc_A"
LORC_B = ".lorc_B"
LORC_SCALE = ".lorc_scale"
INPUT_OFFSET = ".input_offset"

PACKED_SUFFIXES = (
    PACKED,
    SCALE,
    ROW_SCALE,
    CODEBOOK,
    LORC_A,
    LORC_B,
    LORC_SCALE,
    INPUT_OFFSET,
)

E8M0_BIAS = 127
E8M0_FORBIDDEN = 255
RANKS = 8  # ranks below the largest that a layer may have are multiples of it


def shard_file(number: int, of: int) -> str:
    """The file name of shard `number` (from 1) of `of`."""
    return SINGLE_SHARD if of == 1 else f"model-{number:05d}-of-{of:05d}.safetensors"


def layer_of(tensor: str) -> str | None:
    """The quantized layer that a tensor's name belongs to by its ending, or None."""
    for suffix in PACKED_SUFFIXES:
        if tensor.endswith(suffix):
            return tensor.removesuffix(suffix)
    return None
