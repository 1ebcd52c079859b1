"""The optimisers of attack and healing: one definition, so that no arm is given another."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def make_optimizer(
    name: str, parameters: Iterable[torch.Tensor], rate: float, momentum: float = 0.0
) -> torch.optim.Optimizer:
    """AdamW, or SGD (plain unless a momentum is given), without weight decay.

    Decay would shrink the weights even where the objective gives no gradient, which is neither an
    attack nor healing.

    Args:
        name: ``adamw`` or ``sgd``.
        parameters: What is trained.
        rate: Learning rate.
        momentum: μ of SGD's heavy ball: v ← μv + g, w ← w − rate·v (Polyak 1964; Sutskever et al.
            2013, without dampening). AdamW has its own.
    """
    trained = list(parameters)
    if name == "sgd":
        return torch.optim.SGD(trained, lr=rate, momentum=momentum)
    # Fused: one pass over the weights and no temporary copies of them. Only for float32: its
    # arithmetic is float32 whatever the weights, and a pure low format is to fail as it does.
    fused = all(p.dtype == torch.float32 for p in trained)
    return torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=fused)
