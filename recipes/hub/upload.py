"""Upload a built folder to the Hub in one commit, with retries.

Every step can be repeated: the repository is created only if it does not exist, files that the Hub already has are left
out, and large files that arrived before the connection broke are not sent again. So after a temporary error the whole
upload is retried.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling

from ...convert.errors import AdderkitError, PublishError
from ...convert.files import sha256
from ...convert.hub import check_repository, quiet_hub, reason

CARD = "README.md"
_WAITS = (1, 4, 10)  # seconds before each retry
# Time-out, conflict with another commit, outdated parent commit, too many requests; server errors are temporary, too.
_TEMPORARY = (408, 409, 412, 429)


@dataclasses.dataclass(frozen=True)
class Target:
    """Destination of an upload.

    Args:
        repository: Repository on the Hub, ``user/name``; created if it does not exist.
        private: Create the repository as a private one; an existing one must be private already.
        revision: Branch to commit to, created if it does not exist; by default ``main``.
        create_pr: Open a pull request instead of committing to the branch.
        message: Commit message.

    Raises:
        PublishError: The repository name is invalid, or a pull request is requested for a branch other than ``main``.
    """

    repository: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    message: str = "Publish with adderkit"

    def __post_init__(self) -> None:
        check_repository(self.repository, "--repo")
        if self.create_pr and self.revision not in (None, "main"):
            raise PublishError(
                f"--create-pr opens a pull request against main, not {self.revision!r}; give --create-pr or --revision"
            )
        if not self.message.strip():
            raise PublishError("--message is empty, expected a commit message")


@dataclasses.dataclass(frozen=True)
class Upload:
    """Outcome of an upload.

    Args:
        url: Address of the commit or pull request; of the repository if nothing had to be sent.
        commit: SHA-1 of the commit.
        sent: Files that were new or different.
        card_kept: Whether the Hub has a different model card, which was not replaced.
    """

    url: str
    commit: str
    sent: tuple[str, ...]
    card_kept: bool


def upload(
    folder: Path,
    files: Sequence[str],
    target: Target,
    *,
    overwrite_card: bool = False,
    announce: Callable[[str], None] = print,
) -> Upload:
    """Send files of a folder to the Hub as one commit.

    The token is the one that huggingface_hub finds: ``HF_TOKEN``, or the one that ``hf auth login`` stored.

    Args:
        folder: Folder that holds the files.
        files: Paths of the files in the folder.
        target: Destination on the Hub.
        overwrite_card: Replace a different ``README.md`` on the Hub; otherwise it is kept.
        announce: Called with a line before each retry.

    Returns:
        Outcome of the upload; files that the Hub already has make no commit.

    Raises:
        PublishError: The Hub refuses, or cannot be reached; the message names the remedy and never the token.
    """
    api = HfApi(library_name="adderkit", library_version=version("adderkit"))
    sent: set[str] = set()
    with quiet_hub():
        for wait in (*_WAITS, None):
            try:
                done = _upload(api, folder, files, target, overwrite_card, sent)
                # If only the response to a commit was lost, the retry finds nothing left to send.
                return dataclasses.replace(done, sent=tuple(name for name in files if name in sent))
            except AdderkitError:
                raise
            except Exception as raised:  # the Hub's client raises errors of many kinds
                error = _origin(raised)
                explained = _explain(error, api, target)
                if wait is None or not _is_temporary(error):
                    # A server may repeat the token in its response, so a traceback must not show it either.
                    raise PublishError(explained) from None
                announce(f"{explained.rpartition(';')[0]}; retrying in {wait} s")
                time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _upload(
    api: HfApi, folder: Path, files: Sequence[str], target: Target, overwrite_card: bool, sent: set[str]
) -> Upload:
    """Upload once; the files that are about to be committed are added to ``sent``."""
    api.create_repo(target.repository, private=target.private or None, exist_ok=True)
    info = _branch(api, target)
    if target.private and info.private is False:
        raise PublishError(
            f"{target.repository} exists already and is public, but --private was given; make it private in its "
            "settings, or give another repository"
        )
    there = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    changed = [name for name in files if name not in there or not _same(there[name], folder / name)]
    card_kept = CARD in changed and CARD in there and not overwrite_card
    additions = [CommitOperationAdd(name, folder / name) for name in changed if not (card_kept and name == CARD)]
    if not additions:
        return Upload(f"{api.endpoint}/{target.repository}", str(info.sha), (), card_kept)
    api.preupload_lfs_files(
        target.repository,
        additions,
        revision=target.revision,
        create_pr=target.create_pr,
        free_memory=False,
    )
    sent.update(addition.path_in_repo for addition in additions)
    try:
        commit = api.create_commit(
            target.repository,
            additions,
            commit_message=target.message,
            revision=target.revision,
            create_pr=target.create_pr,
            parent_commit=info.sha,  # the state that the files were compared with
        )
    except Exception as raised:
        error = _origin(raised)
        if target.create_pr and _is_temporary(error):
            raise PublishError(
                f"{_explain(error, api, target).rpartition(';')[0]}; the pull request may have been opened "
                f"nevertheless: check {api.endpoint}/{target.repository}/discussions before you retry"
            ) from None
        raise
    return Upload(commit.pr_url or commit.commit_url, commit.oid, (), card_kept)


def _branch(api: HfApi, target: Target) -> ModelInfo:
    """Return the Hub's information on the branch, which is created from ``main`` if it does not exist."""
    try:
        return api.model_info(target.repository, revision=target.revision, files_metadata=True)
    except RevisionNotFoundError:
        if target.revision is None:
            raise
        api.create_branch(target.repository, branch=target.revision, exist_ok=True)
    return api.model_info(target.repository, revision=target.revision, files_metadata=True)


def _same(there: RepoSibling, path: Path) -> bool:
    """Return whether the Hub has an identical file: it reports the SHA-256 of large files and git's hash of others."""
    if there.lfs is not None:
        return bool(there.lfs.sha256 == sha256(path))
    content = path.read_bytes()
    return there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _origin(error: Exception) -> Exception:
    """Return the original error, which the Hub's client wraps while it uploads a file."""
    return error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error


def _is_temporary(error: Exception) -> bool:
    """Return whether a retry may succeed, as opposed to a refusal by the Hub or an invalid request."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status >= 500 or status in _TEMPORARY
    if isinstance(error, (OfflineModeIsEnabled, FileNotFoundError)):
        return False
    return isinstance(error, json.JSONDecodeError) or not isinstance(error, (ValueError, TypeError))


def _explain(error: Exception, api: HfApi, target: Target) -> str:
    """Return one line without the token; the remedy follows the last semicolon."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    said = reason(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub cannot be used; unset it to publish"
    if status == 401:
        return f"the Hub needs a token, or does not accept yours ({said}); log in with: hf auth login"
    if status == 403:
        return f"your token does not permit writing to {target.repository} ({said}); use one with write permission"
    if status == 404 or isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
        return f"the Hub has no {target.repository}, or your token does not give access ({said}); check the names"
    if not _is_temporary(error):
        return f"the Hub refuses {target.repository} ({said}); fix the cause and publish again"
    return (
        f"the upload to {api.endpoint}/{target.repository} failed ({type(error).__name__}: {said}); "
        "publish again: files that have arrived are not sent twice"
    )
