"""docs/findings.md from the tables: every number in it is computed here, none is typed.

What is said follows from rules of docs/protocol.md: another table can turn a sentence round.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Sequence

from scipy import stats

from findings import mechanism, replication, variation
from findings.estimates import (
    MEASURES,
    Group,
    Run,
    bounds,
    excess_loss,
    group,
    paired,
    pairs_needed,
    read,
    sham_of,
)
from findings.figure import draw, draw_first_screen
from findings.parts import PARTS, part_of
from findings.protocol import PRESET, SCRATCH_ARM, STRONG, TREATMENT
from findings.replication import Replication
from findings.verdicts import counted, strict, verdict
from healing.config.arm_tags import SHAM_ARM
from healing.measurements.recovery import REVERSIBLE_ABOVE
from healing.statistics.intervals import Interval, t_interval
from healing.statistics.paired_tests import holm_adjust

ROOT = pathlib.Path(__file__).parents[1]
TABLES = ROOT / "findings" / "tables"
PAGE, FIGURE = ROOT / "docs" / "findings.md", ROOT / "docs" / "findings.png"
FIRST_SCREEN = {
    False: ROOT / "docs/images/recovery.png",
    True: ROOT / "docs/images/recovery_dark.png",
}
"""Dark → README's picture."""
FINE_TUNING = ("random_tokens", "random_text")
"""The controls of question 2."""
MARGIN = 10.0


def _arms(runs: Sequence[Run], model: str) -> list[str]:
    part = part_of(model)
    there = {r.arm for r in runs if r.model == model}
    return [arm.name for arm in part.arms if arm.name in there]


def _damage_table(runs: Sequence[Run], models: Sequence[str]) -> Iterator[str]:
    yield "| model | arm | checkpoints | rank after the attack (healthy) | loss after (healthy) | steps | weight distance |"
    yield "|---|---|---|---|---|---|---|"
    for model in models:
        for arm in _arms(runs, model):
            own = group(runs, model, arm, STRONG, 0)
            if own is None or arm == SHAM_ARM:
                continue
            steps = [int(run.facts["attack_steps"]) for run in own.runs]
            distance = [float(run.facts["weight_change"]) for run in own.runs]
            yield (
                f"| {model} | {part_of(model).arm_name(arm)} | {own.n} | {own.mean('effective_rank'):.1f} "
                f"({own.mean('effective_rank', -1):.1f}) | {own.mean('loss'):.1f} "
                f"({own.mean('loss', -1):.2f}) | {min(steps)}–{max(steps)} | "
                f"{min(distance):.2f}–{max(distance):.2f} |"
            )


