"""What a search for healers refuses before anything is loaded, and what it takes by itself."""

from __future__ import annotations

import pytest

from healing.config.heal import HealConfig
from healing.config.options import AUTO
from healing.config.resolve import resolve_from_presets
from healing.config.tune import TuneConfig
from healing.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": "gaussian_noise"}, "--arms gaussian_noise: a healer is selected on states of"),
        ({"arms": "none"}, "--arms none: a healer is selected on states of"),
        ({"arms": "ray"}, "--arms ray: a healer is selected on states of"),
        ({"arms": "haep,magic"}, "--arms: unknown magic"),
        ({"seeds": "100,x"}, "--seeds must be whole numbers from 0, as in 100,101; got '100,x'"),
        ({"axes": "rate,colour"}, "--axes: unknown colour"),
        ({"axes": ""}, "--axes is empty"),
        ({"rate_lowest": 2.0, "rate_highest": 1.0}, "--rate-lowest must be below --rate-highest"),
        ({"rate_lowest": 2.0}, "must have 1 between them, the default healer's rate"),
        ({"study": "a/b"}, "--study 'a/b' is the name of a folder: no path"),
        ({"study": ".."}, "--study '..' is the name of a folder"),
        ({"batch_sizes": "4,16"}, "--batch-sizes must hold 8, the default healer's"),
        ({"batch_sizes": "8,0"}, "--batch-sizes must be whole numbers from 1, separated by commas"),
        ({"batch_sizes": "8,2.5"}, "--batch-sizes must be whole numbers from 1"),
        ({"warmups": "0.1"}, "--warmups must hold 0, the default healer's"),
        ({"warmups": "0,1.5"}, "--warmups must be numbers from 0 to 1, separated by commas"),
        ({"clips": "0,nan"}, "--clips must be numbers from 0 to"),
        ({"token_budget": 245_000}, "for batches of 4, 8, 16, 32 x 128 tokens: 225280 or 245760"),
        ({"token_budget": 1000}, "does not make 5 rungs of whole steps"),
    ],
)
def test_what_cannot_be_searched_is_named(changes, message):
    with pytest.raises(ConfigError) as caught:
        TuneConfig(**changes)
    assert message in str(caught.value)


def test_axes_that_are_off_ask_nothing_of_their_values():
    assert TuneConfig(axes="decay", batch_sizes="4", warmups="0.3", clips="2").batches() == (8,)
    # Without other batch sizes 1,024 tokens per step in 5 rungs are enough.
    assert TuneConfig(axes="decay", token_budget=5 * 1024).tokens == 5 * 1024


@pytest.mark.parametrize(("model", "tokens"), [("nano", 4 * 60 * 1024), ("70m", 4 * 500 * 1024)])
def test_the_budget_is_four_times_that_of_main(model, tokens):
    assert TuneConfig(model=model).tokens == tokens


def test_momentum_is_sgds():
    assert HealConfig(healing_optimizer="sgd", healing_momentum=0.9).healing_momentum == 0.9
    with pytest.raises(ConfigError, match="--healing-momentum belongs to --healing-optimizer sgd"):
        HealConfig(healing_momentum=0.9)


def test_steps_are_500_where_nobody_says_how_many():
    assert HealConfig().healing_steps == 500
    assert resolve_from_presets(HealConfig(healing_steps=AUTO, model="nano")).healing_steps == 500
