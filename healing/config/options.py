"""Typed, documented, range-checked dataclass fields: the one place a parameter is declared.

A configuration is a frozen dataclass, derived from :class:`Options`, whose fields are made by
:func:`option`. The field carries its default, its help text, its admissible values, and whether
results depend on it; the command line, the ``MLproject`` file, the logged parameters and the
fingerprints are all derived from (or tested against) these fields.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from healing.errors import ConfigError

MAX_COUNT = 10**9
"""Largest whole number of an option that names no maximum of its own."""
MAX_SEED = 2**31 - 1
MAX_TEXT = 4096
"""Characters of an option: the longest path that Linux has."""
AUTO = "auto"
"""Value of a field that is resolved from the model's preset; never reaches the numerics."""


def option(
    default: Any,
    help: str | Callable[[], str],
    *,
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    exclusive_minimum: bool = False,
    determines: bool = True,
    separates: bool = True,
    later: bool = False,
    required: bool = False,
) -> Any:
    """A dataclass field with its documentation and admissible values.

    Args:
        default: The value used where nothing is given.
        help: One sentence for ``--help`` and the docs, with the unit; or what makes it when it is
            asked for.
        choices: Admissible strings; or what lists them when they are asked for (a registry's
            ``names``).
        minimum: Smallest admissible number.
        maximum: Largest admissible number.
        exclusive_minimum: The minimum itself is not admissible.
        determines: A result's numbers depend on it: it is part of fingerprints. ``False`` also
            where what the field names does determine them and is hashed itself (the kind of
            device, a checkpoint's weights).
        separates: Runs that differ in it are not pooled in a summary. What determines no number
            separates no runs, whatever is said here.
        later: The field came later, and with its default results are those of before: fingerprints
            and settings hold it only where it has another value.
        required: An empty string is not admissible.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "choices": choices,
            "minimum": minimum,
            "maximum": maximum,
            "exclusive_minimum": exclusive_minimum,
            "determines": determines,
            "separates": determines and separates,
            "later": later,
            "required": required,
        },
    )


def help_of(field: dataclasses.Field[Any]) -> str:
    """Help text of a field."""
    text = field.metadata["help"]
    return str(text() if callable(text) else text)


def choices_of(field: dataclasses.Field[Any]) -> tuple[str, ...] | None:
    """Admissible strings of a field; ``None`` where all are."""
    choices = field.metadata["choices"]
    return tuple(choices()) if callable(choices) else choices


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of every configuration: fields are checked when it is made, and have one order.

    The order, in ``--help``, ``MLproject`` and the logged parameters, is that of the base classes
    as they are written, each in its own order, then the class's own fields; ``order`` then moves
    the fields it names to the front (before its ``...``) or to the end (after it).
    """

    order: ClassVar[tuple[Any, ...]] = (...,)
    unresolved: ClassVar[tuple[str, ...]] = ()
    """Fields whose ``auto`` is not replaced by this stage: another's configuration has them."""

    def __post_init__(self) -> None:
        validate_fields(self)


def ordered_names(cls: type) -> list[str]:
    """Names of a configuration's fields in their order (see :class:`Options`).

    Raises:
        ValueError: ``order`` names what is no field, or has no ``...``.
    """
    names = [name for base in cls.__bases__ for name in _names_of_base(base)]
    names += [field.name for field in dataclasses.fields(cls)]
    names = list(dict.fromkeys(names))
    order = cls.__dict__.get("order", (...,))
    rest = order.index(...)
    front, end = order[:rest], order[rest + 1 :]
    for name in (*front, *end):
        names.remove(name)
    return [*front, *names, *end]


def _names_of_base(base: type) -> list[str]:
    return ordered_names(base) if dataclasses.is_dataclass(base) else []


def flag_name(field_name: str) -> str:
    """The command-line spelling of a field: ``healing_lr`` → ``--healing-lr``."""
    return "--" + field_name.replace("_", "-")


