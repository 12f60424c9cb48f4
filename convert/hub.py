"""Download models from the Hugging Face Hub."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_session, get_token, snapshot_download
from huggingface_hub import logging as hub_logging
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in __all__

from .errors import CheckpointError, PublishError

PREFIX = "hf-hub:"
_PATIENCE = 5.0  # seconds


def fetch(name: str, files: Sequence[str], cache_dir: str | None = None) -> Path:
    """Download files of ``hf-hub:user/name[@revision]``, or find them in the Hub's cache.

    Args:
        name: ``user/name[@revision]``, with or without the prefix.
        files: Names of the files to download; those that the repository does not have are ignored.
        cache_dir: Folder where files are cached; by default that of huggingface_hub.

    Returns:
        The local folder with the files, all of the same commit.

    Raises:
        CheckpointError: The Hub cannot be reached, or the repository or revision does not exist.
    """
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        with reachable_hub():
            return Path(
                snapshot_download(
                    repository, revision=revision or None, allow_patterns=list(files), cache_dir=cache_dir
                )
            )
    except Exception as error:  # the Hub's client raises errors of many kinds
        raise CheckpointError(
            f"cannot download {name} from the Hub ({type(error).__name__}: {reason(error)})"
        ) from error


def reason(error: Exception) -> str:
    """Return the message of an error of the Hub's client in one line, without secrets.

    A server may repeat the token in its answer, and the query of an address may be a signature that lets anybody read
    or write.
    """
    line = " ".join(str(error).split()) or type(error).__name__
    token = get_token()
    line = line.replace(token, "***") if token else line
    return re.sub(r"(https?://[^\s'?]+)\?[^\s']*", r"\1", line)[:400]


def check_repository(name: str, option: str) -> None:
    """Refuse a name that cannot be a repository of a user or organization.

    Args:
        name: Expected to be ``user/name``.
        option: Option that the name was given with, for the message.

    Raises:
        PublishError: The name is malformed.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise PublishError(f"{option} {name!r} is not the name of a repository: {error}") from error
    if name.count("/") != 1:
        raise PublishError(f"{option} is {name!r}, expected user/name or organization/name")


@contextmanager
def reachable_hub() -> Iterator[None]:
    """Use only what is cached inside the context if the Hub cannot be reached, instead of retrying for half a minute.

    Raises:
        ConnectionError: The Hub cannot be reached, and a file is not cached.
    """
    with quiet_hub():
        problem = None if constants.HF_HUB_OFFLINE else _connection_problem()
        if problem is None:
            yield
            return
        constants.HF_HUB_OFFLINE = True
        try:
            yield
        except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
            raise ConnectionError(f"cannot reach {constants.ENDPOINT}: {reason(problem)}") from error
        finally:
            constants.HF_HUB_OFFLINE = False


def _connection_problem() -> Exception | None:
    """Return the error of a single short request to the Hub; ``None`` if it answers, whatever the answer is."""
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception as error:  # the Hub's client raises errors of many kinds
        return error
    return None


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence the warnings of the Hub's client, which prints a line with the address for each retry."""
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)
