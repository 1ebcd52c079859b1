"""Embedded models are real; checkpoints are safe, strict and whole."""

from __future__ import annotations

import json
import math
import pathlib
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from healing.attacks.weight_change import WeightChange
from healing.errors import CheckpointError, ConfigError, ModelError
from healing.measurements.probe import Probe
from healing.measurements.unigram import unigram_perplexity
from healing.models.blocks import block_matrices, transformer_blocks
from healing.models.checkpoints import (
    load_state,
    read_checkpoint,
    save_checkpoint,
    weight_distance,
)
from healing.models.loading import load_model, resolve_device, state_digest
from healing.models.model_files import EMBEDDED_DIR
from healing.training.pretraining import heldout_loss
from tests.measurements.test_probe import hand_written_loss


@pytest.fixture(scope="module")
def heldout_perplexity(corpus) -> dict[str, tuple[float, float, int]]:
    """Model → (perplexity, unigram perplexity, parameters), measured here and now."""
    found = {}
    for name in ("nano", "micro"):
        loaded = load_model(name, "cpu")
        held = corpus.windows("probe", loaded.tokenizer, 128, 8192)
        train = corpus.windows("train", loaded.tokenizer, 128)
        unigram = unigram_perplexity(train, held, len(loaded.tokenizer))
        perplexity = Probe(held).measure(loaded.model).perplexity
        found[name] = (perplexity, unigram, loaded.n_params)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nano", "micro"])
def test_embedded_model_is_under_a_third_of_the_unigram_perplexity(heldout_perplexity, name):
    perplexity, unigram, _ = heldout_perplexity[name]
    assert perplexity < unigram / 3


def test_micro_is_clearly_better_than_nano(heldout_perplexity):
    assert heldout_perplexity["micro"][0] < 0.8 * heldout_perplexity["nano"][0]


@pytest.mark.parametrize(("name", "millions"), [("nano", 0.3), ("micro", 1.3)])
def test_embedded_sizes_and_training_budget(name, millions):
    loaded = load_model(name, "cpu")
    record = json.loads((EMBEDDED_DIR / name / "training_record.json").read_text())
    assert loaded.n_params == record["n_params"]
    assert loaded.n_params / 1e6 == pytest.approx(millions, rel=0.1)
    assert record["training_tokens"] >= 20 * loaded.n_params
    assert len(loaded.tokenizer) == 2048
    assert loaded.model.config.model_type == "gpt_neox"


def test_embedded_files_are_small_and_half_precision():
    files = [p for p in EMBEDDED_DIR.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 6_000_000
    for name in ("nano", "micro"):
        assert json.loads((EMBEDDED_DIR / name / "config.json").read_text())["dtype"] == "float16"
        assert (EMBEDDED_DIR / name / "loss_curve.png").is_file()


def test_weights_are_float32_in_memory(nano):
    assert all(p.dtype == torch.float32 for p in nano.model.parameters())
    assert not nano.model.training


def test_unigram_perplexity_by_hand():
    train = torch.tensor([[0, 0, 0, 1]])
    held = torch.tensor([[1, 0, 1]])  # targets 0 and 1; counts + 1: 4 and 2, over 4 + 3
    expected = math.exp(-(math.log(4 / 7) + math.log(2 / 7)) / 2)
    assert unigram_perplexity(train, held, vocab_size=3) == pytest.approx(expected)
    # Token 2 begins every window and is no text: the same counts, whether it is there or not.
    begun = torch.tensor([[2, 0, 0], [2, 0, 1]])
    assert unigram_perplexity(begun, held, vocab_size=3, opening=1) == pytest.approx(expected)
    assert unigram_perplexity(begun, held, vocab_size=3) > 1.1 * expected


def test_heldout_loss_is_hand_written_cross_entropy(nano, probe):
    windows = probe.windows[:5]
    expected = hand_written_loss(nano.model, windows)
    assert heldout_loss(nano.model, windows, batch_size=2) == pytest.approx(expected, rel=1e-5)


def test_block_matrices_leave_embeddings_out(nano):
    matrices = block_matrices(nano.model)
    assert len(transformer_blocks(nano.model)) == 4
    # Four matrices per GPT-NeoX block: qkv, attention output, and the two of the MLP.
    assert len(matrices) == 16
    assert not any("embed" in name for name in matrices)


def test_unknown_model_names_the_choices():
    with pytest.raises(ConfigError, match=r"unknown model 'giga'.*nano, micro, 70m"):
        load_model("giga")


def test_unreachable_hub_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"is not in the cache.*OFFLINE.*--model nano or micro"):
        load_model("70m")


def test_model_without_blocks_is_an_error():
    with pytest.raises(ModelError, match="no list of transformer blocks"):
        transformer_blocks(torch.nn.Linear(2, 2))


def test_unusable_device_is_named():
    with pytest.raises(ModelError, match="--device warp cannot be used here"):
        resolve_device("warp")
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(ModelError, match=r"mps cannot be used here .*float64.*: try cpu"):
        resolve_device("mps")


def write(path: pathlib.Path, loaded, config=None) -> pathlib.Path:
    save_checkpoint(path, loaded.model, 7, "a test", config if config is not None else {})
    return path


def test_checkpoint_round_trip_is_bitwise(tmp_path, nano):
    path = write(tmp_path / "c.pt", nano, {"model": "nano", "seed": 3})
    raw = torch.load(path, weights_only=True)
    assert set(raw) == {
        "step",
        "model_state_dict",
        "checkpoint_type",
        "description",
        "config",
        "digests",
    }
    digest = state_digest(nano.model.state_dict())
    with torch.no_grad():
        next(nano.model.parameters()).add_(1.0)
    checkpoint = read_checkpoint(path)
    load_state(nano, checkpoint, path)
    assert state_digest(nano.model.state_dict()) == digest
    assert (checkpoint.step, checkpoint.model_name) == (7, "nano")
    assert not list(tmp_path.glob("*.partial"))


