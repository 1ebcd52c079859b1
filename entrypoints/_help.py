"""How ``--help`` is laid out: options in groups, the most used first, and examples."""

from __future__ import annotations

from collections.abc import Collection

from healing.registry import ARMS, MEASUREMENTS

LISTS = {"Arms": ARMS, "Extra measurements": MEASUREMENTS}
"""Title → what has a list of its own below the options: as part of an option's text it would be a
wall of words."""
GROUPS = {
    "What to run": """models model arms arm seeds seed folder experiment filter legacy
        collapsed_checkpoint attack_run_id checkpoint_dir heal_run_id healed_checkpoint healer
        reference_checkpoint reference_run_id direction_checkpoint direction_run_id
        start_checkpoint match noise_match sham basin num_runs runs_per_checkpoint""",
    "How long": """attack_steps healing_steps healing_lr attack_lr learning_rate
        target_rank_reduction tokens_per_parameter trials token_budget batch_size sequence_length
        measurement_interval trajectory_interval""",
    "Text and model": """corpus text_column split_rule tokenizer max_documents revision deduped
        vocab_size probe_tokens measurements""",
    "Results and progress": """output_dir cache_dir verbosity resume_run_id checkpoint_interval
        checkpoint_minutes save_healed log_images log_text log_layers log_model register_as
        system_metrics confidence figure_style""",
    "Memory, time and device": """dry_run time_steps device threads workers precision precision_mode
        gradient_checkpointing parallel ranks""",
    "Cluster": """launcher ray_address worker_cpus worker_gpus worker_memory worker_dir retries
        ending_seconds""",
}
"""Title → options in the order in which they are shown; what stands nowhere is a detail."""
DETAILS = "Details of the method"
HELP = "help"

_RUN = "python -m entrypoints"
EXAMPLES = {
    "main": (
        "main --models nano",
        "main --models nano --arms haep,random_tokens --seeds 0-2",
    ),
    "attack": (
        "attack --model nano",
        "attack --model nano --arm random_tokens --seed 1",
    ),
    "heal": (
        "heal --model nano",
        "heal --attack-run-id ID --sham",
        "heal --model nano --num-runs 3",
    ),
    "summarize": (
        "summarize",
        "summarize --filter \"tags.model = 'nano'\"",
    ),
    "basin": ("basin --heal-run-id ID",),
    "tune": ("tune --model nano",),
    "pretrain": ("pretrain --model nano",),
    "import_results": ("import_results --folder /abs/neuroentropy",),
}
"""Command → examples that need no download."""


def examples(name: str) -> str:
    """Commands to copy, a line each."""
    return "\n".join(f"{_RUN}.{text}" for text in EXAMPLES.get(name, ()))


def with_lists_apart(text: str) -> tuple[str, set[str]]:
    """An option's text without the lists in it, and their titles.

    Args:
        text: As :func:`healing.config.options.help_of` gives it.
    """
    titles = {title for title, known in LISTS.items() if known.describe() in text}
    for title in titles:
        text = text.replace(f"{LISTS[title].describe()}.", f"See {title} below.")
    return text, titles


def grouped(names: Collection[str]) -> list[tuple[str, list[str]]]:
    """Group by group the options that a command has, every one once.

    Args:
        names: Of its options, in the order in which they were declared; ``--help`` ends
            the last group.
    """
    left = [name for name in names if name != HELP]
    found = []
    for title, wanted in GROUPS.items():
        here = [name for name in wanted.split() if name in left]
        left = [name for name in left if name not in here]
        found.append((title, here))
    found.append((DETAILS, left))
    found = [(title, here) for title, here in found if here]
    if HELP in names:
        found[-1][1].append(HELP)
    return found
