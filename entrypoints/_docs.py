"""Renew the tables of docs/method.md that follow from files: arms, healing methods, measurements.

``python -m entrypoints._docs`` after one was added or its first line changed.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from healing.config.arm_tags import arm_label, arm_role
from healing.config.heal import rate_ratio
from healing.registry import ARMS, MEASUREMENTS, METHODS, ROLES

METHOD = pathlib.Path(__file__).parents[1] / "docs" / "method.md"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables() -> dict[str, str]:
    """Name of the marker → table; plug-ins that happen to be installed are left out."""
    arms = [f for f in ARMS.all_facts() if f.built_in]
    methods = [f for f in METHODS.all_facts() if f.built_in]
    extra = [f for f in MEASUREMENTS.all_facts() if f.built_in]
    return {
        "arms": _table(
            ("arm", "in figures", "role", "what it does"),
            [(f"`{f.name}`", arm_label(f.name), arm_role(f.name), f.help) for f in arms],
        ),
        "roles": _table(("role", "means"), list(ROLES.items())),
        "methods": _table(
            ("`--healing-method`", "learning rate of `auto`", "what is trained"),
            [(f"`{f.name}`", f"× {rate_ratio(f):g}", f.help) for f in methods],
        ),
        "measurements": _table(
            ("metric", "unit", "of"),
            [
                (f"`extra/{f.name}_{name}`", unit, f.help)
                for f in extra
                for name, unit in f.get("UNITS", {}).items()
            ],
        ),
    }


def render(text: str) -> str:
    """The text with every table between ``<!-- NAME -->`` and ``<!-- end -->`` made anew."""
    for name, table in tables().items():
        before, marker, rest = text.partition(f"<!-- {name} -->\n")
        text = before + marker + table + "\n<!-- end -->" + rest.partition("<!-- end -->")[2]
    return text


if __name__ == "__main__":
    METHOD.write_text(render(METHOD.read_text(encoding="utf-8")), encoding="utf-8")
