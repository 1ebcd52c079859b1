"""What a local model is: a folder in transformers' format, a GGUF file, an adapter, or none.

Known by names and headers alone, before any weight is loaded.
"""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from healing.data.hub import WEIGHTS

ADAPTER_CONFIG = "adapter_config.json"
GGUF = ".gguf"
WRAPPERS = re.compile(r"(?:(?:_orig_mod|module)\.)+")
"""In front of every name: the weights were saved inside torch.compile's or DDP's wrapper."""
QUANTIZED_DTYPES = frozenset(["I8", "U8", "I4", "U4", "F4", "F8_E4M3", "F8_E5M2"])
OLD_BUFFERS = re.compile(
    r"(attn|attention)\.(masked_)?bias$|attn\.causal_mask$|rotary_emb\.inv_freq$|position_ids$"
)
"""Masks and tables that older files store beside the weights (GPT-Neo's, Pythia's)."""
_POINTER = b"version https://git-lfs.github.com/spec/"
_PARTS = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


class UnusableError(Exception):
    """Why a folder or file is not a model that can be loaded, and what to do."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason, self.hint = reason, hint


@dataclass(frozen=True)
class Contents:
    """A model found at a local path.

    Attributes:
        folder: Of its files.
        gguf: Name of the GGUF file that it is, or empty.
        adapter_base: The base model that an adapter names, or empty.
        adapter_revision: That base's revision on the Hub, or empty.
        prefix: Of every tensor's name, from a wrapper; or empty.
    """

    folder: pathlib.Path
    gguf: str = ""
    adapter_base: str = ""
    adapter_revision: str = ""
    prefix: str = ""


def _quoted(path: object) -> str:
    return shlex.quote(str(path))


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Files with the weights of a whole model, as transformers chooses them; [] = there are none.

    Raises:
        UnusableError: The index of several files is damaged.
    """
    for whole, index in WEIGHTS:
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            try:
                named = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
                return [folder / name for name in sorted(set(named.values()))]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UnusableError(f"its {index} is damaged", "copy it anew") from error
    return []


