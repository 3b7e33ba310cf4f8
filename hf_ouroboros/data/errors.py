"""The named errors of the data package, so that a recipe can catch them in one place."""

from __future__ import annotations


class DataError(ValueError):
    """Training or validation data cannot be used as it is; the message says what to change."""


class NoStdlibSourcesError(DataError):
    """This Python carries no standard library sources, so there is no offline default corpus."""


class DataFileNotFoundError(DataError, FileNotFoundError):
    """A data file named by an option does not exist."""

    def __str__(self) -> str:
        return str(self.args[0])


class MissingColumnError(DataError):
    """The data have neither a text column nor prompt and completion columns."""


class EmptyDataError(DataError):
    """The data contain nothing to train or validate on."""


class NoValidationDataError(DataError):
    """No validation data were given, and none can be held out from the training data."""
