"""Attack and heal a model of your own, from Python, with nothing tracked.

    python examples/own_model.py ./my-model ./my-text.txt

Without arguments it takes the embedded model ``nano`` and the text that comes with Python, and is
done in half a minute.
"""

from __future__ import annotations

import sys

import healing


def main(model: str = "nano", corpus: str = "auto", steps: int = 60) -> float:
    """Print how far the model recovers; returns the rank recovery in percent."""
    collapsed = healing.attack(model, "random_tokens", corpus=corpus, progress=False)
    healed = healing.heal(collapsed, steps=steps, corpus=corpus, progress=False)
    for row in healed.trajectory:
        print(f"step {row['step']:3d}  rank {row['effective_rank']:6.2f}  loss {row['loss']:6.3f}")
    print(healed.description)
    print(f"{', '.join(healed.figures)} in {healed.folder / 'plots'}")
    return float(healed.summary()["rank_recovery_pct"])


if __name__ == "__main__":
    main(*sys.argv[1:3])
