"""The program around the commands: how errors, Ctrl-C and exit codes reach a person.

Errors the package raises on purpose are printed as one sentence; exit codes: 0 done, 1 failed, 2 usage.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from hpddrnet_trt import __version__
from hpddrnet_trt.core.errors import UserError

INTERRUPTED = 130  # exit code after Ctrl-C: 128 + SIGINT
app = typer.Typer(
    name="hpddrnet-trt",
    help="Semantic segmentation of SEM micrographs: train, export, calibrate, build, run and measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"hpddrnet-trt {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="More messages, and tracebacks of errors.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    if verbose:
        os.environ["HPDDRNET_DEBUG"] = "1"


def run(command: Callable[..., Any] | typer.Typer) -> NoReturn:
    """Run one command function (as the recipes do) or the whole app, and exit with its code."""
    if not isinstance(command, typer.Typer):
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        single.command()(command)
        command = single
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        command()
    except UserError as exc:
        if os.environ.get("HPDDRNET_DEBUG"):
            raise
        sys.exit(_fail(str(exc), exc.exit_code))
    except SystemExit as exc:
        if exc.code == INTERRUPTED:  # typer turns Ctrl-C into this exit, without a word
            _fail("interrupted", INTERRUPTED)
        raise
    except OSError as exc:
        if exc.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}:
            raise
        sys.exit(_fail(f"{exc.strerror}: {exc.filename or 'output'}; free some space or choose another path", 1))
    sys.exit(0)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def main() -> NoReturn:
    """Entry point of the installed program."""
    run(app)
