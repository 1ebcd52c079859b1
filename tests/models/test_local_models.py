"""Models as people have them: each kind that is taken, and each that is refused in one line."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from healing.errors import ConfigError, ModelError
from healing.models.architectures import architecture
from healing.models.blocks import block_matrices
from healing.models.checkpoints import load_state, read_checkpoint, save_checkpoint
from healing.models.gguf_files import read_once
from healing.models.loading import load_model
from healing.models.model_files import EMBEDDED_DIR, model_shape
from healing.progress import listening
from tests.models.gguf_files import TOKENIZER, give_tokenizer, small_llama, write_gguf


def weights(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


# ---- GGUF


def dequantized(value: torch.Tensor) -> torch.Tensor:
    """Q4_1 by its definition: blocks of 32 numbers, 16 levels from the smallest to the largest,
    offset and distance in float16.
    """
    blocks = value.reshape(-1, 32)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    step = (high - low) / 15
    level = ((blocks - low) / step).add(0.5).floor().clamp(0, 15)
    return (level * step.half().float() + low.half().float()).reshape(value.shape)


def test_a_gguf_file_is_its_model_in_float32(gguf_path, caplog):
    with caplog.at_level(logging.WARNING):
        loaded = load_model(str(gguf_path))
    assert "its Q4_1 numbers were made float32" in caplog.text
    assert loaded.tags["dequantized_from"] == "Q4_1"
    assert loaded.tags["model_source"] == str(gguf_path)
    original = small_llama()
    state = loaded.model.state_dict()
    for name, value in original.state_dict().items():
        expected = dequantized(value) if value.ndim == 2 else value
        # Rounding at the edge between two levels may go either way: a level is 1/15 of the range.
        off = (state[name] - expected).abs() > 1e-6
        assert off.float().mean() < 1e-3, name
        assert state[name].dtype == torch.float32
        assert (state[name] - value).abs().max() < 0.012  # half a level of about 5 σ = 0.1
    windows = torch.arange(64).view(2, 32) * 7
    original.load_state_dict(state)
    found, expected = (m(input_ids=windows).logits for m in (loaded.model, original.eval()))
    assert torch.allclose(found, expected, atol=1e-5)  # rotation, heads and norms are the same
    nano = load_model("nano").tokenizer
    text = "def f(x):\n    return naïve[x] + 1  # end"
    assert loaded.tokenizer(text)["input_ids"] == nano(text)["input_ids"]
    assert loaded.tokenizer.eos_token_id == 0
    assert len(block_matrices(loaded.model)) == 14


def test_a_gguf_model_can_be_saved_and_is_like_any_other(gguf_path, tmp_path):
    loaded = load_model(str(gguf_path))
    assert getattr(loaded.model.config, "quantization_config", None) is None
    assert not getattr(loaded.model, "is_quantized", False)
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"))
    assert again.digest == loaded.digest
    path = tmp_path / "checkpoint_post_treatment.pt"
    save_checkpoint(path, loaded.model, 1, "text", {"model": str(gguf_path)})
    load_state(again, read_checkpoint(path), path)
    assert model_shape(str(gguf_path)).hidden_size == 64
    assert architecture(str(gguf_path)).num_hidden_layers == 2


def test_a_gguf_header_is_parsed_once_and_the_readers_bar_is_a_phase(gguf_path, monkeypatch, capfd):
    import gguf
    from transformers import modeling_gguf_pytorch_utils

    own = gguf.GGUFReader, gguf.get_tensor_name_map, modeling_gguf_pytorch_utils.tqdm
    parsed, told = [], []
    fields = gguf.GGUFReader._build_fields
    monkeypatch.setattr(
        gguf.GGUFReader, "_build_fields", lambda *a: (parsed.append(1), fields(*a))[1]
    )
    with listening(lambda name, done, total, note="": told.append((name, done, total))):
        load_model(str(gguf_path))
    assert len(parsed) == 1
    tensors = len(small_llama().state_dict())
    assert [t for t in told if t[0] == "dequantizing"] == [
        ("dequantizing", i, tensors) for i in range(tensors)
    ]
    assert "GGUF tensors" not in capfd.readouterr().err
    with read_once():
        assert gguf.GGUFReader is not own[0]
    assert own == (gguf.GGUFReader, gguf.get_tensor_name_map, modeling_gguf_pytorch_utils.tqdm)


def test_a_gguf_file_that_was_written_anew_is_read_anew(gguf_path):
    import gguf

    with read_once():
        before = gguf.GGUFReader(gguf_path)
        write_gguf(gguf_path, small_llama(), "F16")
        os.utime(gguf_path, (1, 1))
        after = gguf.GGUFReader(str(gguf_path))
    plain = gguf.GGUFReader(gguf_path)
    assert after.tensors[0].tensor_type == plain.tensors[0].tensor_type
    assert after.tensors[0].tensor_type != before.tensors[0].tensor_type
    for ours, theirs in zip(after.tensors, plain.tensors, strict=True):
        assert ours.name == theirs.name
        assert (ours.data == theirs.data).all()


def test_loading_draws_nothing_from_the_global_generator(gguf_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_model(str(gguf_path))
    assert torch.equal(torch.rand(1), expected)


def test_a_folder_with_one_gguf_file_is_that_file(gguf_path):
    (gguf_path.parent / "README.md").write_text("about")
    (gguf_path.parent / "mmproj-tiny.gguf").write_bytes(b"")
    one, other = load_model(str(gguf_path.parent)), load_model(str(gguf_path))
    assert (one.digest, one.identity) == (other.digest, other.identity)
    assert one.tags["dequantized_from"] == "Q4_1"


def test_several_gguf_files_ask_which(gguf_path):
    write_gguf(gguf_path.with_name("tiny.Q8_0.gguf"), small_llama(), "Q8_0")
    message = (
        r"holds 2 GGUF models \(tiny.Q4_1.gguf, tiny.Q8_0.gguf\)\): name one of them, as --model"
    )
    with pytest.raises(ModelError, match=message):
        load_model(str(gguf_path.parent))
    better = load_model(str(gguf_path.with_name("tiny.Q8_0.gguf")))
    assert better.tags["dequantized_from"] == "Q8_0"


def test_parts_of_a_gguf_model_and_damaged_files(gguf_path):
    part = gguf_path.rename(gguf_path.with_name("tiny-00001-of-00003.gguf"))
    shutil.copy(part, part.with_name("tiny-00002-of-00003.gguf"))
    for path in (part, part.parent):
        with pytest.raises(
            ModelError, match=r"one of 3 parts .*llama-gguf-split --merge .*tiny\.g"
        ):
            load_model(str(path))
    broken = gguf_path.with_name("broken.gguf")
    broken.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"broken\.gguf-\w+ could not be loaded from"):
        load_model(str(broken))


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("healing.models.conversions.is_gguf_available", lambda: False)
    with pytest.raises(ModelError, match=r"needs the packages gguf.*pip install -e '\.\[gguf\]'"):
        load_model(str(tmp_path / "a.gguf"))


def test_weights_of_transformers_come_before_a_gguf_file_beside_them(folder):
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert_equal(load_model(str(folder)).model, weights(folder))


def test_another_file_is_no_model(folder):
    with pytest.raises(ConfigError, match=r"safetensors is a file: name the folder that it is in"):
        load_model(str(folder / "model.safetensors"))


# ---- Adapters


def wrap(base: torch.nn.Module, config: object) -> torch.nn.Module:
    import peft

    with warnings.catch_warnings():  # of a name in transformers that peft still uses
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(base, config)


def lora(folder: pathlib.Path, target: pathlib.Path, **changes) -> pathlib.Path:
    """An adapter of a folder's model with weights that are not zero."""
    peft = pytest.importorskip("peft", reason="the extra [lora] is not installed")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(
        r=2, lora_alpha=6, task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"]
    )
    wrapped = wrap(base, config)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(target)
    written = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(written | changes))
    return target


