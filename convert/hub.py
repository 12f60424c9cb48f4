"""The Hugging Face Hub, as far as models are fetched from it."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import get_token, snapshot_download
from huggingface_hub import logging as hub_logging
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in __all__

from .errors import CheckpointError, PublishError

PREFIX = "hf-hub:"


def fetch(name: str, files: Sequence[str], cache_dir: str | None = None) -> Path:
    """Download files of ``hf-hub:user/name[@revision]``, or find them in the Hub's cache.

    Args:
        name: With or without the prefix.
        files: Those that are wanted, as far as the repository has them; no other file is fetched.
        cache_dir: Where the Hub's files are kept; by default where huggingface_hub keeps them.

    Returns:
        The local folder that holds them, all of one commit.

    Raises:
        CheckpointError: The Hub cannot be reached, or has no such repository or revision.
    """
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        with quiet_hub():
            return Path(
                snapshot_download(
                    repository, revision=revision or None, allow_patterns=list(files), cache_dir=cache_dir
                )
            )
    except Exception as error:  # the Hub's client raises errors of many kinds
        raise CheckpointError(f"{name} cannot be had from the Hub ({type(error).__name__}: {reason(error)})") from error


def reason(error: Exception) -> str:
    """What an error of the Hub's client says, in one line and without secrets.

    A server may repeat the token in its answer; what follows an address's question mark may be a signature that lets
    anybody read or write.
    """
    line = " ".join(str(error).split()) or type(error).__name__
    token = get_token()
    line = line.replace(token, "***") if token else line
    return re.sub(r"(https?://[^\s'?]+)\?[^\s']*", r"\1", line)[:400]


def check_repository(name: str, option: str) -> None:
    """Refuse what cannot be the name of somebody's repository.

    Args:
        name: Expected to be ``user/name``.
        option: Where it was given, for the message.

    Raises:
        PublishError: It is another.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise PublishError(f"{option} {name!r} is no name of a repository: {error}") from error
    if name.count("/") != 1:
        raise PublishError(f"{option} is {name!r}, expected user/name or organization/name")


@contextmanager
def quiet_hub() -> Iterator[None]:
    """The Hub client's own warnings (a line for each retry, with the address) stay out of the way of ours."""
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)
