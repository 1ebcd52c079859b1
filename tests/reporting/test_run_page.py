"""The page of a run: its command gives the same configuration again, and copies as it stands."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from entrypoints import attack, heal, main
from healing.config.attack import AttackConfig
from healing.config.fingerprint import fingerprint
from healing.config.heal import HealConfig
from healing.config.resolve import resolve_from_presets
from healing.config.sweep import SweepConfig
from healing.reporting.phrases import quantity_text
from healing.reporting.run_page import WIDTH, command, links, page, repeat, settings
from tests.shell_words import words_of


@dataclass(frozen=True)
class Code:
    url: str = "https://example.org/owner/llm-healing.git"
    commit: str = "c" * 40
    is_dirty: bool = False
    is_published: bool = True


CONFIGS = {
    "attack": (
        attack.main,
        resolve_from_presets(AttackConfig(model="nano", arm="random_text", seed=3, attack_steps=7)),
    ),
    "heal": (
        heal.main,
        resolve_from_presets(
            HealConfig(model="micro", corpus="/a b/it's.txt", healing_lr=3e-5, sham=True)
        ),
    ),
    "main": (main.main, SweepConfig(models="nano", arms="haep", seeds="0-2,nano=7", basin=True)),
}


@pytest.mark.parametrize("code", [Code(), Code(url="")])
@pytest.mark.parametrize("entry", CONFIGS)
def test_the_command_is_read_back_to_the_same_fingerprint(entry, code):
    script, config = CONFIGS[entry]
    text = command(entry, settings(config, device="cpu"), code)
    words = words_of(text)
    if code.url:
        assert words[:5] == ["mlflow", "run", code.url, "-v", code.commit]
        assert words[5:9] == ["--env-manager", "local", "-e", entry]
        assert set(words[9::2]) == {"-P"}
        given = dict(word.split("=", 1) for word in words[10::2])
        arguments = [a for n, v in given.items() for a in (f"--{n.replace('_', '-')}", v)]
    else:
        assert words[:3] == ["python", "-m", f"entrypoints.{entry}"]
        arguments = words[3:]
    with script.make_context(entry, arguments) as context:
        read = type(config)(**context.params)
    assert fingerprint(read) == fingerprint(config)
    assert read.device == "cpu"
    assert max(map(len, text.split("\n"))) <= WIDTH + 2


def test_options_that_determine_nothing_are_left_out():
    found = settings(HealConfig(model="nano", verbosity="quiet", output_dir="/x", log_layers=True))
    assert found == {"model": "nano"}


def test_what_the_command_lacks_is_said():
    def said(**changes) -> str:
        return "\n".join(repeat("heal", {}, replace(Code(), **changes)))

    assert "uncommitted" in said(is_dirty=True)
    assert "uncommitted" not in said()
    assert "no branch of the remote" in said(is_published=False)
    assert "In a checkout of commit ccc" in said(url="")
    assert "```bash\nmlflow run https" in said()


def test_parts_without_links_are_not_there():
    assert links("Comes from", [("the attack", "")]) == []
    text = page("It *healed*.", "r", ["| a |"], links("Then", [("next", "runs:/x")]))
    assert text.index("healed") < text.index("runs:/r/plots") < text.index("| a |")
    assert text.index("| a |") < text.index("**Then**") < text.index("runs:/x")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (42.889, "42.89"),
        (160.16, "160.2"),
        (12345.6, "12,346"),
        (3.318e9, "3.3×10⁹"),
        (-2.5e-7, "-2.5×10⁻⁷"),
        (0.0721, "0.0721"),
        (99999.9, "1.0×10⁵"),
        (float("nan"), "undefined"),
        (float("inf"), "∞"),
    ],
)
def test_numbers_are_written_as_people_do(value, text):
    assert quantity_text(value) == text
