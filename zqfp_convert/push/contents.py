"""The files of a repository: those of the checkpoint, its card, its picture, its figures."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import ModelCard

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.reader import PackedCheckpoint
from zqfp_convert.push.card import card
from zqfp_convert.report import evaluated, picture
from zqfp_convert.report.facts import Facts

# What transformers writes beside a model: a manifest of `save_pretrained` lists no other files.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*",
    "processor_config.json",
    "preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True)
class File:
    """A file for the repository: its path there, where its bytes are, and what is known of them."""

    path: str
    content: Path | bytes
    size: int
    sha256: str | None = None

    @property
    def is_shard(self) -> bool:
        """Whether it holds weights, whose hash the manifest knows."""
        return self.sha256 is not None

    def bytes(self) -> bytes:
        """All of it."""
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


@dataclass(frozen=True)
class Contents:
    """What a repository is to hold.

    Attributes:
        files: all of it, shards first.
        left_out: what else lies in the checkpoint's folder, and is nobody's business.
        pictured: whether there is a picture.
        unnamed: what the card does not say, as options that would: `base_model`, `license`.
    """

    files: list[File]
    left_out: list[str]
    pictured: bool
    unnamed: list[str]


def contents(
    packed: PackedCheckpoint,
    repository: str,
    *,
    evaluation: Path | None = None,
    base_model: str | None = None,
    license_name: str | None = None,
) -> Contents:
    """Work out what a repository is to hold; nothing is written.

    Raises:
        OptionError: the evaluation cannot be read or is of another checkpoint.
    """
    figures = evaluated.read(packed, evaluation)
    facts = Facts.of(packed, repository.rpartition("/")[2], figures)
    source = facts.quantization["source"] or {}
    drawn = _picture(facts) if picture.available() else None
    text = card(
        facts,
        repository,
        base_model=base_model or source.get("repository"),
        license_name=license_name,
        picture=drawn is not None,
    )
    made: dict[str, bytes] = {layout.CARD: text.encode()}
    if drawn is not None:
        made[layout.REPORT_PICTURE] = drawn
    if figures is not None:
        made[layout.EVALUATION_FILE] = (json.dumps(figures, indent=1) + "\n").encode()

    shards = packed.manifest["shards"]
    files = [File(n, packed.folder / n, shards[n]["size"], shards[n]["sha256"]) for n in shards]
    others = [layout.INDEX_FILE, layout.MANIFEST_FILE, *packed.manifest.get("files", ())]
    there = {
        path.relative_to(packed.folder).as_posix(): path
        for path in sorted(packed.folder.rglob("*"))
        if path.is_file()
    }
    others += [name for name in there if any(fnmatch(name, kind) for kind in COMPANIONS)]
    others.append(layout.CONFIG_FILE)  # last of all: without it nothing loads
    for name in dict.fromkeys(others):
        if name not in made and name in there:  # a manifest may name what is outside
            files.append(File(name, there[name], there[name].stat().st_size))
    files += [File(name, data, len(data)) for name, data in made.items()]

    known = {file.path for file in files} | {layout.REPORT_PAGE, layout.REPORT_PICTURE}
    data = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    unnamed = [key for key in ("base_model", "license") if key not in data]
    left_out = [name for name in there if name not in known]
    return Contents(files, left_out, drawn is not None, unnamed)


def _picture(facts: Facts) -> bytes:
    with tempfile.TemporaryDirectory(prefix="zqfp-") as folder:
        path = Path(folder) / layout.REPORT_PICTURE
        picture.draw(facts, path)
        return path.read_bytes()
