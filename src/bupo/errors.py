"""What a user can fix: every error here is shown as one line, without a traceback (unless ``--debug``)."""

from __future__ import annotations


class BupoError(Exception):
    """Base of all errors whose message tells a person what was wrong and what to do."""


class InputError(BupoError, ValueError):
    """A wrong value, file or model was given; the message names the valid range or the remedy."""


class ConfigError(InputError):
    """One or several settings are wrong together.

    All problems are collected and raised at once, so that a user fixes a recipe in one pass.
    """

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("; ".join(self.problems))


class TrainingStopped(BupoError):
    """Training cannot continue; the message names the update and what to try."""
