"""``--log-model``: what is stored is the checkpoint's model, and leads back to it."""

from __future__ import annotations

import math
import pathlib

import mlflow
import mlflow.transformers
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.validation import _validate_model_name

from healing.config.attack import AttackConfig
from healing.config.basin import BasinConfig
from healing.config.heal import HealConfig
from healing.config.sweep import SweepConfig
from healing.data.corpora import load_corpus
from healing.errors import ConfigError, HealingError, TrackingError
from healing.models.checkpoints import CHECKPOINT_NAME, HEALED_NAME
from healing.models.loading import load_model
from healing.stages.attack import attack
from healing.stages.basin import find_cell
from healing.stages.cells.sweep_plan import plan
from healing.stages.heal import heal
from healing.stages.launching.cell_configs import attack_config, heal_config
from healing.tracking.store import MlflowStore

SMALL = {"model": "nano", "sequence_length": 64, "probe_tokens": 512, "batch_size": 2,
         "measurement_interval": 2, "verbosity": "quiet", "threads": 1}  # fmt: skip
ATTACK = {**SMALL, "arm": "random_tokens", "attack_steps": 2}
HEAL = {**SMALL, "healing_steps": 2}
TOKENS = torch.arange(60).reshape(3, 20)


def models() -> list:
    client = MlflowClient()
    found = client.search_logged_models([e.experiment_id for e in client.search_experiments()])
    return sorted(found, key=lambda model: model.creation_timestamp)


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def checkpoint_logits(run_id: str, name: str) -> torch.Tensor:
    """By torch alone, into the embedded model."""
    path = MlflowClient().download_artifacts(run_id, f"checkpoints/{name}")
    loaded = load_model("nano", "cpu").model
    loaded.load_state_dict(torch.load(path, weights_only=True)["model_state_dict"])
    return logits_of(loaded)


def files(run_id: str, folder: str | None = None) -> set[str]:
    return {f.path for f in MlflowClient().list_artifacts(run_id, folder)}


def test_models_of_an_attack_and_its_healing(store):
    """Logits, links, metrics, signature, registry, and the way back by models:/ URIs."""
    run_id, _ = attack(AttackConfig(**ATTACK, log_model=True, register_as="collapsed nano"))
    (collapsed,) = models()
    heal(HealConfig(**HEAL, attack_run_id=f"models:/{collapsed.model_id}", log_model=True,
                    register_as="healed", sham=True))  # fmt: skip
    _, healed = models()  # none of the sham
    client = MlflowClient()
    assert client.get_run(healed.source_run_id).data.tags["attack_run_id"] == run_id
    for model, name, state in (
        (collapsed, CHECKPOINT_NAME, "collapsed"), (healed, HEALED_NAME, "healed"),
    ):  # fmt: skip
        assert model.status == "READY"
        assert model.params["state"] == state
        assert model.params["arm"] == "random_tokens"
        assert model.name == f"nano-random_tokens-seed-0-{state}"
        run = client.get_run(model.source_run_id)
        assert [o.model_id for o in run.outputs.model_outputs] == [model.model_id]
        final = {k: v for k, v in run.data.metrics.items() if k.startswith("summary/")}
        # MLflow would show an undefined number of a model as 0.
        finite = {k: v for k, v in final.items() if math.isfinite(v)}
        assert 0 < len(finite) < len(final) + (state == "collapsed")
        assert {m.key: m.value for m in model.metrics} == finite
        assert all(len(client.get_metric_history(run.info.run_id, key)) == 1 for key in final), (
            "the model's metrics are no second points of the run"
        )
        uri = f"models:/{model.model_id}"
        loaded = mlflow.transformers.load_model(uri, return_type="components")
        assert torch.equal(logits_of(loaded["model"]), checkpoint_logits(model.source_run_id, name))
        text = "def main():"
        own = load_model("nano", "cpu").tokenizer
        assert loaded["tokenizer"](text)["input_ids"] == own(text)["input_ids"]
        described = mlflow.models.get_model_info(uri)
        assert described.run_id == model.source_run_id
        assert described.model_id == model.model_id
        assert described.signature.inputs.to_dict() == [{"type": "string", "required": True}]
        assert described.saved_input_example_info is not None
        whole = pathlib.Path(mlflow.artifacts.download_artifacts(uri))
        written = (whole / "MLmodel").read_text()
        assert "embedded" not in written.replace("source: embedded", "")
        assert not any(path.startswith("model") for path in files(model.source_run_id))
    collapsed_version = client.get_model_version("collapsed nano", "1")
    healed_version = client.get_model_version("healed", "1")
    assert collapsed_version.source == f"models:/{collapsed.model_id}"
    assert healed_version.source == f"models:/{healed.model_id}"
    registered = mlflow.transformers.load_model("models:/healed/1", return_type="components")
    healed_logits = checkpoint_logits(healed.source_run_id, HEALED_NAME)
    assert torch.equal(logits_of(registered["model"]), healed_logits)
    assert healed_version.tags["state"] == "healed"
    # The way back: by version, alias and id; a model of the other stage is named as such.
    cell = find_cell(BasinConfig(heal_run_id="models:/healed/1"), MlflowStore())
    assert cell.healed.endswith(HEALED_NAME)
    client.set_registered_model_alias("healed", "best", "1")
    files_by_model = BasinConfig(
        collapsed_checkpoint="models:/collapsed nano/1", healed_checkpoint="models:/healed@best"
    )
    assert find_cell(files_by_model, MlflowStore()).collapsed.endswith(CHECKPOINT_NAME)
    wrong = "of stage heal: name a model of stage attack"
    for option in ("attack_run_id", "collapsed_checkpoint"):
        with pytest.raises(TrackingError, match=wrong):
            heal(HealConfig(**HEAL, **{option: "models:/healed/1"}))