def test_an_adapter_is_merged_into_its_base(folder, tmp_path, caplog):
    adapter = lora(folder, tmp_path / "adapter")
    with caplog.at_level(logging.WARNING):
        loaded = load_model(str(adapter))
    assert f"its adapter was merged into the weights of {folder}" in caplog.text
    assert loaded.tags["merged_adapter"] == str(adapter)
    assert loaded.tags["adapter_base"] == str(folder)
    change, expected = load_file(adapter / "adapter_model.safetensors"), weights(folder)
    for name, value in expected.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{stem}A.weight" in change:  # W + α/r · B A, by hand
            value += 3 * change[f"{stem}B.weight"] @ change[f"{stem}A.weight"]
    state = loaded.model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(state[name], value, atol=1e-6), name
    assert not torch.equal(state["model.layers.0.mlp.up_proj.weight"],
                           weights(folder)["model.layers.0.mlp.up_proj.weight"])  # fmt: skip
    assert not any("lora" in name for name in block_matrices(loaded.model))
    loaded.model.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert model_shape(str(adapter)).hidden_size == 64


def test_the_base_may_be_named_from_the_adapters_folder(folder, tmp_path, monkeypatch):
    adapter = lora(folder, tmp_path / "adapter", base_model_name_or_path="../model")
    monkeypatch.chdir(EMBEDDED_DIR)
    assert load_model(str(adapter)).tags["adapter_base"] == str(folder)


