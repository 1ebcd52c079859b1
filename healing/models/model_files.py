"""Where a model's files are, and what its configuration tells before any weight is loaded."""

from __future__ import annotations

import copy
import functools
import os
import pathlib
import pickle
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from healing.config.presets import (
    EMBEDDED,
    FOLDER,
    HUB,
    MAIN,
    is_gguf_file,
    model_kind,
    model_label,
    source_of,
)
from healing.data import hub
from healing.errors import ConfigError, ModelError
from healing.models.conversions import require_gguf
from healing.models.gguf_files import read_once
from healing.models.local_models import contents_of, whole_model
from healing.models.weight_headers import UnusableError, check_gguf

EMBEDDED_DIR = pathlib.Path(__file__).parent / "embedded"


@dataclass(frozen=True)
class Location:
    """Files of a model on this machine, and where they came from.

    Attributes:
        folder: With config.json and tokenizer, and the weights where they were asked for.
        source: ``embedded``, the id on the Hub, or the folder or GGUF file.
        commit: Of the Hub's repository, or empty.
        gguf: Name of the GGUF file in the folder that the model is; empty = transformers' format.
        prefix: In front of every tensor's name, from a wrapper; or empty.
        base: Of an adapter, the model that it changes.
    """

    folder: pathlib.Path
    source: str
    commit: str = ""
    gguf: str = ""
    prefix: str = ""
    base: Location | None = None

    @property
    def whole(self) -> Location:
        """Where configuration and weights of a whole model are: an adapter's base, else this."""
        return self.base or self

    @property
    def how(self) -> dict[str, str]:
        """What transformers has to be told of its format."""
        return {"gguf_file": self.gguf} if self.gguf else {}


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
        return _local(model_label(name, revision, deduped), source, weights)
    return _on_the_hub(model_label(name, revision, deduped), source, revision, weights)


def weights_are_here(name: str, revision: str = "", deduped: bool = False) -> bool:
    """Whether a model can be loaded without downloading its weights.

    Raises:
        ConfigError: Unknown model.
        ModelError: The Hub has no such model or revision, or cannot be reached.
    """
    if model_kind(name) in (EMBEDDED, FOLDER):
        return True
    return hub.has_weights(source_of(name, deduped), revision or MAIN)


def bytes_to_fetch(name: str, revision: str = "", deduped: bool = False) -> int | None:
    """Bytes of a model's weights that loading it would download; ``None`` = some, but the Hub does
    not say how many.

    Raises:
        ConfigError: Unknown model.
        ModelError: The Hub has no such model or revision, or cannot be reached.
    """
    if model_kind(name) in (EMBEDDED, FOLDER):
        return 0
    return hub.bytes_to_fetch(source_of(name, deduped), revision or MAIN)


def _on_the_hub(label: str, repo: str, revision: str, weights: bool) -> Location:
    found = (hub.snapshot if weights else hub.small_files)(repo, revision or MAIN)
    place = Location(found.folder, repo, found.commit)
    if not weights:
        return place
    try:
        return replace(place, prefix=whole_model(found.folder).prefix)
    except UnusableError as error:
        raise unloadable(label, place, error.reason, error.hint) from error


def _local(label: str, source: str, weights: bool, *, is_base: bool = False) -> Location:
    place = Location(pathlib.Path(source), source)
    try:
        found = contents_of(place.folder)
        if found.gguf:
            require_gguf()
            check_gguf(found.folder / found.gguf)
        if found.adapter_base and is_base:
            raise UnusableError(
                "it is an adapter itself",
                "merge it into its own base first (merge_and_unload of peft)",
            )
        base = None
        if found.adapter_base:
            base = _base_of(found.adapter_base, found.adapter_revision, weights)
    except UnusableError as error:
        raise unloadable(label, place, error.reason, error.hint) from error
    except ModelError as error:
        raise unloadable(label, place, f"its base model: {error}", "mend that first") from error
    except OSError as error:
        raise unloadable(label, place, hub.first_line(error), "make it readable") from error
    return Location(found.folder, source, "", found.gguf, found.prefix, base)


