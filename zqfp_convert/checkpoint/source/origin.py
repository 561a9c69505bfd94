"""Where a model comes from, as far as strangers may know it: what a checkpoint says of its source.

A repository on the Hub with its revision, or the bare name of a folder; never a path of the machine
that converted it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from zqfp_convert.checkpoint import layout

OF_CARD = ("license", "license_name", "license_link", "language")  # what a copy has to say too
IN_CACHE = re.compile(r"^models--(?P<name>.+)$")  # how the Hub's cache spells a repository
OWN_PATH = re.compile(r"^([/~.\\]|[A-Za-z]:)")


def origin(folder: Path) -> dict[str, Any]:
    """What is known of the model in a folder, as plain JSON values.

    Returns:
        `name`: the repository's, or the folder's own; `repository`: its name on the Hub, or None;
        `revision`: the commit there, or None; `card`: licence and languages by the model's card.
    """
    where = folder.absolute()
    cached = IN_CACHE.match(where.parent.parent.name)
    repository = revision = None
    if cached is not None and where.parent.name == "snapshots":
        repository, revision = cached["name"].replace("--", "/"), where.name
    return {
        "name": repository or where.name,
        "repository": repository,
        "revision": revision,
        "card": _card(folder / layout.CARD),
    }


def without_own_path(config: dict[str, Any]) -> dict[str, Any]:
    """A model's configuration, less the path that it once was loaded from."""
    path = config.get("_name_or_path")
    if isinstance(path, str) and OWN_PATH.match(path):
        return {key: value for key, value in config.items() if key != "_name_or_path"}
    return config


def of_card(data: dict[str, Any]) -> dict[str, Any]:
    """What a copy has to say too of a card's front matter, as far as it is well-formed."""
    return {key: data[key] for key in OF_CARD if _plain(data.get(key))}


def _card(path: Path) -> dict[str, Any]:
    """Licence and languages in the front matter of a model card; empty where there is none."""
    try:
        found = metadata_load(path) if path.is_file() else None
    except Exception:  # of the YAML library: a card that nobody can read says nothing
        return {}
    return of_card(found or {})


def _plain(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(one, str) for one in value)
    return isinstance(value, str) and bool(value)
