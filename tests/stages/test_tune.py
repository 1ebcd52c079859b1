"""The search for the strongest healer: known optima, interruption, pruning, the winner's file."""

from __future__ import annotations

import json
import math
import pathlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import optuna
import pytest
from matplotlib.figure import Figure
from mlflow.tracking import MlflowClient
from optuna.storages.journal import JournalFileBackend

from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.healer import HEALER_NAME, SETTINGS, Healer, included_healers
from healing.config.resolve import resolve_from_presets
from healing.config.sweep import SweepConfig
from healing.config.tune import TuneConfig
from healing.errors import ConfigError
from healing.progress import Safe
from healing.reporting.plots import style
from healing.reporting.plots import tuning as figures
from healing.reporting.tuning import healer_sentence, trials_csv, tuning_markdown
from healing.stages import tune as stage
from healing.stages.attack import attack
from healing.stages.cells import trial as trial_module
from healing.stages.cells.events import Begin, Record, outcome_of
from healing.stages.cells.heal import heal_cell
from healing.stages.cells.heal_outcome import HealCell
from healing.stages.cells.sweep_plan import SweepCell
from healing.stages.cells.trial import TrialCell, trial_cell
from healing.stages.driver import Driver
from healing.stages.heal import heal
from healing.stages.launching.cell_configs import heal_config
from healing.stages.sweep import sweep
from healing.stages.terminal.console import Console
from healing.stages.tune import Selected, Tuned, healing_of, tune
from healing.stages.tuning.healer_files import find_healer, healers_of
from healing.stages.tuning.space import axes_of, default_values, grid_points, settings_of
from healing.stages.tuning.study import Study
from healing.statistics.healer_trials import COMPLETE, DIVERGED, PRUNED, Trial, best_so_far, winner
from healing.tracking.local_store import LocalStore
from tests.stages.test_driver import killed_at

OPTIMUM = 4e-3


def closed_form(config: HealConfig, tokens: int) -> float:
    """Loss of the stub: a parabola in the log of the rate, above a term that training removes."""
    off = math.log10(float(config.healing_lr) / OPTIMUM)
    return 3.0 + 0.1 * config.seed + off**2 + 2.0 * math.exp(-tokens / 100_000)


def healing(loss_of: Callable[[HealConfig, int], float] = closed_form, on_begin=lambda cell: None):
    """A stub of a healing cell: same events, losses by a formula."""

    def cell(cell: HealCell):
        on_begin(cell)
        config = cell.config
        yield Begin("f", "n", {}, config.healing_steps)
        per_step, status = config.batch_size * config.sequence_length, "ok"
        for step in range(config.healing_steps + 1):
            if step % config.measurement_interval == 0:
                loss = loss_of(config, step * per_step)
                status = "ok" if math.isfinite(loss) else "diverged"
                metrics = {"loss": loss, "rank_recovery_pct": 50.0, "loss_recovery_pct": 80.0}
                yield Record(step, metrics)
            yield Safe(step)
            if status != "ok":
                break
        return SimpleNamespace(status=status), None

    return cell


CHECKPOINTS = [Selected("haep", seed, f"/none/{seed}.pt", f"digest{seed}") for seed in (7, 8)]


@pytest.fixture
def stubbed(monkeypatch):
    """No attack and no healing is computed; returns what replaces the healing."""
    monkeypatch.setattr(stage, "selection", lambda config, run, driver: CHECKPOINTS)
    for name in ("history", "slices", "importance"):  # drawn below, and slow
        monkeypatch.setattr(stage.figures, name, lambda *_: None)
    monkeypatch.setattr(trial_module, "heal_cell", healing())

    def use(cell) -> None:
        monkeypatch.setattr(trial_module, "heal_cell", cell)

    return use


def config_for(folder, **changes) -> TuneConfig:
    values = {"seeds": "7,8", "axes": "rate", "trials": 14, "output_dir": str(folder),
              "verbosity": "quiet", "startup_trials": 4, "batch_sizes": "8",
              "token_budget": 40 * 1024}  # fmt: skip
    return TuneConfig(**(values | changes))


def run(config: TuneConfig, store: LocalStore | None = None) -> Tuned:
    return tune(config, Driver(Console("quiet"), store or LocalStore()))


def comparable(trials) -> list[tuple]:
    return [(dict(t.values), t.state, t.loss) for t in trials]


