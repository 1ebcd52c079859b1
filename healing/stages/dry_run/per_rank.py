"""Predicted memory of each of several processes that heal one model together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from healing.config.heal import NOT_PARALLEL, SHARDED, HealConfig
from healing.models.blocks import transformer_blocks
from healing.stages.dry_run.peak_memory import (
    CHECKING,
    HEALING,
    LOADING,
    Prediction,
    predict_healing,
)
from healing.stages.dry_run.plan import heal_plan
from healing.stages.dry_run.tensor_bytes import COPIES, GRADIENTS, OPTIMIZER, WEIGHTS
from healing.training.parallel.group import ranks_of

SPREAD = (WEIGHTS, GRADIENTS, OPTIMIZER)
"""What each rank has a part of."""
BLOCKS_GATHERED = 2
"""The one that computes, and the next, which is gathered meanwhile."""
_FLOAT32 = 4
_SMALLEST_PROBE = 64


def part_bytes(parameters: Iterable[torch.Tensor], ranks: int) -> int:
    """Bytes in float32 of the largest part that a rank has: torch cuts the first dimension into as
    many equal pieces as there are ranks, the last ones smaller or empty.
    """
    sizes = ((p.numel() // p.shape[0]) * -(-p.shape[0] // ranks) for p in parameters)
    return _FLOAT32 * sum(sizes)


def _bytes(parameters: Iterable[torch.Tensor]) -> int:
    return _FLOAT32 * sum(p.numel() for p in parameters)


def gathered_bytes(model: nn.Module) -> int:
    """Bytes of weights that are whole on a rank at once: of :data:`BLOCKS_GATHERED` blocks, and of
    all that is in none (embeddings, output matrix, final norm), which stays from the forward pass
    to the end of the backward pass.
    """
    blocks = transformer_blocks(model)
    inside = {id(p) for p in blocks.parameters()}
    outside = _bytes(p for p in model.parameters() if id(p) not in inside)
    return outside + BLOCKS_GATHERED * max(_bytes(block.parameters()) for block in blocks)


def predict_rank(
    config: HealConfig, architecture: PreTrainedConfig, device: torch.device
) -> Prediction:
    """Predict the memory of one rank of a healing run; what rank 0 has beside it is said in words.

    Activations are those of one process with the rank's share of batch and probe; weights,
    gradients and moments are cut; what is gathered counts as copies: weights, and in a step as much
    again for the gradients that are not cut yet.

    Args:
        config: Resolved configuration.
        architecture: Of the model.
        device: Where it will be.

    Raises:
        ConfigError: There cannot be such ranks.
    """
    ranks = ranks_of(config)
    windows = -(-int(config.probe_tokens) // config.sequence_length)
    own = replace(
        config,
        parallel=NOT_PARALLEL,
        ranks=0,
        batch_size=int(config.batch_size) // ranks,
        probe_tokens=max(_SMALLEST_PROBE, -(-windows // ranks) * config.sequence_length),
    )
    alone = predict_healing(own, architecture, device)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
    whole, parts = _bytes(model.parameters()), ranks if config.parallel == SHARDED else 1
    share, gathered = part_bytes(model.parameters(), parts) / whole, gathered_bytes(model)
    phases = {}
    for phase, kinds in alone.phases.items():
        if phase == LOADING:
            continue  # in the host's memory of rank 0
        cut = {kind: int(kinds[kind] * share) for kind in SPREAD}
        times = 2 if phase in (CHECKING, HEALING) else 1
        phases[phase] = {**kinds, **cut, COPIES: kinds[COPIES] + times * gathered}
    lines = [
        f"each of {ranks} ranks ({config.parallel}); weights {whole * share / 1e6:,.1f} MB of "
        f"{whole / 1e6:,.1f} MB, gradients as much, moments "
        f"{'twice' if config.healing_optimizer == 'adamw' else 'at most'} as much",
        f"rank 0 has in the host's memory besides: the whole weights ({whole / 1e9:.2g} GB), and "
        f"weights and moments while a state is kept ({3 * whole / 1e9:.2g} GB)",
    ]
    return replace(alone, phases=phases, plan=[*lines, *heal_plan(config, alone.n_params)])