def _base_of(name: str, revision: str, weights: bool) -> Location:
    """The model that an adapter names as its base.

    Raises:
        UnusableError: It is not here, and not a Hub id.
        ModelError: It cannot be had.
    """
    if os.path.isdir(name) or is_gguf_file(name):
        folder = os.path.abspath(name)
        return _local(folder, folder, weights, is_base=True)
    try:
        kind = model_kind(name)
    except ConfigError:
        kind = ""
    if kind != HUB:
        raise UnusableError(
            f"it is an adapter, and its base model {name} is not here",
            "put the base there, or write its folder or Hub id into adapter_config.json as "
            "base_model_name_or_path",
        )
    return _on_the_hub(name, name, revision, weights)


LOADING_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    pickle.UnpicklingError,
    SafetensorError,
    StrictDataclassError,
    LookupError,
    EOFError,
    ArithmeticError,
    AssertionError,
    struct.error,
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


def _stored_config(whole: Location) -> PreTrainedConfig:
    """The configuration as the files give it; a copy, which may be changed."""
    if not whole.gguf:
        return _as_transformers_reads(whole, 0.0)
    # A GGUF file's header holds the whole vocabulary: seconds, and asked for several times a run.
    changed = (whole.folder / whole.gguf).stat().st_mtime
    with read_once():
        return copy.deepcopy(_read_once(whole, changed))


def _as_transformers_reads(whole: Location, changed: float) -> PreTrainedConfig:
    found: PreTrainedConfig = AutoConfig.from_pretrained(
        whole.folder, trust_remote_code=False, **whole.how
    )
    return found


_read_once = functools.lru_cache(maxsize=2)(_as_transformers_reads)


def read_config(label: str, location: Location) -> PreTrainedConfig:
    """The architecture, with every dropout at 0: what it draws would come from torch's global
    generator, unseeded and different on every device, and none of the models is trained with any.

    Raises:
        ModelError: Missing, damaged, quantized, or in need of code of its own.
    """
    try:
        config = _stored_config(location.whole)
    except LOADING_ERRORS as error:
        raise loading_failure(error, label, location) from error
    if getattr(config, "quantization_config", None):
        hint = "name the unquantized model, or a GGUF file of it"
        raise unloadable(label, location, "its weights are quantized", hint)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in part.to_dict().items():
            is_dropout = re.search(r"drop(out)?(_prob|_rate)?$|layerdrop$", key)
            if is_dropout and isinstance(value, float) and value:
                setattr(part, key, 0.0)
    return config


VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")


def _require_vocabulary(label: str, location: Location, names: Iterable[str]) -> None:
    names = list(dict.fromkeys(names))
    if names and not _has_one(location.folder, names):
        reason = f"it has no tokenizer: none of {', '.join(names)}"
        hint = "put the model's own tokenizer beside it, or name one with --tokenizer"
        if _has_one(location.folder.parent, names):
            hint = f"name the tokenizer of its parent, --tokenizer {location.folder.parent}"
        raise unloadable(label, location, reason, hint)


def _has_one(folder: pathlib.Path, names: Iterable[str]) -> bool:
    return any((folder / name).is_file() for name in names)


def tokenizer_location(name: str) -> Location:
    """Where a tokenizer is that the user names as models are named.

    Raises:
        ConfigError: It is no folder, file, Hub id or preset.
        ModelError: The Hub has none, or cannot be reached.
    """
    if model_kind(name) != FOLDER:
        return locate(name, weights=False)
    path = pathlib.Path(source_of(name))
    if path.is_dir():  # it need hold nothing but a tokenizer
        return Location(path, str(path))
    return Location(path.parent, str(path), gguf=path.name)


def read_tokenizer(label: str, location: Location, named: str = "") -> PreTrainedTokenizerBase:
    """A model's tokenizer.

    Args:
        label: Of the model, for messages.
        location: Of the model; an adapter's folder may have a tokenizer, else its base's is meant.
        named: Another one that is to be used, as models are named; empty = the model's own.

    Raises:
        ModelError: Damaged, or without a vocabulary: transformers would make one of its special
            tokens alone.
    """
    if named:
        location = tokenizer_location(named)
    elif location.base is not None and not _has_one(location.folder, VOCABULARIES):
        location = location.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            location.folder, trust_remote_code=False, **location.how
        )
    except Exception as error:  # tokenizers raises this very type for a damaged tokenizer.json
        if not location.gguf:
            _require_vocabulary(label, location, VOCABULARIES)
        raise loading_failure(error, label, location) from error
    names = list(type(tokenizer).vocab_files_names.values())
    if names and not location.gguf:  # those that read bytes have none
        _require_vocabulary(label, location, [VOCABULARIES[0], *names])
    tokenizer.name_or_path = str(location.folder / location.gguf)
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
