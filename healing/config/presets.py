"""Models by name: where each comes from, at which revision, and the defaults that suit it."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass

from healing.config.options import AUTO
from healing.errors import ConfigError

EMBEDDED, PYTHIA, HUB, FOLDER = "embedded", "pythia", "hub", "folder"


@dataclass(frozen=True)
class Preset:
    """What differs by model size; every value can be overridden from the command line.

    Attributes:
        source: ``embedded``, the model's id on the Hugging Face Hub, or a local folder.
        corpus: Where clean text comes from unless the user says otherwise.
        probe_tokens: Tokens of the frozen probe: 4 rows per hidden dimension after the first token
            of every window of 128 is left out; ``auto`` where the hidden size is not known here.
        batch_size: Windows per fine-tuning step.
        attack_lr: AdamW learning rate of the attack.
        attack_sgd_lr: SGD learning rate of the attack.
        attack_steps: Attack budget, in optimiser steps.
        healing_lr: Learning rate of healing.
        sweep_healing_steps: Healing steps per cell of the default ``main`` sweep.
        threads: CPU threads of torch; 0 = torch's default.
        curvature_tokens: Tokens of a Hessian product. It costs as many gradients of them whatever
            the model, so that a large one is asked less: an eighth of the time with both.
        rayleigh_draws: Hessian products along random directions.
        trajectory_interval: Attack steps between the points of its curve. A measurement of a large
            model takes longer than many attack steps.
    """

    source: str
    corpus: str
    probe_tokens: int | str
    batch_size: int
    attack_lr: float
    attack_sgd_lr: float
    attack_steps: int
    healing_lr: float
    sweep_healing_steps: int
    threads: int
    curvature_tokens: int
    rayleigh_draws: int
    trajectory_interval: int


def _pretrained_preset(source: str, probe_tokens: int | str) -> Preset:
    """A model trained elsewhere: Pythia's rates."""
    return Preset(source, "pile", probe_tokens, 8, 1e-3, 1e-1, 100, 1e-4, 500, 0, 256, 8, 5)


PROBE_TOKENS_AT_LEAST = 4096
"""Small models get no smaller probe: its loss would be less certain. A larger one costs what it
gains: with twice as many tokens a measurement every ten steps takes more than a quarter of a run
(docs/performance.md), and a recovery changes by one or two points (docs/method.md).
"""


