"""Stage ``basin`` end to end on nano with tiny budgets: numbers, lineage, refusals, figures."""

from __future__ import annotations

import json
import math
import pathlib
import pickle
import shutil
from dataclasses import replace

import mlflow
import pytest
import torch
from click.testing import CliRunner
from mlflow.tracking import MlflowClient
from torch import nn

from entrypoints.basin import main as basin_command
from healing.config.attack import AttackConfig
from healing.config.basin import BasinConfig
from healing.config.fingerprint import fingerprint
from healing.config.heal import HealConfig
from healing.config.shared import BaseConfig
from healing.curvature.flat_weights import put_weights, weights_of
from healing.curvature.hessian import HessianOperator
from healing.curvature.loss_landscape import loss_path
from healing.curvature.minimum import FLAT
from healing.curvature.stochastic_lanczos import SpectralDensity, lanczos_quadrature
from healing.data.splits import Corpus
from healing.data.windows import batches
from healing.errors import CheckpointError, ConfigError, CorpusError, TrackingError
from healing.measurements.probe import Probe
from healing.models.blocks import next_token_loss
from healing.models.checkpoints import HEALED_NAME, load_state, read_checkpoint
from healing.models.loading import load_model, new_embedded_model
from healing.progress import Stopped
from healing.randomness import named_generator
from healing.reporting.plots import basin as figures
from healing.stages.attack import attack
from healing.stages.basin import basin, find_cell
from healing.stages.cells import basin as basin_module
from healing.stages.cells.basin import STEPS, basin_cell, curvature_batch, gradient_batches
from healing.stages.cells.basin_outcome import BasinCell, BasinOutcome
from healing.stages.cells.events import Begin, outcome_of
from healing.stages.cells.heal import resolve_from_checkpoint, settings_of
from healing.stages.cells.heal_outcome import HealCell
from healing.stages.cells.inputs import corpus_for
from healing.stages.heal import heal
from healing.stages.healing_run.inputs import find_checkpoints
from healing.tracking.store import MlflowStore
from tests.rewritten import rewritten
from tests.stages.test_resume import Died, driver, files

pytestmark = pytest.mark.slow

SMALL = {"model": "nano", "sequence_length": 64, "probe_tokens": 512, "batch_size": 4,
         "verbosity": "quiet"}  # fmt: skip
TINY = {"curvature_tokens": 64, "gradient_batches": 8, "eigenvalues": 1,
        "lanczos_iterations": 4, "density_iterations": 3, "perturbations": 1, "escape_steps": 2,
        "verbosity": "quiet"}  # fmt: skip


def make_healed(arm: str = "random_tokens", steps: int = 4, **changes) -> str:
    """Attack and heal nano; returns the healing run's id."""
    config = AttackConfig(**{**SMALL, "arm": arm, "attack_steps": 4, "measurement_interval": 4})
    attack_id, _ = attack(config)
    heal(HealConfig(**{**SMALL, "attack_run_id": attack_id, "healing_steps": steps, **changes}))
    return newest("heal")


def newest(stage: str) -> str:
    client = MlflowClient()
    experiment = client.get_experiment_by_name("llm-healing").experiment_id
    return client.search_runs([experiment], f"tags.stage = '{stage}'")[0].info.run_id


def config_for(run_id: str, **changes) -> BasinConfig:
    return BasinConfig(**{**TINY, "heal_run_id": run_id, **changes})


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> tuple[pathlib.Path, str]:
    """A store with one attack and its healing, made once; and the healing run's id."""
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        return folder, make_healed()


@pytest.fixture
def healed(template, store) -> str:
    """A copy of that store to change at will (its artifacts stay where they are)."""
    folder, run_id = template
    shutil.copy(folder / "mlflow.db", store / "mlflow.db")
    shutil.copytree(folder / "experiments", store / "experiments")
    return run_id