def test_the_adapters_own_tokenizer_comes_first(folder, tmp_path):
    adapter = lora(folder, tmp_path / "adapter")
    assert load_model(str(adapter)).tokenizer.name_or_path.startswith(str(folder))
    give_tokenizer(adapter)
    assert load_model(str(adapter)).tokenizer.name_or_path.startswith(str(adapter))


@pytest.mark.parametrize(("base", "message"), [
    ("/nowhere/base", "it is an adapter, and its base model /nowhere/base is not here.*put the b"),
    ("nano", "its base model nano is not here"),
    (None, "names no base model.*as base_model_name_or_path"),
    ("own/base", "its base model: .*own/base.*HF_HUB_OFFLINE"),
])  # fmt: skip
def test_an_adapter_whose_base_is_not_here(folder, tmp_path, base, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    adapter = lora(folder, tmp_path / "adapter", base_model_name_or_path=base)
    with pytest.raises(ModelError, match=message):
        load_model(str(adapter))


def test_an_adapter_of_another_model_or_of_an_adapter(folder, tmp_path):
    adapter = lora(folder, tmp_path / "adapter")
    lora(folder, tmp_path / "second", base_model_name_or_path=str(adapter))
    with pytest.raises(ModelError, match=r"is an adapter itself.*merge it into its own base"):
        load_model(str(tmp_path / "second"))
    change = load_file(adapter / "adapter_model.safetensors")
    change.popitem()
    save_file(change, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="lacks weights for the base model that it names"):
        load_model(str(adapter))
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config\.json is damaged"):
        load_model(str(adapter))


def test_a_prompt_is_no_change_of_weights(folder, tmp_path):
    peft = pytest.importorskip("peft", reason="the extra [lora] is not installed")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    wrap(base, config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ModelError, match=r"is a prompt \(PROMPT_TUNING\)"):
        load_model(str(tmp_path / "prompt"))


def test_an_adapter_beside_full_weights_has_two_readings(folder, tmp_path):
    adapter = lora(folder, tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, folder)
    message = r"whole model and an adapter \(.*if the weights alone are meant.*if the adapter is"
    with pytest.raises(ModelError, match=message):
        load_model(str(folder))


def test_peft_is_asked_for(folder, tmp_path, monkeypatch):
    adapter = lora(folder, tmp_path / "adapter")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ModelError, match=r"needs the package peft.*pip install -e '\.\[lora\]'"):
        load_model(str(adapter))


