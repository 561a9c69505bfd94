"""From what a user types for a model to a folder on this machine, by way of the Hub's cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
)

from zqfp_convert.checkpoint.source import PICKLED
from zqfp_convert.errors import SourceError

NOT_NEEDED = [
    *(f"*{suffix}" for suffix in (*PICKLED, ".h5", ".msgpack", ".gguf", ".onnx", ".ot")),
    "original/*",  # second copies of the weights, in their authors' own layouts
    "consolidated*",
]


def fetch(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: the path itself if it is one, else downloaded from the Hub.

    `HF_HUB_OFFLINE`, `HF_TOKEN` and the cache's settings are those of `huggingface_hub`.

    Raises:
        SourceError: neither a folder nor a repository that can be read.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    name = str(model)
    if isinstance(model, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SourceError(
            name,
            "a file" if path.exists() else "no such folder",
            needed="a model folder, or a repository's name on the Hub (USER/NAME)",
            do="Check the path.",
        )
    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=NOT_NEEDED))
    except GatedRepoError as error:
        raise SourceError(
            name,
            "a gated repository",
            needed="access granted to your account, and your token",
            do=f"Accept its terms on the Hub's page of {name}, then run 'hf auth login' or set "
            "HF_TOKEN.",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SourceError(
            name,
            "neither a folder here nor a repository that the Hub shows you",
            needed="a model folder, or a repository's name on the Hub (USER/NAME)",
            do="Check the spelling; for a private repository run 'hf auth login'.",
        ) from error
    except Exception as error:  # of the transport, of many unrelated kinds
        raise SourceError(
            name,
            f"no such folder here; cannot be downloaded, and is not whole in the cache "
            f"({type(error).__name__})",
            needed="a model folder, or a name on the Hub and a connection to it",
            do="Check the path; for a name on the Hub check the network and HF_HUB_OFFLINE.",
        ) from error


def cached(repository: str, revision: str | None = None) -> Path | None:
    """The folder of a repository as it lies in the Hub's cache, or None; the network is let be."""
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                ignore_patterns=NOT_NEEDED,
                local_files_only=True,
            )
        )
    except Exception:  # of many unrelated kinds: it is not there, then
        return None
