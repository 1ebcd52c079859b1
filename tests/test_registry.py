"""Registries: names from files and entry points, facts without imports, faults that are named."""

from __future__ import annotations

import gc
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from entrypoints._docs import METHOD, render
from healing import registry
from healing.config.arm_tags import SHAM_ARM, arm_label, arm_role, arm_tags, arms_of
from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.resolve import resolve_from_presets
from healing.config.sweep import SweepConfig
from healing.errors import ConfigError
from healing.registry import ARMS, MEASUREMENTS, METHODS, ROLES, Registry, parse
from healing.stages.cells.code_digest import closure, code_digest
from tests.conftest import ROOT, forget_plug_ins

PRUNE = '''
    """Set the smallest weights to zero."""
    import heavy_that_is_not_there
    LABEL = "pruning"
    ROLE: str = "treatment"
    COMPUTED = 1 + len("x")
    def make(context): ...
    '''


def test_the_folder_of_a_registry_holds_its_names_and_nothing_else():
    assert set(ARMS.names()) == {
        "haep", "haep_oracle", "spectral", "random_tokens", "random_text", "gaussian_noise",
        "low_rank_noise", "ray", "reinitialised", "rotated_change", "sharpened_spectrum", "none",
    }  # fmt: skip
    assert METHODS.names() == ("full", "lora")
    for own in (ARMS, METHODS, MEASUREMENTS):
        folder = ROOT / own.package.replace(".", "/")
        assert {p.stem for p in folder.glob("*.py")} - {"__init__"} == set(own.names())
        for name in own.names():
            own.load(name)
            assert own.facts(name).help, name
            assert registry.NAME.fullmatch(name)


def test_arms_come_by_role_and_each_role_that_code_asks_for_is_there():
    roles = [arm_role(arm) for arm in ARMS.names()]
    assert roles == sorted(roles, key=list(ROLES).index)
    assert set(roles) == set(ROLES)
    assert arms_of("sham") == (SHAM_ARM,)
    assert [a for a in ARMS.names() if arm_role(a) == "treatment"] == ["haep"]


def test_facts_of_a_plug_in_are_read_without_importing_it(plug_ins):
    plug_ins("prune", PRUNE)
    facts = ARMS.facts("prune")
    assert facts.help == "Set the smallest weights to zero"
    assert facts.constants == {"LABEL": "pruning", "ROLE": "treatment"}  # what is no literal is not
    assert not facts.built_in
    assert "plug_in_0" not in sys.modules
    assert ARMS.names()[:2] == ("haep", "prune")
    assert "prune: Set the smallest weights to zero" in ARMS.describe()
    assert AttackConfig(arm="prune").arm == "prune"
    assert SweepConfig(arms="haep,prune").arm_list() == ("haep", "prune")
    assert arm_tags("prune") == {"arm_role": "treatment", "arm_label": "pruning"}


def test_roles_and_labels_of_arms_that_are_not_installed_are_those_of_their_runs():
    assert arm_role("gone", "treatment") == "treatment"
    assert arm_label("gone", "Gone") == "Gone"
    assert arm_role("gone") == arm_role("gone", "a role of tomorrow") == "control"
    assert arm_label("gone") == "gone"
    assert arm_role("haep", "control") == "control"  # the run's own word counts
    assert arm_tags("gone") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PRUNE, r"arm 'prune' of plug_in_0: plug_in_0 cannot be imported \(No module named 'heavy"),
        ('"""X."""\n', "arm 'prune' of plug_in_0: plug_in_0 lacks make"),
        ('"""X."""\nROLE = "boss"\n', "arm 'prune' of plug_in_0: ROLE is 'boss', not one of treat"),
        ('"""X."""\nROLE = "sham"\n', "arm 'prune' of plug_in_0: the sham is the healthy model"),
        ('"""X."""\nCOLOUR = "red"\n', "arm 'prune' of plug_in_0: COLOUR is 'red'"),
        ('"""X."""\nMARKER = "oo"\n', "arm 'prune' of plug_in_0: MARKER is 'oo'"),
        (
            '"""X."""\nMATCHES = ("all",)\n',
            r"plug_in_0: MATCHES is \('all',\), not a tuple of some of",
        ),
        (
            '"""X."""\nNEEDS = "reference"\n',
            "plug_in_0: NEEDS is 'reference', not a tuple of some of",
        ),
        (
            "def make(:\n",
            r"arm 'prune' of plug_in_0: plug_in_0 cannot be imported \(invalid syntax",
        ),
    ],
)
def test_a_plug_in_that_cannot_be_used_is_named(plug_ins, text, message):
    plug_ins("prune", text)
    assert "prune" in ARMS.names()  # help and other arms go on
    ARMS.load("none")
    with pytest.raises(ConfigError, match=message):
        ARMS.load("prune")


