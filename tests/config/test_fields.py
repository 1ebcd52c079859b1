"""Fields of the configurations: their order, and which of them decide what is one experiment."""

from __future__ import annotations

import pathlib
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from entrypoints._mlproject import STAGES
from healing.config.attack import AttackConfig
from healing.config.fingerprint import (
    LINEAGE,
    NOT_SETTINGS,
    as_params,
    fingerprint,
    not_determining,
    not_separating,
)
from healing.config.heal import HealConfig
from healing.config.options import Options, fields_of, option, ordered_names
from healing.config.resolve import resolve_from_presets
from healing.config.sweep import SweepConfig
from healing.errors import ConfigError
from healing.stages.cells.heal_outcome import HealCell
from healing.stages.cells.sweep_plan import SweepCell
from healing.stages.healing_run.inputs import fresh_attack_config
from healing.stages.launching.cell_configs import attack_config

# Stage → every field, each with its answer: "name" determines numbers and separates runs in a
# summary; "~name" determines numbers, but runs that differ in it are pooled; "-name" does neither.
ANSWERS = {
    "main": "models revision deduped arms seeds noise_match noise_rank control_draws ray_of sham "
    "basin healing_steps healing_lr healer attack_steps "
    "-trajectory_interval corpus tokenizer text_column split_rule batch_size sequence_length "
    "measurement_interval workers -launcher -ray_address -worker_cpus -worker_gpus -worker_memory "
    "-worker_dir -retries -ending_seconds -device -cache_dir -output_dir -verbosity "
    "-checkpoint_interval -checkpoint_minutes -resume_run_id -log_layers -log_images -log_text "
    "-log_model -register_as -system_metrics",
    "attack": "model revision deduped tokenizer corpus max_documents text_column split_rule ~seed "
    "batch_size sequence_length probe_tokens measurement_interval ~measurements threads "
    "-device -cache_dir -output_dir -verbosity arm attack_steps attack_optimizer attack_lr "
    "warmup_steps target_rank_reduction -trajectory_interval catalyst_length "
    "search_steps search_candidates baseline_draws subspace subspace_energy hessian_directions "
    "~alignment ~baseline_interval "
    "curvature_tokens rayleigh_draws -reference_checkpoint -reference_run_id match noise_scale "
    "noise_rank ~noise_draw -direction_checkpoint -direction_run_id -start_checkpoint "
    "-checkpoint_interval -checkpoint_minutes -resume_run_id -log_layers -log_images "
    "-log_model -register_as -system_metrics -dry_run -time_steps",
    "heal": "model revision deduped tokenizer corpus max_documents text_column split_rule ~seed "
    "batch_size sequence_length probe_tokens measurement_interval ~measurements threads "
    "-device -cache_dir -output_dir -verbosity ~collapsed_checkpoint -attack_run_id "
    "-checkpoint_dir "
    "-runs_per_checkpoint -num_runs ~arm -attack_steps -attack_optimizer -attack_lr "
    "-target_rank_reduction -catalyst_length -trajectory_interval "
    "healing_steps healing_lr healing_optimizer healing_momentum healing_warmup healing_decay "
    "healing_method lora_rank lora_alpha sham gradient_checkpointing gradient_clip reset_norms "
    "-healer -save_healed precision precision_mode -parallel -ranks "
    "-checkpoint_interval -checkpoint_minutes -resume_run_id -log_layers -log_images -log_text "
    "-log_model -register_as -system_metrics -dry_run -time_steps",
    "summarize": "experiment filter legacy confidence -figure_style -output_dir -verbosity",
    "import_results": "folder -output_dir -verbosity",
    "pretrain": "model corpus max_documents tokens_per_parameter vocab_size batch_size "
    "sequence_length "
    "text_column split_rule learning_rate weight_decay gradient_clip measurement_interval "
    "~seed threads -output_dir -verbosity "
    "-checkpoint_interval -checkpoint_minutes -resume_run_id -system_metrics",
    "basin": "heal_run_id collapsed_checkpoint healed_checkpoint model revision deduped tokenizer "
    "corpus max_documents ~seed sequence_length probe_tokens curvature_tokens "
    "gradient_batches eigenvalues lanczos_iterations curvature_tolerance density_probes "
    "density_iterations path_points perturbations perturbation_radius escape_steps "
    "text_column split_rule threads -device -output_dir -verbosity -resume_run_id "
    "-system_metrics",
    "tune": "model revision deduped tokenizer corpus max_documents text_column split_rule seed "
    "batch_size sequence_length probe_tokens measurement_interval ~measurements threads "
    "-device -cache_dir -output_dir -verbosity -system_metrics arms seeds attack_steps trials "
    "token_budget rungs sampler pruner startup_trials axes rate_lowest rate_highest grid_rates "
    "sgd_rate_ratio sgd_momentum warmups clips batch_sizes -study",
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_says_whether_it_determines_and_separates(stage):
    cls = STAGES[stage].config
    found = []
    for name in ordered_names(cls):
        sign = "-" if name in not_determining(cls) else "~" if name in not_separating(cls) else ""
        found.append(sign + name)
    assert found == ANSWERS[stage].split()


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_are_logged_in_the_order_of_the_options(stage):
    cls = STAGES[stage].config
    assert list(as_params(cls())) == ordered_names(cls)


def changed(config: Any, name: str) -> Any:
    """The configuration with another value in one text field."""
    values = as_params(config) | {name: "other"}
    if name.startswith("reference"):
        values["arm"] = "gaussian_noise"
    return type(config)(**values)


@pytest.mark.parametrize(
    ("config", "name", "same"),
    [
        (HealConfig(), "output_dir", True),
        (HealConfig(), "attack_run_id", True),
        (HealConfig(), "collapsed_checkpoint", False),
        (HealConfig(), "corpus", False),
        (AttackConfig(arm="gaussian_noise"), "reference_run_id", True),
        (AttackConfig(), "corpus", False),
    ],
)
def test_a_fingerprint_holds_what_determines(config, name, same):
    assert (fingerprint(config) == fingerprint(changed(config, name))) is same


GIVEN: dict[str, Any] = {
    "attack_steps": 3, "attack_optimizer": "sgd", "attack_lr": 0.5, "target_rank_reduction": 0.9,
    "catalyst_length": 32, "trajectory_interval": 5,
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_what_heal_takes_for_its_fresh_attack_reaches_it_and_nothing_else(name):
    config, plain = HealConfig(model="nano", **{name: GIVEN[name]}), HealConfig(model="nano")
    attack, usual = fresh_attack_config(config), fresh_attack_config(plain)
    different = {k for k, v in as_params(attack).items() if v != as_params(usual)[k]}
    assert different == {name}
    assert getattr(attack, name) == GIVEN[name]
    assert usual == AttackConfig(model="nano", corpus="stdlib", batch_size=8, probe_tokens=4096,
                                 threads=1)  # fmt: skip
    assert fingerprint(config) == fingerprint(plain)
    assert HealCell(config, "").sham_cell() == HealCell(plain, "").sham_cell()
    # What is not given stays the attack's business: no number of its presets is logged here.
    assert getattr(resolve_from_presets(plain), name) == "auto"
    assert getattr(resolve_from_presets(config), name) == GIVEN[name]


def test_a_curve_has_fewer_points_where_a_measurement_is_dear():
    found = {m: resolve_from_presets(AttackConfig(model=m)) for m in ("nano", "micro", "1b")}
    assert {m: c.trajectory_interval for m, c in found.items()} == {"nano": 1, "micro": 1, "1b": 5}


@pytest.mark.parametrize(("given", "reached"), [("auto", 1), (7, 7), (0, 0)])
def test_the_points_of_a_curve_that_main_is_given_reach_its_attacks(given, reached):
    sweep = SweepConfig(models="nano", trajectory_interval=given)
    assert attack_config(sweep, SweepCell("nano", "haep", 0), "").trajectory_interval == reached


@pytest.mark.parametrize("source", ["collapsed_checkpoint", "attack_run_id", "checkpoint_dir"])
@pytest.mark.parametrize("name", GIVEN)
def test_a_fresh_attacks_option_beside_a_stored_state_is_refused(name, source):
    flags = [re.escape("--" + word.replace("_", "-")) for word in (name, source)]
    with pytest.raises(ConfigError, match=f"{flags[0]} is of the fresh attack, and {flags[1]} "):
        HealConfig(**{name: GIVEN[name], source: "x"})


def test_heal_checks_the_ranges_of_its_fresh_attack():
    for name, wrong in {"attack_steps": -1, "catalyst_length": 7, "attack_optimizer": "lion",
                        "target_rank_reduction": 1.5, "attack_lr": 0.0,
                        "trajectory_interval": -1}.items():  # fmt: skip
        flag = "--" + name.replace("_", "-")
        with pytest.raises(ConfigError, match=f"{flag} must be"):
            HealConfig(**{name: wrong})
        with pytest.raises(ConfigError, match=f"{flag} must be"):
            AttackConfig(**{name: wrong})


@pytest.mark.parametrize("kind", [AttackConfig, HealConfig, SweepConfig])
def test_an_empty_option_that_is_not_stored_is_read_back_as_it_was(kind):
    """Empty parameters are not stored, and a resumed run takes the default in their place."""
    for field, _, _ in fields_of(kind):
        if field.metadata["determines"] and isinstance(field.default, str) and field.default:
            with pytest.raises(ConfigError):
                kind(**{field.name: ""})


def test_entries_of_a_checkpoint_that_separate_no_runs():
    """Written down from the list that stored checkpoints were pooled by."""
    assert set(NOT_SETTINGS) == {
        "seed", "fingerprint", "attack_run_id", "reference_checkpoint", "reference_run_id",
        "reference_fingerprint", "model_commit", "output_dir", "verbosity", "device", "dry_run",
        "measurements", "cache_dir", "alignment", "baseline_interval", "noise_draw",
        "direction_checkpoint", "direction_run_id", "direction_fingerprint",
        "start_checkpoint", "start_digest", "start_run_id",
        "checkpoint_interval", "checkpoint_minutes", "resume_run_id", "time_steps",
        "log_layers", "log_images", "log_model", "register_as", "system_metrics",
        "trajectory_interval",
    }  # fmt: skip
    # What is named beside the fields is a field of no attack: else it would have two answers.
    assert not set(LINEAGE) & set(ordered_names(AttackConfig))


@dataclass(frozen=True, kw_only=True)
class Place(Options):
    where: str = option("here", "Where.")
    when: str = option("now", "When.")


@dataclass(frozen=True, kw_only=True)
class Size(Options):
    size: int = option(1, "How large.")


@dataclass(frozen=True, kw_only=True)
class Both(Size, Place):
    """Overrides a field of the second base and moves one to the end."""

    order: ClassVar[tuple[Any, ...]] = ("last", ..., "size")
    where: str = option("there", "Elsewhere.")
    last: int = option(0, "Own.")


def test_fields_stand_in_the_order_of_the_bases_unless_moved():
    assert ordered_names(Place) == ["where", "when"]
    assert ordered_names(Both) == ["last", "where", "when", "size"]

    @dataclass(frozen=True, kw_only=True)
    class Further(Both, Place):
        """Inherits no ``order``: that of a base has been applied to the base."""

        more: int = option(0, "More.")

    assert ordered_names(Further) == ["last", "where", "when", "size", "more"]


@pytest.mark.parametrize("order", [("nothing", ...), ("where",)])
def test_an_order_that_cannot_be_followed_is_refused(order):
    @dataclass(frozen=True, kw_only=True)
    class Wrong(Place):
        pass

    Wrong.order = order
    with pytest.raises(ValueError, match=r"not in (list|tuple)"):
        ordered_names(Wrong)


def test_shared_fields_are_declared_once():
    """output_dir and verbosity were once typed out in six files."""
    root = pathlib.Path(__file__).parents[2] / "healing" / "config"
    users = [p.name for p in sorted(root.glob("*.py")) if "verbosity: str" in p.read_text()]
    assert users == ["shared.py"]


@pytest.mark.parametrize(
    ("models", "seeds", "said"),
    [
        ("nano,micro", "auto", "0-4 (nano), 0-1 (micro)"),
        ("70m,160m", "auto", "0-2"),
        ("nano,70m,160m", "auto", "0-4 (nano), 0-2 (70m and 160m)"),
        ("nano,micro", "0-2,nano=7", "0-2,nano=7"),
    ],
)
def test_the_seeds_of_a_sweep_are_said_as_numbers(models, seeds, said):
    assert SweepConfig(models=models, seeds=seeds).seeds_text() == said