def test_a_known_optimum_is_found_and_compared_with_the_default(tmp_path, stubbed):
    found = run(config_for(tmp_path, trials=24))
    rate = found.healer.settings["healing_lr"]
    assert rate == pytest.approx(OPTIMUM, rel=0.2)
    at_end = 3.75 + 2 * math.exp(-40 * 1024 / 100_000)  # seeds 7 and 8: 3.7 and 3.8
    assert found.healer.loss == pytest.approx(at_end + math.log10(rate / OPTIMUM) ** 2)
    assert found.healer.default_loss == pytest.approx(at_end + math.log10(1e-3 / OPTIMUM) ** 2)
    assert found.trials[0].values == {"rate": 1.0}
    assert found.healer.tried == len(found.trials) == 24
    assert found.healer.token_budget == 40 * 1024
    assert (found.healer.seeds, found.healer.arms) == ((7, 8), ("haep",))


def test_the_winner_reads_back_as_a_healing(tmp_path, stubbed):
    config = config_for(
        tmp_path, axes="rate,optimizer,warmup,decay,clip,batch,norms", batch_sizes="4,8"
    )
    found = run(config)
    healer = find_healer(str(found.folder / HEALER_NAME), LocalStore())
    assert healer == found.healer
    assert healer.digest == found.healer.digest
    best = winner(found.trials)
    wanted = settings_of(config, best.values)
    applied = healer.applied(HealConfig(model="nano", healing_steps="auto", seed=3))
    assert {name: getattr(applied, name) for name in SETTINGS} == wanted
    assert applied.healing_steps * wanted["batch_size"] * 128 == 40 * 1024
    assert applied.seed == 3
    # What is applied already contradicts nothing, and another number of steps is kept.
    assert healer.applied(replace(applied, healing_steps=9)).healing_steps == 9


@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path, stubbed, sampler):
    settings = {"axes": "rate,decay", "sampler": sampler}
    whole = run(config_for(tmp_path / "whole", **settings))
    begun = []

    def stop_at_the_seventh(cell: HealCell) -> None:
        begun.append(cell)
        if len(begun) == 13:  # two checkpoints each, where none is ended early
            raise KeyboardInterrupt

    stubbed(healing(on_begin=stop_at_the_seventh))
    config = config_for(tmp_path / "parts", pruner="none", **settings)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    stubbed(healing())
    parts = run(config)
    whole = run(config_for(tmp_path / "whole too", pruner="none", **settings))
    assert comparable(parts.trials) == comparable(whole.trials)
    assert len(parts.trials) == 14
    assert 6 not in [t.number for t in parts.trials]  # the one that was lost
    assert parts.healer.settings == whole.healer.settings


def test_a_finished_search_is_not_run_again_and_can_be_made_longer(tmp_path, stubbed):
    first = run(config_for(tmp_path, trials=5))
    begun = []
    stubbed(healing(on_begin=begun.append))
    assert comparable(run(config_for(tmp_path, trials=5)).trials) == comparable(first.trials)
    assert begun == []
    more = run(config_for(tmp_path, trials=7))
    assert comparable(more.trials)[:5] == comparable(first.trials)
    assert len(more.trials) == 7


def test_one_seed_proposes_the_same_healers_twice_and_another_others(tmp_path, stubbed):
    settings = {"axes": "rate,decay,optimizer", "trials": 9}
    a, b = (run(config_for(tmp_path / name, **settings)) for name in "ab")
    c = run(config_for(tmp_path / "c", seed=1, **settings))
    assert comparable(a.trials) == comparable(b.trials)
    assert a.healer.study_digest == b.healer.study_digest
    assert a.healer.study_digest != c.healer.study_digest
    assert comparable(a.trials)[1:] != comparable(c.trials)[1:]
    assert len({t.values["rate"] for t in a.trials}) == 9  # nor is one proposed again and again


