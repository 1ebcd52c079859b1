"""What the intervals leave out: nanos of other pretraining seeds, other probes, another text.

Every state is measured on all probes, so that a probe's own error can be told from that of the
checkpoints. Nothing is tracked.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from findings.parts import PARTS
from findings.protocol import STRONG
from findings.runs import keep_collapsed
from findings.variation import OTHER_PROBE, OTHER_TEXT, OWN_TEXT, PIECES
from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.pretrain import PretrainConfig
from healing.data.corpora import load_corpus
from healing.data.splits import Corpus
from healing.measurements.probe import Measurement, Probe
from healing.models.checkpoints import load_state, read_checkpoint
from healing.models.loading import LoadedModel
from healing.stages.cells.attack import attack_cell
from healing.stages.cells.events import outcome_of
from healing.stages.cells.heal import heal_cell
from healing.stages.cells.heal_outcome import HealCell
from healing.stages.cells.inputs import load_for, resolve_from_model, use_threads
from healing.stages.pretrain import pretrain_cell

Row = dict[str, Any]

PART = PARTS["nano"]
EMBEDDED = 0
"""Pretraining seed of the model that this project brings."""
PRETRAINING_SEEDS = (EMBEDDED, 1, 2, 3, 4)
ATTACK_SEEDS = (0, 1, 2)
OWN_CORPUS = "stdlib"
PROBES = {piece: (128, 4096 * i, 4096) for i, piece in enumerate(PIECES)} | {
    "four times the tokens": (128, 0, 16_384),
    "windows of 64": (64, 0, 4096),
    "windows of 256": (256, 0, 4096),
}
"""Probe → tokens per window, first token and number of tokens in the held-out text. The first is
the protocol's, the next four are other pieces of the same text.
"""


def pretrained(seed: int, folder: pathlib.Path) -> str:
    """A nano of another initialisation and order of text, made once and kept; by the recipe of the
    embedded one. What it is called as ``--model``.
    """
    if seed == EMBEDDED:
        return PART.model
    place = folder / f"nano-{seed}"
    if not place.exists():
        config = PretrainConfig(model="nano", tokens_per_parameter=30.0, seed=seed, threads=1)
        partial = folder / f".nano-{seed}.partial"
        torch.set_num_threads(config.threads)
        outcome = outcome_of(pretrain_cell(config))
        outcome.training.save(partial)
        partial.rename(place)
    return str(place)


def probes(loaded: LoadedModel, corpus: Corpus, other: Corpus | None) -> dict[str, Probe]:
    """By name; windows are cut as those of every run are."""
    found = {}
    for name, (length, first, tokens) in PROBES.items():
        windows = corpus.windows("probe", loaded.tokenizer, length, first + tokens)
        found[name] = Probe(windows[first // length :].clone())
    if other is not None:
        found[OTHER_PROBE] = Probe.of(other, loaded, 4096, 128)
    return found


def attack_settings(model: str, seed: int) -> AttackConfig:
    """HAEP as the protocol's part on nano has it, whatever the model's folder is called."""
    config = AttackConfig(model=PART.model, arm="haep", seed=seed, **PART.shared, **PART.attack)
    use_threads(config)
    return replace(resolve_from_model(config), model=model)


def healing_settings(model: str, seed: int) -> HealConfig:
    """The same for its strong healer, measured at the end."""
    config = HealConfig(
        model=PART.model, seed=seed, healing_steps=PART.steps, measurement_interval=PART.steps,
        **PART.shared, **PART.healers[STRONG],
    )  # fmt: skip
    return replace(resolve_from_model(config), model=model)


def _measured(loaded: LoadedModel, on: Mapping[str, Probe]) -> dict[str, Measurement]:
    return {name: probe.measure(loaded.model) for name, probe in on.items()}


def unit_rows(
    model: str, pretraining: int, attack_seed: int, other_text: str = ""
) -> Iterator[Row]:
    """Rows of one checkpoint: a probe each, for each text that it was healed on.

    Args:
        model: Preset or folder.
        pretraining: Seed of the model.
        attack_seed: Of attack and healing.
        other_text: Folder of another text: a probe on it, and (on the embedded model) a healing.
    """
    corpus = load_corpus(OWN_CORPUS)
    other = load_corpus(other_text) if other_text else None
    texts = {OWN_TEXT: OWN_CORPUS}
    if other_text and pretraining == EMBEDDED:
        texts[OTHER_TEXT] = other_text
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = pathlib.Path(folder) / "collapsed.pt"
        made = outcome_of(attack_cell(attack_settings(model, attack_seed)))
        keep_collapsed(made, checkpoint)
        del made
        for name, text in texts.items():
            config = replace(healing_settings(model, attack_seed), corpus=text)
            _, healed = outcome_of(heal_cell(HealCell(config, str(checkpoint))))
            on = probes(healed, corpus, other)
            after = _measured(healed, on)
            del healed
            loaded = load_for(config)
            before = _measured(loaded, on)
            load_state(loaded, read_checkpoint(checkpoint), checkpoint)
            amid = _measured(loaded, on)
            for probe in on:
                states = {"healthy": before, "collapsed": amid, "healed": after}
                yield {
                    "pretraining_seed": pretraining,
                    "attack_seed": attack_seed,
                    "healing_text": name,
                    "probe": probe,
                    **{f"{s}_rank": f"{m[probe].effective_rank:.7g}" for s, m in states.items()},
                    **{f"{s}_loss": f"{m[probe].loss:.7g}" for s, m in states.items()},
                }
