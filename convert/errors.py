"""What adderkit raises when a user can mend it: one clear sentence, remedy included."""


class AdderkitError(Exception):
    """Base of the errors that the command line prints as one line instead of a traceback."""


class NoModuleMatchedError(AdderkitError):
    """A conversion found nothing to convert."""


class CheckpointError(AdderkitError):
    """A checkpoint is missing, damaged, foreign or does not fit."""


class ModelSourceError(AdderkitError):
    """A model name or its pretrained weights cannot be had."""


class DatasetError(AdderkitError):
    """A data set is unknown, missing or damaged."""


class RecipeError(AdderkitError):
    """A recipe or a setting in it is unknown or has a wrong value."""


class PublishError(AdderkitError):
    """A folder cannot be published, or the Hub refuses it."""


class ExportError(AdderkitError):
    """A model cannot be exported, or what exporting needs is not installed."""