def test_the_numbers_and_the_fingerprint_are_those_without(store):
    first, _ = attack(AttackConfig(**ATTACK))
    second, _ = attack(AttackConfig(**ATTACK, log_model=True))
    client = MlflowClient()
    plain, logged = client.get_run(first).data, client.get_run(second).data
    assert plain.tags["fingerprint"] == logged.tags["fingerprint"]
    kept = [
        {k: v for k, v in d.metrics.items() if not k.startswith(("seconds", "tokens_per"))}
        for d in (plain, logged)
    ]
    assert kept[0] == pytest.approx(kept[1], nan_ok=True, rel=0, abs=0)
    assert len(models()) == 1


def other_program(name: str, *, run: bool) -> str:
    """A logged model as somebody else makes it, with or without a run."""
    client = MlflowClient()
    experiment = client.create_experiment(name)
    source = client.create_run(experiment).info.run_id if run else None
    return client.create_logged_model(experiment, name, source).model_id


def test_models_that_lead_nowhere_are_named_in_one_line(store):
    client = MlflowClient()
    foreign = other_program("foreign", run=True)
    client.create_registered_model("theirs")
    client.create_model_version("theirs", f"models:/{foreign}", model_id=foreign)
    experiment = client.create_experiment("ours")
    orphan = client.create_logged_model(experiment, "m", None, {"llm_healing.stage": "attack"})
    cases = {
        "models:/m-0123": "no model models:/m-0123",
        "models:/nobody/1": "no model models:/nobody/1",
        "models:/theirs/7": "no model models:/theirs/7",
        "models:/theirs@best": "no model models:/theirs@best",
        "models:/theirs": "names no model",
        f"models:/{foreign}": "was made by another program",
        "models:/theirs/1": "was made by another program",
        f"models:/{orphan.model_id}": "has no source run",
    }
    for uri, text in cases.items():
        for option in ("attack_run_id", "collapsed_checkpoint"):
            with pytest.raises(TrackingError, match=text) as caught:
                heal(HealConfig(**HEAL, **{option: uri}))
            assert "\n" not in str(caught.value)
        with pytest.raises(TrackingError, match=text):
            find_cell(BasinConfig(heal_run_id=uri), MlflowStore())


NAMES = ["plain", "with space", "a/b", "a:b", ".", "..", "..x", "./x", " ", "x.y", "ä", "a" * 256]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_refused_as_the_registry_refuses_them(name):
    try:
        _validate_model_name(name)
    except MlflowException:
        with pytest.raises(ConfigError, match="--register-as"):
            AttackConfig(log_model=True, register_as=name)
    else:
        AttackConfig(log_model=True, register_as=name)


def test_what_a_registry_cannot_keep_is_refused_before_any_work(store):
    with pytest.raises(ConfigError, match="add --log-model"):
        HealConfig(register_as="x")
    with pytest.raises(ConfigError, match="at most 256"):
        HealConfig(log_model=True, register_as="x" * 257)
    mlflow.genai.register_prompt("taken", "a {{word}}")
    for run in (
        lambda: attack(AttackConfig(**ATTACK, log_model=True, register_as="taken")),
        lambda: heal(HealConfig(**HEAL, log_model=True, register_as="taken")),
    ):
        with pytest.raises(HealingError, match="is the name of a prompt"):
            run()
    assert not (store / "experiments/results/priority5_healing").exists()


def test_a_sweep_hands_the_wish_on():
    config = SweepConfig(models="nano", seeds="0", log_model=True, register_as="best")
    cell = next(c for c in plan(config)[0] if c.arm == "haep")
    made = attack_config(config, cell, "")
    healed = heal_config(config, cell)
    assert (made.log_model, made.register_as) == (True, "")
    assert (healed.log_model, healed.register_as) == (True, "best")
    assert not made.system_metrics


def test_the_text_that_was_read_is_listed_with_digest_source_and_use(store):
    """Read back through MLflow's own classes, digests computed anew."""
    run_id, _ = attack(AttackConfig(**ATTACK))
    heal(HealConfig(**HEAL, attack_run_id=run_id))
    client = MlflowClient()
    found = client.get_experiment_by_name("llm-healing")
    (healing,) = client.search_runs([found.experiment_id], "tags.stage = 'heal'")
    digests = load_corpus("stdlib").digests
    for run, uses in (
        (client.get_run(run_id), {"attack": "attack", "probe": "probe"}),
        (healing, {"train": "training", "probe": "probe"}),
    ):
        inputs = {i.dataset.name: i for i in run.inputs.dataset_inputs}
        assert inputs.keys() == {f"stdlib-{split}" for split in uses}
        for split, use in uses.items():
            read = inputs[f"stdlib-{split}"]
            assert read.dataset.digest == digests[split]
            assert [(t.key, t.value) for t in read.tags] == [("mlflow.data.context", use)]
            source = mlflow.data.get_source(read)
            assert source.to_dict()["tags"] == {"corpus": "stdlib", "split": split}
