"""Notices about data: lines on standard error, from the first process only."""

import logging
import os

_logger = logging.getLogger(__name__)


def notify(line: str) -> None:
    """Log a line that a user should read, once for all processes of a run."""
    if int(os.environ.get("RANK", 0)) == 0:
        _logger.warning(line)
