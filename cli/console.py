"""Where the command prints, and how it ends: data on stdout, everything else on stderr, one exit code per outcome."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import typer
from rich.console import Console, RenderableType
from typer.core import TyperGroup

from actvar_convert.errors import ActvarError, InputError, Interrupted, explained
from actvar_convert.system.launch import Launch, launched
from actvar_convert.system.progress import Progress, SilentProgress, TerminalProgress

LINE, VERBOSE, MEASURED, LAUNCH = "actvar.line", "actvar.verbose", "actvar.measured", "actvar.launch"
"""Keys in the context's meta: the command line as typed, whether tracebacks are wanted, whether memory is reported, and
which of several processes this is."""

SHARED = ("convert", "distill", "run")
"""Commands whose work several processes share, so that the first of them prints the result for all."""

GRACE = 1.0
"""Seconds within which a launcher notices that a process has failed, and ends the others."""


class ActvarGroup(TyperGroup):
    """The root command: the one place that turns errors into messages and exit codes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[LINE] = shlex.join(["actvar", *args])
        try:
            return super().parse_args(ctx, args)
        except OSError as error:  # what --help prints finds no room
            _explain(ctx, explained("use", error.filename, error.errno, str(error.strerror)).message)
            raise typer.Exit(ActvarError.exit_code) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        found = super().resolve_command(ctx, args)
        if found[0] in SHARED and not _launch(ctx).first:
            ctx.with_resource(_unprinted())
        return found

    def invoke(self, ctx: Any) -> Any:
        with _notes_on_stderr(ctx):
            return self._invoke(ctx)

    def _invoke(self, ctx: Any) -> Any:
        try:
            ctx.meta[LAUNCH] = launch = launched()
            if launch.leftover:
                typer.echo(f"{launch.leftover} in the environment is ignored: WORLD_SIZE names no others", err=True)
            with _terminated_as_interrupted():
                result = super().invoke(ctx)
            _say_peak_memory(ctx)
            sys.stdout.flush()
            return result
        except ActvarError as error:
            if not isinstance(error, Interrupted):
                _let_the_first_speak(ctx)
            if _launch(ctx).first or not isinstance(error, Interrupted):
                _explain(ctx, str(error))
            if not isinstance(error, InputError):
                _say_peak_memory(ctx)
            if isinstance(error, Interrupted):
                _say_how_to_resume(ctx)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            if _launch(ctx).first:
                _explain(ctx, "stopped")
            if resumes(ctx):
                _say_how_to_resume(ctx)
            raise typer.Exit(Interrupted.exit_code) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _let_the_first_speak(ctx)
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


class _Notes(logging.Handler):
    """Says on stderr what the library chose or inferred, whether progress is shown or not."""

    def __init__(self, ctx: Any) -> None:
        super().__init__(logging.WARNING)
        self._ctx = ctx

    def emit(self, record: logging.LogRecord) -> None:
        if _launch(self._ctx).first and not self._ctx.meta.get(VERBOSE):  # with --verbose the whole log is there
            typer.echo(f"actvar: {record.getMessage()}", err=True)


@contextmanager
def _notes_on_stderr(ctx: Any) -> Iterator[None]:
    log, notes = logging.getLogger("actvar_convert"), _Notes(ctx)
    log.addHandler(notes)
    try:
        yield
    finally:
        log.removeHandler(notes)


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
    launch = _launch(ctx)
    who = "actvar" if launch.first else f"actvar, process {launch.rank}"
    typer.echo(f"{who}: {message}", err=True)


def _launch(ctx: Any) -> Launch:
    """Which of several processes this is; alone if the environment is faulty, which is said then."""
    launch: Launch = ctx.meta.get(LAUNCH, Launch())
    return launch


@contextmanager
def _unprinted() -> Iterator[None]:
    """Nothing is printed on stdout while the block runs."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def _let_the_first_speak(ctx: Any) -> None:
    """Waits, in all processes but the first one, for a launcher to end them because of the same error there.

    What is wrong with a file or a recipe all of them find, and it is to be said once; what goes on is wrong here alone.
    """
    if not _launch(ctx).first:
        time.sleep(GRACE)


def resumes(ctx: Any) -> bool:
    """Whether the command that was stopped keeps what it has done, so that the same line goes on from there."""
    command, line = ctx.invoked_subcommand, ctx.meta[LINE]
    needed = {"evaluate": " --cache", "convert": " --work"}
    return command in ("run", "distill", "sweep") or (command in needed and needed[command] in line)


def _say_how_to_resume(ctx: Any) -> None:
    if not _launch(ctx).first:
        return
    typer.echo(f"To go on, give the same line again:\n  {ctx.meta[LINE]}", err=True)


def _say_peak_memory(ctx: Any) -> None:
    if ctx.meta.get(MEASURED) and _launch(ctx).first:
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


def show_json(text: str) -> None:
    """Prints JSON on stdout; where the encoding might lack a character, all but ASCII as JSON escapes it."""
    if not sys.stdout.encoding.lower().startswith("utf"):
        text = re.sub(r"[^\x00-\x7f]+", lambda found: json.dumps(found[0])[1:-1], text)
    show_text(text)


def show_html(text: str) -> None:
    """Prints a page on stdout: in ASCII, for a page says that it is UTF-8, and stdout may be anything."""
    show_text(text.encode("ascii", "xmlcharrefreplace").decode())


def closing(example: str, then: str) -> str:
    """The end of a command's help: an example, and the command that usually follows."""
    return f"Example: {example}\n\nThen: {then}"
