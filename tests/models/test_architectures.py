"""Other causal language models: tiny random GPT-2, Llama and Qwen2 go through everything alike."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import shutil

import click
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from entrypoints._cli import options_of
from healing.config.attack import AttackConfig
from healing.config.basin import BasinConfig
from healing.config.fingerprint import fingerprint
from healing.config.heal import HealConfig
from healing.config.presets import model_label, model_slug, probe_tokens_for
from healing.config.sweep import SweepConfig
from healing.curvature.subspaces import MatrixSubspace
from healing.errors import CheckpointError, ConfigError, ModelError
from healing.measurements.probe import Probe
from healing.models.blocks import (
    block_matrices,
    block_outputs,
    embedding_matrix,
    transformer_blocks,
)
from healing.models.checkpoints import (
    Checkpoint,
    cpu_state,
    load_state,
    read_checkpoint,
    save_checkpoint,
)
from healing.models.loading import load_model, state_digest
from healing.models.model_files import EMBEDDED_DIR, model_shape
from healing.stages.cells.attack import attack_cell
from healing.stages.cells.basin import resolve_from_checkpoint as resolve_basin
from healing.stages.cells.events import outcome_of
from healing.stages.cells.heal import attacked_settings, heal_cell, resolve_from_checkpoint
from healing.stages.cells.heal_outcome import HealCell
from healing.stages.cells.inputs import load_inputs, resolve_from_model
from healing.stages.cells.sweep_plan import plan
from healing.stages.launching.cell_configs import attack_config, heal_config

COMMON = {"vocab_size": 2060, "bos_token_id": 0, "eos_token_id": 0}  # 12 rows beyond the tokenizer
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "max_position_embeddings": 96}  # fmt: skip
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=3, n_head=4, n_positions=96, **COMMON
    ),
    "llama": lambda: transformers.LlamaConfig(num_key_value_heads=2, **SMALL, **COMMON),
    "qwen2": lambda: transformers.Qwen2Config(
        num_key_value_heads=2, tie_word_embeddings=True, **SMALL, **COMMON
    ),
}
MATRICES = {"gpt2": 4, "llama": 7, "qwen2": 7}
"""Weight matrices per block, counted by hand: qkv, output and two of the MLP; or q, k, v, o and
three."""
TIED = ("gpt2", "qwen2")


def make_folder(folder: pathlib.Path, config: transformers.PreTrainedConfig) -> pathlib.Path:
    """A model in transformers' format, weights in fp16, with nano's tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
    model.half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED_DIR / "nano" / name, folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_folder(root / name, make()) for name, make in CONFIGS.items()}


@pytest.fixture(params=list(CONFIGS))
def kind(request) -> str:
    return request.param


def small_attack(folder: pathlib.Path, **changes) -> AttackConfig:
    settings = {
        "corpus": "stdlib", "sequence_length": 48, "probe_tokens": 960, "attack_steps": 3,
        "batch_size": 2, "search_steps": 1, "search_candidates": 2, "baseline_draws": 3,
        "curvature_tokens": 96, "rayleigh_draws": 2, "measurement_interval": 2,
        "attack_lr": 1e-2, "hessian_directions": 2, "device": "cpu", "threads": 1,
    }  # fmt: skip
    return AttackConfig(model=str(folder), **settings | changes)


def test_weights_are_float32_and_whole(folders, kind):
    loaded = load_model(str(folders[kind]))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    bare = transformers.AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float16)
    for name, value in bare.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value.float())
    assert loaded.n_params == sum({id(p): p.numel() for p in bare.parameters()}.values())
    tied = loaded.model.get_output_embeddings().weight is embedding_matrix(loaded.model)
    assert tied == (kind in TIED)
    assert loaded.source == str(folders[kind])


def test_blocks_and_their_matrices(folders, kind):
    model = load_model(str(folders[kind])).model
    assert len(transformer_blocks(model)) == 3
    assert len(block_matrices(model)) == 3 * MATRICES[kind]
    left = {n for n, p in model.named_parameters() if p.ndim == 2} - set(block_matrices(model))
    assert all(any(w in n for w in ("embed", "wte", "wpe", "lm_head")) for n in left), left
    assert embedding_matrix(model).shape == (2060, 32)


