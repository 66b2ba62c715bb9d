"""Exceptions that carry a message for a person: what is wrong, where, and what to do."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class ActvarError(Exception):
    """Base of every error this package raises on purpose; the command line prints it without a traceback.

    Attributes:
        exit_code: the process exit code that the command line uses.
    """

    exit_code = 2


class InputError(ActvarError):
    """Input that cannot be used: a file, an argument, a recipe.

    Bytes of a file's name that are no UTF-8 stand in the texts as escapes: such a message can be printed anywhere.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.message = _printable(message)
        self.problems = [_printable(problem) for problem in problems]
        message = self.message
        super().__init__("\n".join([message, *(f"  - {problem}" for problem in self.problems)]))


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, of another kind, or does not fit its counterpart."""


class RecipeError(InputError):
    """A recipe with wrong keys, values, or a plan that the model cannot execute."""


class ChecksFailed(ActvarError):
    """The checks of a recipe did not hold; the message is the table of given against allowed."""

    exit_code = 3


class Diverged(ActvarError):
    """A training whose gradient stopped being a number; what was saved before it is still there."""


class Interrupted(ActvarError):
    """The run was stopped by a person and can be resumed by the same command."""

    exit_code = 130


def explained(action: str, path: object, cause: int | None, text: str) -> InputError:
    """What the operating system refuses, with the cause in words and the way out.

    Args:
        action: a verb: "read", "write".
        path: the file or folder; None if it is not known.
        cause: the error's number.
        text: the error in the system's words, for causes that have none here.
    """
    what = action if path is None else f"{action} {path}"
    if cause in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"cannot {what}: the disk is full. Free some space, or choose a folder elsewhere.")
    if cause in (errno.EACCES, errno.EPERM):
        return InputError(f"cannot {what}: no permission. Change its permissions, or choose another place.")
    if cause == errno.EROFS:
        return InputError(f"cannot {what}: the file system is read-only. Choose a folder elsewhere.")
    if cause == errno.ENOENT:
        return InputError(f"cannot {what}: no such file or folder. Check the path.")
    if cause == errno.EISDIR:
        return InputError(f"cannot {what}: it is a folder where a file is needed. Name a file in it.")
    if cause in (errno.ENOTDIR, errno.EEXIST):
        return InputError(f"cannot {what}: a file is in the way of the folder. Choose another name.")
    return InputError(f"cannot {what}: {text}. Check the path and the disk.")


@contextmanager
def explain_os_errors(action: str, path: object) -> Iterator[None]:
    """Turns what the operating system refuses into an InputError with the cause and the way out.

    Args:
        action: a verb: "read", "write".
        path: the file or folder that is being read or written.
    """
    try:
        yield
    except OSError as error:
        raise explained(action, path, error.errno, error.strerror or str(error)) from error
    except Exception as error:
        number = os_error_number(error)
        if number is None:
            raise
        raise explained(action, path, number, str(error)) from error


def os_error_number(error: BaseException) -> int | None:
    """The number of an operating-system error; libraries in Rust put it into their message."""
    if isinstance(error, OSError):
        return error.errno
    quoted = re.search(r"os error (\d+)\)", str(error))
    return None if quoted is None else int(quoted[1])


def counted(number: int, word: str, plural: str | None = None) -> str:
    """A number and what it counts: 1 block, 2 blocks, 5 classes."""
    return f"{number} {word if number == 1 else plural or word + 's'}"