def checkpoints(root: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    (collapsed,) = root.rglob("raw_data/*/checkpoints/checkpoint_post_treatment.pt")
    (after,) = root.rglob(f"raw_data/*/checkpoints/{HEALED_NAME}")
    return collapsed, after


def test_healing_stores_its_end_and_only_basin_takes_it_for_one(store, healed):
    collapsed, after = checkpoints(store)
    stored = read_checkpoint(after)
    assert stored.kind == "post_healing"
    assert stored.step == 4
    assert stored.config["heal_run_id"] == healed
    loaded = load_model("nano")
    load_state(loaded, stored, after)
    probe = find_cell(config_for(healed), MlflowStore()).config.probe_tokens
    summary = json.loads((after.parents[1] / "healing_summary.json").read_text())
    corpus_probe = Probe.of(cached(), loaded, probe, 64)
    assert corpus_probe.loss(loaded.model) == pytest.approx(summary["final_loss"], rel=1e-6)
    assert [p.resolve() for p in find_checkpoints("experiments")] == [collapsed.resolve()]
    names = {a.path for a in MlflowClient().list_artifacts(healed, "checkpoints")}
    assert names == {f"checkpoints/{HEALED_NAME}"}


def cached() -> Corpus:
    return corpus_for(BaseConfig(corpus="stdlib"))


def test_saving_the_healed_state_changes_no_number_and_can_be_left_out(store):
    run_id = make_healed(save_healed=False)
    assert not list(store.rglob(HEALED_NAME))
    with pytest.raises(TrackingError, match="heal again with --save-healed true"):
        basin(config_for(run_id))
    (path,) = find_checkpoints("experiments")
    found = []
    for save in (True, False):
        config = HealConfig(**SMALL, save_healed=save)
        cell = HealCell(resolve_from_checkpoint(config, read_checkpoint(path), path), str(path))
        found.append((fingerprint(cell.config), settings_of(cell, read_checkpoint(path), {})))
    assert found[0] == found[1]


def test_basin_logs_statement_numbers_paths_and_figures(store, healed):
    outcome = basin(config_for(healed))
    client, run_id = MlflowClient(), newest("basin")
    run = client.get_run(run_id)
    tags, metrics = run.data.tags, run.data.metrics
    assert run.info.status == "FINISHED"
    for state in ("healthy", "collapsed", "healed"):
        assert tags[f"{state}_is_minimum"] in ("yes", "no", FLAT, "undetermined")
        assert metrics[f"basin/{state}/least_gain"] < metrics[f"basin/{state}/most_gain"]
        assert metrics[f"basin/{state}/lambda_max"] > metrics[f"basin/{state}/lambda_min"]
    assert (tags["stage"], tags["model"], tags["arm"]) == ("basin", "nano", "random_tokens")
    assert tags["heal_run_id"] == healed
    assert tags["attack_run_id"] == client.get_run(healed).data.tags["attack_run_id"]
    assert tags["fingerprint"] == outcome.fingerprint
    assert "standard error" in tags["collapsed_is_minimum_evidence"]
    assert "Is the collapsed state a minimum?" in tags["mlflow.note.content"]
    healthy = f"The healthy state, by the same rule: {tags['healthy_is_minimum']} ("
    assert healthy in tags["mlflow.note.content"]
    fall = metrics["basin/healthy/best_probe_loss_drop"]
    assert f"| best_probe_loss_drop | {fall:.4g} |" in tags["mlflow.note.content"]
    assert run.data.params["basin.sequence_length"] == "64"  # the healing run's, not the default
    # The collapsed and healed losses on the probe are those that healing measured there.
    healing = client.get_run(healed).data.metrics
    assert metrics["basin/collapsed/loss"] == pytest.approx(healing["summary/collapsed_loss"])
    assert metrics["basin/healed/loss"] == pytest.approx(healing["summary/final_loss"])
    history = client.get_metric_history(run_id, "path/collapsed_healed_loss")
    assert [m.step for m in history] == list(range(0, 101, 5))
    assert history[0].value == metrics["basin/collapsed/loss"]
    assert history[-1].value == metrics["basin/healed/loss"]
    chord = [(1 - m.step / 100) * history[0].value + m.step / 100 * history[-1].value
             for m in history]  # fmt: skip
    excess = [m.value - c for m, c in zip(history, chord, strict=True)]
    barrier = metrics["basin/barrier/collapsed_healed"]
    assert barrier == pytest.approx(max(0.0, *excess[1:-1]), abs=1e-9)
    files = {a.path for a in client.list_artifacts(run_id)}
    assert {"basin_summary.json", "paths.json", "spectral_density.json", "config.json"} <= files
    plots = {a.path for a in client.list_artifacts(run_id, "plots")}
    assert plots == {"plots/overview.png", "plots/loss_barriers.png", "plots/spectral_density.png",
                     "plots/gradient_and_eigenvalues.png"}  # fmt: skip


def test_numbers_are_those_of_an_independent_computation(store, healed):
    """Gradient and curvature of the collapsed state, by autograd and the float64 dense product."""
    outcome = basin(config_for(healed, lanczos_iterations=12))
    collapsed, after = checkpoints(store)
    loaded = load_model("nano")
    load_state(loaded, read_checkpoint(collapsed), collapsed)
    windows = cached().windows("attack", loaded.tokenizer, 64)
    starts = [i * len(windows) // 8 for i in range(8)]

    def gradient(start: int) -> torch.Tensor:
        loaded.model.zero_grad()
        ids = windows[start : start + 1]
        logits = loaded.model(input_ids=ids).logits[0, :-1]
        nn.functional.cross_entropy(logits, ids[0, 1:]).backward()
        return torch.cat([p.grad.reshape(-1) for p in loaded.model.parameters()])

    gradients = [gradient(start) for start in starts]
    mean = torch.stack(gradients).mean(0)
    report = outcome.states["collapsed"].evidence
    assert report.gradient.norm == pytest.approx(float(mean.norm()), rel=1e-4)
    # λ_max bounds every Rayleigh quotient, that of the gradient among them.
    operator = HessianOperator(loaded.model, next_token_loss, [windows[:1]], [63.0])
    unit = gradients[0] / gradients[0].norm()
    quotient = float(unit @ operator(unit))
    slack = report.curvature.largest_residuals[0] + 1e-3 * report.curvature.scale
    assert report.curvature.smallest[0] - slack <= quotient <= report.curvature.largest[0] + slack
    # Two steps from the state itself, on one batch after the other, judged window by window.
    probe = Probe.of(cached(), loaded, 512, 64)
    losses = [[Probe(window[None]).loss(loaded.model) for window in probe.windows]]
    start = weights_of(loaded.model)
    for number in (0, 1):
        step = gradient(starts[number]) / report.curvature.largest[0]
        put_weights(loaded.model, weights_of(loaded.model) - step)
    losses.append([Probe(window[None]).loss(loaded.model) for window in probe.windows])
    drops = torch.tensor(losses[0]) - torch.tensor(losses[1])
    descent = report.escape.unperturbed
    assert descent.heldout_drop == pytest.approx(float(drops.mean()), rel=1e-3)
    error = float(drops.std()) / math.sqrt(len(drops))
    assert descent.heldout_error == pytest.approx(error, rel=1e-2)
    distance = float((weights_of(loaded.model) - start).norm())
    assert descent.final_distance == pytest.approx(distance, rel=1e-3)
    assert report.curvature.is_negative
    assert len(report.escape.along) == 2
    states = []
    for path in (collapsed, after):
        load_state(loaded, read_checkpoint(path), path)
        states.append(weights_of(loaded.model).double())
    healthy = weights_of(load_model("nano").model).double()
    a, h = states[0] - healthy, states[1] - states[0]
    cosine = -float(nn.functional.cosine_similarity(a, h, dim=0))
    assert outcome.displacement.return_cosine == pytest.approx(cosine, abs=1e-9)


def test_a_cell_is_a_pure_function_of_a_picklable_configuration(store, healed):
    cell = pickle.loads(pickle.dumps(find_cell(config_for(healed), MlflowStore())))
    before = sorted(store.rglob("*"))
    begin, *events = basin_cell(cell)
    first, again = outcome_of(basin_cell(cell)), outcome_of(basin_cell(cell))
    assert sorted(store.rglob("*")) == before
    assert isinstance(begin, Begin)
    assert [event.done for event in events] == list(range(1, STEPS + 1))
    assert first.metrics() == pytest.approx(again.metrics(), nan_ok=True, rel=0, abs=0)
    assert first.fingerprint == again.fingerprint
    assert pickle.loads(pickle.dumps(first)).statements() == first.statements()
    other = replace(cell, config=replace(cell.config, escape_steps=3))
    assert outcome_of(basin_cell(other)).fingerprint != first.fingerprint


def test_the_two_ways_of_naming_the_states_agree(store, healed):
    collapsed, after = map(str, checkpoints(store))
    by_run = basin(config_for(healed))
    by_file = basin(
        BasinConfig(**TINY, collapsed_checkpoint=collapsed, healed_checkpoint=after, model="nano")
    )
    assert by_file.fingerprint == by_run.fingerprint
    assert by_file.metrics() == pytest.approx(by_run.metrics(), nan_ok=True)


def test_a_sham_has_no_attack_step_and_says_so(store):
    run_id = make_healed(arm="none")
    MlflowClient().set_tag(run_id, "checkpoint", "")  # healed from the healthy model itself
    outcome = basin(config_for(run_id))
    assert outcome.cell.collapsed == ""
    assert math.isnan(outcome.displacement.return_cosine)
    tags = MlflowClient().get_run(newest("basin")).data.tags
    assert tags["return_cosine_undefined_reason"] == "the collapsed state is the healthy one"
    states = {name: report.metrics() for name, report in outcome.states.items()}
    assert states["collapsed"] == pytest.approx(states["healthy"], nan_ok=True, rel=0, abs=0)
    # The straight line between two equal losses is equal to them but for rounding.
    assert outcome.paths["healthy_collapsed"].barrier == pytest.approx(0, abs=1e-12)


def poison(path: pathlib.Path, target: pathlib.Path, **config) -> pathlib.Path:
    return rewritten(path, target, lambda data: data["config"].update(config))


def test_states_that_do_not_belong_together_are_refused(store, healed):
    collapsed, after = checkpoints(store)

    def refused(match: str, first: pathlib.Path, second: pathlib.Path, **changes) -> None:
        given = {"collapsed_checkpoint": str(first), "healed_checkpoint": str(second)}
        with pytest.raises(CheckpointError, match=match):
            basin(BasinConfig(**{**TINY, **given, **changes}))

    refused("is not a healed checkpoint .type post_treatment.", collapsed, collapsed)
    refused("was not healed from .* but from other weights", after, after)
    refused("is a checkpoint of model nano, --model says micro", collapsed, after, model="micro")
    bad = poison(after, store / "healed.pt", healthy_digest="0" * 16)
    refused("healed.pt was made from other weights of nano", collapsed, bad)
    bad = poison(collapsed, store / "collapsed.pt", healthy_digest="0" * 16)
    refused("collapsed.pt was made from other weights of nano", bad, after)
    nameless = poison(after, store / "nameless.pt", model=None)
    refused("names no model: name it with --model", collapsed, nameless)


def test_a_run_whose_files_are_not_its_own_is_refused(store, healed):
    client = MlflowClient()
    attack_id = client.get_run(healed).data.tags["attack_run_id"]
    with pytest.raises(CheckpointError, match="is not a healing run: name a single healing run"):
        basin(config_for(attack_id))
    mark = client.get_run(healed).data.tags["fingerprint"]
    client.set_tag(healed, "fingerprint", "0" * 16)
    with pytest.raises(CheckpointError, match="the artifact is of another run"):
        basin(config_for(healed))
    client.set_tag(healed, "fingerprint", mark)
    client.set_tag(healed, "checkpoint_id", "1" * 16)
    with pytest.raises(CheckpointError, match=r"is not the checkpoint that run .* healed"):
        basin(config_for(healed))
    client.set_tag(healed, "role", "parent")
    with pytest.raises(CheckpointError, match="is the parent of healing runs"):
        basin(config_for(healed))


def test_the_collapsed_checkpoint_is_found_without_its_artifact(store, healed):
    """The attack run is gone from the store: the path in the tag serves."""
    client = MlflowClient()
    client.set_tag(healed, "attack_run_id", "0" * 32)
    cell = find_cell(config_for(healed), MlflowStore())
    assert pathlib.Path(cell.collapsed).is_file()
    client.set_tag(healed, "checkpoint", "/no/where.pt")
    with pytest.raises(TrackingError, match="cannot be had"):
        find_cell(config_for(healed), MlflowStore())


def test_a_state_that_cannot_compute_is_undetermined(store, healed):
    collapsed, after = checkpoints(store)
    cell = find_cell(config_for(healed), MlflowStore())

    def poisoned(data: dict) -> None:
        next(reversed(data["model_state_dict"].values()))[3] = math.nan  # the output matrix

    rewritten(after, store / "nan.pt", poisoned)
    outcome = outcome_of(basin_cell(BasinCell(cell.config, str(collapsed), str(store / "nan.pt"))))
    assert outcome.statements()["healed_is_minimum"] == "undetermined"
    assert outcome.states["healed"].statement.because == "the gradient is not finite"
    assert math.isnan(outcome.paths["healthy_healed"].barrier)
    assert outcome.displacement.reason == "the weights of a state are not finite"
    assert outcome.statements()["collapsed_is_minimum"] != "undetermined"
    draw(outcome, store)
    basin(BasinConfig(**TINY, collapsed_checkpoint=str(collapsed),
                      healed_checkpoint=str(store / "nan.pt")))  # fmt: skip
    tags = MlflowClient().get_run(newest("basin")).data.tags
    assert tags["barrier_undefined_reason.healthy_healed"].startswith("the loss is not finite at")


def draw(outcome: BasinOutcome, folder: pathlib.Path) -> None:
    """All figures, also where a state (or every state) is not finite."""
    lost = {name: SpectralDensity(torch.full((1, 2), math.nan), torch.full((1, 2), math.nan), 5)
            for name in outcome.states}  # fmt: skip
    figures.spectral_density(folder / "lost.png", lost, 1.0, "nothing")
    assert (folder / "lost.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path_points": 20}, "--path-points must be at least 21"),
        ({"path_points": 22}, "must be 21, 26, 51 or 101 (whole percents apart), got 22"),
        ({"gradient_batches": 7}, "--gradient-batches must be at least 8"),
        ({"eigenvalues": 3, "lanczos_iterations": 5}, "at least twice --eigenvalues (6), got 5"),
        ({"model": "giga"}, "unknown model 'giga'"),
    ],
)
def test_bad_parameters_are_named(changes, message):
    with pytest.raises(ConfigError) as caught:
        BasinConfig(**changes)
    assert message in str(caught.value)