def test_block_outputs_are_the_hidden_states_of_transformers(folders, kind):
    model = load_model(str(folders[kind])).model
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad(), block_outputs(model) as outputs:
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    # Its list starts with the embeddings, and its last entry is after the final norm.
    assert len(outputs) == 3 == len(states) - 1
    for own, theirs in zip(outputs[:-1], states[1:-1], strict=True):
        assert torch.equal(own, theirs)
    norm = model.transformer.ln_f if kind == "gpt2" else model.model.norm
    with torch.no_grad():
        torch.testing.assert_close(norm(outputs[-1]), states[-1])
    assert not torch.allclose(outputs[-1], states[-1])


@pytest.mark.slow
def test_attack_and_heal_end_to_end(folders, kind, tmp_path):
    attacked = outcome_of(attack_cell(resolve_from_model(small_attack(folders[kind]))))
    assert attacked.last.step > 0
    assert 0 < attacked.catalyst.alignment < 1
    assert math.isfinite(attacked.summary()["rayleigh_quotient"])
    assert attacked.collapsed.loss != attacked.healthy.loss
    path = tmp_path / "c.pt"
    made = dataclasses.asdict(attacked.config) | {"healthy_digest": attacked.loaded.digest}
    save_checkpoint(path, attacked.loaded.model, 3, "test", made)
    wanted = HealConfig(
        corpus="stdlib", sequence_length=48, probe_tokens=960, batch_size=2, healing_steps=4,
        measurement_interval=2, healing_lr=1e-3, device="cpu", threads=1,
    )  # fmt: skip
    config = resolve_from_checkpoint(wanted, read_checkpoint(path), path)
    assert config.model == str(folders[kind])
    healed = outcome_of(heal_cell(HealCell(config, str(path))))[0]
    assert healed.status == "ok"
    assert [r.step for r in healed.records] == [0, 2, 4]
    assert healed.records[0].measurement.loss == pytest.approx(attacked.collapsed.loss, rel=1e-6)
    assert healed.records[-1].measurement.loss < healed.records[0].measurement.loss
    again = outcome_of(heal_cell(HealCell(config, str(path))))[
        0
    ]  # no dropout: nothing is drawn but by name
    assert again.records[-1].measurement.loss == healed.records[-1].measurement.loss
    assert again.fingerprint == healed.fingerprint


WITHOUT_SDPA = {
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=96, **COMMON,
    ),
    "gptj": lambda: transformers.GPTJConfig(
        n_embd=32, n_layer=2, n_head=4, n_positions=96, rotary_dim=4, **COMMON
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        num_key_value_heads=2, head_dim=8, pad_token_id=0, **SMALL, **COMMON
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT_SDPA)
def test_architectures_without_sdpa_get_eager_attention(folders, tmp_path, name):
    folder = make_folder(tmp_path / name, WITHOUT_SDPA[name]())
    assert load_model(str(folder)).model.config._attn_implementation == "eager"
    assert load_model(str(folders["llama"])).model.config._attn_implementation == "sdpa"
    test_attack_and_heal_end_to_end({name: folder}, name, tmp_path)


def edit_weights(folder: pathlib.Path, change, name: str = "model.safetensors") -> pathlib.Path:
    """Stored weights, changed in place by a function of their dictionary."""
    state = load_file(folder / "model.safetensors")
    change(state)
    (folder / "model.safetensors").unlink()
    if name.endswith(".bin"):
        torch.save(state, folder / name)
    else:
        save_file(state, folder / name, {"format": "pt"})
    return folder


def test_masks_that_old_files_store_are_no_weights(tmp_path):
    folder = make_folder(tmp_path / "old", WITHOUT_SDPA["gpt_neo"]())
    digest = load_model(str(folder)).digest

    def add(state: dict[str, torch.Tensor]) -> None:
        for i in range(2):
            place = f"transformer.h.{i}.attn.attention."
            state[place + "bias"] = torch.ones(1, 1, 96, 96, dtype=torch.uint8).tril()
            state[place + "masked_bias"] = torch.tensor(-1e9)

    assert load_model(str(edit_weights(folder, add))).digest == digest


