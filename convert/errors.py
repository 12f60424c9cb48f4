"""Errors that a user can fix: one clear sentence, including the remedy."""

OWN_NETWORK = "a network of your own is registered by --import FILE, or by importing its module"  # a remedy


class AdderkitError(Exception):
    """Base class of the errors that the command line prints as one line instead of a traceback."""


class NoModuleMatchedError(AdderkitError):
    """A conversion found nothing to convert."""


class CheckpointError(AdderkitError):
    """A checkpoint is missing, damaged, foreign or does not fit."""


class ModelSourceError(AdderkitError):
    """A model is unknown, or its pretrained weights cannot be loaded."""


class DatasetError(AdderkitError):
    """A data set is unknown, missing or damaged.

    Args:
        message: One line; or the text with which torch rebuilds an error of a loader process, a traceback that ends
            with it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit("DatasetError: ", 1)[-1].rstrip())


class RecipeError(AdderkitError):
    """A recipe or one of its settings is unknown or has an invalid value."""


class PublishError(AdderkitError):
    """A folder cannot be published, or the Hub rejects it."""


class ExportError(AdderkitError):
    """A model cannot be exported, or a package that exporting needs is not installed."""
