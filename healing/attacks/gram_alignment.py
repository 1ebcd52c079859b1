"""ρ of many sequences in one pass, without a single weight gradient.

The gradient of a linear layer is G = δᵀa, with a its inputs and δ the gradients of its outputs, a
row per token. The squared norms of G and of its projection follow from a and δ alone
(:func:`healing.curvature.subspaces.product_energy`), and the rows of a batch belong to one sequence
each, so that one forward and backward pass serves them all.

That holds for models whose block matrices all belong to ``nn.Linear`` or transformers' ``Conv1D``
layers that are called once per pass. Whether a model is of this kind is found by trying.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from healing.curvature.subspaces import SingularSubspace, product_energy
from healing.models.blocks import block_matrices, embedding_matrix, evaluation_mode, next_token_loss
from healing.progress import counted

BATCH_BYTES = 256 * 2**20
"""A batch may take as much memory as two gradients of all block matrices (AdamW's moments will),
and at least this much. The rule asks nothing of the machine, so that batches, and with them the
last digits, are the same everywhere.
"""
_TRIAL = (2, 6)
"""Sequences and tokens of the trial."""
_TRIED: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@dataclass
class Trace:
    """Inputs and outputs of the layers in one forward pass, by name of their matrix.

    Attributes:
        tokens: Of all sequences together.
        inputs: a, (sequences, tokens, inputs), or the same in rows (sequences · tokens, inputs).
        outputs: Likewise, in the graph.
        broken: A layer was called twice, or with something else than a row per token.
    """

    tokens: int
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    broken: bool = False

    def take(self, name: str, args: tuple[Any, ...], output: Any) -> None:
        """One call of a layer."""
        usual = len(args) == 1 and isinstance(output, torch.Tensor)
        if not usual or name in self.inputs or output.shape[:-1].numel() != self.tokens:
            self.broken = True
            return
        self.inputs[name], self.outputs[name] = args[0], output


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | Conv1D] | None:
    """Name of each block matrix → the one layer that it is the weight of; ``None`` where a matrix
    belongs to no layer of the two types, or to several.
    """
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    found = {}
    for name, matrix in block_matrices(model).items():
        owner = owners[id(matrix)][0]
        known = isinstance(owner, (nn.Linear, Conv1D)) and owner.weight is matrix
        if not known or len(owners[id(matrix)]) > 1:
            return None
        found[name] = owner
    return found  # type: ignore[return-value]


@contextlib.contextmanager
def _traced(layers: Mapping[str, nn.Module], tokens: int) -> Iterator[Trace]:
    """Record what the layers are given and return in a forward pass made inside."""
    trace = Trace(tokens)

    def hook_of(name: str) -> Any:
        return lambda _module, args, output: trace.take(name, args, output)

    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def _factors(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Linear | Conv1D],
    inputs: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    *,
    differentiable: bool = False,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]] | None:
    """Name of each matrix → (rows, columns) of every sequence's gradient G = rowsᵀ·columns.

    Args:
        model: Maps ``inputs`` to logits.
        layers: From :func:`linear_layers`.
        inputs: Keyword arguments: all tokens but the last of every sequence, which is predicted
            and predicts nothing, so that its row of δ would be 0.
        labels: What they predict, int64 (sequences, tokens − 1).
        differentiable: Keep the graph of the factors.

    Returns:
        ``None`` where a layer was not called in the usual way.
    """
    with torch.enable_grad(), _traced(layers, labels.numel()) as trace:
        logits = model(**inputs).logits
        # The sum over sequences of their mean losses; each reaches its own rows alone.
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    if trace.broken or len(trace.inputs) < len(layers):
        return None
    deltas = torch.autograd.grad(
        loss / labels.shape[1], list(trace.outputs.values()), create_graph=differentiable
    )
    found = {}
    for (name, a), delta in zip(trace.inputs.items(), deltas, strict=True):
        given = a if differentiable else a.detach()
        given, delta = (x.reshape(*labels.shape, -1) for x in (given, delta))
        transposed = isinstance(layers[name], Conv1D)  # its weight is (inputs, outputs)
        found[name] = (given, delta) if transposed else (delta, given)
    return found


def _trial_succeeds(model: PreTrainedModel, layers: Mapping[str, nn.Linear | Conv1D]) -> bool:
    """Whether the factors give the norms of the gradients that autograd gives."""
    matrices = block_matrices(model)
    device = next(iter(matrices.values())).device
    count, length = _TRIAL
    ids = torch.arange(count * length, device=device) % len(embedding_matrix(model))
    windows = ids.view(count, length)
    with evaluation_mode(model), torch.enable_grad():
        factors = _factors(model, layers, {"input_ids": windows[:, :-1]}, windows[:, 1:])
        if factors is None:
            return False
        for row, window in enumerate(windows):
            expected = torch.autograd.grad(
                next_token_loss(model, window[None]), list(matrices.values()), allow_unused=True
            )
            for name, gradient in zip(matrices, expected, strict=True):
                norm = product_energy(*(x[row] for x in factors[name]))
                if gradient is None or not torch.allclose(
                    norm, gradient.double().square().sum(), rtol=1e-3, equal_nan=True
                ):
                    return False
    return True


def gram_layers(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D] | None:
    """The layers of a model whose gradients' norms follow from their factors, else ``None``.

    A layer may be called in ways that no hook sees (its weight multiplied elsewhere, its output
    changed in place): so the norms are compared with autograd's, once per model.
    """
    layers = linear_layers(model)
    if layers is None:
        return None
    if model not in _TRIED:
        _TRIED[model] = _trial_succeeds(model, layers)
    return layers if _TRIED[model] else None


def _layers_of(
    model: PreTrainedModel, subspace: SingularSubspace
) -> dict[str, nn.Linear | Conv1D] | None:
    layers = gram_layers(model)
    return layers if layers is not None and set(layers) >= set(subspace.names) else None


def sequences_per_batch(model: PreTrainedModel, length: int, count: int) -> int:
    """How many of ``count`` sequences of ``length`` tokens are passed together: as many as fit, in
    batches of nearly equal size (a last one of few would cost nearly as much as a whole one). A
    function of shapes alone.

    A token keeps about the inputs and outputs of all layers twice (values and gradients), and
    three rows of logits.
    """
    matrices = block_matrices(model).values()
    per_token = 2 * sum(sum(p.shape) for p in matrices) + 3 * len(embedding_matrix(model))
    numbers = max(2 * sum(p.numel() for p in matrices), BATCH_BYTES // 4)
    fit = max(1, numbers // (per_token * length))
    batches = -(-count // fit)
    return -(-count // batches)


def _rho(
    subspace: SingularSubspace, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """ρ of every sequence, float64 (sequences,); NaN for a gradient of zero."""
    parts = [space.energies_of_product(*factors[n]) for n, space in subspace.matrices.items()]
    inside, total = (torch.stack(energies).sum(0) for energies in zip(*parts, strict=True))
    return inside / total


def alignments(
    model: PreTrainedModel, subspace: SingularSubspace, sequences: torch.Tensor
) -> list[float] | None:
    """ρ of the gradient that each sequence alone induces.

    Args:
        model: In ``eval`` mode.
        subspace: N, of the model's block matrices.
        sequences: int64 (count, length), on the model's device.

    Returns:
        One number per sequence; ``None`` where the model is not of the kind described above.
    """
    layers = _layers_of(model, subspace)
    if layers is None:
        return None
    found: list[float] = []
    together = sequences_per_batch(model, sequences.shape[1], len(sequences))
    batches = sequences.split(together)
    for batch in counted(batches, len(batches)):
        factors = _factors(model, layers, {"input_ids": batch[:, :-1]}, batch[:, 1:])
        if factors is None:
            return None
        found += _rho(subspace, factors).tolist()
    return found


def differentiable_alignment(
    model: PreTrainedModel,
    subspace: SingularSubspace,
    embedded: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor | None:
    """ρ of one sequence as a function of its embeddings, float64 scalar with its graph.

    Args:
        model: With attention that has second derivatives.
        subspace: N, of the model's block matrices.
        embedded: (length, hidden).
        labels: int64 (length,).

    Returns:
        ``None`` where the model is not of the kind described above.
    """
    layers = _layers_of(model, subspace)
    if layers is None:
        return None
    inputs = {"inputs_embeds": embedded[None, :-1]}
    factors = _factors(model, layers, inputs, labels[None, 1:], differentiable=True)
    return None if factors is None else _rho(subspace, factors)[0]
