"""Which arms are compared, in which order and family, and what they say of the catalyst."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from healing.config.arm_tags import arm_role
from healing.reporting.contrasts import (
    catalyst_sentence,
    comparison_gaps,
    comparison_sentence,
    family_sentence,
    lead_sentences,
    sections,
)
from healing.reporting.markdown import markdown
from healing.reporting.plain_data import as_json
from tests.statistics.test_summary import make_run, pool

N = 60
JITTER = np.resize([-2.0, 1.0, 3.0, -1.0, -1.0], N)
CONTROLS = ("random_text", "random_tokens")


def arm_runs(arm: str, rank: float, n: int = N, reduction: float = 38.0, **changes):
    """One run per seed: final rank with a jitter of its own, loss recovery 80 + seed."""
    phase = len(arm) + (arm == "gaussian_noise")  # no two arms with the same jitter as HAEP
    return [
        make_run(rank + JITTER[(seed + phase) % N], seed=seed, arm=arm,
                 rank_reduction_pct=reduction, start_loss=9.0, weight_change=0.5, **changes)
        for seed in range(n)
    ]  # fmt: skip


def equal_loss(runs):
    """Losses that differ by a jitter alone, so that both endpoints can be judged."""
    return [
        replace(r, final={**r.final, "loss_recovery_pct": 80.0 + JITTER[(i * 7 + len(r.arm)) % N]})
        for i, r in enumerate(runs)
    ]


def summary_of(controls: dict[str, float], n: int = N, **changes):
    runs = equal_loss(arm_runs("haep", 40.0, n))
    for arm, rank in controls.items():
        runs += equal_loss(arm_runs(arm, rank, n, **changes))
    return pool(runs)


def test_the_plan_is_ordered_primary_first_in_every_output() -> None:
    arms = ("gaussian_noise", "haep_oracle", "random_tokens", "spectral", "random_text")
    runs = arm_runs("haep", 40.0, 6)
    for arm in arms:
        runs += arm_runs(arm, 50.0, 6)
        runs += arm_runs(arm, 50.0, 6, model="micro")
    runs += arm_runs("haep", 40.0, 6, model="micro")
    summary = pool(runs)
    order = [(c.pair.kind.name, c.pair.model, c.pair.control.arm) for c in summary.contrasts]
    assert order == [
        *(("fine_tuning", m, a) for m in ("nano", "micro") for a in CONTROLS),
        *(("mechanism", m, "haep_oracle") for m in ("nano", "micro")),
        *(("other_damage", m, "gaussian_noise") for m in ("nano", "micro")),
    ]
    assert [title.split(":")[0] for title, _ in sections(summary)] == [
        "Primary", "Second primary", "Secondary",
    ]  # fmt: skip
    stored = as_json(summary)["contrasts"]
    assert [(c["kind"], c["model"], c["control"]) for c in stored] == order
    text = markdown(summary)
    places = [text.index(f"### {t}") for t in ("Primary", "Second primary", "Secondary")]
    assert places == sorted(places)
    assert text.index("catalyst is") < places[0]  # the answer stands first


def test_primary_contrasts_share_one_adjustment_secondary_ones_have_their_own() -> None:
    runs = arm_runs("haep", 40.0, 8)
    for arm in (*CONTROLS, "haep_oracle", "gaussian_noise"):
        runs += arm_runs(arm, 60.0, 8)
    summary = pool(runs)
    sizes = [c.comparison.n_family for c in summary.contrasts]
    assert sizes == [6, 6, 6, 2]  # two endpoints each
    ranks = [c.comparison.endpoints[0] for c in summary.contrasts]
    smallest = min(ranks[:3], key=lambda e: e.p_difference)
    # Two-sided p over 2 one-sided claims per endpoint: the smallest of 12, and of 4.
    assert smallest.p_adjusted == pytest.approx(min(1.0, 6 * smallest.p_difference))
    assert ranks[3].p_adjusted == pytest.approx(min(1.0, 2 * ranks[3].p_difference))
    assert "6 tests of primary contrasts and 2 tests of secondary" in family_sentence(summary)


def test_pairs_are_by_seed_and_the_interval_is_scipys() -> None:
    own, other = arm_runs("haep", 40.0, 5), arm_runs("random_tokens", 50.0, 7)
    summary = pool([*own, *reversed(other)])
    interval = summary.contrast("nano", "random_tokens").comparison.endpoints[0].superiority
    d = [a.final["rank_recovery_pct"] - b.final["rank_recovery_pct"]
         for a, b in zip(own, other, strict=False)]  # fmt: skip
    low, high = scipy_stats.t.interval(0.95, 4, np.mean(d), scipy_stats.sem(d))
    assert (interval.interval.low, interval.interval.high) == pytest.approx((low, high))


def test_roles_of_stored_runs_are_read_as_today() -> None:
    assert arm_role("haep_oracle", "positive_control") == "mechanism"
    assert arm_role("haep_oracle", "") == "mechanism"
    assert arm_role("haep_oracle", "control") == "control"  # never its role: as the tag says
    assert arm_role("spectral", "positive_control") == "positive_control"
    assert arm_role("not installed", "positive_control") == "positive_control"
    old = arm_runs("haep_oracle", 50.0, 4, role="positive_control")
    summary = pool([*arm_runs("haep", 40.0, 4), *old])
    assert [c.pair.kind.name for c in summary.contrasts] == ["mechanism"]


@pytest.mark.parametrize(
    ("tokens", "text", "said"),
    [
        (75.0, 75.0, "HAEP's catalyst is special in healing: HAEP damage heals less than that of "
         "both clean text and random tokens (60 pairs each)"),
        (5.0, 5.0, "catalyst is special in healing: HAEP damage heals more than that of both"),
        (40.0, 40.0, "catalyst is not special in healing: clean text and random tokens recover "
         "alike within 10 points (60 pairs each)"),
        (75.0, 5.0, "not special in healing: its damage recovers less than that of random tokens "
         "(60 pairs), more than that of clean text (60 pairs)"),
        (75.0, 40.0, "not special in healing: its damage recovers less than that of random tokens "
         "(60 pairs), alike within 10 points with that of clean text (60 pairs)"),
        (75.0, 48.0, "not shown to be special in healing: its damage recovers less than that of "
         "random tokens (60 pairs), undecidedly against that of clean text (60 pairs); ± 10 "),
    ],
)  # fmt: skip
def test_the_catalyst_can_come_out_any_way(tokens: float, text: float, said: str) -> None:
    summary = summary_of({"random_tokens": tokens, "random_text": text})
    (answer,) = summary.catalyst
    assert f"nano: HAEP's catalyst is {said.split('catalyst is ')[-1]}" in catalyst_sentence(answer)
    assert lead_sentences(summary)[0] == catalyst_sentence(answer)


def test_few_pairs_are_counted_and_decide_nothing() -> None:
    summary = summary_of({"random_tokens": 75.0, "random_text": 75.0}, n=3)
    (answer,) = summary.catalyst
    text = catalyst_sentence(answer)
    assert "not shown to be special in healing: 3 pairs each against clean text and" in text
    found = summary.contrast("nano", "random_tokens")
    needed = found.needed["rank_recovery_pct"]
    said = comparison_sentence(found)
    assert found.comparison.statement == "inconclusive"
    assert "rank: HAEP recovers less in 3 of 3 pairs (a difference of this size takes at" in said
    assert f"at least {needed.agreeing}; to tell within ±\u00a010 points takes about" in said
    most = max(n.alike for c in summary.contrasts for n in c.needed.values())
    assert f"± 10 points need about {most}" in text


def test_one_control_missing_or_none() -> None:
    alone = summary_of({"gaussian_noise": 40.0})
    assert "is special is not known" in catalyst_sentence(alone.catalyst[0])
    assert "(clean text, random tokens)" in catalyst_sentence(alone.catalyst[0]).replace(
        " and", ","
    )
    runs = equal_loss([*arm_runs("haep", 40.0), *arm_runs("random_tokens", 75.0)])
    strangers = [replace(r, seed=f"9{r.seed}") for r in arm_runs("random_text", 75.0)]
    summary = pool([*runs, *strangers])
    text = catalyst_sentence(summary.catalyst[0])
    assert "not shown to be special" in text  # "every control" is not known
    assert "Not compared: clean text (no run of clean text shares a seed with one of HAEP)" in text
    assert "clean text are not compared (primary)" in comparison_gaps(summary)[0]


@pytest.mark.parametrize(
    ("reduction", "said"),
    [
        (36.0, "As an attack it is not special: random tokens lower the rank by 36 % where HAEP "
         "does by 38 % (as far in 4 of 4 pairs)."),
        (12.0, "As an attack it goes further than the same fine-tuning without it: random tokens "
         "lower the rank by 12 % where HAEP does by 38 % (as far in 0 of 4 pairs)."),
    ],
)  # fmt: skip
def test_whether_the_attack_is_special(reduction: float, said: str) -> None:
    summary = summary_of({"random_tokens": 40.0}, n=4, reduction=reduction)
    assert said in catalyst_sentence(summary.catalyst[0])


def test_the_start_of_healing_stands_beside_every_contrast() -> None:
    own = arm_runs("haep", 40.0, 4)
    other = [
        replace(r, weight_change=0.9, start_loss=22.0) for r in arm_runs("random_tokens", 50.0, 6)
    ]
    other[5] = replace(other[5], weight_change=50.0)  # its seed has no partner
    found = pool([*own, *other]).contrast("nano", "random_tokens")
    assert "(HAEP and random tokens): weight change 0.50 and 0.90, loss 9.0 and 22.0 nats" in (
        comparison_sentence(found)
    )


def test_other_healers_are_not_compared() -> None:
    own = [replace(r, healer="AdamW at 0.001") for r in arm_runs("haep", 40.0, 4)]
    other = [replace(r, healer="SGD at 0.03") for r in arm_runs("random_tokens", 50.0, 4)]
    (line,) = comparison_gaps(pool([*own, *other]))
    assert line.endswith("they were healed by AdamW at 0.001, and by SGD at 0.03.")
