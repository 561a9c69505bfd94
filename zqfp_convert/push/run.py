"""Uploads a checkpoint to the Hub, in commits that another run can go on from.

What the repository has already is found by its hashes, so nothing is kept on this machine, and
nothing is sent twice: not a file of an earlier commit, and not a shard that was uploaded before its
commit was made. Each call is one of `huggingface_hub`'s: `create_repo`, `list_repo_tree`,
`preupload_lfs_files` and `create_commit`, as its own upload of large folders makes them.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from zqfp_convert.checkpoint.reader import PackedCheckpoint
from zqfp_convert.errors import OptionError, OutputError
from zqfp_convert.push.contents import Contents, File, contents
from zqfp_convert.push.refusals import LOGIN, told

MESSAGE = "Checkpoint made by zqfp-convert"
BY_THE_HUB = (".gitattributes",)  # in every repository
IN_A_COMMIT, BYTES_IN_A_COMMIT = 50, 20 << 30  # the most
AT_ONCE = 5  # shards that are uploaded together
Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes done so far, and their total."""


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        url: of the repository.
        created: whether it is new.
        sent: files that were sent; there: that the repository had already.
        removed: files of something else that it held before.
        left_out: files of the checkpoint's folder that are no part of the checkpoint.
        pictured: whether the card has a picture.
        unnamed: what the card does not say: `base_model`, `license`.
    """

    url: str
    created: bool
    sent: list[str]
    there: list[str]
    removed: list[str]
    left_out: list[str]
    pictured: bool
    unnamed: list[str]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def check(repository: str, *, private: bool = False, overwrite: bool = False) -> None:
    """Find out, before hours of work, whether a push has a chance; changes nothing on the Hub.

    Raises:
        OptionError: not a repository's name.
        OutputError: no token, none that may write there, the name is taken, or no connection.
    """
    _check_name(repository)
    with told(repository, "Nothing has been done yet."):
        api = HfApi()
        _check_rights(api, repository)
        if (held := _held(api, repository)) is None:
            return
        _check_privacy(api, repository, private=private)
        if not overwrite and set(held) - set(BY_THE_HUB):
            raise _taken(repository, sorted(set(held) - set(BY_THE_HUB))[0])


def push(
    checkpoint: str | Path,
    repository: str,
    *,
    private: bool = False,
    overwrite: bool = False,
    evaluation: str | Path | None = None,
    base_model: str | None = None,
    license_name: str | None = None,
    progress: Progress | None = None,
) -> Pushed:
    """Upload a packed checkpoint to the Hub, with a model card made of what it has on record.

    The token is that of `HF_TOKEN` or of `hf auth login`. Called again after it was interrupted, it
    sends what is missing.

    Args:
        checkpoint: the folder; nothing in it changes.
        repository: `USER/NAME`; is made if there is none.
        private: whether it is to be private.
        overwrite: whether it may hold something else, which is replaced then.
        evaluation: what `evaluate --json` wrote; by default what a report has kept in the folder.
        base_model: the repository of the original; by default the one on record.
        license_name: the Hub's identifier of a licence; by default that of the original's card.
        progress: called as work goes on.

    Raises:
        OptionError: not a folder, not a repository's name, or not an evaluation of this checkpoint.
        CheckpointError: the checkpoint breaks a rule of its format.
        OutputError: the Hub or the network does not let it; the message says what to do.
    """
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        raise OptionError(
            str(checkpoint),
            "no such folder",
            needed="the folder of a packed checkpoint",
            do="Check the path.",
        )
    _check_name(repository)
    if base_model is not None:
        _check_name(base_model)
    packed = PackedCheckpoint(folder)
    wanted = contents(
        packed,
        repository,
        evaluation=None if evaluation is None else Path(evaluation).expanduser(),
        base_model=base_model,
        license_name=license_name,
    )
    again = ["zqfp-convert", "push", str(checkpoint), repository]
    given = {"evaluation": evaluation, "base-model": base_model, "license": license_name}
    again += [f"--{name}={value}" for name, value in given.items() if value is not None]
    again += ["--private"] * private + ["--overwrite"] * overwrite
    safe = (
        f"The checkpoint in {folder} is whole, and what is uploaded stays. Go on with:\n  "
        + shlex.join(again)
    )
    silent = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with told(repository, safe):
            report = progress or (lambda text, done, total: None)
            return _push(wanted, repository, private, overwrite, report)
    finally:
        if not silent:
            enable_progress_bars()


def _push(
    wanted: Contents, repository: str, private: bool, overwrite: bool, report: Progress
) -> Pushed:
    api = HfApi()
    _check_rights(api, repository)
    created = _create(api, repository, private=private)
    held: dict[str, RepoFile] = {} if created else _held(api, repository) or {}
    foreign = _foreign(wanted.files, held)
    if foreign and not overwrite:
        raise _taken(repository, foreign[0])
    missing = [file for file in wanted.files if not _same(held.get(file.path), file)]
    paths = {file.path for file in wanted.files}
    stale = [path for path in foreign if path not in paths]
    parts = _commits(missing) or ([[]] if stale else [])
    total, done = sum(file.size for file in missing), 0
    for number, part in enumerate(parts, 1):
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        for start in range(0, len(part), AT_ONCE):
            together = part[start : start + AT_ONCE]
            report(f"uploading {together[0].path}", done, total)
            additions = [_addition(file) for file in together]
            api.preupload_lfs_files(repository, additions, free_memory=False)
            operations += additions
            done += sum(file.size for file in together)
        if number == len(parts):
            operations += [CommitOperationDelete(path) for path in stale]
        of = f", part {number} of {len(parts)}" if len(parts) > 1 else ""
        report(f"commit {number} of {len(parts)}", done, total)
        api.create_commit(repository, operations, commit_message=f"{MESSAGE}{of}")
    sent = [file.path for file in missing]
    return Pushed(
        url=f"{api.endpoint}/{repository}",
        created=created,
        sent=sent,
        there=sorted(paths - set(sent)),
        removed=stale,
        left_out=wanted.left_out,
        pictured=wanted.pictured,
        unnamed=wanted.unnamed,
    )


def _commits(files: Sequence[File]) -> list[list[File]]:
    """Files of each commit, in their order; what is no shard is in the last one."""
    parts: list[list[File]] = []
    room = 0
    for file in files:
        if not parts or (file.is_shard and (file.size > room or len(parts[-1]) >= IN_A_COMMIT)):
            parts.append([])
            room = BYTES_IN_A_COMMIT
        parts[-1].append(file)
        room -= file.size
    return parts


def _addition(file: File) -> CommitOperationAdd:
    content = file.content if isinstance(file.content, bytes) else str(file.content)
    return CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=content)


def _same(held: RepoFile | None, file: File) -> bool:
    """Whether a repository has a file already, by the hash that it has on record."""
    if held is None or held.size != file.size:
        return False
    if held.lfs is not None:
        return bool(held.lfs.sha256 == (file.sha256 or hashlib.sha256(file.bytes()).hexdigest()))
    if file.is_shard:
        return False
    blob = hashlib.sha1(b"blob %d\0" % file.size + file.bytes(), usedforsecurity=False)  # as git
    return bool(held.blob_id == blob.hexdigest())


def _foreign(files: Sequence[File], held: Mapping[str, RepoFile]) -> list[str]:
    """What a repository holds that an earlier push of this checkpoint cannot have left there."""
    ours = {file.path: file for file in files}
    return [
        path
        for path, there in sorted(held.items())
        if path not in BY_THE_HUB
        and (path not in ours or (ours[path].is_shard and not _same(there, ours[path])))
    ]


def _held(api: HfApi, repository: str) -> dict[str, RepoFile] | None:
    """The files of a repository, by their paths; None if there is none to be seen."""
    try:
        tree = api.list_repo_tree(repository, recursive=True)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    except RepositoryNotFoundError:
        return None
    except EntryNotFoundError:  # a repository without a commit
        return {}


def _create(api: HfApi, repository: str, *, private: bool) -> bool:
    """Make the repository; False if there is one.

    Raises:
        OutputError: the one that there is may be seen by everybody, and that is not wanted.
    """
    try:
        api.create_repo(repository, private=private)
        return True
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status not in (403, 409) or not api.repo_exists(repository):
            raise
    _check_privacy(api, repository, private=private)
    return False


def _check_name(repository: str) -> None:
    try:
        validate_repo_id(repository)
        right = repository.count("/") == 1
    except HFValidationError:
        right = False
    if not right:
        raise OptionError(
            repository,
            "not a repository's name",
            needed="USER/NAME, of letters, digits, '-', '_' and '.'",
            do="Give one, such as your user name on the Hub, '/', and a name for the model.",
        )


def _check_rights(api: HfApi, repository: str) -> None:
    """Refuse a token that cannot write there, as far as it says so itself.

    Raises:
        OutputError: there is no token, it may only read, or the name is of somebody else.
    """
    if get_token() is None:
        raise OutputError(
            repository, "no token of the Hub here", needed="a token that may write", do=f"{LOGIN}."
        )
    owner, _, _ = repository.partition("/")
    me = api.whoami()
    role = ((me.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise OutputError(
            repository,
            "a token that may only read",
            needed="a token that may write",
            do=f"Make one on the Hub's page of your tokens. {LOGIN}.",
        )
    owners = [str(one.get("name")) for one in (me, *(me.get("orgs") or ()))]
    if owner.lower() not in map(str.lower, owners):
        raise OutputError(
            repository,
            f"the token is of {owners[0]}, who is no member of {owner}",
            needed=f"a name of {' or '.join(owners)}",
            do=f"Give {owners[0]}/{repository.partition('/')[2]}, or use another token.",
        )


def _check_privacy(api: HfApi, repository: str, *, private: bool) -> None:
    """Refuse to put what is to be private where everybody sees it.

    Raises:
        OutputError: the repository is public.
    """
    if private and not api.repo_info(repository).private:
        raise OutputError(
            repository,
            "exists and is public",
            needed="a private repository",
            do="Make it private on its page, or give another name.",
        )


def _taken(repository: str, path: str) -> OutputError:
    return OutputError(
        repository,
        f"exists and holds something else ({path})",
        needed="a new repository, or one that an upload of this checkpoint was begun to",
        do="Give another name, or add --overwrite to replace what it holds.",
    )