def test_something_must_be_named_once(store):
    with pytest.raises(ConfigError, match="name a healing run"):
        basin(BasinConfig(verbosity="quiet"))
    with pytest.raises(ConfigError, match="name a healing run"):
        basin(BasinConfig(verbosity="quiet", healed_checkpoint="a"))
    with pytest.raises(ConfigError, match="--heal-run-id excludes"):
        basin(BasinConfig(verbosity="quiet", heal_run_id="a", healed_checkpoint="a"))


def test_budgets_that_the_text_cannot_fill_are_refused(store, healed):
    with pytest.raises(ConfigError, match="32 is less than one window of 64"):
        basin(config_for(healed, curvature_tokens=32))
    with pytest.raises(CorpusError, match=r"the gradient needs 80000: .* lower --gradient-batches"):
        basin(config_for(healed, gradient_batches=80_000))


def test_batches_are_disjoint_spread_and_of_the_size_asked_for():
    windows = torch.arange(103).view(103, 1)
    blocks = gradient_batches(windows, 8, 12)
    flat = torch.cat(blocks).flatten().tolist()
    assert len(set(flat)) == len(flat) == 96
    assert all((block.diff(dim=0) == 1).all() for block in blocks)
    assert flat[-12] == 7 * 103 // 8
    fixed = curvature_batch(windows, 4).flatten().tolist()
    assert fixed == [0, 25, 51, 77]


