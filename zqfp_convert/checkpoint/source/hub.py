"""From what a user types for a model to a folder on this machine, by way of the Hub's cache."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
)

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.shards import read_index
from zqfp_convert.checkpoint.source.source import PICKLED
from zqfp_convert.errors import SourceError, ZqfpError

NOT_NEEDED = [
    *(f"*{suffix}" for suffix in (*PICKLED, ".h5", ".msgpack", ".gguf", ".onnx", ".ot")),
    "original/*",  # second copies of the weights, in their authors' own layouts
    "consolidated*",
]
HEADERS_AT_ONCE = 8  # of shards, read over the network


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
    if "://" in name:
        raise SourceError(
            name,
            "an address",
            needed="a model folder, or a repository's name on the Hub (USER/NAME)",
            do=_instead(name),
        )
    is_path = isinstance(model, Path) or name.startswith((".", "/", "~"))
    if is_path or path.exists() or name.count("/") > 1:
        raise SourceError(
            name,
            "a file" if path.exists() else "no such folder",
            needed="a model folder, or a repository's name on the Hub (USER/NAME)",
            do="Give the folder that it lies in." if path.exists() else "Check the path.",
        )
    with _told(name):
        return Path(snapshot_download(name, revision=revision, ignore_patterns=NOT_NEEDED))


def _instead(address: str) -> str:
    """What to give instead of the address of a page."""
    parts = urlsplit(address).path.strip("/").split("/")
    of_hub = urlsplit(address).netloc == urlsplit(constants.ENDPOINT).netloc
    if not of_hub or len(parts) < 2:
        return "Download it, and give the folder; of the Hub give USER/NAME."
    revision = f" --revision {parts[3]}" if parts[2:3] == ["tree"] and len(parts) == 4 else ""
    return f"Give {parts[0]}/{parts[1]}{revision}."


@contextmanager
def to_plan(model: str | Path, revision: str | None = None) -> Iterator[Path]:
    """The folder of a model as `fetch` gives it, but of a repository the weights stay on the Hub.

    Their files are as long as there and have their headers, which are read over the network; behind
    these are holes. The folder goes with the context.

    Raises:
        SourceError: as `fetch`.
    """
    name = str(model)
    if Path(model).expanduser().exists() or name.startswith((".", "/", "~")) or "://" in name:
        yield fetch(model)
        return
    with tempfile.TemporaryDirectory(prefix="zqfp-plan-") as above:
        with _told(name):
            ignored = [*NOT_NEEDED, "*.safetensors"]
            there = Path(snapshot_download(name, revision=revision, ignore_patterns=ignored))
            # As the Hub's cache spells it, so that it is known where this comes from.
            folder = Path(above) / there.parent.parent.name / there.parent.name / there.name
            shutil.copytree(there, folder, ignore=shutil.ignore_patterns(*ignored))
            with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
                one = partial(_write_header, name, there.name, folder)
                list(pool.map(one, sorted(_shards(folder))))
        yield folder


def is_here(model: str | Path, revision: str | None = None) -> bool:
    """Whether `fetch` has no weights to download."""
    if Path(model).expanduser().exists():
        return True
    folder = cached(str(model), revision)
    return folder is not None and all((folder / file).is_file() for file in _shards(folder))


def _shards(folder: Path) -> set[str]:
    """The names of the files of weights, which need not be there."""
    index = folder / layout.INDEX_FILE
    return set(read_index(folder).values()) if index.is_file() else {layout.SINGLE_SHARD}


def _write_header(name: str, revision: str, folder: Path, file: str) -> None:
    """Write a shard that has its header and its length, and no data."""
    try:
        found = HfApi().parse_safetensors_file_metadata(name, file, revision=revision)
    except EntryNotFoundError:
        return  # who reads the folder says that it is missing
    tensors = {
        tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
        for tensor, info in found.tensors.items()
    }
    header = json.dumps({"__metadata__": found.metadata, **tensors}).encode()
    end = max((info.data_offsets[1] for info in found.tensors.values()), default=0)
    with (folder / file).open("wb") as shard:
        shard.write(len(header).to_bytes(8, "little") + header)
        shard.truncate(8 + len(header) + end)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turns what the Hub's client raises into a `SourceError`."""
    try:
        yield
    except ZqfpError:
        raise
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
