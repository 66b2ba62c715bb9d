"""Exceptions that carry a message for a person: what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class ActvarError(Exception):
    """Base of every error this package raises on purpose; the command line prints it without a traceback.

    Attributes:
        exit_code: the process exit code that the command line uses.
    """

    exit_code = 2


class InputError(ActvarError):
    """Input that cannot be used: a file, an argument, a recipe."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.message = message
        self.problems = list(problems)
        super().__init__("\n".join([message, *(f"  - {problem}" for problem in self.problems)]))


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, of another kind, or does not fit its counterpart."""


class RecipeError(InputError):
    """A recipe with wrong keys, values, or a plan that the model cannot execute."""


class ChecksFailed(ActvarError):
    """The checks of a recipe did not hold; the message is the table of given against allowed."""

    exit_code = 3


class Interrupted(ActvarError):
    """The run was stopped by a person and can be resumed by the same command."""

    exit_code = 130
