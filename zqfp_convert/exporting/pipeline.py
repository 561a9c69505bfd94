"""`export`: from a packed checkpoint to a folder that another program reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from zqfp_convert import __version__
from zqfp_convert.checkpoint.output.partial import CHECKPOINT, Partial, check_room, partial_folder
from zqfp_convert.checkpoint.source import hub
from zqfp_convert.errors import OptionError, OutputError, Stopped
from zqfp_convert.exporting import adapter, card, compressed_tensors, dense, folder, spans
from zqfp_convert.exporting.opened import Opened

TARGETS = ("compressed-tensors", "bf16", "gguf")
SPARE = 64 << 20  # bytes, for what is not tensors


@dataclass(frozen=True)
class Export:
    """What came out.

    Attributes:
        dest: the folder.
        to: the format.
        layers: how many layers it has that were packed.
        bytes: of all files in the folder.
        adapter: the LoRA adapter with the low-rank compensation, or None.
        wide: for `compressed-tensors`: sets of layers that are multiplied at once and whose span is
            above 11, with it; vLLM's kernel for Hopper quantizes their smallest groups again.
    """

    dest: Path
    to: str
    layers: int
    bytes: int
    adapter: Path | None
    wide: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "dest": str(self.dest),
            "to": self.to,
            "layers": self.layers,
            "bytes": self.bytes,
            "adapter": None if self.adapter is None else str(self.adapter),
            "wide": self.wide,
        }


@torch.no_grad()
def export(
    checkpoint: str | Path,
    dest: str | Path,
    to: str = "compressed-tensors",
    *,
    resume: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Export:
    """Write a packed checkpoint in the format of other programs.

    `compressed-tensors`: MXFP4 weights with FP8 activations, for transformers and vLLM; the very
    weights, so E2M1 codes whose scales are powers of two, in groups of multiples of 32, are needed.
    Low-rank compensation becomes a LoRA adapter of PEFT in the folder `lorc-adapter` inside.
    `bf16`: a plain checkpoint, weights dequantized, compensation merged. `gguf`: MXFP4 for
    llama.cpp, of architectures like Llama's; needs the package `gguf`.

    Args:
        checkpoint: a packed checkpoint's folder, or a repository on the Hub.
        dest: the folder to make; it appears when it is whole.
        to: one of `TARGETS`.
        resume: whether to go on from what a run that was stopped has left.
        progress: called with what is being done, and how many of how many are done.

    Raises:
        CheckpointError: the checkpoint breaks a rule of its format, or its files are damaged.
        SourceError: it cannot be spelled in that format; says which conversion can.
        OptionError: no such format.
        OutputError: `dest` exists, or cannot be written, or there is too little room.
        Stopped: (a KeyboardInterrupt) by Ctrl-C, with work done that can be gone on with.
    """
    dest = Path(dest)
    if to not in TARGETS:
        raise OptionError("to", repr(to), needed="one of " + ", ".join(TARGETS), do="Give another.")
    if dest.exists() or dest.is_symlink():
        raise OutputError(str(dest), "exists", needed="a new folder", do="Give another DEST.")
    source = hub.fetch(checkpoint)
    if source.resolve() in dest.resolve().parents:
        raise OutputError(
            str(dest),
            "lies in the checkpoint",
            needed="a folder beside it",
            do="Give another DEST.",
        )
    opened = Opened(source)
    shards = opened.checkpoint.manifest["shards"]
    of = {file: entry["sha256"] for file, entry in shards.items()}
    identity = {"export": to, "program": __version__, "checkpoint": of}
    report = progress or (lambda text, done, total: None)
    if to == "gguf":
        return _to_gguf(opened, dest, identity, report, resume=resume)
    contents = dense.contents(opened) if to == "bf16" else compressed_tensors.contents(opened)
    check_room(dest, sum(piece.bytes for piece in contents.pieces) + SPARE)
    try:
        with Partial(dest, identity, resume=resume) as partial:
            noted = folder.write(partial, opened.folder, contents, report)
    except KeyboardInterrupt:
        if partial_folder(dest).exists():
            raise Stopped(
                f"Stopped. What is done is in {partial_folder(dest)}; the same export goes on "
                "from there."
            ) from None
        raise
    wide = spans.wide({name: (low, high) for name, (low, high) in noted.items()})
    return _result(opened, dest, to, None if contents.adapter is None else adapter.FOLDER, wide)


def _to_gguf(
    opened: Opened, dest: Path, identity: dict[str, Any], report: folder.Report, *, resume: bool
) -> Export:
    if find_spec("gguf") is None:
        raise OptionError(
            "to",
            "'gguf', and the package gguf is not installed",
            needed="that package, which knows the format",
            do="pip install 'zqfp-convert[gguf]', or pip install gguf.",
        )
    from zqfp_convert.exporting.llama_cpp import file

    plan = file.Plan(opened, dest.name)
    check_room(dest, plan.bytes + SPARE)
    with Partial(dest, identity, resume=resume) as partial:
        made = partial.folder / CHECKPOINT
        plan.write(made / f"{dest.name}-mxfp4.gguf", report)
        text = card.of(opened, "gguf", adapted=bool(plan.ranks))
        folder.write_terms(made, opened.folder, text)
        partial.give_name()
    return _result(opened, dest, "gguf", file.ADAPTER if plan.ranks else None, {})


def _result(
    opened: Opened, dest: Path, to: str, adapter: str | None, wide: dict[str, int]
) -> Export:
    size = sum(path.stat().st_size for path in dest.rglob("*") if path.is_file())
    beside = None if adapter is None else dest / adapter
    return Export(dest, to, len(opened.checkpoint.layers), size, beside, wide)