def test_a_hopeless_healer_is_ended_early_and_marked(tmp_path, stubbed):
    store = LocalStore()
    found = run(config_for(tmp_path), store)
    pruned = [t for t in found.trials if t.state == PRUNED]
    assert pruned
    for trial in pruned:
        assert trial.facts["tokens"] < 2 * 40 * 1024
        view = store.get_run(trial.facts["run_id"])
        assert view.tags["trial_state"] == PRUNED
        assert view.tags["stage"] == "trial"
        assert view.status == "FINISHED"
    through = [t for t in found.trials if t.state == COMPLETE]
    assert {t.facts["tokens"] for t in through} == {2 * 40 * 1024}
    assert min(t.loss for t in pruned) > found.healer.loss
    parents = {store.get_run(t.facts["run_id"]).tags["mlflow.parentRunId"] for t in found.trials}
    (parent,) = (store.get_run(p) for p in parents)
    assert (parent.tags["stage"], parent.tags["healer"]) == ("tune", found.healer.digest)
    assert parent.metrics["summary/gain_nats"] == pytest.approx(
        found.healer.default_loss - found.healer.loss
    )


def test_the_default_healer_is_never_ended_early(tmp_path, stubbed):
    def worst_at_first(config: HealConfig, tokens: int) -> float:
        return 9.0 if config.healing_lr == 1e-3 else closed_form(config, tokens)

    stubbed(healing(worst_at_first))
    found = run(config_for(tmp_path, pruner="halving"))
    assert found.trials[0].state == COMPLETE
    assert found.healer.default_loss == 9.0
    assert PRUNED in {t.state for t in found.trials}


def test_a_healer_that_diverges_counts_as_tried_and_never_wins(tmp_path, stubbed):
    def diverging(config: HealConfig, tokens: int) -> float:
        fast = config.healing_lr > 5e-3 and tokens
        return math.nan if fast else closed_form(config, tokens)

    stubbed(healing(diverging))
    found = run(config_for(tmp_path, pruner="none"))
    lost = [t for t in found.trials if t.state == DIVERGED]
    assert lost
    assert all(t.values["rate"] > 5 for t in lost)
    assert found.healer.settings["healing_lr"] <= 5e-3
    assert found.healer.tried == 14
    stubbed(healing(lambda config, tokens: math.nan if tokens else 9.0))
    with pytest.raises(ConfigError, match="none of 3 healers got through 40,960 tokens"):
        run(config_for(tmp_path, trials=3, seed=1))


