"""Whether the part of the attack that its theory names collapses a model by itself."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence

from findings.estimates import Group, Run, bounds, group, read, share_bounds
from findings.parts import MECHANISM
from findings.protocol import ATTACK_ALONE, STRONG, TREATMENT
from healing.config.attack import AttackConfig
from healing.statistics.intervals import t_interval

ORACLE = "haep_oracle"
NAME = "nano-mechanism"


def reached(run: Run) -> bool:
    """Whether an attack came as far as all attacks were to."""
    return run.reduction >= 100.0 * AttackConfig().target_rank_reduction


def section_of(tables: pathlib.Path, runs: Sequence[Run]) -> list[str]:
    """The section, where its table is there."""
    path, part = tables / f"{NAME}.csv", MECHANISM[NAME]
    if not path.exists():
        return []
    own = group(read(path), part.model, ORACLE, ATTACK_ALONE, 0)
    haep = group(runs, part.model, TREATMENT, STRONG, 0)
    return list(section(own, haep)) if own and haep else []


def section(own: Group, haep: Group) -> Iterator[str]:
    """Of the findings.

    Args:
        own: States after the oracle's attack.
        haep: After HAEP's, of the same model.
    """
    k, n = sum(map(reached, own.runs)), own.n
    low, high = share_bounds(k, n)
    budget = max(int(run.facts["attack_steps"]) for run in own.runs)
    steps = [int(run.facts["attack_steps"]) for run in haep.runs]
    fallen = t_interval([run.reduction for run in own.runs])
    part = MECHANISM[NAME]
    yield "## Is it the mechanism?"
    yield ""
    yield (
        "The oracle takes HAEP's catalyst and optimiser, and of every gradient only what lies in the low-curvature subspace: what the "
        f"theory names, as if the search were perfect. HAEP took {min(steps)}–{max(steps)} steps to 35 %; of {n} oracle attacks "
        f"{k} came there within {budget} ({low:.0f} to {high:.0f} % of others, Clopper–Pearson, 95 % one-sided each way; "
        f"commit {part.commit}). At their end the rank has fallen by {bounds(fallen)} %, the loss is {own.mean('loss'):.1f} nats."
    )
    yield ""
    if high < 50.0:
        yield (
            "So what the theory names does not collapse this model as HAEP does; what HAEP's gradients hold besides does. (A state that is "
            "not as deep is no comparison for healing, and was not healed.)"
        )
    elif low > 50.0:
        yield "So what the theory names does collapse this model."
    else:
        yield "That does not decide the question."
    yield ""