# ---- Weights under other names, of other kinds, not finite


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("format", ["safetensors", "bin", "sharded"])
def test_a_wrappers_prefix_is_taken_off(folder, tmp_path, caplog, prefix, format):
    plain = weights(folder)
    state = {prefix + name: value for name, value in plain.items()}
    (folder / "model.safetensors").unlink()
    if format == "safetensors":
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    elif format == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        shards = {f"part-{i % 2}.safetensors": {} for i in range(2)}
        for number, (name, value) in enumerate(state.items()):
            shards[f"part-{number % 2}.safetensors"][name] = value
        where = {name: shard for shard, content in shards.items() for name in content}
        for shard, content in shards.items():
            save_file(content, folder / shard, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": where})
        )
    with caplog.at_level(logging.WARNING):
        loaded = load_model(str(folder))
    assert f"the prefix {prefix} of a wrapper was taken off" in caplog.text
    assert loaded.tags["stripped_prefix"] == prefix
    assert_equal(loaded.model, plain)
    loaded.model.save_pretrained(tmp_path / "saved")
    assert_equal(loaded.model, weights(tmp_path / "saved"))


def test_a_prefix_of_some_names_is_not_taken_off(folder):
    state = weights(folder)
    state["module.lm_head.weight"] = state.pop("lm_head.weight")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"weights lack 1 tensors, first lm_head\.weight"):
        load_model(str(folder))


def test_weights_that_are_not_finite_are_counted(folder):
    state = weights(folder)
    state["model.layers.1.mlp.up_proj.weight"][0, :3] = float("nan")
    state["lm_head.weight"][1, 1] = float("inf")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    first = r"model\.layers\.1\.mlp\.up_proj\.weight"
    with pytest.raises(ModelError, match=rf"4 of its weights are not finite, first in {first}\)"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("lm_head", "model.norm"), "its weights are finite and its logits are not"),
        # The norm divides by an infinite length.
        (("model.embed_tokens",), "its logits are the same for every token"),
    ],
)
def test_finite_weights_whose_forward_pass_overflows_are_refused(folder, names, message):
    state = weights(folder)
    for name in names:
        state[f"{name}.weight"] = state[f"{name}.weight"].abs() * 1e25 + 1e25
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load_model(str(folder))


def test_blocks_of_zeros_are_refused(folder):
    state = {name: torch.zeros_like(value) for name, value in weights(folder).items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="the weights of its blocks are all zero"):
        load_model(str(folder))


