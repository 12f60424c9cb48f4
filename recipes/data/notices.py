"""Notices about data: lines on standard error, from the first process only."""

import logging
import os

_logger = logging.getLogger(__name__)


def is_first_process() -> bool:
    """Return whether this is the first process of a run, before and after they are connected."""
    return int(os.environ.get("RANK", 0)) == 0


def notify(line: str) -> None:
    """Log a line that a user should read, once for all processes of a run."""
    if is_first_process():
        _logger.warning(line)
