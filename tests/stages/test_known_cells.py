"""A sweep's cells that finished long ago: known without loading or fetching anything, and only
where nothing differs that decides their numbers.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file, save_file

from healing.config.sweep import SweepConfig
from healing.models.model_files import EMBEDDED_DIR
from healing.stages.cells import inputs
from healing.stages.launching import known_cells
from healing.stages.launching.chain import Chain, chains_of
from healing.stages.launching.known_cells import heal_key
from healing.stages.sweep import sweep
from healing.stages.tuning.healer_files import healers_of
from healing.tracking import queries
from healing.tracking.local_store import LocalStore

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def settings(output: pathlib.Path, **changes) -> SweepConfig:
    values = {"models": "nano", "arms": "random_tokens,gaussian_noise,haep", "seeds": "0",
              "attack_steps": 2, "healing_steps": 2, "batch_size": 2, "sequence_length": 64,
              "measurement_interval": 1, "workers": 1, "noise_match": "norm", "healer": "none",
              "output_dir": str(output), "verbosity": "quiet"}  # fmt: skip
    return SweepConfig(**(values | changes))


def runs() -> dict[tuple[str, str], list[str]]:
    """Stage and arm → ids of runs, newest first."""
    found: dict[tuple[str, str], list[str]] = {}
    client = MlflowClient()
    for run in client.search_runs([e.experiment_id for e in client.search_experiments()]):
        tags = run.data.tags
        if tags["stage"] in ("attack", "heal", "basin"):
            found.setdefault((tags["stage"], tags["arm"]), []).append(run.info.run_id)
    return found


@pytest.mark.slow
def test_what_is_finished_is_found_without_a_weight(store, monkeypatch):
    config = settings(store / "output", basin=True, arms="haep,gaussian_noise")
    first = sweep(config)
    before = runs()
    loaded, fetched = list[str](), list[str]()
    load, download = inputs.load_model, queries.download

    def loading(name, *args, **kwargs):
        loaded.append(name)
        return load(name, *args, **kwargs)

    def fetching(uri, folder=None):
        fetched.append(uri)
        return download(uri, folder)

    monkeypatch.setattr(inputs, "load_model", loading)
    monkeypatch.setattr(queries, "download", fetching)
    shutil.rmtree(store / "output")  # another machine, or a cleaned disk
    again = sweep(config)
    assert (loaded, runs()) == ([], before)
    assert [uri for uri in fetched if "checkpoints" in uri] == []
    assert {g.arm for g in again.groups} == {g.arm for g in first.groups}
    # A healing that is gone is done again, and what it refers to is fetched; nothing else is.
    ((lost,), (attack,)) = (before[stage, "gaussian_noise"] for stage in ("heal", "attack"))
    MlflowClient().delete_run(lost)
    sweep(config)
    after = runs()
    assert {k: v for k, v in after.items() if k[1] != "gaussian_noise"} == {
        k: v for k, v in before.items() if k[1] != "gaussian_noise"
    }
    assert after["attack", "gaussian_noise"] == [attack]
    (healed,) = after["heal", "gaussian_noise"]
    assert healed != lost
    client = MlflowClient()
    old, new = (client.get_run(run_id).data.tags for run_id in (lost, healed))
    assert (new["fingerprint"], new["cell_key"]) == (old["fingerprint"], old["cell_key"])


def the_chain(config: SweepConfig) -> Chain:
    return chains_of(config, {})[0]


def keys(chain: Chain) -> dict[str, str]:
    found = {cell.arm: heal_key(chain, cell) for cell in chain.cells}
    assert all(found.values())
    assert len(set(found.values())) == len(chain.cells)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"healing_lr": 2e-3},
        {"healing_steps": 3},
        {"batch_size": 3},
        {"sequence_length": 32},
        {"seeds": "1"},
        {"measurement_interval": 2},
        {"models": "micro"},
        {"corpus": "TEXT"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_decides_every_number_is_in_every_key(tmp_path, changes):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Some sentences of document {n}. " * 40 for n in range(300)))
    changes = {name: str(text) if v == "TEXT" else v for name, v in changes.items()}
    plain = keys(the_chain(settings(tmp_path)))
    changed = keys(the_chain(settings(tmp_path, **changes)))
    assert not set(plain.values()) & set(changed.values())


def test_what_decides_an_attack_is_in_the_keys_of_all_that_refer_to_it(tmp_path):
    plain = keys(the_chain(settings(tmp_path)))
    changed = keys(the_chain(settings(tmp_path, attack_steps=3)))
    assert {arm for arm in plain if plain[arm] != changed[arm]} == set(plain) - {"none"}
    draws = settings(tmp_path, control_draws=2)
    noises = [c for c in the_chain(draws).cells if c.arm == "gaussian_noise"]
    assert len({heal_key(the_chain(draws), cell) for cell in noises}) == len(noises) == 2


@pytest.mark.parametrize(
    ("changed", "arms", "refer"),
    [
        ("haep", "random_tokens,haep,gaussian_noise", {"haep", "gaussian_noise"}),
        ("random_tokens", "random_tokens,haep,ray", {"random_tokens", "ray"}),
        ("haep", "random_tokens,haep,ray", {"haep", "ray"}),
    ],
)
def test_what_decides_a_reference_is_in_the_keys_of_what_refers_to_it(
    tmp_path, monkeypatch, changed, arms, refer
):
    """Another attack of one arm alone: controls are matched to it, rays take its direction."""
    chain = the_chain(settings(tmp_path, arms=arms, ray_of="random_tokens", noise_match="auto"))
    plain, code = keys(chain), known_cells.attack_code
    monkeypatch.setattr(
        known_cells, "attack_code", lambda c: "other" if c.arm == changed else code(c)
    )
    found = keys(chain)
    assert {arm for arm in plain if plain[arm] != found[arm]} == refer


@pytest.mark.parametrize(
    ("changes", "arms"),
    [
        ({"sham": False}, {"random_tokens", "haep", "gaussian_noise"}),
        ({"noise_match": "loss"}, {"gaussian_noise"}),
        ({"tokenizer": "micro"}, {"none", "random_tokens", "haep", "gaussian_noise"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_decides_some_numbers_is_in_the_keys_of_these(tmp_path, changes, arms):
    plain = keys(the_chain(settings(tmp_path)))
    changed = keys(the_chain(settings(tmp_path, **changes)))
    assert {arm for arm in plain if arm in changed and plain[arm] != changed[arm]} == arms


def test_a_healer_is_in_the_keys(tmp_path):
    config = SweepConfig(models="nano", seeds="0", healer="none", output_dir=str(tmp_path))
    chain = the_chain(config)
    (own,) = chains_of(config, healers_of(replace(config, healer="nano"), LocalStore()))
    assert own.healer is not None
    plain, healed = keys(chain), keys(own)
    assert not set(plain.values()) & set(healed.values())
    # The same settings, of another search: the numbers are equal, what they say is not.
    found = replace(own.healer, seeds=(*own.healer.seeds, 99))
    assert found.digest != own.healer.digest
    assert not set(keys(replace(own, healer=found)).values()) & set(healed.values())


def test_what_decides_no_number_is_in_no_key(tmp_path):
    plain = keys(the_chain(settings(tmp_path)))
    same = settings(tmp_path / "elsewhere", seeds="0-3", workers=2, launcher="ray", retries=5,
                    verbosity="normal", cache_dir=str(tmp_path / "cache"))  # fmt: skip
    assert keys(the_chain(same)) == plain
    fewer = keys(the_chain(settings(tmp_path, arms="random_tokens")))
    assert fewer.items() <= plain.items()


def _weight(folder: pathlib.Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    next(iter(state.values())).view(-1)[0] += 1e-3
    save_file(state, path, {"format": "pt"})


def _tokenizer(folder: pathlib.Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text() + "\n")


def _touched(folder: pathlib.Path) -> None:
    for path in folder.iterdir():
        os.utime(path, (1, 1))


def _other_weights(folder: pathlib.Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"0" * 64)
    (folder / "training.log").write_text("step 1")


def _in_shards(folder: pathlib.Path) -> None:
    """The weights in a file of a subfolder, as an index may name it."""
    state = load_file(folder / "model.safetensors")
    (folder / "parts").mkdir()
    (folder / "model.safetensors").rename(folder / "parts/a.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "parts/a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_in_a_subfolder_count(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED_DIR / "nano", folder)
    _in_shards(folder)
    config = settings(tmp_path, models=str(folder), corpus="stdlib")
    first = keys(the_chain(config))
    path = folder / "parts/a.safetensors"
    state = load_file(path)
    next(iter(state.values())).view(-1)[0] += 1e-3
    save_file(state, path, {"format": "pt"})
    assert not set(keys(the_chain(config)).values()) & set(first.values())


@pytest.mark.parametrize(
    ("change", "differs"),
    [(_weight, True), (_tokenizer, True), (_touched, False), (_other_weights, False)],
)
def test_a_folder_counts_by_what_is_in_its_files(
    tmp_path, change: Callable[[pathlib.Path], None], differs: bool
):
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED_DIR / "nano", folder)
    config = settings(tmp_path, models=str(folder), corpus="stdlib")
    first = keys(the_chain(config))
    change(folder)
    assert (keys(the_chain(config)) != first) is differs
    before, moved = keys(the_chain(config)), tmp_path / "moved"
    folder.rename(moved)
    assert keys(the_chain(replace(config, models=str(moved)))) == before


def test_a_text_counts_by_what_it_says(tmp_path):
    found = []
    for word in ("document", "document", "other"):
        text = tmp_path / "text.txt"
        text.write_text("\n\n".join(f"Some sentences of {word} {n}. " * 40 for n in range(300)))
        inputs.cached_corpus.cache_clear()
        found.append(keys(the_chain(settings(tmp_path, corpus=str(text)))))
    assert found[0] == found[1]
    assert not set(found[1].values()) & set(found[2].values())


def test_other_code_has_other_keys(tmp_path, monkeypatch):
    chain = the_chain(settings(tmp_path))
    plain = keys(chain)
    monkeypatch.setattr(known_cells, "attack_code", lambda config: "other")
    attacked = keys(chain)
    assert {arm for arm in plain if plain[arm] != attacked[arm]} == set(plain) - {"none"}
    monkeypatch.setattr(known_cells, "heal_code", lambda config, *more: "other")
    assert not set(keys(chain).values()) & set(plain.values())


def test_where_something_is_wrong_there_is_no_key(tmp_path):
    missing = the_chain(settings(tmp_path, corpus=str(tmp_path / "missing.txt")))
    assert {heal_key(missing, cell) for cell in missing.cells} == {""}
