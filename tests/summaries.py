"""Simulated healing runs and the summaries that reports and figures are tested on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from healing.statistics.heal_runs import HealRun
from healing.statistics.summary import Summary, summarize_runs

N_PARAMS = {"nano": 309_792, "micro": 1_317_632, "70m": 70_426_624}
STEPS = tuple(range(0, 61, 10))
TOO_SMALL = "the attack changed the effective rank by +0.42, below the detection threshold of 2.14"
NASTY = (
    "<script>alert(1)</script>", "100%_a&b#c\\d{e}$f$^g~h", "[模型] **`é|'\"--''",
    "a_b", "a-b", "</style>\n| x", "[x](javascript:alert(1)) ![y][z] `c` *d* _e_ ~~f~~",
    "# =1+1 \\input{/etc/passwd} @g https://h.invalid &lt;i",
)  # fmt: skip


def simulated_run(
    rng: np.random.Generator, model: str, arm: str, seed: int, rank: float, loss: float, **changes
) -> HealRun:
    """Exponential approach to ``rank`` and ``loss`` (half-lives 13.9 and 5.5 steps), with noise
    between and within checkpoints; a NaN ``rank`` is an undefined rank recovery.
    """
    t = np.array(STEPS, dtype=float)
    limits = rank + rng.normal(0, 4), loss + rng.normal(0, 3)
    curves = [
        limit * (1 - np.exp(-t / tau)) + rng.normal(0, 0.5, len(t)) * (t > 0)
        for limit, tau in zip(limits, (20.0, 8.0), strict=True)
    ]
    names = ("rank_recovery_pct", "loss_recovery_pct", "ppl_improvement_pct")
    trajectory = dict(zip(names, map(tuple, [*curves, curves[1]]), strict=True))
    values = {
        "run_id": f"{model}{arm}{seed}", "name": f"heal {model} {arm} seed {seed}",
        "finished": True, "model": model, "arm": arm, "settings": "abcdef1234",
        "checkpoint": f"{model}{arm}{seed}", "seed": str(seed),
        "n_params": N_PARAMS.get(model, 1000), "steps": STEPS, "trajectory": trajectory,
        "final": {name: float(row[-1]) for name, row in trajectory.items()},
        "spectral_state": "unchanged" if math.isnan(rank) else "collapsed",
        "undefined_reason": TOO_SMALL if math.isnan(rank) else "",
        "panel": panel_of(curves[0][-1]), "healer": "AdamW at 0.001",
        "rank_recovery_error": math.nan if math.isnan(rank) else 1.1,
        **damage_of(arm, seed, curves[1][-1]),
    }  # fmt: skip
    return HealRun(**(values | changes))


def panel_of(rank: float) -> dict[str, float]:
    """Other measures that recover sooner or later than the rank does."""
    shares = {"last_block": 1.3, "min_block": 0.9, "participation_ratio": 0.5,
              "effective_rank_energy": 0.6, "stable_rank": 0.4}  # fmt: skip
    return {} if math.isnan(rank) else {name: share * rank for name, share in shares.items()}


def damage_of(arm: str, seed: int, loss: float) -> dict[str, float]:
    """Damage of an arm's size, a little different in every seed."""
    far = {"haep": 1.0, "spectral": 0.4, "random_text": 1.1}.get(arm, 0.6)
    start = 9.0 + 10.0 * far + 0.3 * seed
    return {"weight_change": far + 0.02 * seed, "start_loss": start,
            "final_loss": start - loss / 100.0 * (start - 3.0),
            "rank_reduction_pct": 0.5 if arm == "gaussian_noise" else 38 + 0.5 * seed}  # fmt: skip


def pool(runs: Sequence[HealRun]) -> Summary:
    return summarize_runs(runs, 0.95, np.random.default_rng(0))


def realistic(models: Sequence[str] = ("nano", "micro"), seeds: int = 3) -> Summary:
    """HAEP partial (first model), irreversible (second), reversible (third); noise without a rank
    recovery; one failed run.
    """
    rng, runs = np.random.default_rng(1), []
    for model, rank in zip(models, (45.0, 2.0, 85.0), strict=False):
        for seed in range(seeds):
            runs.append(simulated_run(rng, model, "haep", seed, rank, 86.0))
            runs.append(simulated_run(rng, model, "gaussian_noise", seed, math.nan, 77.0))
            runs.append(simulated_run(rng, model, "spectral", seed, 1.5, 50.0))
    failed = HealRun("dead", "heal micro haep seed 9", finished=False, failure="out of memory")
    return pool([*runs, failed])