def test_what_is_judged_has_seen_the_same_checkpoints_for_the_same_tokens():
    asked: list[tuple[int, float]] = []
    base = config_for("/none")
    selected = [*CHECKPOINTS, Selected("haep", 9, "/none/9.pt", "digest9")]
    configs = [healing_of(base, s, settings_of(base, {"rate": 4.0})) for s in selected]

    def judge(rung: int, loss: float) -> bool:
        asked.append((rung, loss))
        return False

    cell = TrialCell(0, {}, configs[0], tuple(HealCell(c, "x") for c in configs), ("d",) * 3, judge)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial_module, "heal_cell", healing())
        events = list(trial_cell(cell))
        outcome = outcome_of(trial_cell(replace(cell, judge=trial_module.never)))
    budget = 40 * 1024
    rungs = [budget * k // 5 for k in range(1, 6)]
    finals = [closed_form(c, budget) for c in configs]
    first = [(k, closed_form(configs[0], t)) for k, t in enumerate(rungs, 1)]
    expected = [*first, (6, (finals[0] + finals[1]) / 2)]
    assert [rung for rung, _ in asked] == [rung for rung, _ in expected]
    assert [loss for _, loss in asked] == pytest.approx([loss for _, loss in expected])
    assert outcome.loss == pytest.approx(sum(finals) / 3)
    steps = [e.step for e in events if isinstance(e, Record)]
    assert steps == [start + t for start in (0, budget, 2 * budget) for t in rungs]


def test_every_batch_size_has_the_same_tokens_and_rungs():
    base = config_for("/none", batch_sizes="4,8,16", token_budget=40 * 2048, axes="batch")
    for batch in (4, 8, 16):
        config = healing_of(base, CHECKPOINTS[0], settings_of(base, {"batch": batch}))
        assert config.healing_steps * batch * 128 == 40 * 2048
        assert config.measurement_interval * 5 == config.healing_steps


def test_the_default_healer_is_that_of_heal_field_by_field():
    base = config_for("/none")
    settings = settings_of(base, default_values(base))
    plain = resolve_from_presets(HealConfig(model="nano"))
    assert settings == {name: getattr(plain, name) for name in SETTINGS}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_rates_are_relative_to_those_of_model_method_and_optimiser(method):
    base = config_for("/none", model="70m", sgd_rate_ratio=50.0, token_budget=40 * 1024)
    ratio = 10 if method == "lora" else 1
    settings = settings_of(base, {"rate": 3.0, "optimizer": "sgd", "method": method})
    assert settings["healing_lr"] == pytest.approx(3 * 1e-4 * ratio * 50)
    assert settings["healing_momentum"] == 0.9
    assert settings_of(base, {"rate": 3.0})["healing_momentum"] == 0.0


def test_the_grid_holds_every_combination_once_and_ends(tmp_path, stubbed):
    config = config_for(
        tmp_path, axes="rate,decay", sampler="grid", trials=99, pruner="none", grid_rates=3,
        rate_lowest=0.1, rate_highest=10.0,
    )  # fmt: skip
    found = run(config)
    tried = [(round(t.values["rate"], 9), t.values["decay"]) for t in found.trials]
    assert sorted(tried) == sorted((r, d) for r in (0.1, 1, 10)
                                   for d in ("constant", "cosine", "linear"))  # fmt: skip
    assert tried[0] == (1.0, "constant")
    orders = [grid_points(replace(config, seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_what_a_killed_process_leaves_is_taken_up(tmp_path):
    """A running trial, and half a line at the end of the journal."""
    config, path = config_for(tmp_path), tmp_path / "s" / "study.journal"
    with Study.opened(path, config, {"a": 1}) as study:
        study.finish(study.propose(), 5.0, {})
        lost = study.propose().values
    content = path.read_bytes()
    path.write_bytes(content + b'{"op_code": 6, "worker')
    with Study.opened(path, config, {"a": 1}) as study:
        assert [t.loss for t in study.trials()] == [5.0]
        again = study.propose()
        assert again.values == lost
        study.finish(again, 4.0, {"rank_recovery_pct": math.nan})
    with Study.opened(path, config, {"a": 1}) as study:
        assert [t.loss for t in study.trials()] == [5.0, 4.0]
        assert math.isnan(study.trials()[1].rank_recovery_pct)


def test_a_search_killed_at_any_moment_goes_on_without_its_finished_trials(tmp_path, stubbed):
    """SIGKILL at a sample of the changes of files; what the journal says then is read by Optuna
    itself, and no finished trial is computed again.
    """
    begun: list[HealCell] = []

    def wanted(folder: pathlib.Path) -> TuneConfig:
        return config_for(folder, trials=4, pruner="none")

    def trials_of(folder: pathlib.Path) -> list[optuna.trial.FrozenTrial]:
        (path,) = folder.rglob("study.journal")
        copied = folder.parent / "copy.journal"  # as it is, half a line at its end left out
        copied.write_bytes(path.read_bytes().rpartition(b"\n")[0] + b"\n")
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(copied)))
        try:
            return optuna.load_study(study_name="healer", storage=storage).trials
        except KeyError:
            return []  # not made yet

    whole = run(wanted(tmp_path / "whole"))
    stubbed(healing(on_begin=begun.append))
    number, over, computed = 2, False, []
    while not over:
        place = tmp_path / f"at{number}"
        over = killed_at(number, place, lambda place=place: run(wanted(place)))
        journal = list(place.rglob("study.journal"))
        before = trials_of(place) if journal else []
        finished = sum(t.state.is_finished() for t in before)
        begun.clear()
        started = time.monotonic()
        found = run(wanted(place))
        assert time.monotonic() - started < 20, "it waited for the dead"
        assert comparable(found.trials) == comparable(whole.trials), number
        assert len(begun) == 2 * (4 - finished), number
        states = [t.state for t in trials_of(place)]
        assert states.count(optuna.trial.TrialState.COMPLETE) == 4
        assert not {optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.WAITING} & {*states}
        computed.append(finished)
        number += 13
    assert len({*computed}) >= 4, computed


def test_a_search_made_longer_leaves_what_its_files_were_under_other_names(tmp_path, stubbed):
    """As they wait, linked, for a store that is away; and half a file is never there."""
    first = run(config_for(tmp_path, trials=2))
    names = ("trials.csv", "tuning.md", HEALER_NAME)
    before = {name: (first.folder / name).read_bytes() for name in names}
    for name in names:
        (tmp_path / f"waits-{name}").hardlink_to(first.folder / name)
    more = run(config_for(tmp_path, trials=5))
    assert more.folder == first.folder
    assert (more.folder / "trials.csv").read_bytes() != before["trials.csv"]
    assert {name: (tmp_path / f"waits-{name}").read_bytes() for name in names} == before
    assert not [p for p in more.folder.iterdir() if p.suffix == ".partial" or p.name == ".plots"]


def test_a_lock_that_leads_nowhere_holds_nobody_up(tmp_path):
    """As Optuna's own leaves it where a process was killed amid a line, and the folder moved."""
    config, path = config_for(tmp_path), tmp_path / "s" / "study.journal"
    with Study.opened(path, config, {}) as study:
        study.finish(study.propose(), 5.0, {})
    (path.parent / "study.journal.lock").symlink_to(tmp_path / "elsewhere" / "study.journal")
    done = []

    def again() -> None:
        with Study.opened(path, config, {}) as study:
            study.finish(study.propose(), 4.0, {})
            done.extend(t.loss for t in study.trials())

    asking = threading.Thread(target=again, daemon=True)
    asking.start()
    asking.join(10)
    assert done == [5.0, 4.0]
    assert sorted(p.name for p in path.parent.iterdir()) == ["study.journal"]


def test_a_study_of_something_else_is_refused(tmp_path, stubbed):
    run(config_for(tmp_path, study="mine", trials=2))
    with pytest.raises(ConfigError, match=r"begun with other settings \(healing, tokens\): name"):
        run(config_for(tmp_path, study="mine", trials=2, token_budget=80 * 1024))
    run(config_for(tmp_path, trials=2, token_budget=80 * 1024))  # a name of its own


def test_one_process_at_a_time(tmp_path):
    config, path = config_for(tmp_path), tmp_path / "study.journal"
    second = Study.opened(path, config, {})
    with Study.opened(path, config, {}), pytest.raises(ConfigError, match="another process is at"):
        second.__enter__()
    with Study.opened(path, config, {}) as study:
        assert study.trials() == []


def test_importance_names_the_axis_that_matters(tmp_path):
    config = config_for(tmp_path, axes="rate,decay,warmup")
    with Study.opened(tmp_path / "s", config, {}) as study:
        for done in range(25):
            proposal = study.propose()
            if done == 7:
                assert study.importances() == {}  # too few
            study.finish(proposal, math.log10(proposal.values["rate"]) ** 2, {})
        shares = study.importances()
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["rate"] > 0.8


def test_axes_that_are_off_are_the_defaults(tmp_path):
    config = config_for(tmp_path, axes="decay")
    assert [axis.name for axis in axes_of(config)] == ["decay"]
    assert settings_of(config, {"decay": "cosine"}) == {
        **settings_of(config, {}), "healing_decay": "cosine"
    }  # fmt: skip


SETTINGS_OF_WINNER = settings_of(
    TuneConfig(), {"rate": 3.0, "optimizer": "sgd", "warmup": 0.1, "decay": "cosine", "clip": 1.0}
)
HEALER = Healer(
    settings=SETTINGS_OF_WINNER, model="nano", arms=("haep",), seeds=(100, 101), tried=24,
    token_budget=4096, loss=3.5, default_loss=4.0, rank_recovery_pct=60.0,
    default_rank_recovery_pct=40.0, trial=13, study="s", study_digest="d",
)  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"healing_lr": 1e-3}, r"--healing-lr 0.001 contradicts --healer w, whose --healing-lr is"),
        ({"batch_size": 16}, "--batch-size 16 contradicts --healer w, whose --batch-size is 8"),
        ({"healing_decay": "linear"}, "--healing-decay linear contradicts --healer w"),
        ({"reset_norms": True}, "--reset-norms True contradicts"),
    ],
)
def test_a_setting_that_contradicts_the_healer_is_named(given, message):
    with pytest.raises(ConfigError, match=message):
        HEALER.applied(HealConfig(model="nano", healer="w", **given))