def test_a_file_like_those_of_early_pythia(tmp_path):
    config = transformers.GPTNeoXConfig(
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0,
                         "partial_rotary_factor": 0.25}, **SMALL, **COMMON,
    )  # fmt: skip
    folder = make_folder(tmp_path / "pythia", config)
    new = load_model(str(folder))
    stored = load_file(folder / "model.safetensors")

    def add(state: dict[str, torch.Tensor]) -> None:
        for i in range(3):
            place = f"gpt_neox.layers.{i}.attention."
            state[place + "bias"] = torch.ones(1, 1, 96, 96, dtype=torch.bool).tril()
            state[place + "masked_bias"] = torch.tensor(-1e9)
            state[place + "rotary_emb.inv_freq"] = torch.rand(1)

    edit_weights(folder, add, "pytorch_model.bin")
    written = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "dtype"):
        del written[key]
    written |= {"rotary_pct": 0.25, "rotary_emb_base": 10_000, "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(written))
    old = load_model(str(folder))
    assert {v.dtype for v in stored.values()} == {torch.float16}
    assert_float32_and_equal(old, stored)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():  # the rotary settings are of the configuration, not of the weights
        assert torch.equal(old.model(input_ids=ids).logits, new.model(input_ids=ids).logits)


def assert_float32_and_equal(loaded, stored: dict[str, torch.Tensor]) -> None:
    own = loaded.model.state_dict()
    assert {v.dtype for v in own.values()} == {torch.float32}
    for name, value in stored.items():
        # GPT-NeoX's files have another name for what transformers calls lm_head.
        assert torch.equal(own[name.replace("embed_out", "lm_head")], value.float()), name


def test_bfloat16_files_become_float32(folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "bf16")
    edit_weights(folder, lambda s: s.update({k: v.bfloat16() for k, v in s.items()}))
    assert_float32_and_equal(load_model(str(folder)), load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("deviation", [0.02, 0.2])
@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_encoders_are_refused(tmp_path, kind, deviation):
    config = getattr(transformers, f"{kind}Config")(vocab_size=2060, **SMALL)
    folder = make_folder(tmp_path / "encoder", config)
    scale = deviation / 0.2  # make_folder's
    edit_weights(folder, lambda s: [v.mul_(scale) for v in s.values() if v.ndim == 2])
    with pytest.raises(ModelError, match=r"its logits depend on later tokens\): name a causal"):
        load_model(str(folder))


def test_mixtures_of_experts_are_refused(tmp_path):
    config = transformers.MixtralConfig(
        num_key_value_heads=2, num_local_experts=4, **SMALL, **COMMON
    )
    folder = make_folder(tmp_path / "mixture", config)
    with pytest.raises(ModelError, match=r"\d\d % of its blocks are not two-dim.*a dense model"):
        load_model(str(folder))


def test_a_configuration_with_fewer_layers_than_the_weights(folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "short")
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"num_hidden_layers": 2}))
    with pytest.raises(ModelError, match=r"no place for 9 of its tensors, first model\.layers\.2"):
        load_model(str(folder))


@pytest.mark.parametrize("kind", ["GPT2", "GPTNeoX", "Llama", "Qwen2", "Gemma", "PreTrained", ""])
def test_a_folder_without_a_tokenizer(folders, tmp_path, kind):
    folder = shutil.copytree(folders["llama"], tmp_path / "speechless")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    if kind:
        name = kind + ("TokenizerFast" if kind == "PreTrained" else "Tokenizer")
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    with pytest.raises(ModelError, match=r"it has no tokenizer: none of tokenizer\.json") as caught:
        load_model(str(folder))
    assert len(str(caught.value).splitlines()) == 1


def test_a_tokenizer_that_reads_bytes_needs_no_vocabulary(folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "bytes")
    (folder / "tokenizer.json").unlink()
    written = json.dumps({"tokenizer_class": "ByT5Tokenizer"})
    (folder / "tokenizer_config.json").write_text(written)
    loaded = load_model(str(folder))
    assert loaded.tokenizer("ab", add_special_tokens=False)["input_ids"] == [100, 101]


