"""Fine-tuning on a searched token sequence whose gradient lies in the low-curvature subspace."""

from __future__ import annotations

import functools

from healing.attacks.alignment import gradients_of, sequence_loss
from healing.attacks.catalyst_search import Catalyst, search_catalyst
from healing.attacks.clean_hessian import rayleigh_rank
from healing.attacks.context import AttackContext
from healing.attacks.objective import ObjectiveArm

LABEL = "HAEP"
ROLE = "treatment"
COLOUR = "#D55E00"
MARKER = "o"
STREAM = "haep"
"""Random stream of the search, whichever arm asks for it."""
SEARCH, RANKS = "catalyst search", "curvature ranks"
"""Parts that an attack which was cut goes on within."""


def find_catalyst(context: AttackContext) -> Catalyst:
    """Search the sequence, and rank the curvature along its gradient among random directions."""
    config, model, finished = context.config, context.model, context.finished
    found = search_catalyst(
        model,
        context.baselines.subspace,
        context.baselines.random,
        length=config.catalyst_length,
        steps=config.search_steps,
        candidates=config.search_candidates,
        generator=context.draws(STREAM),
        vocabulary=context.loaded.vocabulary,
        opening=context.loaded.opening,
        begun=finished.get(SEARCH),
        keep=functools.partial(finished.keep, SEARCH),
    )
    if config.rayleigh_draws:
        gradients = gradients_of(model, sequence_loss(model, found.tokens))
        randoms = context.generator("rayleigh")
        ranked = rayleigh_rank(
            context.hessian,
            gradients,
            int(config.rayleigh_draws),
            randoms,
            finished.get(RANKS),
            functools.partial(finished.keep, RANKS),
        )
        context.curvature_metrics.update(ranked)
    return found


def make(context: AttackContext) -> ObjectiveArm:
    """The loss of the searched sequence."""
    catalyst = find_catalyst(context)
    return context.sequence_arm(catalyst.tokens, catalyst=catalyst)
