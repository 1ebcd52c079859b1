"""Parts of a causal language model: blocks, matrices, hidden states, modes; its loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
)

from healing.errors import ModelError


def next_token_loss(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of windows (batch, tokens), nats per token; the model shifts once."""
    loss: torch.Tensor = model(input_ids=windows, labels=windows).loss
    return loss


def transformer_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks: the outermost ``ModuleList`` with as many modules as the
    configuration has layers; without a configuration the longest one of equal modules.

    Raises:
        ModelError: There is none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    config = getattr(model, "config", None)
    if config is not None:
        depth = getattr(config.get_text_config(), "num_hidden_layers", None)
        lists = [module for module in lists if len(module) == depth][:1]
    else:
        lists = [module for module in lists if len({type(m) for m in module}) == 1]
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


def readout_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """What turns the last block's output into logits, by parameter name: the output matrix, where
    it is not tied to the embeddings, and the final norm's gain and bias.

    Found by derivatives: the logits have one with respect to them, no block's output has.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tokens = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    with torch.enable_grad(), block_outputs(model) as outputs:
        logits = model(input_ids=tokens).logits
        hidden = torch.stack([output.sum() for output in outputs]).sum()
        inside, through = (
            torch.autograd.grad(end, list(named.values()), retain_graph=True, allow_unused=True)
            for end in (hidden, logits.sum())
        )
    return {
        name: parameter
        for (name, parameter), before, after in zip(named.items(), inside, through, strict=True)
        if before is None and after is not None
    }


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