def test_seeds_and_models_of_the_selection_are_refused():
    HEALER.check_use("w", "nano", [0, 1])
    with pytest.raises(ConfigError, match="seed 101 has selected --healer w: judge it on seeds"):
        HEALER.check_use("w", "nano", [0, 101])
    with pytest.raises(ConfigError, match="was selected on nano, and its rates are that model's"):
        HEALER.check_use("w", "micro", [0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("tried"), "its entries are others"),
        (lambda e: e["settings"].pop("healing_lr"), "its entries are others"),
        (lambda e: e["settings"].update(healing_lr=-1.0), "--healing-lr must be above 0"),
    ],
)
def test_a_file_that_is_no_healer_is_refused(tmp_path, change, message):
    entries = json.loads(json.dumps(HEALER.entries()))
    assert Healer.of(entries, "w") == HEALER
    change(entries)
    path = tmp_path / "w.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match=message):
        find_healer(str(path), LocalStore())


@pytest.mark.parametrize("name", included_healers())
def test_an_included_healer_is_found_by_its_name_and_takes_whole_steps(name):
    healer = find_healer(name, LocalStore())
    assert healer.model == name
    assert healer.loss < healer.default_loss
    applied = healer.applied(HealConfig(model=name, healer=name, healing_steps="auto"))
    tokens = applied.healing_steps * applied.batch_size * applied.sequence_length
    assert tokens == healer.token_budget


