"""Findings: estimates against values by hand, runs that go on, the committed page."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # like benchmarks, findings is no installed package

from findings import command, estimates, mechanism, render, replication, verdicts  # noqa: E402
from findings.parts import PARTS  # noqa: E402
from findings.protocol import ATTACK_ALONE, SCRATCH_ARM, STRONG, Arm, Part  # noqa: E402
from findings.runs import COLUMNS, chain_rows  # noqa: E402
from healing.config.attack import AttackConfig  # noqa: E402
from healing.stages.cells.attack import attack_cell  # noqa: E402
from healing.stages.cells.events import outcome_of  # noqa: E402
from healing.stages.cells.inputs import resolve_from_model  # noqa: E402


def row(**values: object) -> dict[str, object]:
    plain = dict.fromkeys(COLUMNS, "")
    numbers = dict.fromkeys(
        ("last_block_rank", "min_block_rank", "participation_ratio", "accuracy", "tokens"), 1.0
    )
    facts = {"model": "nano", "arm": "haep", "seed": 0, "healer": STRONG, "status": "ok"}
    return {**plain, **numbers, **facts, "weight_change": 0.5, "attack_steps": 3, **values}


def trajectory(rank: float, loss: float, **facts: object) -> list[dict[str, object]]:
    """Healthy 40 and 3 nats, collapsed 20 and 13, at step 60 as given."""
    states = ((-1, 40.0, 3.0), (0, 20.0, 13.0), (60, rank, loss))
    ranks = ("effective_rank", "last_block_rank", "min_block_rank", "participation_ratio")
    return [row(step=s, loss=x, **dict.fromkeys(ranks, r), **facts) for s, r, x in states]


@pytest.fixture
def table(tmp_path: pathlib.Path) -> pathlib.Path:
    """Ten checkpoints whose rank comes back by 80, 81 … 89 %; each control two points less."""
    rows = trajectory(39.0, 3.5, arm="none")
    for seed in range(10):
        facts = {"seed": seed, "weight_change": 0.4 + 0.01 * seed}
        loss = 4.0 + 0.01 * seed
        rows += trajectory(36.0 + 0.2 * seed, loss, **facts)
        # The difference itself differs, by turns.
        rows += trajectory(
            35.6 + 0.2 * seed + 0.1 * (-1) ** seed, loss, arm="random_tokens", **facts
        )
    path = tmp_path / "nano.csv"
    estimates.write(path, rows)
    return path


def test_recoveries_counts_and_intervals_by_hand(table):
    runs = estimates.read(table)
    own = estimates.group(runs, "nano", "haep", STRONG, 60)
    assert own is not None
    assert own.recoveries() == pytest.approx([80.0 + i for i in range(10)])
    found, values = own.interval(), np.arange(80.0, 90.0)
    expected = stats.t.interval(0.95, 9, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)
    assert own.above() == 10
    # 10 of 10: the share p with p^10 = 0.05.
    assert estimates.share_bounds(10, 10)[0] == pytest.approx(100 * 0.05**0.1)
    sham = estimates.sham_of(runs, "nano", STRONG, 60)
    assert estimates.excess_loss(own, sham).point == pytest.approx(0.545)
    control = estimates.group(runs, "nano", "random_tokens", STRONG, 60)
    assert estimates.paired(own, control) == pytest.approx([1.5, 2.5] * 5)
    assert own.runs[0].reduction == 50.0


def test_pairs_needed_give_the_width_that_is_asked_for():
    differences = [0.0, 10.0, 20.0, 30.0]
    n = estimates.pairs_needed(differences)
    spread = np.std(differences, ddof=1)

    def half_width(pairs: int) -> float:
        return stats.t.ppf(0.975, pairs - 1) * spread / np.sqrt(pairs)

    assert half_width(n) <= 10.0 < half_width(n - 1)


@pytest.mark.parametrize(
    ("rank", "scratch_loss", "said"),
    [
        (38.0, 6.0, "heals"),
        (38.0, 3.9, "no verdict"),  # learning from scratch knows more
        (20.5, 6.0, "does not heal within this budget"),
        (30.0, 6.0, "no verdict"),
    ],
)
def test_verdict_needs_rank_and_knowledge(tmp_path, rank, scratch_loss, said):
    rows = trajectory(38.0, scratch_loss, arm=SCRATCH_ARM)
    for seed in range(10):
        rows += trajectory(rank + 0.01 * seed, 4.0, seed=seed)
    estimates.write(tmp_path / "t.csv", rows)
    runs = estimates.read(tmp_path / "t.csv")
    own = estimates.group(runs, "nano", "haep", STRONG, 60)
    scratch = estimates.group(runs, "nano", SCRATCH_ARM, STRONG, 60)
    assert verdicts.verdict(own, scratch).startswith(said)


@pytest.mark.parametrize(("n", "said"), [(11, "too few: takes 12"), (12, "over 70 % recovered")])
def test_the_stricter_rule_asks_that_the_mean_stay_though_the_others_did_the_opposite(
    tmp_path, n, said
):
    # Up to 1 - 0.05^(1/n) of others: at 91 % twelve leave 70.9 if these do not heal, eleven 69.3.
    rows = []
    for seed in range(n):
        rows += trajectory(38.2 + 0.001 * seed, 4.0, seed=seed)
    estimates.write(tmp_path / "t.csv", rows)
    own = estimates.group(estimates.read(tmp_path / "t.csv"), "nano", "haep", STRONG, 60)
    assert verdicts.strict(own).startswith(said)
    worst = own.interval().point * 0.05 ** (1 / n)
    assert (worst > 70.0) == (n == 12)


def test_a_page_is_written_from_its_table_alone_and_twice_alike(table, tmp_path):
    pages = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        render.render(table.parent, tmp_path / name / "findings.md")
        pages.append([p.read_bytes() for p in sorted((tmp_path / name).iterdir())])
    assert pages[0] == pages[1]
    text = pages[0][0].decode()
    assert "rank recovery 84 [82, 87] % after 60 steps (10 checkpoints, 10 over 70 %)" in text
    assert "HAEP minus its controls, points: random tokens 2.0 [" in text


def test_a_replication_is_judged_by_its_own_checkpoints(table, tmp_path):
    """Ten at 80 to 89 % have no verdict by the stricter rule; twelve at 91 % of their own have."""
    rows = trajectory(39.0, 3.5, arm="none") + trajectory(38.0, 6.0, arm=SCRATCH_ARM)
    for seed in range(10, 22):
        rows += trajectory(38.2 + 0.001 * seed, 4.0 + 0.01 * seed, seed=seed)
    for row_ in rows:
        row_["step"] = PARTS["nano"].steps if row_["step"] == 60 else row_["step"]
    estimates.write(table.parent / "nano-replication.csv", rows)
    (tmp_path / "page").mkdir()
    render.render(table.parent, tmp_path / "page" / "findings.md")
    text = (tmp_path / "page" / "findings.md").read_text()
    assert "By the protocol: heals; by the stricter rule of docs/method.md: too few" in text
    said = "Again on 12 other seeds: 91 [91, 91] % (12 over 70 %); by the stricter rule: over 70 %"
    assert said in text
    (found,) = [line for line in text.splitlines() if line.startswith("| nano | 10–21 |")]
    assert "| 91 [91, 91] | 12 of 12 (at least 78 %) | 91, 91 |" in found
    assert pytest.approx(0.22, abs=0.005) == 1.0 - 0.05 ** (1 / 12)


def test_the_committed_page_is_what_the_committed_tables_give(tmp_path):
    if not list(render.TABLES.glob("*.csv")):
        pytest.skip("no table is committed")
    render.render(page_path=tmp_path / "findings.md")
    assert (tmp_path / "findings.md").read_text() == render.PAGE.read_text()
    readme = (ROOT / "README.md").read_text()
    assert (
        render.with_block(
            readme, render.readme_block(*render.load(), replication.read_all(render.TABLES))
        )
        == readme
    )
    (tmp_path / "README.md").write_text(readme)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    render.render(page_path=tmp_path / "findings.md", readme=tmp_path / "README.md")
    for path in render.FIRST_SCREEN.values():
        drawn = tmp_path / path.relative_to(ROOT)
        pixels, kept = (np.asarray(Image.open(p)) for p in (drawn, path))
        assert np.array_equal(pixels, kept), "`python -m findings render` was not run"
        assert path.stat().st_size <= 80_000


@pytest.mark.slow
def test_a_stopped_part_goes_on_and_equal_collapse_is_equal(tmp_path):
    small = dataclasses.replace(
        PARTS["nano"],
        arms=(Arm("haep"), Arm("random_tokens", healers=(STRONG, "preset"))),
        seeds=(7,),
        steps=4,
        interval=2,
    )
    chains = small.chains(7)
    assert [[arm.name for arm in chain] for chain in chains] == [["haep"], ["random_tokens"]]
    place = {"model": "nano"}
    (found,) = chain_rows(small, chains[0], 7, "nano", **place)
    assert [r["step"] for r in found] == [-1, 0, 2, 4]
    assert not list(chain_rows(small, chains[0], 7, "nano", done={("haep", STRONG)}, **place))
    (left,) = chain_rows(small, chains[1], 7, "nano", done={("random_tokens", STRONG)}, **place)
    assert {r["healer"] for r in left} == {"preset"}
    for rows in (found, left):
        healthy, collapsed = (float(rows[i]["effective_rank"]) for i in (0, 1))
        # The first step at which 35 % are gone: a little more than that, whatever the arm.
        assert 0.55 * healthy < collapsed <= 0.65 * healthy


def test_a_sham_takes_the_threads_of_its_part():
    """No attack comes before it in its process that would have set them."""
    part = Part("nano", (Arm("none"),), (7,), {STRONG: {}}, 2, 2, shared={"threads": 1})
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (found,) = chain_rows(part, part.chains(7)[0], 7, "nano", model="nano")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert [r["step"] for r in found] == [-1, 0, 2]


def test_an_attack_alone_is_kept_as_it_ends():
    part = Part(
        "nano",
        (Arm("haep", healed=False),),
        (7,),
        {},
        steps=4,
        interval=2,
        attack={"measurement_interval": 1, "rayleigh_draws": 0, "attack_steps": 3},
    )
    (found,) = chain_rows(part, part.chains(7)[0], 7, "nano", model="nano")
    assert [(r["step"], r["attack_steps"], r["healer"]) for r in found] == [
        (-1, 3, ATTACK_ALONE), (0, 3, ATTACK_ALONE)
    ]  # fmt: skip
    config = AttackConfig(model="nano", arm="haep", seed=7, **part.attack)
    last = outcome_of(attack_cell(resolve_from_model(config))).last
    assert float(found[1]["effective_rank"]) == pytest.approx(last.measurement.effective_rank)
    done = {("haep", ATTACK_ALONE)}
    assert not list(chain_rows(part, part.chains(7)[0], 7, "nano", done=done, model="nano"))


@pytest.mark.parametrize(("ranks", "said"), [
    ([34.0] * 10, "0 came there within 200 (0 to 26 % of others"),
    ([25.9] * 5 + [26.1] * 5, "5 came there within 200 (22 to 78 % of others"),
])  # fmt: skip
def test_an_oracle_that_stays_above_is_counted(table, tmp_path, ranks, said):
    rows = []
    for seed, rank in enumerate(ranks):
        facts = {"arm": "haep_oracle", "seed": seed, "attack_steps": 200, "healer": ATTACK_ALONE}
        rows += trajectory(40.0, 3.0, **facts)[:2]
        rows[-1]["effective_rank"] = rank + 0.01 * seed * (rank > 30)
    estimates.write(table.parent / f"{mechanism.NAME}.csv", rows)
    (text,) = [
        line for line in mechanism.section_of(table.parent, estimates.read(table)) if said in line
    ]
    assert "HAEP took 3–3 steps to 35 %; of 10 oracle attacks" in text
    lines = "\n".join(mechanism.section_of(table.parent, estimates.read(table)))
    assert ("does not collapse this model as HAEP does" in lines) == (ranks[0] == 34.0)
    assert ("does not decide" in lines) == (ranks[0] == 25.9)


def test_what_is_matched_runs_with_its_reference():
    part = Part("x", (Arm("a"), Arm("b", reference="a"), Arm("c")), (0,), {}, 1, 1)
    assert [[arm.name for arm in chain] for chain in part.chains(0)] == [["a", "b"], ["c"]]


def test_a_part_goes_on_from_its_table(tmp_path, monkeypatch):
    """What a table of another machine holds is not run again, and only that."""
    rows = trajectory(39.0, 3.5, arm="haep", seed=1) + trajectory(39.0, 3.5, arm="none", seed=0)
    estimates.write(tmp_path / "nano.csv", rows)
    seen = []

    def no_rows(part, chain, seed, label, deadline, done, **place):
        seen.append((chain[0].name, seed, done))
        return iter(())

    monkeypatch.setattr("findings.runs.chain_rows", no_rows)
    names = [chain[0].name for chain in PARTS["nano"].chains(1)]
    kept = {
        name: command._chain("nano", 1, i, {}, math.inf, str(tmp_path), go_on=True)
        for i, name in enumerate(names)
    }
    assert {name for name, found in kept.items() if found} == {"haep"}
    assert [row["step"] for row in kept["haep"]] == ["-1", "0", "60"]
    assert {name: done for name, _, done in seen if done} == {"haep": {("haep", STRONG)}}
    assert command._chain("nano", 1, names.index("haep"), {}, math.inf, str(tmp_path)) == []