def scalar_type(annotation: Any) -> type:
    """The number (or string, or bool) type of a field; ``int | str`` (auto) gives ``int``."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        members = [a for a in typing.get_args(annotation) if a not in (str, type(None))]
        return members[0] if members else str
    return annotation  # type: ignore[no-any-return]


def fields_of(config: Any) -> Iterator[tuple[dataclasses.Field[Any], type, bool]]:
    """Yield (field, scalar type, may be ``auto``) of a configuration class or object, in order."""
    yield from _fields_of(config if isinstance(config, type) else type(config))


@functools.cache  # a sweep of thousands of cells makes some configurations for each
def _fields_of(cls: type) -> tuple[tuple[dataclasses.Field[Any], type, bool], ...]:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    return tuple(
        (field, scalar_type(hints[field.name]), isinstance(hints[field.name], types.UnionType))
        for field in map(fields.__getitem__, ordered_names(cls))
    )


def _check_number(name: str, value: float, meta: typing.Mapping[str, Any], whole: bool) -> None:
    low, high = meta["minimum"], meta["maximum"]
    high = MAX_COUNT if whole and high is None else high
    if value != value or value in (float("inf"), float("-inf")):
        raise ConfigError(f"{flag_name(name)} must be a finite number, got {value}")
    below = low is not None and (value <= low if meta["exclusive_minimum"] else value < low)
    if below or (high is not None and value > high):
        opening = "above" if meta["exclusive_minimum"] else "at least"
        parts = [f"{opening} {low:g}"] if low is not None else []
        stated = meta["maximum"] is not None or not below
        parts += [f"at most {high:g}"] if high is not None and stated else []
        got = f"{value:g}" if abs(value) < 1e300 else "a number of more digits"
        raise ConfigError(f"{flag_name(name)} must be {' and '.join(parts)}, got {got}")


def _check_text(name: str, value: str, required: bool) -> None:
    """No text that cannot be a path, a name or a line of a terminal."""
    if required and not value.strip():
        raise ConfigError(f"{flag_name(name)} is empty: name one, or leave it out")
    if len(value) > MAX_TEXT:
        raise ConfigError(
            f"{flag_name(name)} must have at most {MAX_TEXT} characters, got {len(value)}"
        )
    if bad := next((c for c in value if unicodedata.category(c) in ("Cc", "Cs")), ""):
        raise ConfigError(f"{flag_name(name)} holds the control character {bad!r}: leave it out")


def listed(
    text: str, flag: str, admissible: tuple[str, ...] | None = None, *, empty: bool = False
) -> tuple[str, ...]:
    """The entries of a comma-separated option, in the order given.

    Args:
        text: As given.
        flag: Option that it was given as, for messages.
        admissible: Entries that there are; ``None`` = any.
        empty: Whether there may be none.

    Raises:
        ConfigError: It is empty, or an entry is unknown or there twice.
    """
    items = tuple(item.strip() for item in text.split(",") if item.strip())
    if not items and not empty:
        raise ConfigError(f"{flag} is empty: name at least one")
    unknown = [item for item in items if admissible is not None and item not in admissible]
    if unknown:
        raise ConfigError(
            f"{flag}: unknown {', '.join(unknown)}; choose from {', '.join(admissible or ())}"
        )
    if len(set(items)) < len(items):
        raise ConfigError(f"{flag} names one entry twice: {text}")
    return items


def seed_number(text: str) -> int | None:
    """A seed as it is written, ``7`` or ``007``; ``None`` where it is none."""
    if not text.isdecimal() or len(text) > 20 or int(text) > MAX_SEED:
        return None
    return int(text)


def validate_fields(config: Any) -> None:
    """Check type, range and choice of every field.

    Raises:
        ConfigError: Naming the option, what is admissible and what was given.
    """
    for field, kind, may_be_auto in fields_of(config):
        value, meta = getattr(config, field.name), field.metadata
        if may_be_auto and value == AUTO:
            continue
        choices = choices_of(field)
        if choices is not None and value not in choices:
            admissible = ", ".join(choices)
            raise ConfigError(f"{flag_name(field.name)} must be one of {admissible}; got {value!r}")
        if kind in (int, float):
            ok = isinstance(value, (int, float) if kind is float else int)
            if not ok or isinstance(value, bool):
                wanted = "a whole number" if kind is int else "a number"
                auto = " or 'auto'" if may_be_auto else ""
                raise ConfigError(f"{flag_name(field.name)} must be {wanted}{auto}, got {value!r}")
            _check_number(field.name, value, meta, kind is int)
        elif not isinstance(value, kind):
            raise ConfigError(
                f"{flag_name(field.name)} must be of type {kind.__name__}, got {value!r}"
            )
        elif isinstance(value, str):
            _check_text(field.name, value, meta["required"])
