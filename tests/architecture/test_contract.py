"""Contracts: layering, one declaration per parameter, one place for versions, safe loading."""

from __future__ import annotations

import ast
import graphlib
import json
import pathlib
import pickle
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable

import click
import pytest
import yaml

from entrypoints import attack, basin, heal, import_results, main, pretrain, summarize, tune
from entrypoints._mlproject import render
from healing.config.attack import AttackConfig
from healing.config.basin import BasinConfig
from healing.config.fingerprint import as_params, fingerprint
from healing.config.heal import HealConfig
from healing.config.import_results import ImportConfig
from healing.config.options import fields_of, flag_name
from healing.config.presets import MODELS, preset_for
from healing.config.pretrain import PretrainConfig
from healing.config.resolve import resolve_from_presets
from healing.config.summarize import SummarizeConfig
from healing.config.sweep import SweepConfig
from healing.config.tune import TuneConfig
from healing.errors import ConfigError
from tests.conftest import ROOT

STAGES = {
    "main": (main.main, SweepConfig),
    "attack": (attack.main, AttackConfig),
    "heal": (heal.main, HealConfig),
    "summarize": (summarize.main, SummarizeConfig),
    "import_results": (import_results.main, ImportConfig),
    "pretrain": (pretrain.main, PretrainConfig),
    "basin": (basin.main, BasinConfig),
    "tune": (tune.main, TuneConfig),
}

# The architecture: what a package (or module of the ground floor) may import beside itself. A new
# file needs no edit here; a new package does.
GROUND = {"errors", "randomness", "registry", "progress", "kept_files"}
MAY_IMPORT = {
    "errors": set(),
    "randomness": set(),
    "registry": {"errors"},
    "progress": set(),
    "kept_files": set(),
    "config": {"errors", "registry"},
    "data": {*GROUND, "config"},
    "curvature": GROUND,
    "models": {*GROUND, "config", "data"},
    "measurements": {*GROUND, "config", "data", "models"},
    "training": {*GROUND, "config", "data", "models", "measurements"},
    "attacks": {*GROUND, "config", "data", "curvature", "models", "measurements", "training"},
    "statistics": {
        "errors", "registry", "config", "measurements.recovery", "measurements.diagnosis",
    },
    "tracking": {"errors"},
    "reporting": {
        "errors", "registry", "config", "curvature", "measurements.diagnosis",
        "measurements.recovery", "measurements.spectrum", "statistics",
    },
    "stages": {
        *GROUND, "config", "data", "curvature", "models", "measurements", "training", "attacks",
        "statistics", "tracking", "reporting",
    },
    "predecessor": {
        *GROUND, "config", "measurements", "statistics", "tracking", "reporting", "stages",
    },
    "results": {"errors", "models", "statistics", "tracking", "reporting"},
    "api": {
        *GROUND, "config", "data", "models", "measurements", "statistics", "tracking", "reporting",
        "stages", "results",
    },
}  # fmt: skip
# Where a library may stand; others may stand anywhere. click belongs to the entry points.
ONLY_IN = {
    "mlflow": ("tracking",),
    "click": (),
    "matplotlib": ("reporting.plots",),
    "jinja2": ("reporting", "models"),
    "peft": ("training.methods", "models"),
    "tqdm": ("stages",),
    "optuna": ("stages.tuning",),
    "ray": ("stages.launching",),
    "datasets": ("data",),
    "huggingface_hub": ("data", "models"),
    "scipy": ("curvature", "statistics", "reporting.plots", "predecessor"),
}
MOST_LINES = 400
MOST_FILES = 16


def modules() -> dict[str, pathlib.Path]:
    """Name below ``healing`` → file; packages under their own name."""
    root = ROOT / "healing"
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if parts:
            found[".".join(parts)] = path
    return found


