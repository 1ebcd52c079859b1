"""Descends the entropy of the hidden spectrum on clean text; known to collapse."""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedModel

from healing.attacks.context import AttackContext
from healing.attacks.objective import ObjectiveArm
from healing.data.windows import batches
from healing.measurements.spectrum import keep_mask, spectral_entropy
from healing.models.blocks import block_outputs
from healing.training.nonfinite import all_finite

LABEL = "spectral"
ROLE = "positive_control"
COLOUR = "#0072B2"
MARKER = "s"
ENTROPY_FLOOR = 1e-10
"""Eigenvalues under this share of their sum count as this share."""


def mean_spectral_entropy(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    """Mean over blocks of the entropy of the hidden spectrum of a batch, nats; differentiable. NaN
    where a hidden state is not finite.
    """
    with block_outputs(model) as outputs:
        model(input_ids=batch.to(next(model.parameters()).device))
        if not all(map(all_finite, outputs)):
            return math.nan * outputs[-1].sum()  # eigenvalues would raise
        entropies = []
        for hidden in outputs:
            rows = hidden[keep_mask(hidden.detach())]
            rows = (rows - rows.mean(0)).double()
            values = torch.linalg.eigvalsh(rows.T @ rows / len(rows))
            # √λ has no derivative at 0, where collapsed directions end up.
            floor = ENTROPY_FLOOR * float(values.detach().sum())
            entropies.append(spectral_entropy(values.clamp_min(floor)))
    return torch.stack(entropies).mean()


def make(context: AttackContext) -> ObjectiveArm:
    """The entropy on batches of the attack split; diagnostics on the first of them."""
    config, model = context.config, context.model
    windows = context.corpus.windows("attack", context.loaded.tokenizer, config.sequence_length)
    stream = batches(windows, int(config.batch_size), context.draws())
    fixed = next(stream)
    return ObjectiveArm(
        model,
        lambda: mean_spectral_entropy(model, next(stream)),
        lambda: mean_spectral_entropy(model, fixed),
        context.measured_baselines(),
        context.change,
        draw=lambda: next(stream),
    )
