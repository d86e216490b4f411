"""The program around the commands: their list, and how errors, Ctrl-C and exit codes reach a person.

Errors the package raises on purpose are printed as one sentence; exit codes: 0 done, 1 failed, 2 usage.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import inspect
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

import typer
from typer.core import TyperGroup

from hpddrnet_trt import __version__
from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.progress import QUIET

INTERRUPTED = 130  # exit code after Ctrl-C: 128 + SIGINT
PROGRAM_OPTIONS = ("--verbose", "-v", "--quiet", "-q")  # of every command
MOST_LETTERS = 200  # of a command's first sentence in the list
Command = TypeVar("Command", bound=Callable[..., Any])

# Commands of earlier versions, and what has taken their place.
GONE = {
    "calibration-curve": "`calibrate` with several --max-images",
    "check-dataset": "`datasets check`",
    "compare-precisions": "`choose-precision --study`",
    "convert-precision": "`export --precision fp16` (or bf16), which also takes FP32 ONNX files",
    "measure-training": "`train`, whose progress bar shows steps per second",
    "profile": "`inspect ENGINE --layer-times FILE`",
    "report": "`benchmark report`",
    "sensitivity": "`choose-precision --study`",
    "ship": "`export --half-weights`",
    "show": "`datasets list NAME`",
    "simulate": "`datasets simulate`",
}
OTHER_NAMES = {"dataset": "datasets"}  # of commands
# Options of earlier versions: taken, but not shown.
OLD_SPELLINGS = {
    "compare": "against",
    "flavour": "runtime",
    "form": "runtime",
    "licence": "license",
    "optimisation-level": "optimization-level",
    "peers": "baselines",
    "window": "intensity-range",
}


class CommandList(TyperGroup):
    """Commands, also of two words, in the panels they were registered with; those that have gone name what to use.

    Options of the program may also stand after the command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        ours = [arg for arg in args[:end] if arg in PROGRAM_OPTIONS]
        return super().parse_args(ctx, ours + [arg for arg in args[:end] if arg not in PROGRAM_OPTIONS] + args[end:])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        args = [OTHER_NAMES.get(args[0], args[0]), *args[1:]]
        two_words = " ".join(args[:2])  # such as `benchmark report`
        if two_words in self.commands:
            return two_words, self.commands[two_words], args[2:]
        if args[0] in GONE and args[0] not in self.commands:
            raise UsageError(f"the command `{args[0]}` has gone; use {GONE[args[0]]}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            if not command.hidden:
                # Typer keeps the panel, also where it is not drawn as one.
                panel = getattr(command, "rich_help_panel", None)
                title = panel if isinstance(panel, str) else "Commands"
                panels.setdefault(title, []).append((name, command.get_short_help_str(MOST_LETTERS)))
        for title, rows in panels.items():
            with formatter.section(title):
                formatter.write_dl(rows)


def new_app(**options: Any) -> typer.Typer:
    """A program, or a command with commands of its own; ``options`` are Typer's."""
    return typer.Typer(**{
        "cls": CommandList, "add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None,
        "context_settings": {"token_normalize_func": lambda name: OLD_SPELLINGS.get(name, name)}, **options,
    })  # fmt: skip


app = new_app(
    name="hpddrnet-trt",
    help="Semantic segmentation of SEM micrographs: train, export, calibrate, build, run and measure.",
    no_args_is_help=True,
    add_completion=True,
)


def command(
    panel: str, example: str, *, name: str | None = None, group: typer.Typer = app
) -> Callable[[Command], Command]:
    """Make a function a command: its docstring is the help, ``example`` what a person types after the program's name.

    A parameter whose type is a dataclass is a group of options: its fields become options of the command, and the
    function gets the dataclass.
    """

    def register(function: Command) -> Command:
        registered = _with_fields(function)
        group.command(name, rich_help_panel=panel, epilog=f"\b\nExample: hpddrnet-trt {example}")(registered)
        return registered

    return register


def _with_fields(function: Command) -> Command:
    """``function`` as Typer sees it: the fields of option groups in place of the groups."""
    given = inspect.signature(function, eval_str=True).parameters
    groups: dict[str, Any] = {
        name: each.annotation for name, each in given.items() if dataclasses.is_dataclass(each.annotation)
    }
    shown: list[inspect.Parameter] = []
    for name, each in given.items():
        if name in groups:
            hints = get_type_hints(groups[name], include_extras=True)
            shown += [
                inspect.Parameter(
                    entry.name, each.KEYWORD_ONLY, annotation=hints[entry.name],
                    default=each.empty if entry.default is dataclasses.MISSING else entry.default,
                )
                for entry in dataclasses.fields(groups[name])
            ]  # fmt: skip
        else:
            shown.append(each.replace(kind=each.KEYWORD_ONLY))

    @functools.wraps(function)
    def call(**values: Any) -> Any:
        for name, group in groups.items():
            values[name] = group(**{entry.name: values.pop(entry.name) for entry in dataclasses.fields(group)})
        return function(**values)

    call.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in shown}
    return call  # type: ignore[return-value]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"hpddrnet-trt {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="More messages, and tracebacks of errors.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Results and errors only: no bars, no remarks.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    if verbose and quiet:
        raise UsageError("give either --verbose or --quiet, not both")
    _log(logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING)
    if verbose:
        os.environ["HPDDRNET_DEBUG"] = "1"
    if quiet:
        os.environ[QUIET] = "1"


def _log(level: int) -> None:
    logging.basicConfig(level=level, format=f"{_colored('%(levelname)s', 'yellow')}: %(message)s")


def _colored(text: str, color: str) -> str:
    """In colour where standard error is a terminal and nobody objects (https://no-color.org)."""
    wanted = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return typer.style(text, fg=color, bold=True) if wanted else text


def run(program: Callable[..., Any] | typer.Typer) -> NoReturn:
    """Run one command function (as the recipes do) or the whole app, and exit with its code."""
    if not isinstance(program, typer.Typer):
        single = new_app()
        single.command()(program)
        program = single
        _log(logging.WARNING)
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminated) if in_main_thread else None
    try:
        program(prog_name=app.info.name if program is app else None)
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
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    sys.exit(0)


def _fail(message: str, code: int) -> int:
    print(f"{_colored('error', 'red')}: {message}", file=sys.stderr)
    return code


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """Batch systems and service managers send SIGTERM: it ends a command as Ctrl-C does."""
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Entry point of the installed program."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    run(app)
