"""What the intervals leave out: components by hand, and units against the protocol's own runs."""

from __future__ import annotations

import dataclasses
import pathlib
import sys

import numpy as np
import pytest
from scipy import stats

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # like benchmarks, findings is no installed package

from findings import variation, variation_runs  # noqa: E402
from findings.protocol import STRONG, Arm  # noqa: E402
from findings.runs import chain_rows  # noqa: E402
from findings.variation import OTHER_PROBE, OTHER_TEXT, OWN_TEXT, PIECES, PRIMARY  # noqa: E402

Rows = list[dict[str, object]]


def row(model: int, attack: int, probe: str, recovery: float, text: str = OWN_TEXT) -> dict:
    """Healthy 40, collapsed 20, healed where the recovery has it."""
    return {
        "pretraining_seed": model, "attack_seed": attack, "healing_text": text, "probe": probe,
        "healthy_rank": 40.0, "collapsed_rank": 20.0, "healed_rank": 20.0 + 0.2 * recovery,
        "healthy_loss": 3.0, "collapsed_loss": 13.0, "healed_loss": 3.5,
    }  # fmt: skip


def table(path: pathlib.Path, rows: Rows) -> variation.Variation:
    variation.write(path, rows)
    return variation.read(path)


MODELS, ATTACKS = (80.0, 90.0, 85.0), (-2.0, 0.0, 2.0)
ADDS = dict(zip(PIECES, (0.0, 3.0, -3.0, 1.0, -1.0), strict=True))


def rows(cell: float = 0.0) -> Rows:
    """Model + attack + piece; and what is a cell's own, on other pieces than the first."""
    return [
        row(m, a, piece, mean + effect + add + (piece != PRIMARY) * cell * ((m + a) % 3 - 1))
        for m, mean in enumerate(MODELS)
        for a, effect in enumerate(ATTACKS)
        for piece, add in ADDS.items()
    ]


def test_components_between_models_and_between_attacks_are_those_of_the_design(tmp_path):
    found = table(tmp_path / "t.csv", rows()).pretraining()
    assert (found.n_checkpoints, found.n_replicates) == (3, 9)
    # Attacks −2, 0, 2 around each mean: variance 4. Means 80, 90, 85 vary by 25, of which the
    # attacks' share 4/3 is not the models'.
    assert found.within == pytest.approx(4.0)
    assert found.between == pytest.approx(25.0 - 4.0 / 3.0)


def test_what_a_piece_adds_to_all_is_found_exactly_where_nothing_else_varies_by_piece(tmp_path):
    found = table(tmp_path / "t.csv", rows())
    assert found.probe_error() == pytest.approx(np.std(list(ADDS.values()), ddof=1))


def test_differences_are_paired_by_checkpoint(tmp_path):
    found = table(tmp_path / "t.csv", rows(cell=1.0)).difference("held-out 2")
    # 2, 3, 4 three times each around a mean of 3, where the recoveries themselves vary by 13.
    expected = stats.t.interval(0.95, 8, 3.0, np.sqrt(6.0 / 8.0 / 9.0))
    assert (found.low, found.high) == pytest.approx(expected)


def test_the_probes_error_is_unbiased_beside_noise_of_every_cell(tmp_path):
    """By simulation: variance 9 between pieces, 9 in every cell, of which four checkpoints leave a
    quarter in the pieces' means.
    """
    draws, squares = np.random.default_rng(0), []
    for number in range(300):
        adds = draws.normal(0.0, 3.0, len(PIECES))
        made = [
            row(m, a, piece, 80.0 + add + draws.normal(0.0, 3.0))
            for m in range(2)
            for a in range(2)
            for piece, add in zip(PIECES, adds, strict=True)
        ]
        squares.append(table(tmp_path / f"{number}.csv", made).probe_error() ** 2)
    # The mean of 300 has a standard error of 11.25·√(2/4)/√300 = 0.46.
    assert np.mean(squares) == pytest.approx(9.0, abs=1.2)


def test_without_an_effect_of_pieces_the_error_is_zero_or_small(tmp_path):
    same = [row(m, a, piece, 70.0 + 5 * m + a) for m in range(3) for a in range(3)
            for piece in PIECES]  # fmt: skip
    assert table(tmp_path / "t.csv", same).probe_error() == 0.0


def test_the_section_says_what_the_table_says(tmp_path):
    more = [row(m, a, OTHER_PROBE, mean + 1.5 * effect - 5.0)
            for m, mean in enumerate(MODELS) for a, effect in enumerate(ATTACKS)]  # fmt: skip
    other = [row(0, a, probe, 60.0 + 3 * effect, OTHER_TEXT)
             for a, effect in enumerate(ATTACKS) for probe in (*PIECES, OTHER_PROBE)]  # fmt: skip
    text = "\n".join(variation.section(table(tmp_path / "t.csv", [*rows(cell=1.0), *more, *other])))
    assert "3 pretraining seeds" in text
    assert "| embedded | 78, 80, 82 | 80.0 |" in text
    assert "| 1 | 88, 90, 92 | 90.0 |" in text
    assert "between attacks on one model 2.0" in text
    assert "| measured on: other text | 9 | -5.0 [-5.7, -4.3] |" in text
    # 54, 60, 66 less 78, 80, 82: −24, −20, −16; t(2) · 4/√3 = 9.9
    assert "| healed on other text | 3 | -20.0 [-29.9, -10.1] |" in text
    assert "stays 0.50 nats above" in text


def test_no_table_no_section(tmp_path):
    assert variation.section_of(tmp_path) == []


def test_another_table_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="its columns are not"):
        variation.read(tmp_path / "t.csv")


@pytest.mark.slow
def test_a_unit_is_the_protocols_run_measured_on_more_probes(monkeypatch):
    short = dataclasses.replace(variation_runs.PART, steps=20, interval=20)
    monkeypatch.setattr(variation_runs, "PART", short)
    found = {r["probe"]: r for r in variation_runs.unit_rows("nano", 0, 1)}
    assert list(found) == list(variation_runs.PROBES)
    (own,) = chain_rows(short, (Arm("haep"),), 1, "nano", model="nano")
    healthy, collapsed, healed = own
    assert healed["healer"] == STRONG
    for state, expected in (("healthy", healthy), ("collapsed", collapsed), ("healed", healed)):
        assert float(found[PRIMARY][f"{state}_rank"]) == float(expected["effective_rank"])
        assert float(found[PRIMARY][f"{state}_loss"]) == float(expected["loss"])
    ranks = [r["healthy_rank"] for r in found.values()]
    assert len(set(ranks)) == len(ranks), "every probe is another one"


def test_a_model_in_a_folder_is_treated_as_the_preset_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for settings in (variation_runs.attack_settings, variation_runs.healing_settings):
        preset, folder = settings("nano", 1), settings(str(tmp_path), 1)
        assert dataclasses.replace(folder, model="nano") == preset
        assert folder.model == str(tmp_path)
