"""Click commands made from configuration classes; errors become one line and exit code 1."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

# Before MLflow is imported, and for this process alone: a library changes no environment.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# It leads to a page of the UI that shows no runs; a command says its own link.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
# One bar per downloaded file would bury the summary's table.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# One unreachable server must not hang a run for minutes (default: 7 retries, about 4 minutes).
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")

from entrypoints import _signals
from entrypoints._help import HELP, LISTS, examples, grouped, with_lists_apart
from entrypoints._resume import resumed
from entrypoints._stages import STAGES, EntryPoint
from healing.config.heal import follows
from healing.config.options import AUTO, choices_of, fields_of, flag_name, help_of
from healing.errors import ConfigError, HealingError, OutageError
from healing.progress import Stop, Stopped
from healing.registry import ARMS
from healing.stages.terminal.console import Console
from healing.stages.terminal.lines import visible, write_line

TRY_LATER = 75
"""Exit code where the tracking store is away: ``EX_TEMPFAIL`` of sysexits.h."""
RESUME = "resume_run_id"
"""Field of the stages that go on with a run that was cut."""


class GroupedCommand(click.Command):
    """A command whose options are shown in groups, the most used first."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A section per group, then the lists that options choose from."""
        records, named = {}, set[str]()
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                flags, text = record
                text, titles = with_lists_apart(text)
                own = "--help" in parameter.opts  # its name is click's affair
                records[HELP if own else str(parameter.name)] = (flags, text)
                named |= titles
        for title, names in grouped(records):
            with formatter.section(title):
                formatter.write_dl([records[name] for name in names])
        for title, known in LISTS.items():
            if title in named:
                with formatter.section(title):
                    formatter.write_dl([(facts.name, facts.help) for facts in known.all_facts()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples, a line each."""
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.splitlines():
                    formatter.write(f"  {line}\n")


class NumberOrAuto(click.ParamType):
    """A number, or the word ``auto``."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.name = f"{'integer' if kind is int else 'number'}|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == AUTO or isinstance(value, self.kind):
            return value
        try:
            return self.kind(value)
        except ValueError:
            wanted = "a whole number" if self.kind is int else "a number"
            self.fail(f"{value!r} is neither {wanted} nor 'auto'", param, ctx)


def _click_type(kind: type, may_be_auto: bool, choices: tuple[str, ...] | None) -> Any:
    if choices:
        return click.Choice(choices)
    if may_be_auto:
        return NumberOrAuto(kind)
    return {int: click.INT, float: click.FLOAT, str: click.STRING, bool: click.BOOL}[kind]


def options_of(config_class: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: one ``--option`` per field of a configuration class."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for field, kind, may_be_auto in reversed(list(fields_of(config_class))):
            # --sham alone means --sham true.
            choices = choices_of(field)
            flag: dict[str, Any] = {"is_flag": False, "flag_value": True} if kind is bool else {}
            function = click.option(
                flag_name(field.name),
                field.name,
                type=_click_type(kind, may_be_auto, choices),
                metavar="ARM" if choices == ARMS.names() else None,
                default=field.default,
                show_default=field.default != "",
                help=help_of(field),
                **flag,
            )(function)
        return function

    return decorate


def command(name: str) -> click.Command:
    """The click command of one entry point, made from its configuration class."""
    entry = STAGES[name]

    @click.command(name=name, cls=GroupedCommand, help=entry.help, epilog=examples(name))
    @options_of(entry.config)
    def run(**values: Any) -> None:
        run_stage(name, entry, values)

    return run


def run_stage(name: str, entry: EntryPoint, values: dict[str, Any]) -> None:
    """Validate, run, and turn an expected failure into one line on stderr and exit code 1; a run
    that was told to stop ends with 128 + the signal.
    """
    try:
        config = entry.config(**values)
    except ConfigError as error:
        if "MLFLOW_RUN_ID" in os.environ:
            from healing.tracking.open_runs import mark_failed

            mark_failed(str(error))
        raise click.UsageError(visible(str(error))) from error
    if follows(config) and not values.get("dry_run"):
        from healing.training.parallel.follow import follow_launched

        try:
            return follow_launched(config.device)
        except HealingError as error:
            fail(str(error))
    # Imports torch, which --help and errors of options do not need, and which takes seconds.
    with Console(str(values.get("verbosity", "normal"))).waiting("starting"):
        stage = entry.load(values)
    from healing.tracking.open_runs import abandon_open_runs

    stop = Stop()
    try:
        with _signals.listening(stop, abandon_open_runs):
            _run(name, stage, config, stop)
    except Stopped as stopped:
        again = " (the same command goes on from there)" if hasattr(config, RESUME) else ""
        write_line(f"stopped by {stopped.name}{again}", error=True)
        sys.exit(128 + stopped.signum)
    except OutageError as error:
        fail(str(error), 1 if error.denied else TRY_LATER)
    except HealingError as error:
        fail(str(error))
    except OSError as error:  # of a file that no part of the program expected to be refused
        reason = error.strerror or str(error) or type(error).__name__
        fail(f"{error.filename or 'a file'} could not be used: {reason}")


def fail(reason: str, code: int = 1) -> NoReturn:
    """One line on stderr, and an exit code."""
    write_line(f"error: {' '.join(reason.split())}", error=True)
    sys.exit(code)


def _run(name: str, stage: Callable[..., Any], config: Any, stop: Stop) -> None:
    """The stage with a driver that can be stopped and goes on, where it takes one."""
    from healing.stages.terminal.downloads import downloads

    for line in downloads(config):
        Console(config.verbosity).say(line)
    if "driver" not in inspect.signature(stage).parameters:
        stage(config)
        return
    from healing.stages.cells.state_classes import STATE_CLASSES
    from healing.stages.driver import Driver
    from healing.tracking.snapshots import FileSnapshots

    run_id = getattr(config, RESUME, "")
    if run_id:
        config = resumed(name, config, run_id)
    snapshots = FileSnapshots(STATE_CLASSES)
    console = Console(config.verbosity)
    stage(config, driver=Driver(console, stop=stop, snapshots=snapshots, again=bool(run_id)))