def test_a_plug_in_that_is_not_there_is_named(plug_ins):
    plug_ins("prune", PRUNE).unlink()
    assert "is not found" in ARMS.facts("prune").help
    with pytest.raises(ConfigError, match="'prune' of plug_in_0: plug_in_0 cannot be imported"):
        ARMS.load("prune")


def test_built_in_names_win_and_whoever_takes_one_is_refused(plug_ins):
    plug_ins("haep", PRUNE)
    assert ARMS.facts("haep").built_in
    with pytest.raises(ConfigError, match="arm 'haep' of plug_in_0: built in has the same name"):
        AttackConfig(arm="haep")
    with pytest.raises(ConfigError, match="uninstall plug_in_0"):
        SweepConfig(arms="haep")
    assert AttackConfig(arm="spectral")


def test_two_plug_ins_of_one_name_are_refused(plug_ins):
    plug_ins("prune", PRUNE)
    plug_ins("prune", PRUNE)
    with pytest.raises(ConfigError, match="plug_in_1: plug_in_0 has the same name"):
        ARMS.check("prune")


@pytest.mark.parametrize("name", ["Prune", "../x", "9lives", "a" * 32, "a b", ""])
def test_names_that_no_folder_could_take_are_refused(plug_ins, name):
    plug_ins(name, PRUNE)
    assert name not in ARMS.names()
    with pytest.raises(ConfigError, match="a name has at most 31 of a-z, 0-9 and _"):
        ARMS.check(name)


def test_an_entry_point_names_a_module(plug_ins):
    plug_ins("prune", PRUNE, value="plug_in_0:make")
    with pytest.raises(ConfigError, match="must name a module, not plug_in_0:make"):
        ARMS.check("prune")


def test_unknown_names_are_listed():
    with pytest.raises(ConfigError, match="unknown healing method 'x': choose one of full, lora"):
        METHODS.facts("x")
    with pytest.raises(ConfigError, match="--measurements: unknown x; choose from accuracy"):
        AttackConfig(measurements="accuracy,x")