def _tensors(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """(name, dtype) of what a file of weights holds, without loading it; nothing where it is
    damaged, which loading it will say.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    yield name, file.get_slice(name).get_dtype()
        else:
            state = torch.load(path, map_location="meta", weights_only=True)
            for name, value in state.items():
                yield name, {torch.int8: "I8", torch.uint8: "U8"}.get(value.dtype, "")
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError) as error:
        del error
    except (SafetensorError, pickle.UnpicklingError) as error:
        del error


def _refuse_pointers(folder: pathlib.Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        is_ours = name.endswith((".json", ".safetensors", ".bin", ".model", GGUF))
        if is_ours and path.is_file() and path.stat().st_size < 1024:
            with path.open("rb") as file:
                if file.read(len(_POINTER)) == _POINTER:
                    raise UnusableError(
                        f"its {name} is a pointer of Git LFS, not the file itself",
                        f"run: git -C {_quoted(folder)} lfs pull",
                    )


def _gguf(folder: pathlib.Path, names: list[str]) -> Contents:
    # Vision parts are no language models.
    files = [n for n in names if n.lower().endswith(GGUF) and not n.startswith("mmproj")]
    if len(files) > 1 and not _PARTS.search(files[0]):
        shown = ", ".join(files[:8]) + (" …" if len(files) > 8 else "")
        raise UnusableError(
            f"it holds {len(files)} GGUF files ({shown})",
            f"name one of them, as --model {_quoted(folder / files[0])}",
        )
    return gguf_file(folder / files[0])


def gguf_file(path: pathlib.Path) -> Contents:
    """A model in one GGUF file.

    Raises:
        UnusableError: It is one part of several, or a pointer to the file.
    """
    _refuse_pointers(path.parent, [path.name])
    if parts := _PARTS.search(path.name):
        whole = _PARTS.sub("", path.name) + GGUF
        raise UnusableError(
            f"it is one of {int(parts[1])} parts of a GGUF model",
            f"run: llama-gguf-split --merge {_quoted(path)} {_quoted(path.with_name(whole))}, and "
            "name that file",
        )
    return Contents(path.parent, gguf=path.name)


def _adapter(folder: pathlib.Path) -> Contents:
    try:
        config: Any = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base, revision = config["base_model_name_or_path"], config.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnusableError(f"its {ADAPTER_CONFIG} is damaged", "copy the adapter anew") from error
    if not isinstance(base, str) or not base:
        raise UnusableError(
            f"its {ADAPTER_CONFIG} names no base model",
            "write the base's folder or Hub id there as base_model_name_or_path",
        )
    beside = folder / base
    if not os.path.isdir(base) and not os.path.isabs(base) and beside.is_dir():
        base = str(beside)
    return Contents(folder, adapter_base=base, adapter_revision=str(revision or ""))


def _refuse_training_states(folder: pathlib.Path, names: list[str]) -> None:
    """Recognize what trainers leave that is no model yet, and name the command that makes it one.

    Raises:
        UnusableError: It is one of them.
    """
    here, folders = _quoted(folder), [name for name in names if (folder / name).is_dir()]
    sharded = [name for name in folders if name.startswith("pytorch_model_fsdp")]
    if sharded or any(name.endswith(".distcp") for name in names):
        parts = _quoted(folder / sharded[0]) if sharded else here
        raise UnusableError(
            "it is a sharded checkpoint of FSDP",
            f"run: accelerate merge-weights {parts} {here}",
        )
    if "pytorch_model_fsdp.bin" in names:
        source, target = folder / "pytorch_model_fsdp.bin", folder / "pytorch_model.bin"
        raise UnusableError(
            "it is a full checkpoint of FSDP under a name of its own",
            f"run: cp {_quoted(source)} {_quoted(target)}",
        )
    is_zero = any(re.fullmatch(r"global_step\d+", name) for name in folders)
    if is_zero or "zero_to_fp32.py" in names or any("_optim_states.pt" in name for name in names):
        raise UnusableError(
            "it is a checkpoint of DeepSpeed",
            f"run: python -m deepspeed.utils.zero_to_fp32 {here} {here}",
        )
    steps = [int(n.removeprefix("checkpoint-")) for n in folders if n.startswith("checkpoint-")
             and n.removeprefix("checkpoint-").isdigit()]  # fmt: skip
    if steps:
        shown = ", ".join(f"checkpoint-{step}" for step in sorted(steps))
        raise UnusableError(
            f"it is a training's output folder, with {shown}",
            f"name one of them, as --model {_quoted(folder / f'checkpoint-{max(steps)}')}",
        )


def contents_of(path: pathlib.Path) -> Contents:
    """What the model at a path is.

    Args:
        path: A folder or a GGUF file.

    Raises:
        UnusableError: It is none that can be loaded, and is known for what it is. What is not
            known is left to transformers.
    """
    if path.is_file():
        return gguf_file(path)
    names = sorted(os.listdir(path))
    _refuse_pointers(path, names)
    weights = weight_files(path)
    refuse_adapter_beside_weights(path)
    if ADAPTER_CONFIG in names:
        return _adapter(path)
    if not weights:
        if any(name.lower().endswith(GGUF) for name in names):
            return _gguf(path, names)
        _refuse_training_states(path, names)
        return Contents(path)
    tensors = [tensor for file in weights for tensor in _tensors(file)]
    quantized = [
        n for n, dtype in tensors if dtype in QUANTIZED_DTYPES and not OLD_BUFFERS.search(n)
    ]
    if quantized and "quantization_config" not in _config(path):
        raise UnusableError(
            f"{len(quantized)} of its tensors are quantized, first {quantized[0]}, and its "
            "config.json does not say how",
            "name the unquantized model, or a GGUF file of it",
        )
    prefixes = {found[0] if (found := WRAPPERS.match(name)) else "" for name, _ in tensors}
    return Contents(path, prefix=prefixes.pop() if len(prefixes) == 1 else "")


def refuse_adapter_beside_weights(folder: pathlib.Path) -> None:
    """Transformers would apply the adapter without a word, where peft is installed.

    Raises:
        UnusableError: The folder can be read in two ways.
    """
    if (folder / ADAPTER_CONFIG).is_file() and weight_files(folder):
        raise UnusableError(
            f"it holds the weights of a whole model and an adapter ({ADAPTER_CONFIG})",
            "if the weights alone are meant, or have the adapter merged into them already, move "
            f"{ADAPTER_CONFIG} away; if the adapter is, move it and its config to another folder "
            "and name that",
        )


def _config(folder: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
