"""`save_pretrained` of a packed model: what transformers writes, and the manifest after it.

transformers asks a quantizer for tensors, but not for files; so the method itself is put around.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import MethodType
from typing import Any

from transformers import PreTrainedModel

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.description import manifest
from zqfp_convert.checkpoint.disk import sha256
from zqfp_convert.checkpoint.shards import read_index
from zqfp_convert.errors import OptionError


def attach(model: PreTrainedModel) -> None:
    """Have the model's `save_pretrained` write a whole packed checkpoint."""
    model.save_pretrained = MethodType(save_pretrained, model)


def detach(model: PreTrainedModel) -> None:
    """Give the model its own `save_pretrained` back."""
    del model.save_pretrained


def save_pretrained(
    self: PreTrainedModel, save_directory: str | Path, *args: Any, **kwargs: Any
) -> None:
    """As transformers', for a packed model.

    Raises:
        OptionError: for `push_to_hub`, or files that the format has no names for.
    """
    if kwargs.get("push_to_hub") or kwargs.get("variant") is not None:
        raise OptionError(
            "save_pretrained",
            "push_to_hub" if kwargs.get("push_to_hub") else f"variant {kwargs['variant']!r}",
            needed="a plain folder to save to",
            do="Use model.push_to_hub('USER/NAME'), which uploads a packed checkpoint."
            if kwargs.get("push_to_hub")
            else "Leave the variant away.",
        )
    folder = Path(save_directory)
    (folder / layout.MANIFEST_FILE).unlink(missing_ok=True)  # until the rest is whole again
    type(self).save_pretrained(self, save_directory, *args, **kwargs)
    if self._hf_peft_config_loaded or not kwargs.get("is_main_process", True):
        return
    indexed = (folder / layout.INDEX_FILE).is_file()
    files = sorted(set(read_index(folder).values())) if indexed else [layout.SINGLE_SHARD]
    shards = {
        file: {"size": (folder / file).stat().st_size, "sha256": sha256(folder / file)}
        for file in files
    }
    ours = self.hf_quantizer.manifest
    text = json.dumps(manifest(shards, ours["layers"], ours["changed"]), indent=2)
    (folder / layout.MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
