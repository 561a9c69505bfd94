"""The `quantization_config` of a packed checkpoint, as transformers carries it about."""

from __future__ import annotations

import copy
from typing import Any

from transformers.utils.quantization_config import Mxfp4Config

from zqfp_convert.checkpoint import layout


class ZqfpConfig(Mxfp4Config):  # type: ignore[misc]
    """What `config.json` says of the quantization, and how to load it.

    `from_pretrained(..., quantization_config=ZqfpConfig(dequantize=True))` gives the plain model.
    It has nothing of MXFP4: transformers takes over what a call asks for (`get_loading_attributes`)
    from classes of its own only, and what that one has is `dequantize`.
    """

    def __init__(self, dequantize: bool = False, **stored: Any) -> None:
        """`stored` is the object in `config.json`."""
        super().__init__(dequantize=dequantize)
        self.quant_method = layout.FORMAT
        self.stored = stored | {"quant_method": layout.FORMAT}

    def to_dict(self) -> dict[str, Any]:
        """The object in `config.json`, as it was read."""
        return copy.deepcopy(self.stored)