@pytest.mark.parametrize(("given", "healed"), [
    ({}, ["micro", "nano"]),
    ({"healing_steps": 480}, ["micro", "nano"]),
    ({"batch_size": 8, "healing_lr": 0.004494303097145379}, ["nano"]),  # its own: no contradiction
    ({"batch_size": 4}, []),
    ({"sequence_length": 64}, []),
    ({"healing_lr": 1e-3}, []),
    ({"healer": "none"}, []),
])  # fmt: skip
def test_a_sweep_takes_included_healers_where_no_setting_says_otherwise(given, healed):
    config = SweepConfig(models="nano,micro,70m", **given)
    found = healers_of(config, LocalStore())
    assert sorted(found) == healed
    assert all(found[name] == (name, find_healer(name, LocalStore())) for name in healed)
    cell = SweepCell("nano", "haep", 0)
    settings = heal_config(config, cell, *found.get("nano", ("", None)))
    assert (settings.healing_decay == "linear") == ("nano" in healed)
    assert settings.healing_steps == given.get("healing_steps", 240 if "nano" in healed else 60)


def test_an_included_healer_is_not_judged_on_seeds_that_selected_it():
    with pytest.raises(ConfigError, match=r"seed 100 has selected --healer nano \(none: the defau"):
        healers_of(SweepConfig(models="nano", seeds="0,100"), LocalStore())
    healers_of(SweepConfig(models="nano", seeds="0,100", healer="none"), LocalStore())
    healers_of(SweepConfig(models="70m", seeds="0,100"), LocalStore())


@pytest.mark.parametrize("healer", ["nano,none", "auto,nano"])
def test_no_healer_and_a_healer_are_not_both_named(healer):
    with pytest.raises(ConfigError, match=r"names (none|auto) beside others"):
        SweepConfig(healer=healer)


def test_a_healer_that_is_nowhere_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        find_healer(str(tmp_path / "none.json"), LocalStore())
    with pytest.raises(ConfigError, match="--healer 0123 is no file, no tune run"):
        find_healer("0123", LocalStore())


def test_a_healer_changes_the_digest_with_any_of_its_entries():
    others = [replace(HEALER, tried=25), replace(HEALER, loss=3.4), replace(HEALER, seeds=(1,)),
              replace(HEALER, settings={**HEALER.settings, "reset_norms": True})]  # fmt: skip
    assert len({h.digest for h in [HEALER, *others]}) == 5


def trial(number: int, state: str, loss: float, **values) -> Trial:
    return Trial(number, {"rate": 1.0, "norms": False, **values}, state, loss, {"tokens": 5})


def test_the_winner_is_the_lowest_of_those_that_went_through():
    trials = [trial(0, COMPLETE, 4.0), trial(1, PRUNED, 1.0), trial(3, COMPLETE, 3.0),
              trial(4, DIVERGED, math.inf), trial(5, COMPLETE, 3.0)]  # fmt: skip
    assert winner(trials).number == 3
    assert best_so_far(trials) == [4, 4, 3, 3, 3]
    assert winner(trials[1:2]) is None
    assert all(map(math.isnan, best_so_far(trials[1:2])))