def test_a_refusal_is_one_line_without_a_table_before_it(folder):
    """In a process of its own: the table goes to standard error by transformers' own logger."""
    state = weights(folder)
    wrapped = {f"module.{n}" if i % 2 else n: v for i, (n, v) in enumerate(state.items())}
    save_file(wrapped, folder / "model.safetensors", {"format": "pt"})
    done = subprocess.run(
        [sys.executable, "-m", "entrypoints.attack", f"--model={folder}", "--verbosity=quiet",
         "--corpus=stdlib", f"--output-dir={folder.parent / 'out'}"],
        capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[2], check=False,
        env={**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder.parent}/mlflow.db"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "LOAD REPORT" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "its weights lack" in line


@pytest.mark.parametrize("preset", ["nano", ""])
def test_loading_prints_nothing(preset, folder):
    """In a process of its own, as above: libraries warn by loggers of theirs."""
    code = f"from healing.models.loading import load_model; load_model({preset or str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


# ---- What trainers and other tools leave


def test_an_output_folder_lists_its_checkpoints(folder, tmp_path):
    output = tmp_path / "out"
    for step in (500, 1000, 20):
        shutil.copytree(folder, output / f"checkpoint-{step}")
    message = r"with checkpoint-20, checkpoint-500, checkpoint-1000\): name one.*checkpoint-1000"
    with pytest.raises(ModelError, match=message):
        load_model(str(output))
    assert_equal(load_model(str(output / "checkpoint-20")).model, weights(folder))
    shutil.copytree(folder, output, dirs_exist_ok=True)  # the training's last model is beside them
    assert_equal(load_model(str(output)).model, weights(folder))


def put(folder: pathlib.Path, *names: str, text: str = "x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(("names", "message"), [
    (["pytorch_model_fsdp_0/__0_0.distcp"],
     r"sharded checkpoint of FSDP.*accelerate merge-weights \S+/pytorch_model_fsdp_0 "),
    (["__0_0.distcp", ".metadata"], "sharded checkpoint of FSDP.*accelerate merge-weights"),
    (["pytorch_model_fsdp.bin"], r"a name of its own.*cp \S+fsdp\.bin \S+/pytorch_model\.bin"),
    (["global_step10/mp_rank_00_model_states.pt", "latest"],
     "checkpoint of DeepSpeed.*python -m deepspeed.utils.zero_to_fp32"),
    (["zero_to_fp32.py"], "checkpoint of DeepSpeed"),
    (["zero_pp_rank_0_mp_rank_00_optim_states.pt"], "checkpoint of DeepSpeed"),
])  # fmt: skip
def test_states_of_trainers_say_how_to_become_models(folder, names, message):
    (folder / "model.safetensors").unlink()
    put(folder, *names)
    with pytest.raises(ModelError, match=message):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "a.gguf"])
def test_pointers_of_git_lfs(folder, name):
    put(folder, name, text="version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    message = rf"its {name} is a pointer of Git LFS.*run: git -C {folder} lfs pull"
    with pytest.raises(ModelError, match=message):
        load_model(str(folder))
    if name == "a.gguf":
        with pytest.raises(ModelError, match=message):
            load_model(str(folder / name))


def test_a_damaged_index(folder):
    (folder / "model.safetensors").unlink()
    put(folder, "model.safetensors.index.json", text="[]")
    with pytest.raises(ModelError, match=r"its model\.safetensors\.index\.json is damaged"):
        load_model(str(folder))


# ---- Tokenizers


def test_a_tokenizer_is_named_where_the_folder_has_none(folder, tmp_path):
    expected = load_model(str(folder))
    for name in TOKENIZER:
        (folder / name).rename(give_tokenizer(tmp_path / "words") / name)
    with pytest.raises(ModelError, match=r"it has no tokenizer.*or name one with --tokenizer"):
        load_model(str(folder))
    loaded = load_model(str(folder), tokenizer_name=str(tmp_path / "words"))
    assert loaded.identity == expected.identity
    assert loaded.tags["tokenizer_source"].startswith(str(tmp_path / "words"))
    assert load_model(str(folder), tokenizer_name="nano").identity == expected.identity
    give_tokenizer(folder.parent)
    with pytest.raises(ModelError, match=rf"of its parent, --tokenizer {folder.parent}$"):
        load_model(str(folder))


def test_a_tokenizer_that_is_not_there_or_gives_other_ids(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"no folder .*nowhere"):
        load_model(str(folder), tokenizer_name="./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"it has no tokenizer"):
        load_model(str(folder), tokenizer_name=str(tmp_path / "empty"))
    words = give_tokenizer(tmp_path / "larger")
    tokenizer = transformers.AutoTokenizer.from_pretrained(words)
    tokenizer.add_tokens([f"word{i}" for i in range(4)])
    tokenizer.save_pretrained(words)
    with pytest.raises(ModelError, match=r"gives ids up to 2051, its embedding matrix has 2048"):
        load_model(str(folder), tokenizer_name=str(words))


def test_the_tokenizer_of_a_gguf_file(folder, gguf_path):
    one = load_model(str(folder), tokenizer_name=str(gguf_path))
    text = "a naïve text"
    assert one.tokenizer(text)["input_ids"] == load_model("nano").tokenizer(text)["input_ids"]
