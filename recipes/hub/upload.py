"""A built folder goes to the Hub in one commit, made once however often the connection breaks.

Everything can be done again: the repository is made unless it is there, files that the Hub has are left out, large ones
that reached it before a break are not sent again. So after an error that may pass, all of it is tried anew.
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
_WAITS = (1, 4, 10)  # seconds before another try
# Time-out, conflict with another commit, a branch that moved on, too many requests; besides all server errors.
_PASSING = (408, 409, 412, 429)


@dataclasses.dataclass(frozen=True)
class Target:
    """Where on the Hub a folder goes.

    Args:
        repository: ``user/name``; made if it is not there.
        private: Make it private; one that is there must be so already.
        revision: Branch to commit to, made if it is not there; by default the main one.
        create_pr: Open a pull request instead of committing to the branch.
        message: Of the commit.

    Raises:
        PublishError: The repository cannot be called so, or a pull request is to go to another branch.
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
                f"--create-pr opens a pull request to main, not to {self.revision!r}; give --create-pr or --revision"
            )
        if not self.message.strip():
            raise PublishError("--message is empty, expected a line for the commit")


@dataclasses.dataclass(frozen=True)
class Upload:
    """What an upload did.

    Args:
        url: Of the commit, the pull request, or where nothing had to be sent the repository.
        commit: Its SHA-1.
        sent: Files that the Hub did not have as they are before.
        card_kept: Whether the Hub has another model card, which was left as it is.
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

    The token is the one that huggingface_hub finds: in ``HF_TOKEN``, or where ``hf auth login`` stored it.

    Args:
        folder: Where the files are.
        files: Their paths in it.
        target: Where they go.
        overwrite_card: Replace a ``README.md`` on the Hub that is another one; else it stays.
        announce: Told before another try.

    Returns:
        What was done; the same files once more make no commit.

    Raises:
        PublishError: The Hub refuses, or cannot be reached; the message names the remedy and never the token.
    """
    api = HfApi(library_name="adderkit", library_version=version("adderkit"))
    sent: set[str] = set()
    with quiet_hub():
        for wait in (*_WAITS, None):
            try:
                done = _upload(api, folder, files, target, overwrite_card, sent)
                # Where only the answer to a commit was lost, the next try finds nothing left to send.
                return dataclasses.replace(done, sent=tuple(name for name in files if name in sent))
            except AdderkitError:
                raise
            except Exception as raised:  # the Hub's client raises errors of many kinds
                error = _origin(raised)
                explained = _explain(error, api, target)
                if wait is None or not _may_pass(error):
                    # A server may repeat the token in what it says, so a traceback must not show that either.
                    raise PublishError(explained) from None
                announce(f"{explained.rpartition(';')[0]}; trying again in {wait} s")
                time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _upload(
    api: HfApi, folder: Path, files: Sequence[str], target: Target, overwrite_card: bool, sent: set[str]
) -> Upload:
    """One try; what it is about to commit is added to ``sent``."""
    api.create_repo(target.repository, private=target.private or None, exist_ok=True)
    info = _branch(api, target)
    if target.private and info.private is False:
        raise PublishError(
            f"{target.repository} is there already and public, but --private was given; make it private in its "
            "settings, or name another repository"
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
            parent_commit=info.sha,  # what is compared above is what the commit is made on
        )
    except Exception as raised:
        error = _origin(raised)
        if target.create_pr and _may_pass(error):
            raise PublishError(
                f"{_explain(error, api, target).rpartition(';')[0]}; the pull request may be open all the same: "
                f"look at {api.endpoint}/{target.repository}/discussions before another try"
            ) from None
        raise
    return Upload(commit.pr_url or commit.commit_url, commit.oid, (), card_kept)


def _branch(api: HfApi, target: Target) -> ModelInfo:
    """What the Hub has at the branch, which is made from the main one where it is missing."""
    try:
        return api.model_info(target.repository, revision=target.revision, files_metadata=True)
    except RevisionNotFoundError:
        if target.revision is None:
            raise
        api.create_branch(target.repository, branch=target.revision, exist_ok=True)
    return api.model_info(target.repository, revision=target.revision, files_metadata=True)


def _same(there: RepoSibling, path: Path) -> bool:
    """Whether the Hub has the very file: large files are known by their SHA-256, others as git knows them."""
    if there.lfs is not None:
        return bool(there.lfs.sha256 == sha256(path))
    content = path.read_bytes()
    return there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _origin(error: Exception) -> Exception:
    """What the Hub's client met while it uploaded a file, which it wraps."""
    return error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error


def _may_pass(error: Exception) -> bool:
    """Whether another try may succeed: not where the Hub said no, or where what was asked is wrong."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status >= 500 or status in _PASSING
    if isinstance(error, (OfflineModeIsEnabled, FileNotFoundError)):
        return False
    return isinstance(error, json.JSONDecodeError) or not isinstance(error, (ValueError, TypeError))


def _explain(error: Exception, api: HfApi, target: Target) -> str:
    """One line with the remedy behind its last semicolon, without the token."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    said = reason(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub is switched off by HF_HUB_OFFLINE; unset it to publish"
    if status == 401:
        return f"the Hub asks for a token, or does not know yours ({said}); log in with: hf auth login"
    if status == 403:
        return f"your token may not write to {target.repository} ({said}); take one with the permission to write"
    if status == 404 or isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
        return f"the Hub has no {target.repository}, or hides it from your token ({said}); check the names"
    if not _may_pass(error):
        return f"the Hub refuses {target.repository} ({said}); mend that and publish again"
    return (
        f"the upload to {api.endpoint}/{target.repository} broke off ({type(error).__name__}: {said}); "
        "publish again: what has arrived is not sent twice"
    )
