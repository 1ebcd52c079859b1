"""What a local model is: a folder in transformers' format, a GGUF file, an adapter, or none.

Known by names and headers alone, before any weight is loaded.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from healing.data.hub import WEIGHTS
from healing.models.weight_headers import COPY_ANEW, FLOATS, UnusableError, tensors_of

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""In peft's order."""
GGUF = ".gguf"
WRAPPERS = re.compile(r"(?:(?:_orig_mod|module)\.)+")
"""In front of every name: the weights were saved inside torch.compile's or DDP's wrapper."""
OLD_BUFFERS = re.compile(
    r"(attn|attention)\.(masked_)?bias$|attn\.causal_mask$|rotary_emb\.inv_freq$|position_ids$"
)
"""Masks and tables that older files store beside the weights (GPT-Neo's, Pythia's)."""
_POINTER = b"version https://git-lfs.github.com/spec/"
_PARTS = re.compile(r"-[0-9]{5}-of-([0-9]{5})\.gguf$", re.IGNORECASE)
_STEP = re.compile(r"checkpoint-([0-9]+)")


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


def _read_json(path: pathlib.Path) -> Any:
    """What a file of JSON holds.

    Raises:
        UnusableError: It cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnusableError(f"its {path.name} is damaged", COPY_ANEW) from error


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
                named = _read_json(folder / index)["weight_map"]
                return [folder / name for name in sorted(set(named.values()))]
            except (KeyError, TypeError, AttributeError) as error:
                raise UnusableError(f"its {index} is damaged", COPY_ANEW) from error
    return []


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


def _language_models(folder: pathlib.Path, names: list[str]) -> list[str]:
    """Of the GGUF files in a folder, those that may be meant by it: whole ones first, of a model in
    parts the first that is there.

    Raises:
        UnusableError: There are GGUF files, and none is a language model.
    """
    files = [n for n in names if n.lower().endswith(GGUF) and (folder / n).is_file()]
    models = [name for name in files if "mmproj" not in name.lower()]
    if files and not models:
        raise UnusableError(
            f"its only GGUF file {files[0]} is the part of a model that reads images",
            "put the file of its language model there",
        )
    first: dict[str, str] = {}
    for name in models:
        first.setdefault(_PARTS.sub("", name) if _n_parts(name) > 1 else name, name)
    return sorted(first.values(), key=lambda name: _n_parts(name) > 1)


def _n_parts(name: str) -> int:
    found = _PARTS.search(name)
    return int(found[1]) if found else 1


def _gguf(folder: pathlib.Path, models: list[str]) -> Contents:
    if len(models) > 1:
        shown = ", ".join(models[:8]) + (" …" if len(models) > 8 else "")
        raise UnusableError(
            f"it holds {len(models)} GGUF models ({shown})",
            f"name one of them, as --model {_quoted(folder / models[0])}",
        )
    return gguf_file(folder / models[0])


def gguf_file(path: pathlib.Path) -> Contents:
    """A model in one GGUF file.

    Raises:
        UnusableError: It is one part of several, or a pointer to the file.
    """
    _refuse_pointers(path.parent, [path.name])
    if (parts := _n_parts(path.name)) > 1:
        whole = _PARTS.sub("", path.name) + GGUF
        raise UnusableError(
            f"it is one of {parts} parts of a GGUF model",
            f"run: llama-gguf-split --merge {_quoted(path)} {_quoted(path.with_name(whole))}, and "
            "name that file",
        )
    return Contents(path.parent, gguf=path.name)


def _adapter(folder: pathlib.Path) -> Contents:
    config = _read_json(folder / ADAPTER_CONFIG)
    if not isinstance(config, dict):
        raise UnusableError(f"its {ADAPTER_CONFIG} is damaged", COPY_ANEW)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise UnusableError(
            f"its {ADAPTER_CONFIG} names no base model",
            "write the base's folder or Hub id there as base_model_name_or_path",
        )
    beside = os.path.join(folder, base)
    if not os.path.isdir(base) and os.path.isdir(beside):
        base = beside
    if os.path.realpath(base) == os.path.realpath(folder):
        raise UnusableError(
            f"its {ADAPTER_CONFIG} names this very adapter as its base model",
            "write the base's folder or Hub id there as base_model_name_or_path",
        )
    weights = [folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()]
    if not weights:
        raise UnusableError(
            f"it is an adapter without its weights: it has neither {' nor '.join(ADAPTER_WEIGHTS)}",
            "copy them there",
        )
    _require_floats(tensors_of(weights[0]), ADAPTER_CONFIG)
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
    steps = [int(found[1]) for name in folders if (found := _STEP.fullmatch(name))]
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
        if models := _language_models(path, names):
            return _gguf(path, models)
        _refuse_training_states(path, names)
        return Contents(path)
    return whole_model(path)


def whole_model(folder: pathlib.Path) -> Contents:
    """A model in transformers' format, by the headers of its files of weights.

    Args:
        folder: With the files that :func:`weight_files` names.

    Raises:
        UnusableError: One of them is damaged, or holds numbers that are no weights, and the
            configuration does not say how they were quantized (:func:`read_config` refuses those
            of which it does).
    """
    formats = {k: v for file in weight_files(folder) for k, v in tensors_of(file).items()}
    if not _config(folder).get("quantization_config"):
        _require_floats(formats)
    prefixes = {found[0] if (found := WRAPPERS.match(name)) else "" for name in formats}
    return Contents(folder, prefix=prefixes.pop() if len(prefixes) == 1 else "")


def _require_floats(formats: Mapping[str, str], told_by: str = "config.json") -> None:
    """Transformers would make float32 of the codes of quantized numbers, without their scales."""
    allowed = FLOATS.values()
    others = [n for n, f in formats.items() if f not in allowed and not OLD_BUFFERS.search(n)]
    if others:
        raise UnusableError(
            f"{len(others)} of its tensors are quantized or no weights at all, first {others[0]} "
            f"({formats[others[0]]}), and its {told_by} does not say how",
            "name the unquantized model, or a GGUF file of it",
        )


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
    if not (folder / "config.json").is_file():
        return {}
    found = _read_json(folder / "config.json")
    return found if isinstance(found, dict) else {}
