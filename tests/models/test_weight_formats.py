"""Numbers that are no weights: in every kind of file that holds some, from a folder or the Hub."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from healing.errors import ModelError
from healing.models.loading import load_model
from tests.models.test_local_models import assert_equal, lora, weights

NAME = "model.layers.0.mlp.up_proj.weight"
CODES = [
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def write(folder: pathlib.Path, state: dict[str, torch.Tensor], format: str) -> None:
    """The weights of a folder, in one of the formats that transformers reads."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    if format == "safetensors":
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    elif format == "sharded":
        save_file(state, folder / "part.safetensors", {"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(state, "part.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        zipped = format == "bin"
        path = folder / "pytorch_model.bin"
        torch.save(state, path, _use_new_zipfile_serialization=zipped)


def say(folder: pathlib.Path, **settings: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize("format", ["safetensors", "sharded", "bin", "old bin"])
@pytest.mark.parametrize("dtype", CODES)
def test_what_is_no_weight_is_refused(folder, format, dtype):
    if format == "old bin" and dtype.itemsize == 1 and dtype.is_floating_point:
        pytest.skip("torch has no such numbers in its older format")
    state = weights(folder)
    state[NAME] = (state[NAME] * 100).to(dtype)
    write(folder, state, format)
    format_name = str(dtype).removeprefix("torch.")
    message = (
        rf"\(1 of its tensors are quantized or no weights at all, first {NAME} \({format_name}\), "
        r"and its config\.json does not say how\): name the unquantized model, or a GGUF file"
    )
    with pytest.raises(ModelError, match=message):
        load_model(str(folder))


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_torchs_own_quantized_numbers_are_refused(folder):
    state = weights(folder)
    state[NAME] = torch.quantize_per_tensor(state[NAME], 0.01, 0, torch.qint8)
    write(folder, state, "bin")
    with pytest.raises(
        ModelError, match=r"pytorch_model.bin holds tensors in one of torch's own quantized"
    ):
        load_model(str(folder))


def test_settings_that_are_null_are_none(folder):
    say(folder, quantization_config=None)
    assert_equal(load_model(str(folder)).model, weights(folder))


@pytest.mark.parametrize("settings", [None, {}, [], ""])
def test_settings_that_say_nothing_do_not_count(folder, settings):
    say(folder, quantization_config=settings)
    state = weights(folder)
    state[NAME] = (state[NAME] * 100).to(torch.int8)
    write(folder, state, "safetensors")
    with pytest.raises(ModelError, match=r"\(int8\), and its config\.json does not say how"):
        load_model(str(folder))


def test_settings_of_quantization_are_refused_as_such(folder):
    say(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    state = weights(folder)
    state[NAME] = (state[NAME] * 100).to(torch.int32)
    write(folder, state, "safetensors")
    with pytest.raises(ModelError, match="its weights are quantized"):
        load_model(str(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("format", ["safetensors", "bin", "old bin"])
def test_other_floating_point_formats_are_weights(folder, format, dtype):
    state = {name: value.to(dtype) for name, value in weights(folder).items()}
    write(folder, state, format)
    assert_equal(load_model(str(folder)).model, {k: v.float() for k, v in state.items()})


def test_masks_that_older_files_hold_are_no_weights(folder):
    state = weights(folder)
    expected = dict(state)
    state["model.layers.0.self_attn.bias"] = torch.ones(4, 4, dtype=torch.bool)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4, dtype=torch.int32)
    write(folder, state, "bin")
    assert_equal(load_model(str(folder)).model, expected)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_an_adapters_numbers_too(folder, tmp_path, format):
    adapter = lora(folder, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    state = load_file(path)
    first = sorted(state)[0]
    state[first] = (state[first] * 100).to(torch.int8)
    save_file(state, path)
    if format == "bin":
        path.unlink()
        torch.save(state, adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=rf"no weights at all, first {first} \(int8\)"):
        load_model(str(adapter))
