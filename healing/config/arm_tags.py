"""What is said of an arm outside its own code: its role in the design, its label, its tags.

Role and label are data of a run: a store may hold runs of an arm that is not installed where it is
summarized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from healing.registry import ARMS, CONTROL, MATCHES, ROLES, role_of

SHAM_ARM = "none"
"""Name under which the healthy model is healed."""


def arm_role(arm: str, tag: str = "") -> str:
    """Role of an arm: by its run's tag, else by its name; ``control`` where neither is known.

    A tag that the arm's file names among its former roles is read as today's role.

    Args:
        arm: Name.
        tag: ``arm_role`` of a stored run; empty for one that was stored without.
    """
    if not ARMS.known(arm):
        return tag if tag in ROLES else CONTROL
    facts = ARMS.facts(arm)
    outdated = tag not in ROLES or tag in facts.get("FORMER_ROLES", ())
    return role_of(facts) if outdated else tag


def arm_label(arm: str, tag: str = "") -> str:
    """Name of an arm for people: by its run's tag ``arm_label``, else by its file; else the name
    itself.
    """
    if tag:
        return tag
    if not ARMS.known(arm):
        return arm
    return str(ARMS.facts(arm).get("LABEL", arm.replace("_", " ")))


def arm_short(arm: str, label: str) -> str:
    """Shortest name of an arm, for the ends of lines in figures; its label where it has none."""
    return str(ARMS.facts(arm).get("SHORT", label)) if ARMS.known(arm) else label


def arm_tags(arm: str) -> dict[str, str]:
    """Tags of a run beside ``arm``; none for an arm that is not installed here."""
    if not ARMS.known(arm):
        return {}
    return {"arm_role": arm_role(arm), "arm_label": arm_label(arm)}


def chart_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    """How a run of a model and an arm is drawn in MLflow's charts: where runs are grouped, the line
    that it belongs to; where they are not, the colour that its arm has in our figures.

    Args:
        tags: Of the run; without ``model`` or ``arm`` there is no such line.
    """
    model, arm = str(tags.get("model", "")), str(tags.get("arm", ""))
    if not (model and arm):
        return {}
    colour = ARMS.facts(arm).get("COLOUR", "") if ARMS.known(arm) else ""
    return {"line": f"{model} {arm}"} | ({"mlflow.runColor": str(colour)} if colour else {})


def arms_of(*roles: str) -> tuple[str, ...]:
    """Names of the installed arms of some roles."""
    return tuple(name for name in ARMS.names() if arm_role(name) in roles)


def arm_matches(arm: str) -> tuple[str, ...]:
    """What a damage control can share with its reference, the one of ``main`` first."""
    return tuple(ARMS.facts(arm).get("MATCHES", MATCHES))


def arm_needs(arm: str) -> tuple[str, ...]:
    """Other attacks (of :data:`healing.registry.NEEDS`) that an arm cannot do without."""
    return tuple(ARMS.facts(arm).get("NEEDS", ()))


def arm_takes(arm: str, option: str) -> bool:
    """Whether an arm takes an option that not all arms take."""
    return option in ARMS.facts(arm).get("OPTIONS", ())


def arms_that_take(option: str) -> tuple[str, ...]:
    """Names of the installed arms that take an option that not all arms take."""
    return tuple(name for name in ARMS.names() if arm_takes(name, option))


def arms_that_need(what: str) -> tuple[str, ...]:
    """Names of the installed arms that need some other attack."""
    return tuple(name for name in ARMS.names() if what in arm_needs(name))