def test_words_say_what_was_tried_and_what_it_gained():
    said = healer_sentence(HEALER)
    assert said == (
        "Trial 13 is the strongest of 24 healers tried within 4,096 tokens on nano (haep; "
        "selection seeds 100, 101): final loss 3.500 nats, 0.500 nats below the default "
        "healer's; rank recovery 60.0 % (default 40.0 %)."
    )
    assert "The default healer is the strongest of 24" in healer_sentence(replace(HEALER, loss=4.0))
    trials = [trial(0, COMPLETE, 4.0), trial(1, PRUNED, 6.0), trial(2, COMPLETE, 3.5, rate=2.5)]
    text = tuning_markdown(HEALER, trials, {"rate": 0.75, "norms": 0.25})
    rows = [line for line in text.splitlines() if line.startswith("| ")][-3:]
    assert [row.split(" | ")[0] for row in rows] == ["| 2", "| 0", "| 1"]
    assert "(6.000)" in rows[2]
    assert "rate 75 %, norms 25 %" in text
    assert trials_csv(trials).splitlines()[:2] == ["trial,state,loss,losses,tokens",
                                                   "0,complete,4.0,,5"]  # fmt: skip


SMALL = {"model": "nano", "sequence_length": 128, "probe_tokens": 512, "verbosity": "quiet"}


@pytest.fixture(scope="module")
def healer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("healer") / "winner.json"
    path.write_text(json.dumps(HEALER.entries()))
    return path


def local(store: LocalStore | None = None) -> Driver:
    return Driver(Console("quiet"), store or LocalStore())


def collapsed(folder, seed: int) -> str:
    config = AttackConfig(**SMALL, arm="random_text", attack_steps=2, seed=seed,
                          output_dir=str(folder))  # fmt: skip
    return str(attack(config, local())[1])


@pytest.mark.slow
def test_heal_takes_the_healer_and_says_so_the_sham_too(tmp_path, healer_file):
    """And it is the healing that the settings alone give."""
    kept = LocalStore()
    (outcome,) = heal(
        HealConfig(**SMALL, collapsed_checkpoint=collapsed(tmp_path, 0), healer=str(healer_file),
                   healing_steps="auto", sham=True, measurement_interval=4, save_healed=False,
                   output_dir=str(tmp_path)), local(kept),
    )  # fmt: skip
    config = outcome.cell.config
    assert {name: getattr(config, name) for name in SETTINGS} == SETTINGS_OF_WINNER
    assert config.healing_steps == 4  # 4,096 tokens of 8 x 128
    heals = [r.view() for r in kept._runs.values()]
    assert sorted(r.tags["arm"] for r in heals) == ["none", "random_text"]
    for found in heals:
        assert found.tags["healer"] == HEALER.digest
        assert found.tags["healers_tried"] == "24"
        assert found.tags["healer_budget_tokens"] == "4096"
        assert found.tags["healer_selection"] == "nano, arms haep, seeds 100, 101"
        assert found.params["heal.healer"] == str(healer_file)
        assert found.params["heal.healing_optimizer"] == "sgd"
    bare = replace(config, healer="", sham=False)
    again = outcome_of(heal_cell(HealCell(bare, outcome.cell.checkpoint)))[0]
    assert again.summary()["final_loss"] == outcome.summary()["final_loss"]
    assert again.fingerprint != outcome.fingerprint  # it does not say how it was selected


def test_a_selection_seed_is_refused_before_anything_is_attacked(tmp_path, healer_file):
    config = HealConfig(**SMALL, healer=str(healer_file), seed=100, output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="seed 100 has selected"):
        heal(config, local())
    assert not list(tmp_path.rglob("checkpoint*"))


def test_a_checkpoint_of_a_selection_seed_is_refused_whatever_heals_it(tmp_path, healer_file):
    config = HealConfig(**SMALL, healer=str(healer_file), seed=0, output_dir=str(tmp_path),
                        collapsed_checkpoint=collapsed(tmp_path, 101))  # fmt: skip
    with pytest.raises(ConfigError, match="seed 101 has selected"):
        heal(config, local())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": "0,100"}, "seed 100 has selected"),
        ({"models": "nano,micro"}, "has none for micro: tune one"),
        ({"models": "micro"}, "one is for nano; name one per model"),
    ],
)
def test_main_refuses_a_healer_that_does_not_fit(tmp_path, healer_file, changes, message):
    values = {"models": "nano", "arms": "random_tokens", "seeds": "0", "verbosity": "quiet",
              "output_dir": str(tmp_path), "healer": str(healer_file)}  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        sweep(SweepConfig(**(values | changes)), local())
    assert not list(tmp_path.rglob("checkpoint*"))