def test_predecessor_checkpoint_without_config_and_in_half_precision(tmp_path, nano):
    state = {k: v.half() for k, v in nano.model.state_dict().items()}
    path = tmp_path / "old.pt"
    torch.save(
        {
            "step": 100,
            "model_state_dict": state,
            "checkpoint_type": "post_treatment",
            "description": "",
        },
        path,
    )
    checkpoint = read_checkpoint(path)
    assert checkpoint.model_name is None
    load_state(nano, checkpoint, path)
    assert next(nano.model.parameters()).dtype == torch.float32


def test_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "none.pt")


def test_truncated_checkpoint(tmp_path, nano):
    path = write(tmp_path / "c.pt", nano)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="damaged, truncated or not a torch checkpoint"):
        read_checkpoint(path)


class Evil:
    """Would run code when unpickled."""

    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path("evil-was-here"),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_checkpoint_with_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"step": 0, "model_state_dict": Evil()}, tmp_path / "e.pt")
    with pytest.raises(CheckpointError, match="objects other than tensors"):
        read_checkpoint(tmp_path / "e.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "raw.pt")
    assert not (tmp_path / "evil-was-here").exists()


def test_checkpoint_without_its_entries(tmp_path):
    torch.save({"step": 1}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="lacks model_state_dict, checkpoint_type"):
        read_checkpoint(tmp_path / "c.pt")
    for broken in ({"step": None}, {"step": True}, {"step": -1}, {"config": "abc"}):
        whole = {"step": 1, "model_state_dict": {}, "checkpoint_type": "x", "description": ""}
        torch.save(whole | broken, tmp_path / "e.pt")
        with pytest.raises(CheckpointError, match="step is not a number or config"):
            read_checkpoint(tmp_path / "e.pt")
    entries = {"step": 1, "model_state_dict": [1], "checkpoint_type": "x", "description": ""}
    torch.save(entries, tmp_path / "d.pt")
    with pytest.raises(CheckpointError, match="not a mapping of names to tensors"):
        read_checkpoint(tmp_path / "d.pt")


def test_loading_is_strict(tmp_path, nano):
    path = write(tmp_path / "c.pt", nano)
    checkpoint = read_checkpoint(path)
    digest = state_digest(nano.model.state_dict())
    name = next(iter(checkpoint.state))
    checkpoint.state["stranger"] = torch.zeros(1)
    dropped = checkpoint.state.pop(name)
    with pytest.raises(CheckpointError, match=r"1 tensors missing.*1 unexpected, first stranger"):
        load_state(nano, checkpoint, path)
    del checkpoint.state["stranger"]
    checkpoint.state[name] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match=r"1 of another shape.*\(3, 3\) for"):
        load_state(nano, checkpoint, path)
    assert state_digest(nano.model.state_dict()) == digest, dropped.shape


def test_micro_checkpoint_is_not_a_nano(tmp_path, nano):
    path = write(tmp_path / "c.pt", load_model("micro"))
    with pytest.raises(CheckpointError, match="not a checkpoint of model nano"):
        load_state(nano, read_checkpoint(path), path)


def test_a_checkpoint_without_its_tensors_keeps_its_digest(nano, tmp_path):
    path = tmp_path / "checkpoint_post_treatment.pt"
    save_checkpoint(path, nano.model, 3, "text", {"model": "nano"})
    checkpoint = read_checkpoint(path)
    assert checkpoint.digest == state_digest(nano.model.state_dict()) == nano.digest
    light = checkpoint.without_tensors()
    assert (light.state, light.digest, light.step) == ({}, nano.digest, 3)
    assert light.without_tensors().digest == nano.digest


def test_a_checkpoint_is_mapped_until_its_tensors_are_used(nano, tmp_path):
    """Reading its configuration alone must not cost the memory of its weights."""
    path = tmp_path / "checkpoint_post_treatment.pt"
    big = torch.nn.Linear(2000, 10_000, bias=False)  # 80 MB
    save_checkpoint(path, big, 0, "text", {})

    def resident() -> int:
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    checkpoint = read_checkpoint(path)
    assert resident() - before < 20e6
    assert torch.equal(checkpoint.state["weight"], big.weight)
    assert resident() - before > 60e6  # the measure can see them


def test_models_are_loaded_one_at_a_time(monkeypatch):
    """transformers patches a class of its own while it loads, which two threads would leave so."""
    load, busy, most = AutoModelForCausalLM.from_pretrained, [], []

    def counted(*args, **options):
        busy.append(1)
        most.append(len(busy))
        time.sleep(0.05)
        try:
            return load(*args, **options)
        finally:
            busy.pop()

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    before = PreTrainedModel.tie_weights
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(load_model, ["nano"] * 3))
    assert most == [1, 1, 1]
    assert PreTrainedModel.tie_weights is before


def test_weight_distance_is_that_of_an_attack(nano):
    """Against the one that attacks report, which holds a copy of all weights."""
    healthy = WeightChange(nano.model)
    untouched = {name: t.clone() for name, t in nano.model.state_dict().items()}
    assert weight_distance(nano.model, untouched) == 0.0
    moved = {n: t + 0.01 * torch.ones_like(t) for n, t in untouched.items()}
    expected = weight_distance(nano.model, moved)
    nano.model.load_state_dict(moved)
    assert expected == pytest.approx(healthy.relative(nano.model), rel=1e-6)
    del moved["gpt_neox.embed_in.weight"]
    assert math.isnan(weight_distance(nano.model, moved))
