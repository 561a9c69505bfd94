"""`save_pretrained` of a packed model: what transformers writes, and the manifest after it.

transformers asks a quantizer for tensors, but not for files; so the method itself is put around.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.description import manifest
from zqfp_convert.checkpoint.output.disk import sha256
from zqfp_convert.checkpoint.shards import read_index
from zqfp_convert.errors import OptionError


class Saver:
    """A packed model's `save_pretrained`; copied and pickled with its model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __call__(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As transformers', and the manifest; where adapters are saved instead, just as there.

        Raises:
            OptionError: for `push_to_hub`, or a variant, which the format has no names for.
        """
        _check(kwargs)
        model, folder = self._model, Path(save_directory)
        whole = not model._hf_peft_config_loaded and kwargs.get("is_main_process", True)
        for stale in (layout.MANIFEST_FILE, layout.INDEX_FILE) if whole else ():
            (folder / stale).unlink(missing_ok=True)
        type(model).save_pretrained(model, save_directory, *args, **kwargs)
        if not whole:
            return
        files = [layout.SINGLE_SHARD]
        if (folder / layout.INDEX_FILE).is_file():
            files = sorted(set(read_index(folder).values()))
            (folder / layout.SINGLE_SHARD).unlink(missing_ok=True)  # readers would take it first
        shards = {
            file: {"size": (folder / file).stat().st_size, "sha256": sha256(folder / file)}
            for file in files
        }
        was = model.hf_quantizer.manifest
        text = json.dumps(manifest(shards, was["layers"], was["changed"]), indent=2)
        (folder / layout.MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def _check(kwargs: dict[str, Any]) -> None:
    pushed, variant = kwargs.get("push_to_hub"), kwargs.get("variant")
    if pushed or variant is not None:
        raise OptionError(
            "save_pretrained",
            "push_to_hub" if pushed else f"variant {variant!r}",
            needed="a folder, and files without a variant",
            do="model.push_to_hub('USER/NAME') uploads a packed checkpoint."
            if pushed
            else "Leave the variant away.",
        )