def test_ids_that_text_gives_are_what_must_fit(folders, tmp_path):
    """Gemma 3 has a special token for images beyond its embeddings; other ids have gaps."""
    folder = shutil.copytree(folders["llama"], tmp_path / "beyond")
    words = json.loads((folder / "tokenizer.json").read_text())
    image = {"id": 2060, "content": "<image>", "special": True, "single_word": False,
             "lstrip": False, "rstrip": False, "normalized": False}  # fmt: skip
    words["added_tokens"].append(image)
    # The library numbers added tokens on from the vocabulary, so that this one lies at its end.
    words["model"]["vocab"]["<image>"] = 2060
    (folder / "tokenizer.json").write_text(json.dumps(words))
    loaded = load_model(str(folder))
    assert loaded.tokenizer.convert_tokens_to_ids("<image>") == 2060
    assert len(embedding_matrix(loaded.model)) == 2060
    words["added_tokens"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(
        ModelError, match="gives ids up to 2060, its embedding matrix has 2060 rows"
    ):
        load_model(str(folder))  # fewer tokens than rows, but with a gap


@pytest.mark.parametrize("arm", ["haep_oracle", "spectral", "gaussian_noise", "random_tokens"])
def test_every_arm_attacks_convolution_style_matrices(folders, arm):
    outcome = outcome_of(attack_cell(resolve_from_model(small_attack(folders["gpt2"], arm=arm))))
    assert outcome.status == "ok"
    assert outcome.last.weight_change > 0


def test_hessian_subspace_of_grouped_queries_and_tied_embeddings(folders):
    outcome = outcome_of(
        attack_cell(resolve_from_model(small_attack(folders["qwen2"], subspace="hessian")))
    )
    assert outcome.preparation.solver_statuses["hessian_status"]
    assert 0 < outcome.catalyst.alignment <= 1


def test_the_projection_commutes_with_transposition():
    """GPT-2 stores (in, out) where others store (out, in): N is the same."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 7, generator=generator, dtype=torch.float64)
    gradient = torch.randn(12, 7, generator=generator, dtype=torch.float64)
    one, other = MatrixSubspace.of(weight, 0.6), MatrixSubspace.of(weight.T, 0.6)
    torch.testing.assert_close(one.project(gradient), other.project(gradient.T).T)
    assert one.dimension == other.dimension


def test_tied_weights_are_stored_once_and_load_strictly(folders, tmp_path):
    loaded = load_model(str(folders["gpt2"]))
    path = tmp_path / "c.pt"
    save_checkpoint(path, loaded.model, 0, "", {"model": str(folders["gpt2"])})
    size = 4 * sum(p.numel() for p in loaded.model.parameters())
    assert path.stat().st_size < size + 40_000  # names and headers; the embeddings are 264 kB
    checkpoint = read_checkpoint(path)
    digest = state_digest(checkpoint.state)
    assert digest == loaded.digest
    with torch.no_grad():
        embedding_matrix(loaded.model).add_(1.0)
    load_state(loaded, checkpoint, path)
    assert state_digest(loaded.model.state_dict()) == digest
    checkpoint.state["lm_head.weight"] = checkpoint.state["lm_head.weight"] + 1
    with pytest.raises(CheckpointError, match=r"wte\.weight and lm_head\.weight are tied in the"):
        load_state(loaded, checkpoint, path)
    assert cpu_state(loaded.model).keys() == checkpoint.state.keys()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_dropout_is_off_in_training_mode(folders, tmp_path, name):
    folder = shutil.copytree(folders[name], tmp_path / name)
    stored = json.loads((folder / "config.json").read_text())
    if name == "gpt2":  # modules
        assert stored["resid_pdrop"] == stored["attn_pdrop"] == stored["embd_pdrop"] == 0.1
    else:  # a number that the attention reads
        (folder / "config.json").write_text(json.dumps(stored | {"attention_dropout": 0.5}))
    model = load_model(str(folder)).model.train()
    ids = torch.arange(40).view(2, 20)
    state = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        assert torch.equal(model(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn


def test_sizes_come_from_the_models_own_configuration(folders, kind):
    settled = resolve_from_model(AttackConfig(model=str(folders[kind]), sequence_length=64))
    shape = model_shape(str(folders[kind]))
    assert (shape.hidden_size, shape.max_positions) == (32, 96)
    assert settled.probe_tokens == 4096
    assert (settled.corpus, settled.attack_lr, settled.threads) == ("pile", 1e-3, 0)
    assert settled.revision == ""


def test_wide_models_get_four_rows_per_dimension():
    for hidden, length in ((2048, 128), (4096, 128), (5000, 64), (100, 100)):
        tokens = probe_tokens_for(hidden, length)
        assert tokens % length == 0
        assert tokens // length * (length - 1) >= 4 * hidden
    assert probe_tokens_for(2048, 128) == 65 * 128
    assert probe_tokens_for(1100, 128) == 35 * 128
    assert probe_tokens_for(576, 128) == probe_tokens_for(100, 100) - 4 == 4096


def test_windows_longer_than_the_model_can_read(folders):
    with pytest.raises(ConfigError, match=r"--sequence-length 128 is more than the 96 positions"):
        resolve_from_model(HealConfig(model=str(folders["gpt2"])))
    with pytest.raises(ConfigError, match=r"--catalyst-length 97 is more than the 96 positions"):
        resolve_from_model(
            AttackConfig(model=str(folders["llama"]), sequence_length=64, catalyst_length=97)
        )


def test_same_model_elsewhere_is_the_same_experiment(folders, tmp_path):
    copy = shutil.copytree(folders["llama"], tmp_path / "copy")
    one, other = load_model(str(folders["llama"])), load_model(str(copy))
    assert one.identity == other.identity
    configs = [resolve_from_model(small_attack(f)) for f in (folders["llama"], copy)]
    assert fingerprint(configs[0]) == fingerprint(configs[1])
    assert len({model_slug(c.label) for c in configs}) == 2
    text = (copy / "config.json").read_text()
    changed = json.loads(text) | {"rms_norm_eps": 1e-3}
    (copy / "config.json").write_text(json.dumps(changed))
    assert load_model(str(copy)).identity != one.identity  # same weights, another architecture
    (copy / "config.json").write_text(text)
    words = json.loads((copy / "tokenizer.json").read_text())
    vocab = words["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (copy / "tokenizer.json").write_text(json.dumps(words))
    assert load_model(str(copy)).identity != one.identity  # same weights, another tokenizer
    assert load_model(str(copy)).digest == one.digest


def test_checkpoint_of_a_folder_that_moved(folders, tmp_path):
    moved = shutil.copytree(folders["llama"], tmp_path / "moved")
    path = tmp_path / "c.pt"
    loaded = load_model(str(moved))
    save_checkpoint(path, loaded.model, 0, "", {"model": "/gone/llama"})
    base = HealConfig(sequence_length=48)
    with pytest.raises(ConfigError, match="no folder /gone/llama here"):
        resolve_from_checkpoint(base, read_checkpoint(path), path)
    named = dataclasses.replace(base, model=str(moved))
    assert resolve_from_checkpoint(named, read_checkpoint(path), path).model == str(moved)


def test_weights_that_lack_tensors_are_not_filled_with_noise(folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "holes")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors, first model\.layers\.1\.mlp\.up_proj"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 100}, r"could not be loaded.*holed"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "weights are quantized"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}},
            "needs Python code of its own, which is never run",
        ),
        ({"model_type": "unheard"}, r"could not be loaded.*unheard"),
        ({"model_type": "t5"}, r"could not be loaded"),
    ],
)
def test_models_that_cannot_be_loaded_say_why(folders, tmp_path, change, message):
    folder = shutil.copytree(folders["llama"], tmp_path / "holed")
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | change))
    (folder / "c.py").write_text("open('code-was-run', 'w')")
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(folder))
    assert "trust_remote_code" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not pathlib.Path("code-was-run").exists()


def test_damaged_and_missing_files(folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "broken")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"could not be loaded from .*broken"):
        load_model(str(folder))
    weights.unlink()
    with pytest.raises(ModelError, match=r"could not be loaded.*model\.safetensors"):
        load_model(str(folder))
    shutil.copy(folders["llama"] / "model.safetensors", folder)
    load_model(str(folder))
    words = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(words.replace('"Ġthe"', '"Ġhte"'))
    with pytest.raises(ModelError, match=r"could not be loaded.*out of vocabulary"):
        load_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"could not be loaded"):
        load_model(str(folder))


def test_tokenizer_that_does_not_fit(folders, tmp_path):
    config = CONFIGS["gpt2"]()
    config.vocab_size = 2000
    folder = make_folder(tmp_path / "short", config)
    with pytest.raises(ModelError, match="ids up to 2047, its embedding matrix has 2000 rows"):
        load_model(str(folder))


def test_tokenizer_without_end_of_text(folders, tmp_path, corpus):
    folder = shutil.copytree(folders["llama"], tmp_path / "endless")
    stored = json.loads((folder / "tokenizer_config.json").read_text())
    stored = {k: v for k, v in stored.items() if k not in ("eos_token", "bos_token", "pad_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(stored))
    loaded = load_model(str(folder))
    assert loaded.tokenizer.eos_token_id is None
    windows = corpus.windows("probe", loaded.tokenizer, 48, 480)
    first = loaded.tokenizer(corpus.documents["probe"][0])["input_ids"]
    assert windows.flatten().tolist()[: min(480, len(first))] == first[:480]
    assert math.isfinite(Probe(windows).loss(loaded.model))


class Evil:
    """Would run code when unpickled."""

    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path("evil-was-here"),))


def test_pickled_weights_load_and_run_no_code(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(folders["llama"], tmp_path / "pickled")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert load_model(str(folder)).digest == load_model(str(folders["llama"])).digest
    torch.save(state | {"evil": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(str(folder))
    assert not (tmp_path / "evil-was-here").exists()


def test_labels_and_slugs_are_readable_and_apart(folders):
    assert model_label("70m", "main") == "70m"
    assert model_label("70m", "step1000", True) == "70m-deduped@step1000"
    assert model_slug("70m-deduped@step1000") == "70m-deduped@step1000"
    assert model_slug("Qwen/Qwen2-0.5B") == "Qwen--Qwen2-0.5B"
    label = model_label("/data/my model/")
    assert label.startswith("folder-") or label.startswith("my-model-")
    assert label != model_label("/data/my-model")
    branches = [model_slug(model_label("a/b", r)) for r in ("x/y", "x-y", "x y")]
    assert len(set(branches)) == 3
    assert all("/" not in b and " " not in b for b in branches)


def test_embedded_models_have_their_identity():
    loaded = load_model("nano")
    assert (loaded.name, loaded.source, loaded.commit) == ("nano", "embedded", "")
    assert loaded.tags == {"model_source": "embedded"}
    assert loaded.identity == load_model("nano").identity != load_model("micro").identity


def test_inputs_of_a_folder(folders):
    config = resolve_from_model(small_attack(folders["qwen2"]))
    _, loaded, probe = load_inputs(config)
    assert probe.windows.shape == (20, 48)
    assert loaded.name == config.label
    assert math.isfinite(probe.measure(loaded.model).effective_rank)


def checkpoint_of(**made: object) -> Checkpoint:
    return Checkpoint(0, {}, "", dict(made))


def test_a_checkpoint_brings_its_model_revision_and_training_set():
    made = checkpoint_of(model="70m", revision="step1000", deduped=True)
    config = resolve_from_checkpoint(HealConfig(), made, "c.pt")
    assert config.label == "70m-deduped@step1000"
    same = HealConfig(model="70m", revision="step1000", deduped=True)
    assert resolve_from_checkpoint(same, made, "c.pt").label == config.label
    older = checkpoint_of(model="70m")  # written before revisions were recorded
    assert resolve_from_checkpoint(HealConfig(revision="main"), older, "c.pt").revision == "main"
    assert resolve_from_checkpoint(
        HealConfig(model="160m", revision="step1"), checkpoint_of(), "c"
    ).label == ("160m@step1")


def test_the_commit_of_a_checkpoint_is_what_its_revision_means(monkeypatch):
    pinned = {}
    monkeypatch.setattr("healing.data.hub._PINNED", pinned)
    commit = "c" * 40
    made = checkpoint_of(model="70m", revision="main", model_commit=commit)
    for revision in ("", "main", commit):
        pinned.clear()
        config = resolve_from_checkpoint(HealConfig(revision=revision), made, "c.pt")
        assert (config.revision, config.label) == ("main", "70m")  # pooled with the others of main
        assert pinned == {("EleutherAI/pythia-70m", "main"): commit}
    with pytest.raises(CheckpointError, match=f"of revision main of .* says {'d' * 40}"):
        resolve_from_checkpoint(HealConfig(revision="d" * 40), made, "c.pt")
    pinned.clear()
    for older in (checkpoint_of(model="70m"), checkpoint_of(model="nano", model_commit="")):
        resolve_from_checkpoint(HealConfig(), older, "c.pt")
    assert not pinned
    one, other = (checkpoint_of(model="70m", model_commit=c * 40) for c in "ab")
    assert attacked_settings(one) == attacked_settings(other)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (HealConfig(model="160m"), "checkpoint of model 70m, --model says 160m: leave --model out"),
        (HealConfig(revision="step2"), "of revision step1 of model 70m, --revision says step2"),
        (HealConfig(revision="main"), "of revision step1 of model 70m, --revision says main"),
        (HealConfig(deduped=True), "of model 70m without --deduped: leave --deduped out"),
        (HealConfig(model="own/other"), "checkpoint of model 70m, --model says own/other"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused(wanted, message):
    with pytest.raises(CheckpointError, match=message):
        resolve_from_checkpoint(wanted, checkpoint_of(model="70m", revision="step1"), "c.pt")


def test_the_landscape_takes_the_model_from_its_checkpoint():
    made = checkpoint_of(model="70m", revision="step1", deduped=True, sequence_length=64)
    settled = resolve_basin(BasinConfig(), made, "h.pt")
    assert (settled.label, settled.sequence_length) == ("70m-deduped@step1", 64)
    assert resolve_basin(settled, made, "h.pt") == settled
    with pytest.raises(CheckpointError, match="--revision says step4"):
        resolve_basin(BasinConfig(revision="step4"), made, "h.pt")


def test_a_sweep_takes_any_model_at_one_revision(folders):
    names = f"nano,{folders['llama']}"
    chains = plan(SweepConfig(models=names, arms="haep", seeds="0", sham=False))
    assert [chain[0].model for chain in chains] == [str(folders["llama"]), "nano"]
    sweep = SweepConfig(models="70m,160m", revision="step512", deduped=True, arms="haep", seeds="0")
    cells = [cell for chain in plan(sweep) for cell in chain]
    assert {cell.label for cell in cells} == {"70m-deduped@step512", "160m-deduped@step512"}
    attack = attack_config(sweep, cells[0], "")
    assert attack.label == heal_config(sweep, cells[0]).label == cells[0].label
    with pytest.raises(ConfigError, match="--model nano is embedded: leave --revision out"):
        SweepConfig(models="nano,70m", revision="step1")
    with pytest.raises(ConfigError, match="--models names one folder twice"):
        SweepConfig(models=f"{folders['llama']},{folders['llama']}/")


def test_a_switch_needs_no_value():
    @click.command()
    @options_of(AttackConfig)
    def command(**values: object) -> None:
        click.echo(f"{values['deduped']} {values['model']}")

    def shown(*arguments: str) -> str:
        return CliRunner().invoke(command, arguments).output.strip()

    assert shown("--deduped", "--model", "70m") == "True 70m"
    assert shown("--model", "70m", "--deduped") == "True 70m"
    assert shown("--deduped", "false", "--model", "1b") == "False 1b"
