"""Pictures of blocks: which steps, how large, the same bytes, and that they show what changed."""

from __future__ import annotations

import io
import itertools

import numpy as np
from PIL import Image

from healing.reporting.plots.layers import PICTURES, chosen, rank_map, spectra_by_step


def bytes_of(picture) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def decaying(rate: float, blocks: int = 4, hidden: int = 48) -> np.ndarray:
    return np.tile(10.0 * np.exp(-rate * np.arange(hidden)), (blocks, 1))


def test_steps_are_the_first_the_last_and_evenly_between():
    assert chosen(range(4)) == [0, 1, 2, 3]
    found = chosen(range(100))
    assert (found[0], found[-1], len(found)) == (0, 99, PICTURES)
    assert {b - a for a, b in itertools.pairwise(found)} == {11}


def test_pictures_are_small_alike_and_differ_by_step():
    rates = np.linspace(0.3, 0.05, 25)
    steps = list(range(0, 250, 10))
    spectra = [decaying(rate) for rate in rates]
    drawn = spectra_by_step(steps, spectra, decaying(0.05))
    again = spectra_by_step(steps, spectra, decaying(0.05))
    files = [bytes_of(picture) for _, picture in drawn]
    assert files == [bytes_of(picture) for _, picture in again]
    assert len(set(files)) == len(files) == PICTURES
    assert max(map(len, files)) < 15_000  # a thousand runs of ten: 150 MB at most
    assert [step for step, _ in drawn] == [steps[i] for i in chosen(steps)]
    # Curves rise from step to step: their coloured pixels lie higher.
    heights = []
    for _, picture in drawn:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
        coloured = np.ptp(pixels, axis=2) > 40
        heights.append(np.nonzero(coloured)[0].mean())
    assert all(b < a for a, b in itertools.pairwise(heights))


def test_spectra_that_are_not_finite_are_left_out():
    broken = decaying(0.1)
    broken[1] = np.nan
    ((step, picture),) = spectra_by_step([0], [broken], decaying(0.1))
    assert step == 0
    assert picture.size == (520, 320)


def test_the_map_of_ranks_is_lighter_where_ranks_are_higher(tmp_path):
    ranks = np.array([[0.2, 0.9], [0.4, 0.9], [np.nan, 0.9]])
    rank_map(tmp_path / "m.png", [0, 10, 20], ranks, "healing steps", "nano")
    pixels = np.asarray(Image.open(tmp_path / "m.png").convert("L")).astype(float)
    height, width = pixels.shape
    low, high = pixels[int(0.68 * height), :], pixels[int(0.3 * height), :]
    left = slice(int(0.12 * width), int(0.2 * width))
    assert np.median(high[left]) > np.median(low[left]) + 50
    assert np.median(low[int(0.68 * width) : int(0.75 * width)]) > 240  # undefined is white