def probe_tokens_for(hidden: int, sequence_length: int, rows_per_dimension: int = 4) -> int:
    """The fewest whole windows with enough rows, in tokens, at least
    :data:`PROBE_TOKENS_AT_LEAST`.

    A window of L tokens gives L − 1 rows, since position 0 is left out (an attention sink).
    """
    rows = rows_per_dimension * hidden
    windows = -(-rows // (sequence_length - 1))
    at_least = -(-PROBE_TOKENS_AT_LEAST // sequence_length)
    return max(windows, at_least) * sequence_length


_EMBEDDED = {
    "nano": Preset("embedded", "stdlib", 4096, 8, 2e-2, 0.2, 40, 1e-3, 60, 1, 1024, 16, 1),
    "micro": Preset("embedded", "stdlib", 4096, 8, 2e-2, 0.2, 40, 1e-3, 60, 1, 1024, 16, 1),
}
PYTHIA_HIDDEN = {
    "70m": 512,
    "160m": 768,
    "410m": 1024,
    "1b": 2048,
    "1.4b": 2048,
    "2.8b": 2560,
}
_PYTHIA = {
    size: _pretrained_preset(f"EleutherAI/pythia-{size}", probe_tokens_for(hidden, 128))
    for size, hidden in PYTHIA_HIDDEN.items()
}
PRESETS: dict[str, Preset] = {**_EMBEDDED, **_PYTHIA}
MODELS = tuple(PRESETS)
DEFAULT_MODEL = "1b"
MODELS_HELP = (
    f"{', '.join(MODELS)}, a Hub id (owner/name), or a folder or .gguf file with a causal language "
    "model"
)

MAIN = "main"
"""Revision of a Hub model where none is named: its newest weights."""
PYTHIA_STEPS = (0, *(2**i for i in range(10)), *range(1000, 143_001, 1000))
"""Training steps at which Pythia was saved (Biderman et al. 2023, arXiv 2304.01373): 154."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def _folder(model: str) -> str:
    return os.path.abspath(os.path.expanduser(model))


def is_gguf_file(path: str) -> bool:
    """Whether a path is a model in one file."""
    return path.lower().endswith(".gguf") and os.path.isfile(path)


def model_kind(model: str) -> str:
    """``embedded``, ``pythia``, ``hub`` or ``folder``.

    A preset's name is always the preset. What else is a path (``/…``, ``./…``, ``~…``) or an
    existing folder or .gguf file is a folder; other names with one slash are Hub ids.

    Raises:
        ConfigError: It is none of them.
    """
    if model in _EMBEDDED:
        return EMBEDDED
    if model in _PYTHIA:
        return PYTHIA
    is_path = model.startswith((".", "/", "~"))
    if model and (os.path.isdir(_folder(model)) or is_gguf_file(_folder(model))):
        return FOLDER
    if os.path.isfile(_folder(model)):
        raise ConfigError(
            f"--model {model} is a file: name the folder that it is in, or a .gguf file"
        )
    if is_path:
        raise ConfigError(
            f"--model {model}: no folder {_folder(model)} here: name an existing folder with "
            "config.json, weights and tokenizer"
        )
    if _HUB_ID.fullmatch(model) and not re.search(r"--|\.\.", model):
        return HUB
    raise ConfigError(f"unknown model {model!r}: choose one of {MODELS_HELP}")


def preset_for(model: str) -> Preset:
    """The preset of a model; for a Hub id or a folder Pythia's rates and an open probe size.

    Raises:
        ConfigError: It is not a model, see :func:`model_kind`.
    """
    kind = model_kind(model)
    if kind in (EMBEDDED, PYTHIA):
        return PRESETS[model]
    return _pretrained_preset(_folder(model) if kind == FOLDER else model, AUTO)


def canonical_model(model: str) -> str:
    """The name under which a model is logged: folders as absolute paths, others as given."""
    return _folder(model) if model_kind(model) == FOLDER else model


def source_of(model: str, deduped: bool = False) -> str:
    """Where the weights are: ``embedded``, a Hub id or a folder."""
    return preset_for(model).source + ("-deduped" if deduped else "")


def check_source(model: str, revision: str, deduped: bool) -> None:
    """Check what can be checked without the network.

    Raises:
        ConfigError: Unknown model, or a revision or ``--deduped`` that it cannot have.
    """
    kind = model_kind(model)
    if deduped and kind != PYTHIA:
        raise ConfigError(
            f"--deduped chooses between the two trainings of a Pythia size ({', '.join(_PYTHIA)}): "
            f"leave it out with --model {model}"
        )
    if not revision:
        return
    if kind in (EMBEDDED, FOLDER):
        what = "is embedded" if kind == EMBEDDED else "is a local folder"
        raise ConfigError(
            f"--revision {revision} names a revision on the Hub, and --model {model} {what}: "
            "leave --revision out"
        )
    if kind == PYTHIA:
        _check_pythia_revision(revision)
    elif re.search(r"[\s\\]|\.\.|^/|/$", revision):
        raise ConfigError(f"--revision {revision!r} is not a branch, tag or commit of a repository")


def _check_pythia_revision(revision: str) -> None:
    found = re.fullmatch(r"step(\d{1,9})", revision)
    if revision == MAIN or _COMMIT.fullmatch(revision):
        return
    if found and int(found[1]) in PYTHIA_STEPS and revision == f"step{int(found[1])}":
        return
    hint = ""
    if number := re.search(r"\d{1,9}", revision):
        nearest = min(PYTHIA_STEPS, key=lambda step: abs(step - int(number[0])))
        hint = f"; the nearest is step{nearest}"
    raise ConfigError(
        f"--revision {revision} is not one of Pythia's {len(PYTHIA_STEPS)} training checkpoints "
        f"(step0, step1, step2, step4 … step512, step1000, step2000 … step143000), main or a "
        f"commit (40 hex digits){hint}"
    )


def same_revision(one: str, other: str) -> bool:
    """Whether two ``--revision`` values name the same; none is ``main``."""
    return (one or MAIN) == (other or MAIN)


def model_label(model: str, revision: str = "", deduped: bool = False) -> str:
    """How runs are titled, tagged and grouped, another one for another model: ``70m``,
    ``70m-deduped``, ``70m@step1000``, ``owner/name``; a folder by its last part and a hash of its
    path.
    """
    name = model
    if os.path.isabs(model):
        last = re.sub(r"[^\w.-]+", "-", os.path.basename(model), flags=re.ASCII)[:40]
        name = f"{last or 'folder'}-{_short_hash(model)}"
    at = "" if same_revision(revision, MAIN) else f"@{revision}"
    return name + ("-deduped" if deduped else "") + at


def model_slug(label: str) -> str:
    """A label of :func:`model_label` in names of folders and files: readable, safe, and another one
    for another label. ``owner/name`` becomes ``owner--name``, as no Hub id holds ``--``.
    """
    name, at, revision = label.partition("@")
    whole = name.replace("/", "--") + at + revision
    safe = re.sub(r"[^\w.@-]+", "-", whole, flags=re.ASCII)[:120]
    # A branch may hold characters that no folder can: then a hash keeps it apart.
    return safe if safe == whole else f"{safe}-{_short_hash(label)}"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