def _recovery_table(runs: Sequence[Run], models: Sequence[str]) -> Iterator[str]:
    yield (
        "| model | arm | rank recovery % [95 %] | over 70 % (share of others) | loss above the sham's, "
        "nats | accuracy % (sham) | by the protocol | by docs/method.md |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for model in models:
        last = _last(runs, model)
        sham = sham_of(runs, model, STRONG, last)
        scratch = group(runs, model, SCRATCH_ARM, STRONG, last)
        for arm in _arms(runs, model):
            own = group(runs, model, arm, STRONG, last)
            if own is None or arm == SHAM_ARM:
                continue
            known = excess_loss(own, sham) if sham else None
            shown = ["–", "–"] if arm == SCRATCH_ARM else [bounds(own.interval()), counted(own)]
            reference = f"{sham.mean('accuracy'):.1f}" if sham else "–"
            said = "yardstick" if arm == SCRATCH_ARM else verdict(own, scratch)
            yield (
                f"| {model} | {part_of(model).arm_name(arm)} | {shown[0]} | {shown[1]} | "
                f"{bounds(known, 2) if known else '–'} | {own.mean('accuracy'):.1f} "
                f"({reference}) | {said} | {'–' if arm == SCRATCH_ARM else strict(own)} |"
            )


def _last(runs: Sequence[Run], model: str) -> int:
    return max(r.last for r in runs if r.model == model and r.healer == STRONG)


def _budget_table(runs: Sequence[Run], models: Sequence[str]) -> Iterator[str]:
    """Rank recovery of HAEP as a function of the budget and of the healer."""
    for model in models:
        part = part_of(model)
        yield "| " + " | ".join([f"{model}: steps", *map(str, part.budgets)]) + " |"
        yield "|---" * (1 + len(part.budgets)) + "|"
        for arm in _arms(runs, model):
            for healer in (STRONG, PRESET):
                found = [group(runs, model, arm, healer, step) for step in part.budgets]
                if arm in (SHAM_ARM, SCRATCH_ARM) or not all(found):
                    continue
                cells = [bounds(g.interval()) for g in found if g]
                name = f"{part.arm_name(arm)}, {healer} healer"
                yield "| " + " | ".join([name, *cells]) + " |"
        yield ""


def _contrasts(runs: Sequence[Run], models: Sequence[str]) -> Iterator[str]:
    """HAEP minus each control, points of rank recovery, Holm over all of them."""
    rows, values = [], []
    for model in models:
        part = part_of(model)
        last = _last(runs, model)
        for control in _controls(runs, model):
            for step in (part.steps // 4, last):
                pair = [group(runs, model, arm, STRONG, step) for arm in (TREATMENT, control)]
                if not all(pair):
                    continue
                differences = paired(*pair)  # type: ignore[arg-type]
                found = t_interval(differences)
                p = float(stats.ttest_1samp(differences, 0.0).pvalue) if len(differences) > 2 else 1
                rows.append((model, control, step, differences, found))
                values.append(p)
    yield (
        "| model | HAEP minus | step | difference, points [95 %] | pairs | p (Holm) | inside ± 10 | "
        "pairs for ± 10 |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for row, p in zip(rows, holm_adjust(values), strict=True):
        model, control, step, differences, found = row
        inside = found.low > -MARGIN and found.high < MARGIN
        yield (
            f"| {model} | {part_of(model).arm_name(control)} | {step} | {bounds(found, 1)} | {len(differences)} | "
            f"{p:.2g} | {'yes' if inside else 'no'} | {pairs_needed(differences) or '–'} |"
        )


def _panel(runs: Sequence[Run], models: Sequence[str]) -> Iterator[str]:
    """Every measure's mean recovery, HAEP and its controls, at the end of the budget."""
    yield "| model | arm | " + " | ".join(MEASURES.values()) + " |"
    yield "|---" * (2 + len(MEASURES)) + "|"
    for model in models:
        last = _last(runs, model)
        for arm in _arms(runs, model):
            own = group(runs, model, arm, STRONG, last)
            if own is None or arm in (SHAM_ARM, SCRATCH_ARM):
                continue
            cells = [bounds(own.interval(measure)) for measure in MEASURES]
            yield f"| {model} | {part_of(model).arm_name(arm)} | " + " | ".join(cells) + " |"


def distance_correlation(
    runs: Sequence[Run], model: str, arms: Sequence[str] = ()
) -> tuple[float, int]:
    """Spearman's ρ of rank recovery and weight distance over collapsed checkpoints, and n.

    Args:
        runs: Of the tables.
        model: Of the runs.
        arms: Which; empty = all that collapsed a model.
    """
    last = _last(runs, model)
    own = [
        r
        for r in runs
        if r.model == model
        and r.healer == STRONG
        and r.arm not in (SHAM_ARM, SCRATCH_ARM)
        and (not arms or r.arm in arms)
    ]
    recovered = [r.recovery("effective_rank", last) for r in own]
    distance = [float(r.facts["weight_change"]) for r in own]
    return float(stats.spearmanr(distance, recovered).statistic), len(own)


def _beside_primary(
    runs: Sequence[Run], models: Sequence[str], differs: Callable[[Interval, Interval], bool]
) -> list[str]:
    """Secondary measures whose interval differs from the primary one's, of every arm, in words."""
    found = []
    for model in models:
        for arm in (TREATMENT, *_controls(runs, model)):
            own = group(runs, model, arm, STRONG, _last(runs, model))
            if own is None or own.n < 3:
                continue
            for measure, name in list(MEASURES.items())[1:]:
                other = own.interval(measure)
                if differs(own.interval(), other):
                    what = f"{name} on {model}, {part_of(model).arm_name(arm)}"
                    found.append(f"{what}: {bounds(other)} %")
    return found


def disagreeing(runs: Sequence[Run], models: Sequence[str]) -> list[str]:
    """Measures whose interval lies on the other side of 70 % than the primary one's."""

    def turned(primary: Interval, other: Interval) -> bool:
        return (primary.low > REVERSIBLE_ABOVE and other.high < REVERSIBLE_ABOVE) or (
            primary.high < REVERSIBLE_ABOVE and other.low > REVERSIBLE_ABOVE
        )

    return _beside_primary(runs, models, turned)


def undecided(runs: Sequence[Run], models: Sequence[str]) -> list[str]:
    """Measures whose interval holds 70 % where the primary one's does not."""

    def holds(interval: Interval) -> bool:
        return interval.low <= REVERSIBLE_ABOVE <= interval.high

    return _beside_primary(runs, models, lambda one, other: holds(other) and not holds(one))


def _controls(runs: Sequence[Run], model: str) -> list[str]:
    return [a for a in _arms(runs, model) if a not in (TREATMENT, SHAM_ARM, SCRATCH_ARM)]


def _beside(runs: Sequence[Run], model: str, own: Group) -> str:
    """HAEP minus each control at the end of the budget, in a sentence."""
    said = []
    for control in _controls(runs, model):
        other = group(runs, model, control, STRONG, own.step)
        if other is not None:
            found = t_interval(paired(own, other))
            said.append(f"{part_of(model).arm_name(control)} {bounds(found, 1)}")
    return f" HAEP minus its controls, points: {'; '.join(said)}." if said else ""


def answer(runs: Sequence[Run], models: Sequence[str], again: Sequence[Replication] = ()) -> str:
    """The answer in a few sentences, as README and findings begin."""
    said = []
    for model in models:
        part = part_of(model)
        last = _last(runs, model)
        own = group(runs, model, TREATMENT, STRONG, last)
        sham = sham_of(runs, model, STRONG, last)
        if own is None:
            continue
        first = group(runs, model, TREATMENT, STRONG, part.budgets[0])
        preset = group(runs, model, TREATMENT, PRESET, part.budgets[0])
        at_first = f", from {bounds(first.interval())} % after {first.step}" if first else ""
        if preset:
            at_first += f" ({bounds(preset.interval())} % with the preset's rate)"
        loss = f", loss {bounds(excess_loss(own, sham), 2)} nats above the sham's" if sham else ""
        said.append(
            f"**{model}**: rank recovery {bounds(own.interval())} % after {last:,} steps "
            f"({own.n} checkpoints, {own.above()} over 70 %){at_first}{loss}. By the protocol: "
            f"{verdict(own, group(runs, model, SCRATCH_ARM, STRONG, last))}; by the stricter rule of "
            f"docs/method.md: {strict(own)}."
            + replication.sentence(model, again)
            + _beside(runs, model, own)
        )
    return "\n".join(f"* {sentence}" for sentence in said)


def page(
    runs: Sequence[Run],
    models: Sequence[str],
    varied: Sequence[str] = (),
    again: Sequence[Replication] = (),
    theory: Sequence[str] = (),
) -> str:
    """The whole document.

    Args:
        runs: Of all parts.
        models: In the protocol's order.
        varied: Lines on what the protocol holds fixed.
        again: Replications that were run.
        theory: Lines on what the attack's theory does alone.
    """
    distances = [(model, *distance_correlation(runs, model)) for model in models]
    apart = disagreeing(runs, models)
    measures = (
        "The measures disagree on what is healed: " + "; ".join(apart) + "."
        if apart
        else "No secondary measure's interval lies on the other side of 70 % than the primary one's."
    )
    if apart_from := undecided(runs, models):
        measures += " These leave it open whether 70 % is reached: " + "; ".join(apart_from) + "."
    tuned = (TREATMENT, *FINE_TUNING)
    within = [(model, *distance_correlation(runs, model, tuned)) for model in models]
    far, near = (
        "; ".join(f"{model} {rho:+.2f} ({n} checkpoints)" for model, rho, n in found)
        for found in (distances, within)
    )
    lines = [
        "# Findings",
        "",
        "Written by `make findings` from `findings/tables/*.csv`: every number is computed, none is "
        "typed. Protocol, fixed before: [protocol.md](protocol.md); the runs were made by "
        + ", ".join(f"commit {part_of(m).commit} ({m})" for m in models)
        + ", which holds the protocol as it was.",
        "",
        "## Answer",
        "",
        "Rank recovered by clean fine-tuning after HAEP, by the strongest healer that was tried:",
        "",
        answer(runs, models, again),
        "",
        measures,
        "",
        "![Rank recovery and loss above the sham's, against healing steps](findings.png)",
        "",
        "Each thin line is one checkpoint, each thick one the mean of an arm; dashed: 20 and 70 %.",
        "",
        "## What was done to the models",
        "",
        "All attacks stop at the first step at which the rank lies 35 % or more under the healthy one.",
        "",
        *_damage_table(runs, models),
        "",
        "## What came back at the end of the budget",
        "",
        *_recovery_table(runs, models),
        "",
        '"Over 70 %" counts checkpoints, with the share of other attacks that this allows (Clopper–'
        "Pearson, 95 % one-sided each way). The sham is the healthy model through the same steps. The protocol asks that more than "
        "half of others do the same; the rule of [method.md](method.md) asks that the mean stay on its side though all others that the "
        "count allows did the opposite.",
        "",
        *(replication.section(again) if again else ()),
        "## The verdict is the budget's and the healer's",
        "",
        *_budget_table(runs, models),
        "## Is it HAEP?",
        "",
        *_contrasts(runs, models),
        "",
        f"Spearman's correlation of rank recovery with weight distance at the start: over all arms {far}; "
        f"among HAEP and its fine-tuning controls alone {near}. Distance does not decide alone: outside the protocol, noise of "
        "rank 1 that reaches HAEP's rank moves the weights farther than HAEP and heals as well (LOG.md).",
        "",
        *theory,
        "## By other measures",
        "",
        *_panel(runs, models),
        "",
        *varied,
        *_conclusions(runs, models),
        "",
    ]
    return "\n".join(lines)


def _conclusions(runs: Sequence[Run], models: Sequence[str]) -> Iterator[str]:
    healed: list[str] = []
    open_: list[str] = []
    not_healed: list[str] = []
    for model in models:
        last = _last(runs, model)
        own = group(runs, model, TREATMENT, STRONG, last)
        if own is None:
            continue
        said = verdict(own, group(runs, model, SCRATCH_ARM, STRONG, last))
        place = {"heals": healed, "does not heal within this budget": not_healed}.get(said, open_)
        place.append(f"{model} ({said})" if place is open_ else model)
    yield "## What holds, and what does not"
    yield ""
    if healed:
        yield (
            f"* HAEP's collapse is reversible on {' and '.join(healed)} by the protocol's rule: rank "
            "over 70 % and a loss below that of learning from scratch. How far loss and accuracy stay "
            "from the sham's, and the stricter rule's answer, stand in the table. A short or weak "
            "healing would have read as not recovered: that says something of the healing, not of the "
            "damage."
        )
    if not_healed:
        yield f"* Not healed within the budget: {', '.join(not_healed)}. More tokens may change that."
    if open_:
        yield f"* Undecided: {', '.join(open_)}."
    yield (
        "* Whether HAEP differs from the same fine-tuning without its idea is the table of differences "
        "above: only a Holm-adjusted p under 0.05 against *both* would say that its catalyst matters to "
        "healing."
    )
    yield (
        "* Equal rank is not equal damage: arms that reach it by another road start from another loss "
        "and another distance."
    )
    yield ""
    yield "## What would change our mind"
    yield ""
    yield (
        "A longer budget under which the plateau stays below 70 %; a healer that is stronger still; a "
        "model of another size, text or tokenizer that stays collapsed; an attack that goes deeper. The "
        "intervals speak of other attack seeds on these models, one probe and one corpus each."
    )


BEGIN, END = "<!-- answer: written by make findings -->", "<!-- end -->"


def readme_block(
    runs: Sequence[Run], models: Sequence[str], again: Sequence[Replication] = ()
) -> str:
    """What README's first screen says between its two marks."""
    light, dark = (FIRST_SCREEN[dark].relative_to(ROOT).as_posix() for dark in (False, True))
    return "\n".join(
        [
            BEGIN,
            "<picture>",
            f'  <source media="(prefers-color-scheme: dark)" srcset="{dark}">',
            f'  <img src="{light}" alt="Rank recovery against healing steps: a thin line per '
            'checkpoint, a thick one per arm; dashed at 20 and 70 %">',
            "</picture>",
            "",
            answer(runs, models, again),
            END,
        ]
    )


def with_block(readme: str, block: str) -> str:
    """README with its block replaced.

    Raises:
        ValueError: It has no place for one.
    """
    begin, end = readme.find(BEGIN), readme.find(END, readme.find(BEGIN))
    if begin < 0 or end < 0:
        raise ValueError(f"README.md has no block from {BEGIN} to {END}")
    return readme[:begin] + block + readme[end + len(END) :]


def load(folder: pathlib.Path = TABLES) -> tuple[list[Run], list[str]]:
    """Runs of all tables that are there, and the models in the protocol's order."""
    runs: list[Run] = []
    for name in PARTS:
        path = folder / f"{name}.csv"
        if path.exists():
            runs += read(path)
    there = {run.model for run in runs}
    return runs, [part.model for part in PARTS.values() if part.model in there]


def render(
    folder: pathlib.Path = TABLES,
    page_path: pathlib.Path = PAGE,
    readme: pathlib.Path | None = None,
) -> None:
    """Write the page and its figure beside it, and README's block where README is named."""
    runs, models = load(folder)
    again = replication.read_all(folder)
    varied = variation.section_of(folder)
    text = page(runs, models, varied, again, mechanism.section_of(folder, runs))
    page_path.write_text(text, encoding="utf-8")
    draw(runs, models, page_path.with_name(FIGURE.name))
    if readme:
        for dark, path in FIRST_SCREEN.items():
            draw_first_screen(runs, models, readme.parent / path.relative_to(ROOT), dark=dark)
        text = with_block(readme.read_text(encoding="utf-8"), readme_block(runs, models, again))
        readme.write_text(text, encoding="utf-8")
