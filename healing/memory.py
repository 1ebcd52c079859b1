"""Peak memory of healing, predicted by running it on tensors without content.

The project's own measurement and healing loop run once at true shapes under torch's
``FakeTensorMode``, which allocates nothing, while a dispatch mode adds up the storages alive after
every operation. So the prediction holds for any architecture, with or without adapters, autocast
and activation checkpointing, and follows the code. What it cannot see is memory that a kernel
takes and gives back within one operation.

torch's own ``MemTracker`` does the like, but stops at a second forward pass of the same model,
which a measurement makes, and does not tell logits from other activations.
"""

from __future__ import annotations

import contextlib
import pathlib
import resource
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from healing.config import HealConfig
from healing.lora import adapted, n_trainable
from healing.models import LoadedModel
from healing.precision import diagnose
from healing.probe import Measurement, Probe
from healing.randomness import named_generator
from healing.sft import adapter_draws, heal

WEIGHTS, GRADIENTS, OPTIMIZER, LOGITS, ACTIVATIONS, COPIES = KINDS = (
    "weights",
    "gradients",
    "optimiser",
    "logits",
    "activations",
    "copies",
)
"""What a storage holds; activations: everything else, temporary tensors too."""

LOADING, MEASURING, CHECKING, HEALING, WATCHING = (
    "loading",
    "measurement",
    "first check",
    "healing step",
    "measurement while healing",
)
_STEPS = 2
"""Steps that are run: from the second on the optimiser's state is there beside the activations."""

_aten = torch.ops.aten