def test_a_probe_more_keeps_moments(corpus):
    """Rows of different length are padded without a trace in any moment."""
    generator = named_generator(0, "matrix")
    matrix = torch.diag(torch.linspace(-1, 3, 30, dtype=torch.float64))

    class Dense:
        shape, dtype, device = (30, 30), torch.float64, torch.device("cpu")

        def __call__(self, vector):
            return matrix @ vector

    long = lanczos_quadrature(Dense(), generator, n_probes=1, n_iterations=9)
    short = lanczos_quadrature(Dense(), generator, n_probes=2, n_iterations=4)
    both = short.with_probe(long.nodes[0], long.weights[0])
    assert both.nodes.shape == (3, 9)
    for order in (0, 1, 2, 5):
        mean = (long.moment(order)[0] + 2 * short.moment(order)[0]) / 3
        assert both.moment(order)[0] == pytest.approx(mean, rel=1e-12)
    swapped = long.with_probe(short.nodes[0], short.weights[0])
    assert swapped.nodes.shape == (2, 9)
    lost = short.with_probe(torch.empty(0), torch.empty(0))
    assert math.isnan(lost.moment(1)[0])


def train(model: nn.Module, windows: torch.Tensor, seed: int, steps: int, lr: float) -> nn.Module:
    """A plain AdamW loop on batches of 8 windows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    stream = batches(windows, 8, named_generator(seed, "order"))
    for _ in range(steps):
        optimizer.zero_grad()
        next_token_loss(model, next(stream)).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
def test_independent_models_have_a_barrier_between_them_and_neighbours_have_none(corpus, nano):
    """Frankle et al. 2020: other random starts end in other basins, a fine-tuned copy does not."""
    windows = corpus.windows("train", nano.tokenizer, 64)
    probe = Probe.of(corpus, nano, 2048, 64)
    vocabulary = len(nano.tokenizer)
    strangers = [
        train(new_embedded_model("nano", vocabulary, named_generator(s, "init")), windows, s, 200,
              5e-3)
        for s in (0, 1)
    ]  # fmt: skip
    ends = [weights_of(model) for model in strangers]
    path = loss_path(strangers[0], *ends, 21, lambda: probe.loss(strangers[0]))
    assert path.losses[0] < 6.24  # the unigram model's loss: both have learned something
    assert path.losses[-1] < 6.24
    assert path.barrier > 0.1
    start = weights_of(nano.model)
    train(nano.model, windows, 0, 20, 1e-4)
    near = loss_path(nano.model, start, weights_of(nano.model), 21, lambda: probe.loss(nano.model))
    assert near.barrier < 0.01
    assert not torch.equal(start, weights_of(nano.model))


PARTS = {"lanczos": 3, "lanczos_quadrature": 3, "gradient_statistics": 3, "escape": 3,
         "loss_path": 3}  # fmt: skip


@pytest.mark.parametrize("by", ["the same command", "--resume-run-id"])
def test_a_landscape_that_was_cut_goes_on_with_what_it_had_finished(store, healed, monkeypatch, by):
    """Left, by a stop and a death in turn, in the middle of the first state, between two parts that
    share their graphs, and between two paths.
    """
    made = dict.fromkeys(PARTS, 0)

    def counting(name: str, part):
        def counted(*given, **options):
            made[name] += 1
            return part(*given, **options)

        return counted

    for name in PARTS:
        part = getattr(basin_module, name)
        monkeypatch.setattr(basin_module, name, counting(name, part))
    config = config_for(healed, output_dir=str(store / "whole"))
    basin(config, driver()[0])
    whole = files(store / "whole", "_basin_")
    assert len(whole) > 5
    assert made == PARTS
    place, client = store / "cut", MlflowClient()
    for name in PARTS:
        made[name] = 0
    cuts = (1, 6, 14) if by == "the same command" else (6,)
    for cut in cuts:
        with pytest.raises(Died if cut == 6 and len(cuts) > 1 else Stopped):
            basin(
                replace(config, output_dir=str(place)),
                driver(cut, dies=cut == 6 and len(cuts) > 1)[0],
            )
    if by == "the same command":
        basin(replace(config, output_dir=str(place)), driver()[0])
    else:
        options = ["--resume-run-id", newest("basin"), "--verbosity", "quiet"]
        done = CliRunner().invoke(basin_command, options)
        assert done.exit_code == 0, done.output
    assert made == PARTS, "nothing is done twice"
    found = files(place, "_basin_")
    assert found.keys() == whole.keys()
    # The configuration names files that were fetched.
    unlike = {name for name in whole if whole[name] != found[name]}
    assert {name for name in unlike if not name.endswith("/config.json")} == set()
    assert not list(place.rglob(".*.state"))
    done = client.get_run(newest("basin"))
    assert (done.info.status, done.data.tags["resumed_at_step"]) == ("FINISHED", str(cuts[-1]))
