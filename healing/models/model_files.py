"""Where a model's files are, and what its configuration tells before any weight is loaded."""

from __future__ import annotations

import functools
import pathlib
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from healing.config.presets import EMBEDDED, FOLDER, MAIN, model_kind, model_label, source_of
from healing.data import hub
from healing.errors import ModelError

EMBEDDED_DIR = pathlib.Path(__file__).parent / "embedded"


@dataclass(frozen=True)
class Location:
    """Files of a model on this machine, and where they came from.

    Attributes:
        folder: With config.json and tokenizer, and the weights where they were asked for.
        source: ``embedded``, the id on the Hub or the folder.
        commit: Of the Hub's repository, or empty.
    """

    folder: pathlib.Path
    source: str
    commit: str = ""


def locate(
    name: str, revision: str = "", deduped: bool = False, *, weights: bool = True
) -> Location:
    """Find, or download, the files of a model.

    Raises:
        ConfigError: Unknown model.
        ModelError: The Hub has no such model or revision, or cannot be reached.
    """
    kind, source = model_kind(name), source_of(name, deduped)
    if kind == EMBEDDED:
        return Location(EMBEDDED_DIR / name, source)
    if kind == FOLDER:
        return Location(pathlib.Path(source), source)
    found = (hub.snapshot if weights else hub.small_files)(source, revision or MAIN)
    return Location(found.folder, source, found.commit)


LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    pickle.UnpicklingError,
    SafetensorError,
    StrictDataclassError,
)
"""What transformers raises for files that are missing, damaged or not of its kind."""


def unloadable(label: str, location: Location, reason: str, hint: str = "") -> ModelError:
    """The one sentence that says which model, from where, why not, and what to do."""
    if location.source == EMBEDDED:
        hint = f"run the pretrain entry point with --model {label}"
    hint = hint or "name a causal language model in transformers' format"
    return ModelError(
        f"model {label} could not be loaded from {location.source} ({reason}): {hint}"
    )


def read_config(label: str, location: Location) -> PreTrainedConfig:
    """The architecture, with every dropout at 0: what it draws would come from torch's global
    generator, unseeded and different on every device, and none of the models is trained with any.

    Raises:
        ModelError: Missing, damaged, quantized, or in need of code of its own.
    """
    try:
        config = AutoConfig.from_pretrained(location.folder, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise loading_failure(error, label, location) from error
    if getattr(config, "quantization_config", None):
        raise unloadable(label, location, "its weights are quantized", "name the unquantized model")
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in part.to_dict().items():
            is_dropout = re.search(r"drop(out)?(_prob|_rate)?$|layerdrop$", key)
            if is_dropout and isinstance(value, float) and value:
                setattr(part, key, 0.0)
    return config


VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")


def _require_vocabulary(label: str, location: Location, names: Iterable[str]) -> None:
    names = list(dict.fromkeys(names))
    if names and not any((location.folder / name).is_file() for name in names):
        reason = f"it has no tokenizer: none of {', '.join(names)}"
        raise unloadable(label, location, reason, "put the model's own tokenizer beside it")


def read_tokenizer(label: str, location: Location) -> PreTrainedTokenizerBase:
    """A model's own tokenizer.

    Raises:
        ModelError: Damaged, or without a vocabulary: transformers would make one of its special
            tokens alone.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(location.folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises this very type for a damaged tokenizer.json
        _require_vocabulary(label, location, VOCABULARIES)
        raise loading_failure(error, label, location) from error
    names = list(type(tokenizer).vocab_files_names.values())
    if names:  # those that read bytes have none
        _require_vocabulary(label, location, [VOCABULARIES[0], *names])
    return tokenizer


def loading_failure(error: Exception, label: str, location: Location) -> ModelError:
    """One of :data:`LOADING_ERRORS` as a :class:`ModelError`."""
    if "trust_remote_code" in str(error):
        reason = "it needs Python code of its own, which is never run"
        return unloadable(
            label, location, reason, "name a model of an architecture that transformers has"
        )
    return unloadable(label, location, hub.first_line(error))


@dataclass(frozen=True)
class ModelShape:
    """What a model's configuration tells before its weights load.

    Attributes:
        hidden_size: Dimensions of its hidden states.
        max_positions: Longest window it can read; ``None`` = no limit is stated.
    """

    hidden_size: int
    max_positions: int | None


@functools.lru_cache(maxsize=16)
def model_shape(name: str, revision: str = "", deduped: bool = False) -> ModelShape:
    """Read a model's configuration alone.

    Raises:
        ConfigError: Unknown model.
        ModelError: It has none, or one that cannot be used.
    """
    label = model_label(name, revision, deduped)
    location = locate(name, revision, deduped, weights=False)
    text = read_config(label, location).get_text_config()
    hidden = getattr(text, "hidden_size", None)
    if not isinstance(hidden, int):
        raise unloadable(label, location, "its configuration names no hidden_size")
    return ModelShape(hidden, getattr(text, "max_position_embeddings", None))
