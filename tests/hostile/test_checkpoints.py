"""Whatever is in a checkpoint's file: refused in one line, or exactly what was saved."""

from __future__ import annotations

import math
import pathlib
import random
import types
import warnings
import zipfile
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from torch import nn

from healing.errors import CheckpointError
from healing.models.checkpoint_files import MAX_LEAVES
from healing.models.checkpoints import (
    CHECKPOINT_NAME,
    load_state,
    read_checkpoint,
    save_checkpoint,
)
from healing.models.loading import load_model, state_digest
from healing.stages.terminal.lines import visible
from tests.hostile.examples import tried

CONFIG = {
    "model": "nano",
    "arm": "haep",
    "seed": 3,
    "attack_lr": 0.01,
    "corpus_digests": {"a": "b"},
}


class Small(nn.Module):
    """Tied weights, a half-precision vector, a buffer of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.one = nn.Linear(5, 4, bias=False)
        self.other = nn.Linear(5, 4, bias=False)
        with torch.no_grad():
            self.one.weight.copy_(torch.randn(4, 5, generator=generator))
        self.other.weight = self.one.weight
        self.short = nn.Parameter(torch.randn(3, generator=generator).half())
        self.register_buffer("count", torch.tensor([7, 8], dtype=torch.int64))


def loaded() -> Any:
    return types.SimpleNamespace(name="small", model=Small())


def saved(folder: pathlib.Path) -> pathlib.Path:
    path = folder / CHECKPOINT_NAME
    path.unlink(missing_ok=True)
    save_checkpoint(path, Small(), 3, "a text", CONFIG)
    return path


def content(**changes: Any) -> dict[str, Any]:
    """What a checkpoint of an older version holds, without digests."""
    state = dict(Small().state_dict())
    whole = {"step": 1, "model_state_dict": state, "checkpoint_type": "post_treatment",
             "description": "d", "config": dict(CONFIG)}  # fmt: skip
    return {**whole, **changes}


def with_weight(value: Any) -> dict[str, Any]:
    return content(model_state_dict={**Small().state_dict(), "one.weight": value})


def with_config(**entries: Any) -> dict[str, Any]:
    return content(config={**CONFIG, **entries})


def laughs() -> list[Any]:
    text: Any = "lol"
    for _ in range(9):
        text = [text] * 10
    return text


def itself() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


FOUR_BY_FIVE = torch.ones(4, 5)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch deprecates them; files with them will stay
    QUANTIZED = torch.quantize_per_tensor(FOUR_BY_FIVE, 0.1, 0, torch.qint8)
REFUSED = {
    "stride 0": (with_weight(torch.zeros(1).expand(4, 5)), "more entries than are stored"),
    "stride 0 of 2^36": (with_weight(torch.zeros(1).expand(1 << 36)), "more entries than are"),
    "stride 0, long storage": (with_weight(torch.zeros(20)[:1].expand(4, 5)), "share memory"),
    "overlapping": (with_weight(torch.zeros(40).as_strided((4, 5), (1, 1))), "share memory"),
    "gaps": (with_weight(torch.zeros(8, 5)[::2]), "share memory or have gaps"),
    "sparse": (with_weight(FOUR_BY_FIVE.to_sparse()), "_rebuild_sparse_tensor"),
    "quantized": (with_weight(QUANTIZED), "not loaded"),
    "meta": (with_weight(torch.empty(4, 5, device="meta")), "not loaded"),
    "complex": (with_weight(FOUR_BY_FIVE * 1j), "objects other than tensors"),
    "negated bit": (with_weight(torch.ones(4, 5, dtype=torch.cfloat).conj().imag), "complex num"),
    "no tensor": (with_weight([1.0]), "not a mapping of names to tensors"),
    "tensor name": (content(model_state_dict={"a\x1b[2J": FOUR_BY_FIVE}), "without a proper name"),
    "same bytes many times": (
        content(model_state_dict=dict.fromkeys(map(str, range(900)), torch.ones(400, 50))),
        "more than are in it"),
    "set in config": (with_config(x={1, 2}), "objects other than tensors"),
    "laughs": (with_config(x=laughs()), f"more than {MAX_LEAVES} values|no plain number"),
    "contains itself": (with_config(x=itself()), "no plain number"),
    "too deep": (with_config(x=deep(100)), "no plain number"),
    "tensor in config": (with_config(x=FOUR_BY_FIVE), "no plain number"),
    "large number": (with_config(x=10**30), "no plain number"),
    "huge number": (with_config(x=10**5000), "damaged"),
    "long text": (with_config(x="a" * 5000), "no plain number or short text"),
    "terminal sequence": (with_config(x="\x1b]0;owned\x07"), "no plain number or short text"),
    "a key that is no text": (with_config(attack={3: 4}), "no plain number or short text"),
    "arm of two": (with_config(arm="x/../../y"), "for arm, which it cannot be"),
    "arm that is no text": (with_config(arm=["haep"]), "for arm, no str"),
    "model that is no text": (with_config(model=3), "for model, no str"),
    "seed of text": (with_config(seed="0"), "for seed, no int"),
    "seed true": (with_config(seed=True), "for seed, no int"),
    "seed too large": (with_config(seed=2**40), "for seed, which it cannot be"),
    "run id": (with_config(attack_run_id="../../x"), "for attack_run_id, which it cannot be"),
    "attack of a healed one": (with_config(attack={"arm": "a/b"}), "for arm, which it cannot be"),
    "attack of text": (with_config(attack="haep"), "for attack, no dict"),
    "attack that is none": (with_config(attack=None), "for attack, no dict"),
    "rank infinite": (with_config(attack_rank=math.inf), "for attack_rank, which it cannot be"),
    "description": (content(description=["x"]), "description is not a text"),
    "type": (content(checkpoint_type=3), "checkpoint_type is not a text"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_checkpoint_is_refused_before_it_is_loaded(tmp_path, kind):
    what, message = REFUSED[kind]
    torch.save(what, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(tmp_path / "c.pt")
    assert visible(str(caught.value)) == str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.uint8])
def test_whole_numbers_are_no_weights(tmp_path, dtype):
    torch.save(with_weight(torch.ones(4, 5).to(dtype)), tmp_path / "c.pt")
    model = loaded()
    before = state_digest(model.model.state_dict())
    with pytest.raises(CheckpointError, match=r"1 of another kind of number, first one\.weight"):
        load_state(model, read_checkpoint(tmp_path / "c.pt"), "c.pt")
    assert state_digest(model.model.state_dict()) == before


def test_transposed_weights_are_dense_too(tmp_path):
    weight = torch.arange(20.0).reshape(5, 4).t()
    state = {**Small().state_dict(), "one.weight": weight, "other.weight": weight}
    torch.save(content(model_state_dict=state), tmp_path / "c.pt")
    model = loaded()
    load_state(model, read_checkpoint(tmp_path / "c.pt"), "c.pt")
    assert torch.equal(model.model.one.weight, weight)


def test_a_zip_that_grows_is_refused(tmp_path):
    path = saved(tmp_path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "z.pt", "w", 8) as packed:
        for entry in archive.infolist():
            packed.writestr(entry.filename, archive.read(entry))
        packed.writestr("zeros", bytes(1 << 24))
    with pytest.raises(CheckpointError, match="more bytes than it has"):
        read_checkpoint(tmp_path / "z.pt")


def test_an_older_file_without_digests_is_read_and_said_to_be_one(tmp_path, caplog):
    torch.save(content(), tmp_path / "c.pt")
    checkpoint = read_checkpoint(tmp_path / "c.pt")
    assert not caplog.records
    load_state(loaded(), checkpoint, "c.pt")
    assert "c.pt carries no digest" in caplog.text


def unchanged(model: Any, checkpoint: Any) -> bool:
    own, wanted = model.model.state_dict(), Small().state_dict()
    same = all(torch.equal(own[name], wanted[name]) for name in wanted)
    facts = (checkpoint.step, checkpoint.description, checkpoint.config, checkpoint.kind)
    return same and facts == (3, "a text", CONFIG, "post_treatment")


def outcome(path: pathlib.Path) -> str:
    """What becomes of a file that was saved and then changed."""
    before, model = path.read_bytes(), loaded()
    try:
        checkpoint = read_checkpoint(path)
        load_state(model, checkpoint, path)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017
        found = "refused"
    else:
        found = "as it was" if unchanged(model, checkpoint) else "changed"
    assert path.read_bytes() == before
    return found


def rewritten(folder: pathlib.Path, data: bytes) -> pathlib.Path:
    """A new file each time: the one before may still be mapped."""
    path = folder / "changed.pt"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def test_no_change_of_one_byte_loads_as_something_else(tmp_path):
    """The same 400 that were tried when 236 of them loaded as other weights."""
    nano = load_model("nano")
    path, draws = tmp_path / CHECKPOINT_NAME, random.Random(0)
    save_checkpoint(path, nano.model, 3, "a text", CONFIG)
    data, digest, loads = path.read_bytes(), nano.digest, 0
    for _ in range(400):
        changed = bytearray(data)
        changed[draws.randrange(len(data))] ^= draws.randrange(1, 256)
        try:
            checkpoint = read_checkpoint(rewritten(tmp_path, bytes(changed)))
            assert (checkpoint.digest, checkpoint.config) == (digest, CONFIG)
            loads += 1
        except CheckpointError:
            pass
    assert loads < 60  # padding and dates of the archive


@pytest.mark.parametrize("entry", ["header", "weights"])
def test_either_digest_alone_catches_what_is_its_own(tmp_path, entry):
    """Files made anew with another content and the digests of the old one: no byte is damaged."""
    whole = torch.load(saved(tmp_path), weights_only=True)
    if entry == "header":
        whole["config"]["seed"] = 4
    else:
        whole["model_state_dict"]["short"] = whole["model_state_dict"]["short"] + 1
    torch.save(whole, tmp_path / "forged.pt")
    with pytest.raises(CheckpointError, match="digest"):
        load_state(loaded(), read_checkpoint(tmp_path / "forged.pt"), "forged.pt")


KINDS = ("flip", "set", "delete", "insert", "cut", "repeat")


def edited(data: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    changed = bytearray(data)
    for kind, place, value in edits:
        at = place % max(len(changed), 1)
        if kind == "flip":
            changed[at : at + 1] = bytes(b ^ (value or 1) for b in changed[at : at + 1])
        elif kind == "set":
            changed[at : at + 1] = bytes([value])
        elif kind == "delete":
            del changed[at : at + value]
        elif kind == "insert":
            changed[at:at] = bytes([value]) * (value % 7 + 1)
        elif kind == "cut":
            del changed[at:]
        else:
            changed[at:at] = changed[at : at + value]
    return bytes(changed)


def check_edits(place: pathlib.Path, edits: list[tuple[str, int, int]]) -> None:
    path = place / CHECKPOINT_NAME
    data = (path if path.is_file() else saved(place)).read_bytes()
    assert outcome(rewritten(place, edited(data, edits))) != "changed"


test_edited_bytes, test_edited_bytes_many = tried(
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.integers(0, 20_000), st.integers(0, 255)),
        min_size=1,
        max_size=4,
    ),
    check_edits,
    450,
)


def repacked(source: pathlib.Path, target: pathlib.Path, change: Any) -> pathlib.Path:
    """The same file with another pickle, its checksum right: nothing is damaged."""
    target.unlink(missing_ok=True)
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as packed:
        for entry in archive.infolist():
            data = archive.read(entry)
            packed.writestr(entry.filename, change(data) if "data.pkl" in entry.filename else data)
    return target


def check_pickles(place: pathlib.Path, example: Any) -> None:
    edits, has_digests = example
    source = place / "whole.pt"
    source.unlink(missing_ok=True)
    if has_digests:
        save_checkpoint(source, Small(), 3, "a text", CONFIG)
    else:
        torch.save(content(), source)
    found = outcome(repacked(source, place / "packed.pt", lambda data: edited(data, edits)))
    assert found != "changed" or not has_digests


test_edited_pickles, test_edited_pickles_many = tried(
    st.tuples(
        st.lists(
            st.tuples(st.sampled_from(KINDS), st.integers(0, 3_000), st.integers(0, 255)),
            min_size=1,
            max_size=3,
        ),
        st.booleans(),
    ),
    check_pickles,
    400,
)


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "lacks step"),
        (b"\x80\x02cbuiltins\nbytearray\nK\x05\x85R.", "objects other than tensors"),
        (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", "objects other than tensors"),
        (b"\x80\x02\x8c\x02os\x8c\x06system\x93.", "objects other than tensors"),
        (b"\x80\x04}.", "a pickle of protocol 4"),
        (b"\x80\x02\x82\x01.", "objects other than tensors"),
        (b"\x80\x02I" + b"9" * 10_000 + b"\n.", "damaged"),
        (b"\x80\x02(lp0\ng0\na.", "damaged|lacks step"),
        (b"", "damaged"),
        (bytes(9 << 20), "describes its tensors in"),
    ],
    ids="deep bytearray system stack protocol extension digits itself empty long".split(),
)  # fmt: skip
def test_a_pickle_written_by_hand(tmp_path, pickled, message):
    packed = repacked(saved(tmp_path), tmp_path / "packed.pt", lambda _: pickled)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(packed)


@pytest.mark.fuzz
def test_no_change_of_any_one_byte(tmp_path):
    data = saved(tmp_path).read_bytes()
    for place in range(len(data)):
        for flip in (1, 128):
            changed = data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :]
            assert outcome(rewritten(tmp_path, changed)) != "changed", (place, flip)


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**30), 10**30), st.floats(),
    st.text(max_size=20), st.just("x" * 5000), st.binary(max_size=5), st.just({1}), st.just(1j),
    st.just(FOUR_BY_FIVE), st.just("../../x"), st.just("\x1b[31m"),
)  # fmt: skip
VALUES = st.recursive(
    ODD,
    lambda below: st.one_of(
        st.lists(below, max_size=4), st.dictionaries(st.text(max_size=8), below, max_size=4)
    ),
    max_leaves=12,
)
TENSORS = st.one_of(
    st.sampled_from([what["model_state_dict"]["one.weight"] for what, _ in REFUSED.values()
                     if "one.weight" in what["model_state_dict"]]),
    st.builds(
        lambda shape, dtype: torch.ones(shape).to(dtype),
        st.lists(st.integers(0, 5), max_size=3),
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool]),
    ),
)  # fmt: skip
NAMES = ("model", "arm", "seed", "revision", "attack", "attack_run_id", "deduped", "x", "tokenizer")


def check_content(place: pathlib.Path, example: Any) -> None:
    name, entries, tensors = example
    what = content()
    what["config"] |= entries
    what |= name
    if isinstance(what["model_state_dict"], dict):
        what["model_state_dict"] |= tensors
    path = rewritten(place, b"")
    path.unlink()
    torch.save(what, path)
    before, model = path.read_bytes(), loaded()
    try:
        checkpoint = read_checkpoint(path)
        load_state(model, checkpoint, path)
    except CheckpointError as error:
        assert visible(str(error)) == str(error)  # noqa: PT017
    else:
        assert torch.equal(model.model.one.weight, what["model_state_dict"]["one.weight"].float())
        assert repr(checkpoint.config) == repr(what["config"])  # NaN included
    assert path.read_bytes() == before


test_odd_contents, test_odd_contents_many = tried(
    st.tuples(
        st.dictionaries(
            st.sampled_from(["step", "description", "checkpoint_type", "extra", "digests"]),
            VALUES,
            max_size=1,
        ),
        st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=2),
        st.dictionaries(st.sampled_from(["one.weight", "short", "stranger"]), TENSORS, max_size=1),
    ),
    check_content,
    450,
)


def test_a_write_that_torch_fails_says_what_it_takes_and_what_is_free(tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        (tmp_path / "c.partial").write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] failed writing file data/3\nmore")

    monkeypatch.setattr(torch, "save", fail)
    line = r"failed writing file data/3; it takes [\d.e-]+ GB, [\d.e+]+ GB are free"
    with pytest.raises(OSError, match=line):
        save_checkpoint(tmp_path / "c.pt", Small(), 0, "", {})
    assert not list(tmp_path.iterdir())
