"""Models: embedded, or from the Hugging Face Hub; their blocks and matrices; safe checkpoints."""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from healing.presets import MODELS, preset_for

transformers_logging.disable_progress_bar()  # its bars would break ours

EMBEDDED_DIR = pathlib.Path(__file__).parent / "embedded"
CHECKPOINT_NAME = "checkpoint_post_treatment.pt"
HEALED_NAME = "checkpoint_post_healing.pt"
COLLAPSED_KIND, HEALED_KIND = "post_treatment", "post_healing"
CHECKPOINT_KEYS = ("step", "model_state_dict", "checkpoint_type", "description")

EMBEDDED_SHAPES: dict[str, dict[str, Any]] = {
    # Pythia's proportions (4x feed-forward, a quarter of each head rotary, untied output matrix)
    # at about 0.3 M and 1.3 M parameters with a 2,048-token vocabulary.
    "nano": {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3},
    "micro": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
}


class ModelError(RuntimeError):
    """A model cannot be loaded."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or not of the model it is loaded into."""


@dataclass
class LoadedModel:
    """A causal language model with its tokenizer.

    Attributes:
        name: Model size as the user names it.
        model: float32 weights, in ``eval`` mode, on the requested device.
        tokenizer: The model's own tokenizer.
        digest: Hash of the healthy weights (16 hex digits).
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str

    @property
    def n_params(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device


def embedded_config(name: str, vocab_size: int) -> GPTNeoXConfig:
    """Architecture of an embedded model (GPT-NeoX, as Pythia)."""
    shape = EMBEDDED_SHAPES[name]
    return GPTNeoXConfig(
        vocab_size=vocab_size,
        intermediate_size=4 * shape["hidden_size"],
        max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.25,
        },
        use_parallel_residual=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        **shape,
    )


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


def resolve_device(device: str) -> torch.device:
    """Turn ``auto`` into the accelerator, if there is one, else the CPU.

    Raises:
        ModelError: The named device does not exist here.
    """
    if device == "auto":
        # Not mps: it has no float64, in which spectra are computed.
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"--device {device} cannot be used here ({reason}): try cpu") from error
    return resolved


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Hash of all tensors, by name, in float32 (16 hex digits)."""
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        digest.update(key.encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_model(name: str, device: str = "cpu", *, attention: str = "sdpa") -> LoadedModel:
    """Load a healthy model in float32.

    Args:
        name: One of :data:`healing.config.MODELS`.
        device: ``auto`` or a torch device.
        attention: transformers' attention implementation; ``eager`` has second derivatives.

    Raises:
        ConfigError: Unknown model.
        ModelError: The weights cannot be loaded; the message says what to do.
    """
    source = preset_for(name).source
    location = str(EMBEDDED_DIR / name) if source == "embedded" else source
    target = resolve_device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location)
        model = AutoModelForCausalLM.from_pretrained(
            location, dtype=torch.float32, attn_implementation=attention
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        hint = (
            f"run the pretrain entry point with --model {name}"
            if source == "embedded"
            else "check the network, set HF_HOME to a cache that has it, or use --model nano or "
            "micro, which need no download"
        )
        raise ModelError(
            f"model {name} could not be loaded from {location} ({reason}): {hint}"
        ) from error
    model.config.use_cache = False
    model.eval().to(target)
    return LoadedModel(name, model, tokenizer, state_digest(model.state_dict()))


def next_token_loss(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of windows (batch, tokens), nats per token; the model shifts once."""
    loss: torch.Tensor = model(input_ids=windows, labels=windows).loss
    return loss


def transformer_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks: the longest ``ModuleList`` of equal modules.

    Raises:
        ModelError: There is none.
    """
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1
    ]
    if not lists:
        raise ModelError("no list of transformer blocks found in this architecture")
    return max(lists, key=len)


def embedding_matrix(model: PreTrainedModel) -> torch.Tensor:
    """Input embeddings, (vocabulary, hidden)."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor), "every causal language model embeds tokens by a matrix"
    return weight


def block_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weight matrices inside the blocks, by parameter name; embeddings and output excluded."""
    inside = {id(p) for block in transformer_blocks(model) for p in block.parameters()}
    return {name: p for name, p in model.named_parameters() if p.ndim == 2 and id(p) in inside}


@contextlib.contextmanager
def block_outputs(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the output of every block of the forward passes made inside the context.

    Yields:
        A list that each forward pass refills with tensors (batch, tokens, hidden), one per block.
    """
    blocks = transformer_blocks(model)
    outputs: list[torch.Tensor] = []

    def hook(module: nn.Module, _args: Any, output: Any) -> None:
        if module is blocks[0]:
            outputs.clear()
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(hook) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    was_training = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(was_training)


def evaluation_mode(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """``eval()`` inside, the previous mode afterwards."""
    return _mode(model, training=False)


def training_mode(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """``train()`` inside (dropout and activation checkpointing act), the previous mode after."""
    return _mode(model, training=True)


@dataclass(frozen=True)
class Checkpoint:
    """A collapsed or healed state on disk.

    Attributes:
        step: Attack or healing step it was taken after.
        state: Parameter name → tensor, on the CPU.
        description: One line.
        config: What made it ({} in files of the predecessor).
        kind: ``post_treatment`` (collapsed) or ``post_healing``.
    """

    step: int
    state: dict[str, torch.Tensor]
    description: str
    config: dict[str, Any]
    kind: str = COLLAPSED_KIND

    @property
    def model_name(self) -> str | None:
        """The model it names, if it names one."""
        return self.config.get("model")


def save_checkpoint(
    path: pathlib.Path,
    model: nn.Module,
    step: int,
    description: str,
    config: dict[str, Any],
    kind: str = COLLAPSED_KIND,
) -> None:
    """Write a checkpoint that ``torch.load(weights_only=True)`` reads.

    The file appears whole or not at all (written beside, then renamed).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(
        {
            "step": step,
            "model_state_dict": {k: v.detach().cpu() for k, v in model.state_dict().items()},
            "checkpoint_type": kind,
            "description": description,
            "config": config,
        },
        partial,
    )
    partial.replace(path)


def read_checkpoint(path: pathlib.Path) -> Checkpoint:
    """Read a checkpoint without running any code it may carry.

    Raises:
        CheckpointError: Missing, damaged, unsafe, or without the expected entries.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: give the path of a {CHECKPOINT_NAME}")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged or holds objects other than tensors and plain values, "
            "which are not loaded: make it anew with the attack entry point"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a torch checkpoint: copy or make it anew"
        ) from error
    missing = [k for k in CHECKPOINT_KEYS if not isinstance(data, dict) or k not in data]
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}: expected {', '.join(CHECKPOINT_KEYS)}"
        )
    state = data["model_state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: model_state_dict is not a mapping of names to tensors")
    config = data.get("config") or {}
    named = config.get("model") if isinstance(config, dict) else 0
    if not isinstance(data["step"], int) or not (named is None or isinstance(named, str)):
        raise CheckpointError(
            f"{path}: step is not a number or config is not a mapping that names a model"
        )
    kind = str(data["checkpoint_type"])
    return Checkpoint(data["step"], state, str(data["description"]), config, kind)


def _mismatch(model: nn.Module, state: dict[str, torch.Tensor]) -> str:
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    notes = []
    if missing:
        notes.append(f"{len(missing)} tensors missing, first {missing[0]}")
    if extra:
        notes.append(f"{len(extra)} unexpected, first {extra[0]}")
    if shapes:
        key = sorted(shapes)[0]
        notes.append(
            f"{len(shapes)} of another shape, first {key} "
            f"{tuple(state[key].shape)} for {tuple(own[key].shape)}"
        )
    return "; ".join(notes)


def load_state(loaded: LoadedModel, checkpoint: Checkpoint, path: object) -> None:
    """Put a checkpoint's weights into a model, strictly, as float32.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of another shape; the model is
            unchanged then.
    """
    notes = _mismatch(loaded.model, checkpoint.state)
    if notes:
        raise CheckpointError(
            f"{path} is not a checkpoint of model {loaded.name} ({notes}): "
            f"name the right one with --model ({', '.join(MODELS)})"
        )
    loaded.model.load_state_dict(checkpoint.state, strict=True)