def test_a_registry_of_its_own(tmp_path, monkeypatch):
    """Nothing in the class knows arms."""
    package = tmp_path / "some_tools"
    package.mkdir()
    (package / "__init__.py").write_text('"""Tools."""\n')
    (package / "saw.py").write_text('"""Cuts.\n\nMore."""\nWEIGHT: float = 1.5\n')
    (package / "axe.py").write_text('"""Splits wood."""\nWEIGHT = 3\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    tools = Registry("some_tools", "no.such.group", "tool", (), lambda f: -f.get("WEIGHT", 0))
    assert tools.names() == ("axe", "saw")
    assert tools.describe() == "axe: Splits wood; saw: Cuts"
    assert tools.facts("saw").get("WEIGHT", 0) == 1.5
    assert "some_tools.axe" not in sys.modules


def test_names_and_facts_need_no_torch():
    code = (
        "from healing.registry import ARMS, METHODS, MEASUREMENTS; import sys\n"
        "print(ARMS.describe(), METHODS.describe(), MEASUREMENTS.describe())\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr


# --- code digests --------------------------------------------------------------------------

CELL = "healing.stages.cells.attack"


def test_an_arm_is_in_its_own_digest_and_in_no_other():
    reached = closure(CELL)
    assert not any(name.startswith(("healing.attacks.arms.", "healing.training.methods."))
                   for name in reached)  # fmt: skip
    haep, noise = (closure(CELL, ARMS.module(name)) for name in ("haep", "gaussian_noise"))
    assert "healing.attacks.arms.haep" in haep
    assert "healing.attacks.arms.haep" not in noise
    assert "healing.attacks.damage_matching" in noise
    assert "healing.attacks.damage_matching" not in haep
    # The oracle makes its sequence by haep's own code.
    assert "healing.attacks.arms.haep" in closure(CELL, ARMS.module("haep_oracle"))


def test_a_plug_in_counts_by_its_file_and_by_what_it_imports(plug_ins, tmp_path):
    own = code_digest(CELL, ARMS.module("none"))
    path = plug_ins("prune", '"""X."""\nfrom healing.attacks import noise\nSHARE = 0.5\n')
    assert code_digest(CELL, ARMS.module("none")) == own  # one more arm changes no other
    before = code_digest(CELL, ARMS.module("prune"))
    assert "healing.attacks.noise" in closure("plug_in_0")
    path.write_text(path.read_text().replace("0.5", "0.6"))
    forget_plug_ins()
    assert code_digest(CELL, ARMS.module("prune")) != before


def test_the_package_of_a_plug_in_counts_with_it(tmp_path, monkeypatch):
    package = tmp_path / "tool_box"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "arm.py").write_text("from . import shared\nfrom .deeper import x\n")
    (package / "shared.py").write_text("import json\n")
    (package / "deeper.py").write_text("import tool_box.last\nx = 1\n")
    (package / "last.py").write_text("y = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert set(closure("tool_box.arm")) == {
        "tool_box", "tool_box.arm", "tool_box.shared", "tool_box.deeper", "tool_box.last",
    }  # fmt: skip


# --- healing methods and derived texts -----------------------------------------------------


def test_the_learning_rate_of_a_method_is_its_ratio(plug_ins):
    plug_ins("slow", '"""X."""\nRATE_RATIO = 0.5\nKEEPS_WEIGHTS = True\n', "llm_healing.methods")
    rate = resolve_from_presets(HealConfig(model="nano")).healing_lr
    assert (
        resolve_from_presets(HealConfig(model="nano", healing_method="lora")).healing_lr
        == 10.0 * rate
    )
    assert (
        resolve_from_presets(HealConfig(model="nano", healing_method="slow")).healing_lr
        == 0.5 * rate
    )
    with pytest.raises(ConfigError, match="--healing-method slow keeps the weights"):
        HealConfig(healing_method="slow", precision="bf16", precision_mode="pure")
    with pytest.raises(ConfigError, match="AdamW's for --healing-method slow: give a number"):
        HealConfig(healing_method="slow", healing_optimizer="sgd")
    assert HealConfig(healing_method="full", healing_optimizer="sgd")


def test_tables_of_the_docs_are_the_generated_ones():
    assert METHOD.read_text(encoding="utf-8") == render(METHOD.read_text(encoding="utf-8"))


def test_sources_are_parsed_by_one_thread_at_a_time():
    """CPython 3.11 fails where a garbage collection lets another thread into its parser."""

    class Slow:
        def __del__(self):
            for _ in range(50):
                pass

    def parse_often(_):
        for _ in range(20):
            cycle = [Slow()]
            cycle.append(cycle)
            parse(source)

    source = 4 * pathlib.Path(registry.__file__).read_text().replace("from __future__", "#")
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(parse_often, range(4)))
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)
