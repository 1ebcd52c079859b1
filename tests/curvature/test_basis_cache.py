"""Bases on disk: the same bits, whatever happens to the file."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from healing.curvature import basis_cache
from healing.curvature.basis_cache import BasisCache, kept_bases
from healing.curvature.subspaces import MatrixSubspace, SingularSubspace
from healing.randomness import named_generator

WEIGHTS = {
    name: torch.randn(*shape, generator=named_generator(0, name))
    for name, shape in {"tall": (12, 8), "wide": (6, 9), "square": (7, 7)}.items()
}


@pytest.fixture
def cache(tmp_path) -> BasisCache:
    return BasisCache(tmp_path / "made" / "later", least_numbers=1)


@pytest.fixture
def made(monkeypatch) -> list[float]:
    """Energies of the subspaces that were decomposed."""
    calls = []
    plain = SingularSubspace.of
    monkeypatch.setattr(
        basis_cache.SingularSubspace, "of", lambda w, e: (calls.append(e), plain(w, e))[1]
    )
    return calls


def assert_same(one: SingularSubspace, other: SingularSubspace) -> None:
    assert list(one.matrices) == list(other.matrices)
    for a, b in zip(one.matrices.values(), other.matrices.values(), strict=True):
        assert torch.equal(a.leading, b.leading)
        assert torch.equal(a.rest, b.rest)
        assert a.wide == b.wide


def test_the_second_time_the_same_bits_are_read(cache, made):
    first, second = (cache.subspace(WEIGHTS, 0.9, "abc") for _ in range(2))
    assert made == [0.9]
    assert_same(first, second)
    assert [p.suffix for p in cache.folder.iterdir()] == [".safetensors"]


def test_another_model_or_energy_is_another_entry(cache, made):
    for digest, energy in (("abc", 0.9), ("abd", 0.9), ("abc", 0.95)):
        cache.subspace(WEIGHTS, energy, digest)
    assert made == [0.9, 0.9, 0.95]


@pytest.mark.parametrize("digest", ["", "abc"])
def test_small_and_unnamed_models_are_not_kept(tmp_path, digest):
    least = 1 if not digest else 10**6
    BasisCache(tmp_path / "x", least_numbers=least).subspace(WEIGHTS, 0.9, digest)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("damage", [b"", b"\x08", b"no tensors", None])
def test_a_damaged_file_is_made_anew(cache, made, damage):
    expected = cache.subspace(WEIGHTS, 0.9, "abc")
    (path,) = cache.folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-20] if damage is None else damage)
    assert_same(cache.subspace(WEIGHTS, 0.9, "abc"), expected)
    assert made == [0.9, 0.9]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("at", [0.2, 0.5, 0.99])
def test_one_changed_bit_is_not_believed(cache, made, at):
    expected = cache.subspace(WEIGHTS, 0.9, "abc")
    (path,) = cache.folder.iterdir()
    whole = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(whole[:8], "little")  # after the header
    whole[begin + int(at * (len(whole) - begin))] ^= 1
    path.write_bytes(whole)
    assert_same(cache.subspace(WEIGHTS, 0.9, "abc"), expected)
    assert made == [0.9, 0.9]


@pytest.mark.parametrize("metadata", [None, {"about": "[]"}, {"about": "{}"}, {"about": "x"}])
def test_a_file_without_its_digest_is_not_believed(cache, made, metadata):
    cache.subspace(WEIGHTS, 0.9, "abc")
    (path,) = cache.folder.iterdir()
    save_file(load_file(path), path, metadata)
    cache.subspace(WEIGHTS, 0.9, "abc")
    assert made == [0.9, 0.9]


def test_what_killed_processes_left_goes_and_what_is_being_written_stays(cache):
    cache.folder.mkdir(parents=True)
    old, new = (cache.folder / f".{name}.safetensors.x.partial" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1000.0, 1000.0))
    cache.subspace(WEIGHTS, 0.9, "abc")
    assert not old.exists()
    assert new.exists()


def test_a_file_of_other_matrices_is_not_believed(cache, made):
    cache.subspace({**WEIGHTS, "tall": torch.randn(8, 12)}, 0.9, "abc")
    found = cache.subspace(WEIGHTS, 0.9, "abc")
    assert made == [0.9, 0.9]
    assert_same(found, SingularSubspace({n: MatrixSubspace.of(w, 0.9) for n, w in WEIGHTS.items()}))


def test_the_longest_unused_goes_first(cache, made):
    for number in range(3):
        cache.subspace(WEIGHTS, 0.9, f"model{number}")
    files = {p.name.split("-")[2]: p for p in cache.folder.iterdir()}
    size = max(p.stat().st_size for p in files.values())
    for age, name in enumerate(("model1", "model2", "model0")):
        os.utime(files[name], (1000.0 + age, 1000.0 + age))
    cache.subspace(WEIGHTS, 0.9, "model1")  # used: now the youngest
    small = BasisCache(cache.folder, most_bytes=3 * size, least_numbers=1)
    small.subspace(WEIGHTS, 0.9, "model3")
    assert {p.name.split("-")[2] for p in cache.folder.iterdir()} == {"model0", "model1", "model3"}
    tiny = BasisCache(cache.folder, most_bytes=10, least_numbers=1)
    tiny.subspace(WEIGHTS, 0.9, "model4")  # larger than all that is allowed: nothing goes for it
    assert len(list(cache.folder.iterdir())) == 3


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path, made):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    found = BasisCache(blocked, least_numbers=1).subspace(WEIGHTS, 0.9, "abc")
    assert list(found.matrices) == list(WEIGHTS)


def test_a_writing_that_fails_leaves_nothing(cache, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(basis_cache, "save_file", full)
    cache.subspace(WEIGHTS, 0.9, "abc")
    assert list(cache.folder.iterdir()) == []


def test_what_changes_last_digits_changes_the_entry(cache, made):
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        cache.subspace(WEIGHTS, 0.9, "abc")
    assert made == [0.9, 0.9]


def test_the_folder_of_a_configuration(tmp_path, monkeypatch, made):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(BasisCache.__init__, "__defaults__", (10**9, 1))
    kept_bases(WEIGHTS, 0.9, "abc", "")
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        kept_bases(WEIGHTS, 0.9, "abc", "~/some")
    assert made == [0.9, 0.9]
    assert len(list((tmp_path / "some" / "bases").iterdir())) == 1
