"""The page of a run: what came out, how to repeat it, what it comes from, what came after.

Addresses are MLflow's own (``runs:/RUN``, ``runs:/RUN/file``, ``runs:?FILTER``); the store turns
them into what its UI opens.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from healing.config.fingerprint import not_determining
from healing.config.options import fields_of, flag_name

PICTURE = "plots/overview.png"
"""The figure of a page, in the run's files."""

WIDTH = 76
"""Characters of a line of a command: MLflow's page does not wrap it, and grows wider than the
screen instead."""


class Code(Protocol):
    """Where the code is that ran."""

    @property
    def url(self) -> str:
        """Of the git repository; empty where others reach none."""

    @property
    def commit(self) -> str:
        """40 hexadecimal digits; empty outside a checkout."""

    @property
    def is_dirty(self) -> bool:
        """Whether files differ from the commit."""

    @property
    def is_published(self) -> bool:
        """Whether a branch of a remote was seen to hold the commit."""


def settings(config: Any, **also: Any) -> dict[str, str]:
    """The options that give a configuration's results: those that differ from their defaults and
    determine numbers.

    Args:
        config: Resolved.
        **also: Options that name what a configuration holds as a path, or that determine no number
            and are wanted all the same; empty ones are left out.
    """
    left_out = not_determining(config)
    found = {
        field.name: getattr(config, field.name)
        for field, _, _ in fields_of(config)
        if field.name not in left_out and getattr(config, field.name) != field.default
    }
    wanted = {name: value for name, value in (found | also).items() if value not in ("", None)}
    return {name: _text(value) for name, value in wanted.items()}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def command(entry: str, options: Mapping[str, str], code: Code) -> str:
    """The command that gives a run's numbers again.

    ``mlflow run`` of the repository's address at the commit where there is one, else the entry
    point of the checkout that it is typed in.
    """
    if code.url and code.commit:
        parts = [["mlflow", "run", code.url], ["-v", code.commit], ["--env-manager", "local"]]
        parts += [["-e", entry], *(["-P", f"{n}={value}"] for n, value in options.items())]
    else:
        parts = [["python", "-m", f"entrypoints.{entry}"]]
        parts += [[flag_name(n), value] for n, value in options.items()]
    return _wrapped([shlex.join(words) for words in parts])


def _wrapped(parts: Sequence[str]) -> str:
    """A command in lines that a page has room for, with a backslash at the end of all but one."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 1 + len(part) <= WIDTH:
            lines[-1] += f" {part}"
        else:
            lines.append(f"    {part}")
    return " \\\n".join(lines)


def repeat(entry: str, options: Mapping[str, str], code: Code, note: str = "") -> list[str]:
    """The part *Repeat this run*.

    Args:
        entry: Entry point.
        options: As :func:`settings` gives them.
        code: That ran.
        note: What else the command makes or needs.
    """
    notes = [note] if note else []
    if code.is_dirty:
        notes.append("Files had uncommitted changes when it ran: the commit is without them.")
    elif code.url and not code.is_published:
        notes.append("When it ran, no branch of the remote was seen to hold the commit.")
    if not code.url and code.commit:
        notes.append(f"In a checkout of commit {code.commit}.")
    return ["**Repeat this run**", "", "```bash", command(entry, options, code), "```", "",
            *(line for text in notes for line in (text, ""))]  # fmt: skip


def links(title: str, found: Iterable[tuple[str, str]]) -> list[str]:
    """A part with one link a line, ``title`` over them; nothing where there is none.

    Args:
        title: *Comes from*, *Then*.
        found: Text and address; an empty address is left out.
    """
    lines = [f"* [{text}]({address})" for text, address in found if address]
    return [f"**{title}**", "", *lines, ""] if lines else []


def run_link(run_id: str) -> str:
    """Address of a run's page; empty where there is no run."""
    return f"runs:/{run_id}" if run_id else ""


def search_link(tag: str, value: str) -> str:
    """Address of the runs that carry a tag's value."""
    name = f"`{tag}`" if "." in tag else tag
    return f"runs:?tags.{name} = '{value}'" if value else ""


PART_OF = ["Part of [the run above](runs:/parent).", ""]
"""Link to the parent; the store leaves the line out where there is none."""


def page(
    sentence: str,
    run_id: str,
    table: Sequence[str],
    *parts: Iterable[str],
    picture: str = PICTURE,
    alt: str = "overview",
) -> str:
    """A run's description in Markdown: the sentence, the figure, the table, then the parts.

    Args:
        sentence: What came out.
        run_id: Whose files hold the figure.
        table: Lines of a Markdown table; may be empty.
        *parts: Lines, in their order.
        picture: Path of the figure in the run's files; empty = none.
        alt: The figure in words.
    """
    image = [f"![{alt}](runs:/{run_id}/{picture})", ""] if picture else []
    lines = [sentence, "", *image, *table, ""]
    for part in parts:
        lines += part
    return "\n".join(lines).rstrip() + "\n"