class _EverythingSelected(TorchDispatchMode):
    """Answers what depends on content: every number is 1, every test holds, every mask selects all.

    So losses are finite, steps are taken and no token is an outlier.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _aten._local_scalar_dense.default:
            return _one(args[0].dtype)
        if func in (_aten.allclose.default, _aten.equal.default):
            return True
        if func is _aten.nonzero.default:
            return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.int64)
        if func is _aten.index.Tensor:
            args = (args[0], [i for index in args[1] for i in _as_positions(index)])
        return func(*args, **kwargs or {})


def _one(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _as_positions(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.int64)] * index.ndim


def _apply(module: nn.Module, change: Callable[[Any], Any], recurse: bool = True) -> nn.Module:
    """``Module._apply`` for tensors without content, which cannot be swapped in place."""
    for part in module.modules() if recurse else [module]:
        for name, parameter in part._parameters.items():
            if parameter is not None and (new := change(parameter)) is not parameter:
                part._parameters[name] = nn.Parameter(new.detach(), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else change(buffer)
    return module


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, tensors have shape, dtype and device, and take no memory."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        _EverythingSelected(),
        mock.patch.object(nn.Module, "_apply", _apply),
    ):
        yield


class Usage(TorchDispatchMode):
    """Bytes of all storages alive, by kind, and their peak in every phase.

    Args:
        vocabulary: Tensors whose last dimension it is are logits.

    Attributes:
        peaks: Phase → kind → bytes at the moment of the phase's largest total.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.peaks: dict[str, dict[str, int]] = {}
        self._vocabulary, self._phase, self._stepping = vocabulary, LOADING, False
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._now = dict.fromkeys(KINDS, 0)
        self._hooks: contextlib.ExitStack = contextlib.ExitStack()

    def __enter__(self) -> Usage:
        """Watch every operation and the optimisers' steps."""
        before = register_optimizer_step_pre_hook(lambda *_: self._step(True, None))
        after = register_optimizer_step_post_hook(lambda o, *_: self._step(False, o))
        self._hooks.callback(before.remove)
        self._hooks.callback(after.remove)
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        """Stop watching."""
        self._hooks.close()
        super().__exit__(*args)

    def _step(self, inside: bool, optimizer: Optimizer | None) -> None:
        self._stepping = inside
        if optimizer is not None:
            states = [v for state in optimizer.state.values() for v in state.values()]
            self.claim(OPTIMIZER, [v for v in states if isinstance(v, torch.Tensor)])

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Peaks inside are those of this phase."""
        previous, self._phase = self._phase, name
        self._compare()
        try:
            yield
        finally:
            self._phase = previous

    def claim(self, kind: str, tensors: Iterable[torch.Tensor]) -> None:
        """Say what storages hold."""
        for tensor in tensors:
            entry = self._entry(tensor, kind)
            self._now[entry[0]] -= entry[1]
            self._now[kind] += entry[1]
            entry[0] = kind
        self._compare()

    def watch_gradients(self, model: nn.Module) -> None:
        """Tell the gradients of what requires them from other tensors of the backward pass."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda p: self.claim(GRADIENTS, [] if p.grad is None else [p.grad])
                )

    def _entry(self, tensor: torch.Tensor, kind: str) -> list[Any]:
        storage = tensor.untyped_storage()
        if storage not in self._entries:
            entry = [kind, storage.nbytes()]
            self._entries[storage] = entry
            self._now[kind] += entry[1]
            weakref.finalize(storage, self._drop, entry)
        found: list[Any] = self._entries[storage]
        return found

    def _drop(self, entry: list[Any]) -> None:
        self._now[entry[0]] -= entry[1]

    def _compare(self) -> None:
        known = self.peaks.get(self._phase)
        if known is None or sum(self._now.values()) > sum(known.values()):
            self.peaks[self._phase] = dict(self._now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and take its new storages into account."""
        result = func(*args, **kwargs or {})
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                is_logits = value.ndim >= 2 and value.shape[-1] == self._vocabulary
                other = OPTIMIZER if self._stepping else ACTIVATIONS
                self._entry(value, LOGITS if is_logits else other)
        self._compare()
        return result


@dataclass(frozen=True)
class _WatchedProbe(Probe):
    """A probe whose measurements are a phase of their own."""

    usage: Usage

    def measure(
        self, model: nn.Module, error_generator: torch.Generator | None = None
    ) -> Measurement:
        with self.usage.phase(WATCHING):
            return super().measure(model, error_generator)


@dataclass(frozen=True)
class Prediction:
    """Predicted memory of one healing run.

    Attributes:
        n_params: Parameters of the model.
        n_trainable: Parameters that healing trains.
        device: Where the tensors are.
        base: Bytes of the process without model: interpreter, libraries; resident when asked.
        phases: Phase → kind → bytes at its peak.
    """

    n_params: int
    n_trainable: int
    device: torch.device
    base: int
    phases: Mapping[str, Mapping[str, int]]

    @property
    def tensor_bytes(self) -> int:
        """Largest total of a phase."""
        return max(sum(kinds.values()) for kinds in self.phases.values())

    @property
    def peak_bytes(self) -> int:
        """On the CPU of the process; on an accelerator of its tensors."""
        return self.tensor_bytes + (self.base if self.device.type == "cpu" else 0)


def resident_bytes() -> int:
    """Memory that this process has now, in bytes; its highest so far where only that is known."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(fields["VmRSS"].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _same_sizes(config: HealConfig) -> HealConfig:
    """Two steps of the same sizes. fp16 under autocast becomes bf16: a gradient scaler would find
    every number infinite and take no step.
    """
    format_ = config.precision
    if format_ == "fp16" and config.precision_mode == "autocast":
        format_ = "bf16"
    return replace(
        config, precision=format_, healing_steps=_STEPS, measurement_interval=_STEPS, sham=False
    )


def _bare_model(architecture: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            architecture, dtype=torch.float32, attn_implementation="sdpa"
        )
    model.config.use_cache = False
    return model.eval()


def _load(usage: Usage, model: PreTrainedModel, *, second_copy: bool) -> Any:
    """Count the weights, the digest's copy of one tensor and, while a checkpoint is read, its
    state on the host.
    """
    usage.claim(WEIGHTS, [*model.parameters(), *model.buffers()])
    state = [torch.empty_like(v) for v in model.state_dict().values()] if second_copy else []
    largest = max(model.state_dict().values(), key=torch.Tensor.numel)
    usage.claim(COPIES, [*state, torch.empty_like(largest)])
    return state


def predict_healing(
    config: HealConfig,
    architecture: PreTrainedConfig,
    device: torch.device,
    *,
    checkpoint: bool = True,
) -> Prediction:
    """Predict the memory of one healing run.

    Args:
        config: Resolved configuration.
        architecture: Of the model.
        device: Where it will be.
        checkpoint: Whether a collapsed state is read from a file, which is a second copy of the
            weights while it is loaded.
    """
    base, config = resident_bytes(), _same_sizes(config)
    length, batch = config.sequence_length, int(config.batch_size)
    text = architecture.get_text_config()
    with shapes_only(), Usage(text.vocab_size) as usage:
        model = _bare_model(architecture, device)
        trainable = n_trainable(model, config)
        count = sum(p.numel() for p in model.parameters())
        probe = Probe(torch.zeros(-(-int(config.probe_tokens) // length), length, dtype=torch.long))
        state = _load(usage, model, second_copy=checkpoint)
        with usage.phase(MEASURING):
            collapsed = probe.measure(model, named_generator(0, "bootstrap"))
        del state
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable()
        windows, order = torch.zeros(batch, length, dtype=torch.long), named_generator(0, "sft")
        with usage.phase(CHECKING), adapted(model, config, adapter_draws(order)):
            usage.watch_gradients(model)
            diagnose(model, windows.to(device), step=0)
        # heal() reads nothing of the tokenizer.
        loaded = LoadedModel.__new__(LoadedModel)
        loaded.name, loaded.model = config.model, model
        watched = _WatchedProbe(probe.windows, usage)
        with usage.phase(HEALING):
            for record in heal(loaded, config, windows, cast(Probe, watched), collapsed, order):
                if not record.step:
                    usage.watch_gradients(model)
    phases = {name: usage.peaks[name] for name in (LOADING, MEASURING, CHECKING, HEALING, WATCHING)}
    return Prediction(count, trainable, device, base, phases)