def nasty() -> Summary:
    """Names that HTML, LaTeX, Markdown and matplotlib would each take for something else."""
    rng, runs = np.random.default_rng(2), []
    for name in NASTY:
        for seed in range(2):
            for arm in ("haep", "gaussian_noise", name)[: 3 if name in NASTY[:3] else 1]:
                extra = {"n_params": 1000, "settings": name, "name": name, "run_id": name}
                runs.append(simulated_run(rng, name, arm, seed, 40.0, 80.0, **extra))
    undefined = simulated_run(
        rng, "nano", NASTY[0], 0, math.nan, 60.0, name=NASTY[1], undefined_reason=NASTY[3]
    )
    failed = [HealRun(n, n, finished=False, failure=n) for n in NASTY]
    return pool([*runs, undefined, *failed])


def eventful() -> Summary:
    """Everything that a report has a place for: two replicates of each checkpoint (one of them
    undefined), ten checkpoints, tokens, a repeat, a run that runs, two settings of an arm, sizes.
    """
    rng, runs = np.random.default_rng(4), []
    for model, rank in (("nano", 60.0), ("micro", 30.0), ("70m", 80.0)):
        for seed in range(10 if model == "nano" else 4):
            for arm, shift in (("haep", 0.0), ("gaussian_noise", 12.0), ("random_text", -9.0)):
                runs += [
                    simulated_run(
                        rng, model, arm, seed, rank + shift, 88.0,
                        run_id=f"{model}{arm}{seed}{replicate}", tokens_per_step=1024,
                        noise_match="loss" if arm == "gaussian_noise" else "",
                        fingerprint=f"{model}{arm}{seed}{replicate}",
                    )
                    for replicate in range(2)
                ]  # fmt: skip
    undefined = {"rank_recovery_pct": math.nan}
    path = {"rank_recovery_pct": (math.nan,) * len(STEPS)}
    for place in (0, 6, 7):  # one replicate of a checkpoint, and both of another
        run = runs[place]
        runs[place] = replace(
            run,
            final={**run.final, **undefined},
            trajectory={**run.trajectory, **path},
            undefined_reason=TOO_SMALL,
        )
    runs += [
        simulated_run(
            rng, "micro", "random_text", s, 5.0, 60.0, settings="other", checkpoint=f"o{s}"
        )
        for s in range(3)
    ]
    runs += [
        replace(runs[8], run_id="again"),
        HealRun("pending", "heal 70m haep seed 9", finished=False, running=True),
        HealRun("dead", "heal micro haep seed 9", finished=False, failure="out of memory"),
    ]
    return pool(runs)


def degenerate() -> dict[str, Summary]:
    """Summaries in which something is missing."""
    rng = np.random.default_rng(3)

    def haep(n: int, **changes) -> list[HealRun]:
        return [simulated_run(rng, "nano", "haep", s, 40.0, 80.0, **changes) for s in range(n)]

    undefined = [simulated_run(rng, "nano", "haep", s, math.nan, math.nan) for s in range(3)]
    first = haep(1)[0]
    infinite = {"final": {**first.final, "ppl_improvement_pct": math.nan}}
    unhealed = {
        "steps": (0,),
        "trajectory": dict.fromkeys(first.trajectory, (0.0,)),
        "final": dict.fromkeys(first.trajectory, 0.0),
    }
    twins = [*haep(3), *haep(3, settings="other", checkpoint="x")]
    return {
        "nothing": pool([]),
        "all failed": pool([HealRun("a", "b", finished=False, failure="c")]),
        "one checkpoint": pool(haep(1)),
        "two checkpoints": pool(haep(2)),
        "all undefined": pool(undefined),
        "infinite perplexity": pool(haep(3, **infinite)),
        "no steps": pool(haep(3, **unhealed)),
        "several settings": pool(twins),
        "equal checkpoints": pool(haep(3, final=dict(first.final))),
        "three sizes": realistic(("nano", "micro", "70m")),
    }
