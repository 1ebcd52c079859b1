"""Memory of a deep model from two shallow ones.

The blocks of most models are alike. Then every pass over them (forward, backward, through the
second derivatives, over their matrices) does the same at each, and the bytes alive at a given
moment of block j of L are α + β·j + γ·L: what was done to the blocks before, and what there is of
all. Within a pass the highest such moment is in its first or its last blocks, and there it is
linear in L. So two runs, of :data:`SHALLOW` blocks and of one more, give all of them, moment by
moment.

The moments of the two are matched: where they do not match one by one, or the blocks are not alike
in every number and flag, the model is run at its full depth instead.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from healing.models.blocks import transformer_blocks
from healing.stages.dry_run.tensor_bytes import Moment

SHALLOW = 3
"""The first, one that stands for all between, the last."""


def without_numbers(architecture: PreTrainedConfig) -> PreTrainedModel:
    """The model's shapes, on torch's device for that."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(architecture)
    return model


def _traits(block: nn.Module) -> list[tuple[Any, ...]]:
    """Kinds, shapes, numbers and flags of a block's parts."""
    found: list[tuple[Any, ...]] = []
    for name, module in block.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if key != "layer_idx" and isinstance(value, (int, float, str, bool, type(None)))
        }
        shapes = [(key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False)]
        found.append((name, type(module), plain, shapes))
    return found


def shallower(architecture: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    """The same architecture with fewer blocks."""
    changed = copy.deepcopy(architecture)
    text = changed.get_text_config()
    whole = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:  # one entry for every block
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    return changed


def has_equal_blocks(model: PreTrainedModel, architecture: PreTrainedConfig) -> bool:
    """Whether a model's blocks are alike, more than two runs have, and as many as asked for when
    there are fewer.

    Args:
        model: Of the architecture, in its full depth.
        architecture: Says the number of its blocks.
    """
    blocks = transformer_blocks(model)
    text = architecture.get_text_config()
    if len(blocks) <= SHALLOW + 1 or len(blocks) != text.num_hidden_layers:
        return False
    first, *others = (_traits(block) for block in blocks)
    fewer = transformer_blocks(without_numbers(shallower(architecture, SHALLOW)))
    others += [_traits(block) for block in fewer]
    return len(fewer) == SHALLOW and all(traits == first for traits in others)


@dataclass
class _Visit:
    """Operations on one block, with those in between that are on none; or, without a block, what
    is done between two such stretches.
    """

    block: int | None
    moments: list[Moment]


def _visits(moments: Sequence[Moment]) -> list[_Visit]:
    found = [_Visit(None, [])]
    between: list[Moment] = []
    for moment in moments:
        if moment.block is None:
            between.append(moment)
        elif moment.block == found[-1].block:
            found[-1].moments += [*between, moment]
            between = []
        else:
            found += [_Visit(None, between), _Visit(moment.block, [moment])]
            between = []
    return [*found, _Visit(None, between)]


_SAME: dict[int | None, tuple[int | None, ...]] = {None: (None,), 0: (0,), 1: (1, 2), 2: (3,)}
"""Block of the shallower run → blocks of the deeper one that it stands for."""

_AHEAD = 8
"""Operations that have to go on alike after a repetition that only the deeper run has."""


def matched(shallow: Sequence[Moment], deep: Sequence[Moment]) -> list[tuple[Moment, Moment]]:
    """Pairs of the same moments of a run of :data:`SHALLOW` blocks and one of one more.

    The block between the first and the last is two in the deeper run, one beside the first and one
    beside the last; what is done between these two lies between what is done beside them.

    Raises:
        ValueError: The runs do not match operation by operation.
    """
    pairs: list[tuple[Moment, Moment]] = []
    rest = iter(_visits(deep))
    for visit in _visits(shallow):
        middle = visit.block == 1
        for number in range(3 if middle else 1):
            other = next(rest, None)
            if number == 1:
                continue  # between the two
            if other is None or other.block not in _SAME[visit.block]:
                raise ValueError("another order of blocks")
            pairs += _pairs(visit.moments, other.moments)
    if next(rest, None) is not None:
        raise ValueError("more visits than in the shallower run")
    return pairs


def _pairs(few: list[Moment], many: list[Moment]) -> list[tuple[Moment, Moment]]:
    """Pairs of two visits. A loop over all blocks that says of none on which it works goes round
    more often in the deeper run: its first rounds are paired, and its last ones.
    """
    if [_key(m) for m in few] == [_key(m) for m in many]:
        return list(zip(few, many, strict=True))
    backwards = _forwards(few[::-1], many[::-1])
    return [*_forwards(few, many), *backwards]


def _key(moment: Moment) -> tuple[Any, ...]:
    return moment.phase, moment.operation, moment.block is None


def _forwards(few: list[Moment], many: list[Moment]) -> list[tuple[Moment, Moment]]:
    pairs, place = [], 0
    own, others = [_key(m) for m in few], [_key(m) for m in many]
    for number, moment in enumerate(few):
        if own[number : number + 1] != others[place : place + 1]:
            place = _after_repetition(own[number:], others, place)
        pairs.append((moment, many[place]))
        place += 1
    if place < len(many):
        _after_repetition([], others, place)
    return pairs


def _after_repetition(wanted: list[Any], others: list[Any], place: int) -> int:
    """Where the wanted operations go on behind a repetition of what stands before ``place``.

    Raises:
        ValueError: Nowhere.
    """
    for length in range(1, min(place, len(others) - place) + 1):
        again = others[place : place + length]
        end = place + length
        ahead = wanted[:_AHEAD]
        repeats = again == others[place - length : place] and all(key[2] for key in again)
        if repeats and others[end : end + len(ahead)] == ahead and (ahead or end == len(others)):
            return end
    raise ValueError("another order of operations")


def extrapolated(shallow: Sequence[Moment], deep: Sequence[Moment], depth: int) -> list[Moment]:
    """The moments at full depth among which that of the highest total is.

    Raises:
        ValueError: The runs do not match.
    """
    more = depth - SHALLOW

    return [
        few._replace(
            sizes=tuple(a + more * (b - a) for a, b in zip(few.sizes, many.sizes, strict=True))
        )
        for few, many in matched(shallow, deep)
    ]


@dataclass(frozen=True)
class Run:
    """What is seen of a run without content.

    Attributes:
        moments: In their order.
        n_trainable: Parameters that are trained.
    """

    moments: Sequence[Moment]
    n_trainable: int


def at_full_depth(
    run: Callable[[PreTrainedConfig, PreTrainedModel], Run], architecture: PreTrainedConfig
) -> tuple[PreTrainedModel, Run]:
    """A run of the whole model, or what two shallow ones say of it.

    Args:
        run: Of an architecture; it is also given the whole model, whose numbers decide whatever a
            stage decides by a model's size.
        architecture: Of the whole model.

    Returns:
        The whole model without numbers, and its run.
    """
    whole = without_numbers(architecture)
    if has_equal_blocks(whole, architecture):
        few, many = (run(shallower(architecture, d), whole) for d in (SHALLOW, SHALLOW + 1))
        depth = len(transformer_blocks(whole))
        trainable = few.n_trainable + (depth - SHALLOW) * (many.n_trainable - few.n_trainable)
        with contextlib.suppress(ValueError):
            return whole, Run(extrapolated(few.moments, many.moments, depth), trainable)
    return whole, run(architecture, whole)