def imports(path: pathlib.Path) -> set[str]:
    """Everything a file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(name: str) -> set[str]:
    """Modules of this project that one of its modules imports, below ``healing``."""
    found = {i for i in imports(modules()[name]) if i.startswith("healing.")}
    return {i.removeprefix("healing.") for i in found} & set(modules())


def below(name: str, places: Iterable[str]) -> bool:
    """Whether a module is one of the places or inside of one."""
    return any(name == place or name.startswith(f"{place}.") for place in places)


def test_every_module_is_in_a_package_of_the_table():
    assert {name.split(".")[0] for name in modules()} <= set(MAY_IMPORT)


@pytest.mark.parametrize("name", modules())
def test_a_package_imports_what_the_table_says(name):
    package = name.split(".")[0]
    allowed = {package, *MAY_IMPORT[package]}
    # `from healing.measurements import recovery` names the package too.
    parents = {place.split(".")[0] for place in allowed}
    wrong = {i for i in own_imports(name) - parents if not below(i, allowed)}
    assert not wrong, f"{name} imports {wrong}: the table in this file says what it may"


def test_the_table_has_no_circle():
    graph = {p: {i.split(".")[0] for i in allowed} for p, allowed in MAY_IMPORT.items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_no_circle_inside_any_package():
    graph = {name: own_imports(name) for name in modules()}
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_stand_where_the_table_says(library):
    users = {n for n in modules() if library in {i.split(".")[0] for i in imports(modules()[n])}}
    assert {n for n in users if not below(n, ONLY_IN[library])} == set()


def reached(name: str) -> set[str]:
    """Everything that a module imports, directly or not."""
    found, waiting = set(), [name]
    while waiting:
        for i in own_imports(waiting.pop()) - found:
            found.add(i)
            waiting.append(i)
    return found


@pytest.mark.parametrize("name", [n for n in modules() if n.startswith("stages.cells.")])
def test_cells_are_pure(name):
    """They reach neither MLflow nor anything that writes for people."""
    assert {i.split(".")[0] for i in reached(name)} & {"tracking", "reporting"} == set()
    assert {i for i in reached(name) if i.startswith("stages.") and "cells" not in i} == set()


def test_nothing_needs_the_predecessor_but_its_entry_points():
    users = {n for n in modules() if below(n, ["predecessor"]) is False} - {"predecessor"}
    assert {n for n in users if any(below(i, ["predecessor"]) for i in own_imports(n))} == set()


WITHOUT_TORCH = (
    "import healing",
    "import healing.config.sweep, healing.config.heal, healing.config.basin",
    "import healing.statistics.summary, healing.statistics.power",
    "import healing.reporting.html, healing.reporting.paper",
    "import entrypoints.heal, entrypoints.main, entrypoints.attack",
)


@pytest.mark.parametrize("statement", WITHOUT_TORCH)
def test_torch_is_not_imported_before_it_is_needed(statement):
    code = f"{statement}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_configuration_needs_only_the_standard_library():
    for name, path in modules().items():
        if below(name, ["config"]):
            roots = {i.split(".")[0] for i in imports(path)} - {"healing"}
            assert roots <= sys.stdlib_module_names, name


@pytest.mark.parametrize("name", modules())
def test_files_are_short(name):
    assert len(modules()[name].read_text().splitlines()) <= MOST_LINES


def test_packages_can_be_seen_at_a_glance():
    counts = Counter(name.rpartition(".")[0] for name in modules())
    assert {package: n for package, n in counts.items() if package and n > MOST_FILES} == {}


def project() -> dict:
    return yaml.safe_load((ROOT / "MLproject").read_text())


def test_every_stage_is_an_entry_point():
    assert set(project()["entry_points"]) == set(STAGES)
    named = {p.stem for p in (ROOT / "entrypoints").glob("[a-z]*.py")}
    assert named == {*STAGES, "sync", "ui"}  # which make no run


@pytest.mark.parametrize("stage", STAGES)
def test_mlproject_parameters_are_click_options_are_config_fields(stage):
    command, config_class = STAGES[stage]
    entry = project()["entry_points"][stage]
    fields = {field.name: field.default for field, _, _ in fields_of(config_class)}
    options = {p.name: p.default for p in command.params if isinstance(p, click.Option)}
    assert options == fields
    parameters = {name: spec["default"] for name, spec in entry["parameters"].items()}
    assert list(parameters) == list(fields)
    assert parameters == fields


def test_mlproject_is_the_generated_one():
    assert (ROOT / "MLproject").read_text() == render()


@pytest.mark.parametrize("stage", STAGES)
def test_mlproject_command_passes_every_parameter(stage):
    entry = project()["entry_points"][stage]
    words = shlex.split(entry["command"])
    assert words[:3] == ["python", "-m", f"entrypoints.{stage}"]
    expected = [w for name in entry["parameters"] for w in (flag_name(name), "{" + name + "}")]
    assert words[3:] == expected


@pytest.mark.parametrize("stage", STAGES)
def test_types_that_mlflow_would_act_on_are_not_used(stage):
    """`path` and `uri` parameters fail on names that do not exist yet."""
    kinds = {s["type"] for s in project()["entry_points"][stage]["parameters"].values()}
    assert kinds <= {"string", "int", "float"}


@pytest.mark.parametrize("stage", STAGES)
def test_configurations_are_frozen_and_picklable(stage):
    config = STAGES[stage][1]()
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(AttributeError):
        config.verbosity = "quiet"


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_is_read(stage):
    """An unread field is a promise that nothing keeps."""
    text = "\n".join(p.read_text() for n, p in modules().items() if n != "config.shared")
    for field, _, _ in fields_of(STAGES[stage][1]):
        used = re.search(rf"(config|self|settings|cell\.config|resolved)\.{field.name}\b", text)
        listed = re.search(rf'"{field.name}"', text)
        assert used or listed, f"{field.name} of {stage} is never read"


def test_versions_have_one_place():
    pins = dict(
        line.split("==")
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    assert pins["torch"] == "2.13.0"
    assert pins["mlflow"] == "3.17.2"
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())["dependencies"]
    assert conda[-1] == {"pip": ["-r requirements.txt"]}
    assert 'dependencies = { file = ["requirements.txt"] }' in (ROOT / "pyproject.toml").read_text()


def test_installed_versions_are_the_pinned_ones():
    from importlib.metadata import version

    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if "==" in line and not line.startswith("#"):
            name, pin = line.strip().split("==")
            assert version(name).split("+")[0] == pin


def test_torch_load_is_always_safe_and_state_dicts_strict():
    for name, path in modules().items():
        text = path.read_text()
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, name
        assert "strict=False" not in text, name


def test_nothing_catches_everything():
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else ""
                reraises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
                assert caught not in ("", "Exception", "BaseException") or reraises, name


def test_resolving_leaves_no_auto_but_the_device():
    for model in MODELS:
        for config in (AttackConfig(model=model), HealConfig(model=model)):
            left = {k for k, v in as_params(resolve_from_presets(config)).items() if v == "auto"}
            assert left == {"device", *config.unresolved}


def test_what_the_user_passes_wins():
    config = resolve_from_presets(HealConfig(model="nano", healing_lr=0.5, batch_size=3))
    assert (config.healing_lr, config.batch_size) == (0.5, 3)
    assert (
        resolve_from_presets(HealConfig(model="nano")).healing_lr == preset_for("nano").healing_lr
    )
    assert resolve_from_presets(HealConfig(model="1b")).healing_lr == 1e-4


def test_the_attack_rate_follows_the_optimiser():
    for model in ("nano", "70m"):
        preset = preset_for(model)
        assert resolve_from_presets(AttackConfig(model=model)).attack_lr == preset.attack_lr
        sgd = resolve_from_presets(AttackConfig(model=model, attack_optimizer="sgd"))
        assert sgd.attack_lr == preset.attack_sgd_lr != preset.attack_lr
    given = AttackConfig(model="nano", attack_optimizer="sgd", attack_lr=0.5)
    assert resolve_from_presets(given).attack_lr == 0.5


def test_heal_defaults_of_the_experiment():
    config = HealConfig()
    assert resolve_from_presets(config).model == "1b"
    assert (config.healing_steps, config.measurement_interval, config.num_runs) == (500, 10, 1)
    assert (config.healing_optimizer, config.gradient_checkpointing) == ("adamw", False)
    assert (config.gradient_clip, config.device) == (0, "auto")
    assert config.output_dir == "./experiments/results"


def test_probe_presets_have_four_rows_per_dimension():
    hidden = {"nano": 48, "micro": 128, "70m": 512, "160m": 768, "410m": 1024, "1b": 2048,
              "1.4b": 2048, "2.8b": 2560}  # fmt: skip
    for model, size in hidden.items():
        tokens = preset_for(model).probe_tokens
        assert tokens % 128 == 0
        assert tokens * 127 // 128 >= 4 * size  # the first token of each window is left out


def test_fingerprint_follows_results_not_places():
    config = resolve_from_presets(HealConfig(model="nano"))
    same = resolve_from_presets(
        HealConfig(model="nano", output_dir="/elsewhere", verbosity="quiet")
    )
    assert fingerprint(config) == fingerprint(same)
    assert fingerprint(config) != fingerprint(
        resolve_from_presets(HealConfig(model="nano", seed=1))
    )
    assert json.loads(json.dumps(as_params(config))) == as_params(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HealConfig(healing_steps=-1), "--healing-steps must be at least 0, got -1"),
        (lambda: HealConfig(healing_lr=0.0), "--healing-lr must be above 0, got 0"),
        (lambda: HealConfig(healing_lr="fast"), "--healing-lr must be a number or 'auto'"),
        (lambda: HealConfig(seed=1.5), "--seed must be a whole number"),
        (lambda: HealConfig(runs_per_checkpoint=4), "at least 1 and at most 3, got 4"),
        (lambda: HealConfig(healing_optimizer="lion"), "must be one of adamw, sgd; got 'lion'"),
        (lambda: HealConfig(gradient_clip=float("nan")), "must be a finite number"),
        (lambda: HealConfig(gradient_checkpointing="yes"), "must be of type bool"),
        (
            lambda: HealConfig(collapsed_checkpoint="a", checkpoint_dir="b"),
            "--collapsed-checkpoint and --checkpoint-dir exclude each other",
        ),
        (
            lambda: AttackConfig(arm="haep", reference_checkpoint="a"),
            "--reference-checkpoint belongs to --arm gaussian_noise, low_rank_noise, ray, ",
        ),
        (
            lambda: AttackConfig(arm="gaussian_noise", match="loss"),
            "--match loss needs the attack to match: give --reference-run-id or",
        ),
        (
            lambda: AttackConfig(
                arm="gaussian_noise", reference_run_id="a", reference_checkpoint="b"
            ),
            "--reference-checkpoint and --reference-run-id exclude each other",
        ),
        (
            lambda: AttackConfig(warmup_steps=3, attack_optimizer="sgd"),
            "--warmup-steps prepares AdamW's second moment: leave it out with",
        ),
        (lambda: SweepConfig(models="nano,giant"), "unknown model 'giant': choose one of nano"),
        (lambda: SweepConfig(arms=""), "--arms is empty"),
        (lambda: SweepConfig(seeds="0,x"), "--seeds must be whole numbers"),
        (lambda: SweepConfig(seeds="1,1"), "--seeds names one entry twice"),
        (lambda: SweepConfig(seeds="0-2,1"), "--seeds names one entry twice"),
        (lambda: SweepConfig(seeds="3-1"), "--seeds must be whole numbers from 0 or ranges"),
        (lambda: SweepConfig(seeds="nano=0-4"), "--seeds has none for model micro"),
        (lambda: SweepConfig(models="nano", seeds="0,micro=1"), "names micro, which is not among"),
        (lambda: SweepConfig(seeds="nano=0,micro=1,nano=2"), "--seeds names model nano twice"),
        (
            lambda: SweepConfig(arms="haep,ray"),
            "--arms names ray, whose direction is that of random_text (--ray-of): add random_text",
        ),
        (
            lambda: SweepConfig(arms="haep,sharpened_spectrum", noise_match="norm"),
            "--noise-match norm is not for sharpened_spectrum of --arms: choose from auto, rank,",
        ),
        (lambda: resolve_from_presets(HealConfig(model="big")), "unknown model 'big'"),
    ],
)
def test_bad_parameters_are_named(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)