def drawn(trials: list[Trial]) -> list[Trial]:
    return [replace(t, values={"rate": 10.0 ** (t.number / 4 - 1), "norms": t.number % 2 == 0})
            for t in trials]  # fmt: skip


def test_figures_show_every_trial_and_mark_the_winner(tmp_path, monkeypatch):
    found = []

    def kept(**settings):
        found.append(Figure(**settings))
        return found[-1]

    monkeypatch.setattr(style, "Figure", kept)
    losses = [4.0, 3.8, 3.9, 3.2, 50.0, 3.6, 3.5]
    trials = drawn([trial(n, COMPLETE, loss) for n, loss in enumerate(losses)]
                   + [trial(7, PRUNED, 6.0), trial(8, DIVERGED, math.inf)])  # fmt: skip
    figures.history(tmp_path / "h.png", trials, "t")
    (ax,) = found[-1].axes
    assert {line.get_label() for line in ax.lines} >= {
        "lowest so far", "went through", "went through, above the range", "ended early", "diverged"
    }  # fmt: skip
    top = ax.get_ylim()[1]
    assert 4.0 < top < 5  # the hopeless one does not press the others onto one line
    (above,) = [x for x in ax.lines if x.get_label() == "went through, above the range"]
    assert list(above.get_xdata()) == [4]
    figures.slices(tmp_path / "s.png", trials, "t")
    rate, norms = found[-1].axes
    assert rate.get_xscale() == "log"
    for ax, place in ((rate, 10.0 ** (3 / 4 - 1)), (norms, 0.0)):
        (star,) = [x for x in ax.lines if x.get_marker() == "*"]
        assert (star.get_xdata()[0], star.get_ydata()[0]) == pytest.approx((place, 3.2))
    assert [t.get_text() for t in norms.get_xticklabels()] == ["no", "yes"]
    figures.importance(tmp_path / "i.png", {"rate": 0.7, "norms": 0.3}, "t")
    assert [p.get_width() for p in found[-1].axes[0].patches] == pytest.approx([30, 70])
    assert {p.name for p in tmp_path.glob("*.png")} == {"h.png", "s.png", "i.png"}


@pytest.mark.slow
def test_main_heals_every_cell_with_the_healer(tmp_path, healer_file):
    kept = LocalStore()
    sweep(
        SweepConfig(models="nano", arms="random_tokens", seeds="0", attack_steps=2, workers=1,
                    healer=str(healer_file), verbosity="quiet", output_dir=str(tmp_path)),
        local(kept),
    )  # fmt: skip
    heals = [r.view() for r in kept._runs.values() if r._tags.get("stage") == "heal"]
    assert sorted(r.tags["arm"] for r in heals) == ["none", "random_tokens"]
    assert {r.tags["healer"] for r in heals} == {HEALER.digest}
    assert {r.params["heal.healing_steps"] for r in heals} == {"4"}
    assert {r.params["heal.healing_optimizer"] for r in heals} == {"sgd"}


@pytest.mark.slow
def test_a_search_on_nano_from_attack_to_winner(store):
    config = TuneConfig(
        arms="random_tokens", seeds="100", attack_steps=20, trials=2, axes="rate", rungs=1,
        token_budget=2048, output_dir=str(store / "out"), verbosity="quiet", probe_tokens=2048,
    )  # fmt: skip
    found = tune(config)
    client = MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'llm-healing'")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if r.data.tags["stage"] == "tune"]
    names = {f.path for f in client.list_artifacts(parent.info.run_id)}
    assert {HEALER_NAME, "trials.csv", "tuning.md", "study.journal", "plots"} <= names
    assert find_healer(parent.info.run_id, Driver(Console("quiet")).store) == found.healer
    # The default trial is the healing that `heal` does of the same checkpoint.
    assert math.isfinite(found.healer.rank_recovery_pct)
    (checkpoint,) = (store / "out").rglob("checkpoint_post_treatment.pt")
    (outcome,) = heal(
        HealConfig(collapsed_checkpoint=str(checkpoint), seed=100, healing_steps=2,
                   probe_tokens=2048, verbosity="quiet", output_dir=str(store / "out"))
    )  # fmt: skip
    assert found.trials[0].loss == outcome.summary()["final_loss"]
    assert found.trials[0].rank_recovery_pct == outcome.summary()["rank_recovery_pct"]
