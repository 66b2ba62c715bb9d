"""Where the command prints, and how it ends: data on stdout, everything else on stderr, one exit code per outcome."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console, RenderableType
from typer.core import TyperGroup

from actvar_convert.errors import ActvarError, InputError, Interrupted, explained
from actvar_convert.system.progress import Progress, SilentProgress, TerminalProgress

LINE, VERBOSE, MEASURED = "actvar.line", "actvar.verbose", "actvar.measured"
"""Keys in the context's meta: the command line as typed, whether tracebacks are wanted, whether memory is reported."""

GRACE = 1.0
"""Seconds within which a launcher notices that a process has failed, and ends the others."""


class ActvarGroup(TyperGroup):
    """The root command: the one place that turns errors into messages and exit codes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[LINE] = shlex.join(["actvar", *args])
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _terminated_as_interrupted():
                result = super().invoke(ctx)
            _say_peak_memory(ctx)
            return result
        except ActvarError as error:
            if not isinstance(error, Interrupted):
                _let_the_first_speak()
            if first_process() or not isinstance(error, Interrupted):
                _explain(ctx, str(error))
            if not isinstance(error, InputError):
                _say_peak_memory(ctx)
            if isinstance(error, Interrupted):
                _say_how_to_resume(ctx)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            if first_process():
                _explain(ctx, "stopped")
            if resumes(ctx):
                _say_how_to_resume(ctx)
            raise typer.Exit(Interrupted.exit_code) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _let_the_first_speak()
            _explain(ctx, explained("use", error.filename, error.errno, str(error.strerror)).message)
            raise typer.Exit(ActvarError.exit_code) from None
        except (MemoryError, RuntimeError) as error:
            _explain_shortage(ctx, error)
            raise typer.Exit(ActvarError.exit_code) from None


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """While the block runs SIGTERM does what Ctrl-C does: batch systems and containers stop a process by it.

    Afterwards it ends the process at once again, as a launcher wants it of processes that wait for their end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _explain_shortage(ctx: Any, error: BaseException) -> None:
    """Says that memory ran out and what helps; raises the error again if it is another one."""
    from actvar_convert.system.device import memory_shortage

    shortage = memory_shortage(error)
    if shortage is None:
        raise error
    _explain(
        ctx,
        f"memory ran out: {shortage}\nAsk for less at once (--batch, --batches, or a batch of the recipe by --set), or "
        "use a larger machine. No file was changed but those that a run keeps to go on from.",
    )


def _explain(ctx: Any, message: str) -> None:
    if ctx.meta.get(VERBOSE):
        traceback.print_exc()
    who = "actvar" if first_process() else f"actvar, process {os.environ['RANK']}"
    typer.echo(f"{who}: {message}", err=True)


def first_process() -> bool:
    """Whether this process is the only one, or the first of those that a launcher started together: it alone speaks."""
    return os.environ.get("RANK", "0") == "0"


def _let_the_first_speak() -> None:
    """Waits, in all processes but the first one, for a launcher to end them because of the same error there.

    What is wrong with a file or a recipe all of them find, and it is to be said once; what goes on is wrong here alone.
    """
    if not first_process():
        time.sleep(GRACE)


def resumes(ctx: Any) -> bool:
    """Whether the command that was stopped keeps what it has done, so that the same line goes on from there."""
    command, line = ctx.invoked_subcommand, ctx.meta[LINE]
    needed = {"evaluate": " --cache", "convert": " --work"}
    return command in ("run", "distill", "sweep") or (command in needed and needed[command] in line)


def _say_how_to_resume(ctx: Any) -> None:
    if not first_process():
        return
    typer.echo(f"To go on, give the same line again:\n  {ctx.meta[LINE]}", err=True)


def _say_peak_memory(ctx: Any) -> None:
    if ctx.meta.get(MEASURED) and first_process():
        from actvar_convert.system.device import peak_memory_line

        typer.echo(peak_memory_line(), err=True)


def be_quiet(ctx: typer.Context, wanted: bool) -> bool:
    """Callback of ``--quiet``: a command that has it ends with a line on its memory, unless it is to be quiet."""
    ctx.meta[MEASURED] = not wanted
    return wanted


def overrule(ctx: typer.Context, wanted: bool) -> bool:
    """Callback of ``--take-over``: the command takes folders of owners on other hosts."""
    if wanted:
        from actvar_convert.system.locks import take_over

        ctx.with_resource(take_over())
    return wanted


def be_verbose(ctx: typer.Context, wanted: bool) -> bool:
    """Callback of ``--verbose``: tracebacks of errors, and the library's log on stderr."""
    if wanted:
        ctx.meta[VERBOSE] = True
        logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s")
        logging.getLogger("actvar_convert").setLevel(logging.DEBUG)
    return wanted


def reporter(quiet: bool) -> Progress:
    """Where long work reports to: stderr, or nowhere."""
    return SilentProgress() if quiet else TerminalProgress()


def show(renderable: RenderableType) -> None:
    """Prints a table on stdout; without a terminal wide enough that nothing wraps."""
    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    Console(width=None if narrow else 160).print(renderable)


def show_text(text: str) -> None:
    """Prints text on stdout as it is."""
    typer.echo(text.rstrip("\n"))


def closing(example: str, then: str) -> str:
    """The end of a command's help: an example, and the command that usually follows."""
    return f"Example: {example}\n\nThen: {then}"
