"""What spectra cost: over the bare forward pass, and beside an SVD of all rows.

python -m benchmarks.spectra [--model 70m] [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.shapes import loaded_model
from benchmarks.table import Row, at_most, ratios, rounds, save, show
from healing.config.resolve import resolve_from_presets
from healing.config.shared import BaseConfig
from healing.measurements.covariance import MomentAccumulator
from healing.measurements.probe import TOKENS_PER_FORWARD, Probe
from healing.measurements.spectrum import Spectrum
from healing.models.blocks import block_outputs
from healing.stages.cells.inputs import cached_corpus, use_threads

TARGETS = {"70m": 0.15}
"""Most that spectra should add, by size."""


@torch.no_grad()
def bare_forward(model: torch.nn.Module, probe: Probe) -> None:
    """Logits of every probe token, dropped at once: no loss, no hidden states."""
    for chunk in probe.windows.split(TOKENS_PER_FORWARD // probe.windows.shape[1]):
        model(input_ids=chunk)


@torch.no_grad()
def hidden_states(model: torch.nn.Module, probe: Probe) -> torch.Tensor:
    """Of the middle block, (windows, tokens, hidden)."""
    parts = []
    with block_outputs(model) as outputs:
        for chunk in probe.windows.split(8):
            model.base_model(input_ids=chunk)
            parts.append(outputs[len(outputs) // 2])
    return torch.cat(parts)


def gram(hidden: torch.Tensor) -> Spectrum:
    """As the probe does it."""
    accumulator = MomentAccumulator()
    for part in hidden.split(16):
        accumulator.add(part)
    return accumulator.finish().spectrum()


def svd(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Singular values of all centred rows at once."""
    rows = hidden[:, 1:].flatten(0, 1).to(dtype)
    return torch.linalg.svdvals(rows - rows.mean(0))


def added_row(name: str, added: list[float]) -> Row:
    """What spectra add, beside the target where the size has one."""
    what = f"{name}: what spectra of all blocks add to a bare forward pass"
    if name in TARGETS:
        return at_most(what, added, "of its time", TARGETS[name])
    return Row(what, tuple(added), "of its time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="70m", help="micro, nano, or a Pythia size's shape")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    config = resolve_from_presets(BaseConfig(model=options.model, corpus="stdlib"))
    use_threads(config)
    loaded = loaded_model(options.model)
    corpus = cached_corpus("stdlib", config.max_documents)
    probe = Probe.of(corpus, loaded, int(config.probe_tokens), config.sequence_length)
    seconds = rounds(
        {
            "forward": lambda: bare_forward(loaded.model, probe),
            "loss": lambda: [probe.loss(loaded.model)],
            "measure": lambda: probe.measure(loaded.model),
        },
        options.rounds,
    )
    hidden = hidden_states(loaded.model, probe)
    decompositions = rounds(
        {
            "gram": lambda: gram(hidden),
            "svd64": lambda: svd(hidden, torch.float64),
            "svd32": lambda: svd(hidden, torch.float32),
        },
        options.rounds,
    )
    exact = svd(hidden, torch.float64)
    kept = gram(hidden)
    error = float(((kept.singular_values - exact).abs() / exact).max())
    name = options.model
    added = [
        (whole - loss) / forward
        for whole, loss, forward in zip(
            seconds["measure"], seconds["loss"], seconds["forward"], strict=True
        )
    ]
    rows = [
        added_row(name, added),
        Row(
            f"{name}: loss and spectra / bare forward pass (logits alone)",
            tuple(ratios(seconds["measure"], seconds["forward"])),
            "of its time",
        ),
        Row(
            f"{name}: SVD of a block's rows in float64 / Gram",
            tuple(ratios(decompositions["svd64"], decompositions["gram"])),
            "of its time",
        ),
        Row(
            f"{name}: SVD in float32 / Gram in float64",
            tuple(ratios(decompositions["svd32"], decompositions["gram"])),
            "of its time",
        ),
    ]
    show(
        f"{name}: {probe.windows.numel()} probe tokens, {torch.get_num_threads()} thread(s); "
        f"largest relative difference of a singular value, Gram against SVD: {error:.1e} "
        f"({kept.dropped_share:.1%} of the rows dropped)",
        rows,
    )
    save(options.json, rows)


if __name__ == "__main__":
    main()
