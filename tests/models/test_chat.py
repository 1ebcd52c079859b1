"""Options for text and tokenizer reach what they are for; alone they change no fingerprint."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import transformers

from healing.config.attack import AttackConfig
from healing.config.basin import BasinConfig
from healing.config.fingerprint import LATER_FIELDS, as_params, fingerprint, without_defaults
from healing.config.heal import HealConfig
from healing.config.options import fields_of
from healing.config.shared import BLANK_LINES, BaseConfig
from healing.config.sweep import SweepConfig
from healing.data.windows import ChatText
from healing.errors import ModelError
from healing.models.chat import ChatTemplate
from healing.models.checkpoints import Checkpoint
from healing.models.model_files import EMBEDDED_DIR
from healing.stages.cells.basin import resolve_from_checkpoint as resolve_basin
from healing.stages.cells.heal import resolve_from_checkpoint
from healing.stages.cells.inputs import corpus_for, load_for
from healing.stages.cells.sweep_plan import plan
from healing.stages.healing_run.inputs import fresh_attack_config
from healing.stages.launching.cell_configs import attack_config, heal_config

OPTIONS = {"tokenizer": "micro", "text_column": "messages", "split_rule": "line"}


@pytest.fixture
def tokenizer_folder(tmp_path):
    """Nano's tokenizer with a chat template."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED_DIR / "nano" / name, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no bad') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def chat(content: str, role: str = "user") -> list[dict[str, str]]:
    return [{"role": role, "content": content}, {"role": "assistant", "content": "yes"}]


def test_a_chat_is_text_by_the_models_template(tokenizer_folder):
    template = ChatTemplate("nano", tokenizer=str(tokenizer_folder))
    assert template(chat("hi")) == "user: hi<|endoftext|>assistant: yes<|endoftext|>"
    with pytest.raises(ModelError, match=r"cannot make text of a chat \(no bad\).*--tokenizer"):
        template(chat("hi", "bad"))
    with pytest.raises(ModelError, match=r"model nano cannot make text of a chat .*chat template"):
        ChatTemplate("nano")(chat("hi"))


def test_a_configuration_with_a_column_of_chats(tokenizer_folder, tmp_path):
    rows = [json.dumps({"messages": chat(f"question {i} of many")}) for i in range(90)]
    (tmp_path / "chats.jsonl").write_text("\n".join(rows))
    config = BaseConfig(
        model="nano", corpus=str(tmp_path / "chats.jsonl"), text_column="messages",
        tokenizer=str(tokenizer_folder),
    )  # fmt: skip
    corpus, loaded = corpus_for(config), load_for(config)
    text = corpus.documents["probe"][0]
    assert isinstance(text, ChatText)
    assert text.startswith("user: question ")
    assert loaded.tags["tokenizer_source"] == str(tokenizer_folder)
    windows = corpus.windows("train", loaded.tokenizer, 16)
    assert (windows == loaded.tokenizer.eos_token_id).sum() > 2 * 60  # those of the template, too
    assert corpus_for(config) is corpus


def test_a_configuration_with_a_split_rule(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"line {i}" for i in range(80)))
    config = BaseConfig(model="nano", corpus=str(tmp_path / "a.txt"), split_rule="line")
    assert sum(map(len, corpus_for(config).documents.values())) == 80


def test_defaults_are_not_in_a_fingerprint_and_other_values_are():
    for config in (AttackConfig(model="nano"), HealConfig(model="nano"), BaseConfig(model="nano")):
        bare = {k: v for k, v in as_params(config).items() if k not in LATER_FIELDS}
        assert without_defaults(as_params(config)) == bare
        assert fingerprint(as_params(config)) == fingerprint(bare)
        for name, value in OPTIONS.items():
            changed = dataclasses.replace(config, **{name: value})
            assert fingerprint(changed) != fingerprint(config), name
    defaults = {
        f.name: f.default for kind in (AttackConfig, HealConfig) for f, _, _ in fields_of(kind)
    }
    assert {name: defaults[name] for name in LATER_FIELDS} == LATER_FIELDS


def test_the_options_go_from_a_sweep_to_its_cells():
    sweep = SweepConfig(models="nano", arms="haep", seeds="0", sham=False, **OPTIONS)
    cell = plan(sweep)[0][0]
    for config in (attack_config(sweep, cell, ""), heal_config(sweep, cell),
                   fresh_attack_config(HealConfig(model="nano", **OPTIONS))):  # fmt: skip
        assert {name: getattr(config, name) for name in OPTIONS} == OPTIONS


def test_what_is_healed_brings_its_tokenizer():
    made = Checkpoint(1, {}, "", {"model": "nano", "tokenizer": "micro"})
    assert resolve_from_checkpoint(HealConfig(), made, "c.pt").tokenizer == "micro"
    assert resolve_from_checkpoint(HealConfig(tokenizer="nano"), made, "c.pt").tokenizer == "nano"
    older = Checkpoint(1, {}, "", {"model": "nano"})
    assert resolve_from_checkpoint(HealConfig(), older, "c.pt").tokenizer == ""


def test_the_landscape_takes_the_options_of_its_healing_run():
    healed = Checkpoint(1, {}, "", {"model": "nano", **OPTIONS})
    settled = resolve_basin(BasinConfig(), healed, "h.pt")
    assert {name: getattr(settled, name) for name in OPTIONS} == OPTIONS
    assert resolve_basin(BasinConfig(split_rule="file"), healed, "h.pt").split_rule == "file"
    older = resolve_basin(BasinConfig(), Checkpoint(1, {}, "", {"model": "nano"}), "h.pt")
    assert (older.tokenizer, older.text_column, older.split_rule) == ("", "", BLANK_LINES)
