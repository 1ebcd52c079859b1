"""Models: embedded, from the Hugging Face Hub or a folder; their blocks and matrices."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from healing.config.fingerprint import fingerprint
from healing.config.presets import model_label
from healing.data.windows import opening
from healing.errors import ModelError
from healing.models.architectures import neox_config
from healing.models.blocks import embedding_matrix
from healing.models.conversions import fresh_copy, merged, quantization_of
from healing.models.gguf_files import read_once
from healing.models.local_models import refuse_adapter_beside_weights
from healing.models.model_files import (
    LOADING_ERRORS,
    Location,
    loading_failure,
    locate,
    read_config,
    read_tokenizer,
    unloadable,
)
from healing.models.objections import objections
from healing.models.weight_headers import UnusableError
from healing.progress import during

logger = logging.getLogger(__name__)
transformers_logging.disable_progress_bar()  # its bars would break ours

EMBEDDED_SHAPES = {
    # Hidden size, blocks, heads: about 0.3 M and 1.3 M parameters with a 2,048-token vocabulary.
    "nano": (48, 4, 3),
    "micro": (128, 4, 4),
}


@dataclass
class LoadedModel:
    """A causal language model with its tokenizer.

    Attributes:
        name: Model as the user names it, with its revision.
        model: float32 weights, in ``eval`` mode, on the requested device.
        tokenizer: The model's own tokenizer.
        digest: Hash of the healthy weights (16 hex digits).
        source: ``embedded``, the id on the Hub or the folder.
        commit: Commit of the Hub's repository; empty for other sources.
        origin: What was done to its files to make it: ``dequantized_from``, ``merged_adapter`` and
            ``adapter_base``, ``stripped_prefix``, ``tokenizer_source``; {} for most.
        identity: Hash of weights, architecture and tokenizer (16 hex digits): the same weights with
            another of these are another model.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    source: str = "embedded"
    commit: str = ""
    origin: dict[str, str] = field(default_factory=dict)
    identity: str = field(init=False)

    def __post_init__(self) -> None:
        self.identity = _identity(self.digest, self.model, self.tokenizer)

    @property
    def tags(self) -> dict[str, str]:
        """Where the model came from, for a run's tags."""
        known = {"model_source": self.source, "model_revision": self.commit, **self.origin}
        return {name: value for name, value in known.items() if value}

    @property
    def n_params(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def vocabulary(self) -> int:
        """Ids that are tokens: embeddings are often padded with rows that no text reaches (Pythia's
        are), whose weights were never trained.
        """
        return min(len(self.tokenizer), len(embedding_matrix(self.model)))

    @property
    def opening(self) -> list[int]:
        """What begins every window and sequence (:func:`healing.data.windows.opening`)."""
        return opening(self.tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device


def embedded_config(name: str, vocab_size: int) -> GPTNeoXConfig:
    """Architecture of an embedded model (GPT-NeoX, as Pythia)."""
    return neox_config(vocab_size, *EMBEDDED_SHAPES[name])


def new_embedded_model(
    name: str, vocab_size: int, generator: torch.Generator
) -> GPTNeoXForCausalLM:
    """An untrained embedded model, initialised from the given generator alone.

    Matrices are N(0, 0.02²) and the two residual outputs of each block N(0, (0.02/√(2·layers))²)
    (GPT-2's scaling); biases are 0 and layer norms 1.
    """
    model = GPTNeoXForCausalLM(embedded_config(name, vocab_size))
    shrink = (2 * model.config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 2:
                residual = key.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
                parameter.normal_(0.0, 0.02 * (shrink if residual else 1.0), generator=generator)
    return model.eval()


class _DrawsFrom(TorchDispatchMode):
    """Random operations of this thread draw from one generator instead of torch's global one, whose
    draws other threads take too.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if any(a.name == "generator" for a in func._schema.arguments):
            given["generator"] = self.generator
        return func(*args, **given)


def untrained_model(loaded: LoadedModel, generator: torch.Generator) -> PreTrainedModel:
    """A model of the same architecture before any training, as its class in transformers
    initialises itself from the same configuration; float32, on the CPU.

    (Embedded models began with smaller residual outputs, see :func:`new_embedded_model`.)

    Args:
        loaded: Left as it is.
        generator: CPU generator of all draws.
    """
    with _ONE_AT_A_TIME, _DrawsFrom(generator):
        fresh: PreTrainedModel = type(loaded.model)(copy.deepcopy(loaded.model.config))
    return fresh.eval()


def resolve_device(device: str) -> torch.device:
    """Turn ``auto`` into the accelerator, if there is one, else the CPU.

    Raises:
        ModelError: The named device does not exist here, or cannot do the arithmetic.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        if resolved.type == "mps":
            raise RuntimeError("it has no float64, in which spectra are computed")
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"--device {device} cannot be used here ({reason}): try cpu") from error
    return resolved


def state_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """Hash of all tensors, by name, in float32 (64 hex digits)."""
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        digest.update(key.encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """The first 16 digits of :func:`state_sha256`: what identifies weights."""
    return state_sha256(state)[:16]


NOT_ARCHITECTURE = ("_name_or_path", "transformers_version", "dtype", "use_cache", "architectures")
"""Entries of a transformers configuration that change no number here."""


def _identity(digest: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    shape = json.loads(model.config.to_json_string(use_diff=True))
    shape = {k: v for k, v in shape.items() if k not in NOT_ARCHITECTURE}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return fingerprint(digest, shape, words, tokenizer.eos_token_id)


_ONE_AT_A_TIME = threading.Lock()
"""transformers switches the tying of weights off in the whole process while it loads: of two loads
at once in threads the later restores what the earlier had switched off, and no model made
afterwards ties its weights."""


@contextlib.contextmanager
def _without_its_report() -> Iterator[None]:
    """Without transformers' table of missing and left over tensors: what is wrong with them is said
    in one line.
    """
    report = logging.getLogger("transformers.modeling_utils")
    # A filter, no level: with a level of its own this logger also checks plans of tensor
    # parallelism, and warns of them from another one.
    report.addFilter(_is_error)
    try:
        yield
    finally:
        report.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _weights(
    label: str, location: Location, config: PreTrainedConfig, attention: str
) -> tuple[PreTrainedModel, Mapping[str, Any], dict[str, str]]:
    """Weights in float32 on the CPU, what transformers says of their names, and
    :attr:`LoadedModel.origin`.
    """
    whole, origin = location.whole, dict[str, str]()
    plain = copy.deepcopy(config)
    try:
        refuse_adapter_beside_weights(whole.folder)  # another program's cache may hold one
        with _without_its_report():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                whole.folder,
                config=config,
                dtype=torch.float32,
                # Asked for sdpa, architectures without it are refused; as the default it gives way
                # to eager.
                attn_implementation=None if attention == "sdpa" else attention,
                trust_remote_code=False,
                output_loading_info=True,
                key_mapping={f"^{re.escape(whole.prefix)}": ""} if whole.prefix else None,
                **whole.how,
            )
        model, report = loaded
        if whole.gguf:
            origin["dequantized_from"] = quantization_of(whole.folder / whole.gguf)
        if whole.prefix:
            origin["stripped_prefix"] = whole.prefix
        if location.base is not None:
            model = merged(model, location.folder)
            origin |= {"merged_adapter": str(location.folder), "adapter_base": whole.source}
        if origin and not report["missing_keys"]:
            model = fresh_copy(model, plain)
    except UnusableError as error:
        raise unloadable(label, location, error.reason, error.hint) from error
    except LOADING_ERRORS as error:
        raise loading_failure(error, label, location) from error
    for line in _told(label, origin):
        logger.warning(line)
    return model, report, origin


def _told(label: str, origin: Mapping[str, str]) -> Iterator[str]:
    """What was done to a model's files, in words."""
    if "dequantized_from" in origin:
        yield f"model {label}: its {origin['dequantized_from']} numbers were made float32"
    if "stripped_prefix" in origin:
        yield (
            f"model {label}: the prefix {origin['stripped_prefix']} of a wrapper was taken off the "
            "names of its weights"
        )
    if "merged_adapter" in origin:
        yield f"model {label}: its adapter was merged into the weights of {origin['adapter_base']}"


def load_model(
    name: str,
    device: str = "cpu",
    *,
    revision: str = "",
    deduped: bool = False,
    attention: str = "sdpa",
    tokenizer_name: str = "",
) -> LoadedModel:
    """Load a healthy model in float32, whatever its file holds; no dropout, no remote code.

    Args:
        name: A name of :data:`healing.config.presets.MODELS`, a Hub id, a folder or a GGUF file.
        device: ``auto`` or a torch device.
        revision: Branch, tag or commit on the Hub; empty = ``main``.
        deduped: The Pythia that was trained on the deduplicated Pile.
        attention: transformers' attention implementation; ``eager`` has second derivatives, and
            is what architectures without ``sdpa`` get.
        tokenizer_name: A folder, Hub id or GGUF file with another tokenizer; empty = its own.

    Raises:
        ConfigError: Unknown model.
        ModelError: It cannot be loaded; the message says what to do.
    """
    label, target = model_label(name, revision, deduped), resolve_device(device)
    location = locate(name, revision, deduped)
    with read_once() if location.whole.gguf else contextlib.nullcontext():
        config = read_config(label, location)
        tokenizer = read_tokenizer(label, location, tokenizer_name)
        with _ONE_AT_A_TIME:
            model, report, origin = _weights(label, location, config, attention)
    if tokenizer_name:
        origin["tokenizer_source"] = tokenizer.name_or_path
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # one that does not follow the configuration
            module.p = 0.0
    model.config.use_cache = False
    model.eval()
    with during("checking model"):
        if objection := next(objections(model, tokenizer, report), None):
            raise unloadable(label, location, *objection)
    model.to(target)  # type: ignore[arg-type]
    with during("hashing weights"):
        digest = state_digest(model.state_dict())
    whole = location.whole
    return LoadedModel(label, model, tokenizer, digest, location.source, whole.commit, origin)
