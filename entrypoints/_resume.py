"""Going on with a run that was cut: its configuration, from its stored parameters."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

from healing.config.options import AUTO, fields_of, flag_name
from healing.config.paths import is_address
from healing.errors import ConfigError

C = TypeVar("C")

_TRUE_FALSE = {"True": True, "False": False}


def _value(text: str, kind: type, may_be_auto: bool, flag: str) -> Any:
    if may_be_auto and text == AUTO:
        return AUTO
    try:
        return _TRUE_FALSE[text] if kind is bool else kind(text)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"the run's {flag} is {text[:100]!r}, which cannot be read") from error


def config_of_run(given: C, stage: str, params: Mapping[str, str]) -> C:
    """The configuration of a stored run, with what determines no number as it is given now.

    Args:
        given: Of the command that resumes.
        stage: Prefix of the parameters.
        params: Of the stored run, all of them.

    Raises:
        ConfigError: They are no configuration of this stage, or a given option contradicts them.
    """
    if not any(name.startswith(f"{stage}.") for name in params):
        raise ConfigError(
            "the run was cut before its settings were stored: give the command that began it "
            "instead of --resume-run-id"
        )
    values: dict[str, Any] = {}
    for field, kind, may_be_auto in fields_of(type(given)):  # type: ignore[arg-type]
        name, flag = field.name, flag_name(field.name)
        now, key = getattr(given, name), f"{stage}.{field.name}"
        stored = now
        if key in params:
            stored = _value(params[key], kind, may_be_auto, flag)
        elif field.metadata["determines"]:
            stored = field.default  # an option that came later
        if name == "resume_run_id":
            values[name] = ""
        elif now == field.default:
            values[name] = stored
        elif field.metadata["determines"] and now != stored:
            raise ConfigError(
                f"--resume-run-id goes on with the run's own settings, and {flag} {now} is not its "
                f"{stored}: leave it out"
            )
        else:
            values[name] = now
    return dataclasses.replace(given, **values)  # type: ignore[type-var]


def resumed(stage: str, config: Any, run_id: str) -> Any:
    """The configuration of a run that was cut.

    Raises:
        HealingError: There is no such run, it is another stage's or finished, it was cut before its
            settings were known, or an option contradicts them.
    """
    from healing.tracking.queries import get_run

    run = get_run(run_id)
    of = run.tags.get("stage", "")
    if of != stage:
        raise ConfigError(
            f"--resume-run-id {run_id} is a run of {of or 'something else'}, not of {stage}"
        )
    if run.status == "FINISHED":
        raise ConfigError(f"--resume-run-id {run_id}: that run finished, nothing is left to do")
    return found_again(config_of_run(config, stage, run.params), run.tags)


def found_again(config: C, tags: Mapping[str, str]) -> C:
    """The configuration, with the runs of the checkpoints that are gone: what a run fetched for
    itself went with its process.

    Args:
        config: Of the run that is gone on with.
        tags: Of that run: the runs that made its checkpoints.
    """
    from healing.models.checkpoints import HEALED_NAME  # torch, which other commands do not need

    by_run = {
        "reference_checkpoint": ("reference_run_id", "{}"),
        "direction_checkpoint": ("direction_run_id", "{}"),
        "start_checkpoint": ("start_checkpoint", f"runs:/{{}}/checkpoints/{HEALED_NAME}"),
    }
    changes: dict[str, str] = {}
    for name, (field, form) in by_run.items():
        path, run_id = getattr(config, name, ""), tags.get(name.replace("checkpoint", "run_id"), "")
        if path and run_id and not is_address(path) and not pathlib.Path(path).is_file():
            changes |= {name: "", field: form.format(run_id)}
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]
