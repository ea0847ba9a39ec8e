"""The errors that a user can cause. Each says what was wrong, where, and what to do."""

from __future__ import annotations


class TutelageError(Exception):
    """A fault that the user can mend.

    what:  what was wrong, a clause without a full stop.
    where: the file, row, key, endpoint or record it was found in.
    fix:   what to do about it.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        message = what
        if where:
            message += f" (in {where})"
        if fix:
            message += f". {fix}"
        super().__init__(message)


class ConfigError(TutelageError):
    """An unknown key or an impossible value in a configuration."""


class DataError(TutelageError):
    """Records that cannot be used."""


class ArtifactError(TutelageError):
    """A missing, half-written or mismatched artifact directory."""


class StoreError(TutelageError):
    """Object storage that cannot be reached, read or written."""


class TrackingError(TutelageError):
    """A tracking server that cannot be reached."""


class SamplingError(TutelageError):
    """An engine or a server that cannot be reached, or whose answer cannot be used."""


class TrainingError(TutelageError):
    """A training run that cannot go on, such as one whose loss is not a number."""
