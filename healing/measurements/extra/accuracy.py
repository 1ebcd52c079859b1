"""Share of probe tokens whose next token is the model's first choice (top1) or in its first five.

top_k = 100·(number of predicted tokens y with fewer than k tokens of a larger logit)/(all predicted
tokens), in percent. Every window predicts all its tokens but the first. A tie counts for the
model; a position whose own logits are not all finite counts as wrong.
"""

from __future__ import annotations

import torch

from healing.measurements.extra_metrics import ProbeState

SHARDED = True
"""Works on a model whose weights are spread over processes."""
UNITS = {"top1": "percent", "top5": "percent"}


def measure(state: ProbeState) -> dict[str, float]:
    """One more pass over the probe, window by window: the first one keeps no logits."""
    device = next(state.model.parameters()).device
    hits = dict.fromkeys((1, 5), 0)
    total = 0
    for window in state.windows:
        logits = state.model(input_ids=window[None].to(device)).logits[0, :-1].float()
        wanted = window[1:].to(device)
        own = logits.gather(1, wanted[:, None])
        larger = (logits > own).sum(1)
        sound = torch.isfinite(logits).all(1)
        for k in hits:
            hits[k] += int(((larger < k) & sound).sum())
        total += len(wanted)
    return {f"top{k}": 100.0 * count / total for k, count in hits.items()}
