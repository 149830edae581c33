"""Synthetic writers: made on demand, the same every time and everywhere, each with a style and a class mix of its own.

If these failed, the processes of one run would train on different data, or personalization would have nothing to learn.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np
import pytest
from helpers import ROOT

from datasets.sources.synthetic_writers import (
    FONTS,
    GLYPH_SIDE,
    MAX_EXAMPLES,
    MIN_EXAMPLES,
    REACH,
    SyntheticWriters,
    glyph_fields,
    signed_distance,
)


def same(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_writer_is_the_same_in_any_order_and_among_any_number_of_clients() -> None:
    """Or a worker's share of the clients would change what they hold."""
    forwards, backwards = SyntheticWriters(10, seed=3), SyntheticWriters(1000, seed=3)
    first = [forwards.examples(client) for client in range(10)]
    second = [backwards.examples(client) for client in reversed(range(10))][::-1]
    assert all(same(one, other) for one, other in zip(first, second, strict=True))


def test_threads_do_not_disturb_each_other() -> None:
    """Or a writer would depend on who else is made at the same time. Glyphs are made by several threads at once."""
    glyph_fields.cache_clear()
    writers = SyntheticWriters(12, seed=0)
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(writers.examples, [*range(12), *range(12)]))
    alone = [writers.examples(client) for client in range(12)]
    assert all(same(one, other) for one, other in zip(together, alone + alone, strict=True))


def test_another_process_makes_the_same_writer() -> None:
    """Or the same run on two workers would not be the run on one. Hash seeds and import order differ there."""
    code = (
        "import hashlib\n"
        "from datasets.sources.synthetic_writers import SyntheticWriters\n"
        "writers = SyntheticWriters(9, seed=1)\n"
        "content = b''.join(array.tobytes() for array in writers.examples(4))\n"
        "print(writers.fingerprint, hashlib.sha256(content).hexdigest())"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    there = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split()
    writers = SyntheticWriters(9, seed=1)
    content = b"".join(array.tobytes() for array in writers.examples(4))
    assert there == [writers.fingerprint, hashlib.sha256(content).hexdigest()]


def test_shapes_types_and_ranges() -> None:
    writers = SyntheticWriters(30, seed=0)
    for client in range(30):
        images, labels = writers.examples(client)
        assert images.shape == (writers.num_examples(client), 28, 28)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
        assert labels.shape == (len(images),)
        assert 0 <= labels.min() <= labels.max() < writers.num_classes == 62
        assert images.reshape(len(images), -1).max(axis=1).min() > 100  # every image has a stroke
        assert images[:, [0, -1]].mean() < 26  # and its ink in the middle


def test_numbers_of_examples_spread_within_their_bounds() -> None:
    """Or weighting clients by their examples would be left untested by these data."""
    writers = SyntheticWriters(2000, seed=0)
    sizes = [writers.num_examples(client) for client in range(2000)]
    assert MIN_EXAMPLES <= min(sizes) < 40
    assert 250 < max(sizes) <= MAX_EXAMPLES
    # log-normal with spread 0.5: standard deviation 110 * sqrt(e^0.25 - 1) = 59, and 59 / sqrt(2000) = 1.3 of the mean
    assert np.mean(sizes) == pytest.approx(110, abs=4)


def test_small_clients_are_found_and_looked_for_only_where_there_can_be_any() -> None:
    """Or clients too small to cut would be kept, or 10^12 of them be counted to find none."""
    writers = SyntheticWriters(300, seed=0)
    assert (
        list(writers.smaller_than(50)) == [client for client in range(300) if writers.num_examples(client) < 50] != []
    )
    assert not SyntheticWriters(10**12, seed=0).smaller_than(MIN_EXAMPLES)


def test_writers_differ_more_than_halves_of_one_writer() -> None:
    """Or there would be nothing to personalize to. Compared within a class: mean images, mean square difference."""
    writers = SyntheticWriters(40, seed=0, mean_num_examples=400)
    halves: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for client in range(40):
        images, labels = writers.examples(client)
        for label in np.flatnonzero(np.bincount(labels, minlength=62) >= 12):
            own = images[labels == label].astype(float)
            halves.setdefault(int(label), []).append((own[::2].mean(axis=0), own[1::2].mean(axis=0)))
    within = [((one - two) ** 2).mean() for pairs in halves.values() for one, two in pairs]
    between = [
        ((one - other) ** 2).mean() for pairs in halves.values() for (one, _), (_, other) in combinations(pairs, 2)
    ]
    assert len(within) > 100
    assert np.mean(between) > 4 * np.mean(within)


def test_one_writers_examples_of_a_class_differ() -> None:
    """Or a client's test part would repeat its training part."""
    images, _ = SyntheticWriters(1, seed=0).examples(0)
    assert len(np.unique(images, axis=0)) == len(images)


def test_writers_have_class_mixes_of_their_own() -> None:
    """Total variation distance; two samples of 400 from one uniform mix over 62 classes are about 0.22 apart."""
    writers = SyntheticWriters(20, seed=0, mean_num_examples=400)
    mixes = [np.bincount(labels, minlength=62) / len(labels) for _, labels in map(writers.examples, range(20))]
    distances = [np.abs(one - other).sum() / 2 for one, other in combinations(mixes, 2)]
    assert np.mean(distances) > 0.4
    assert np.sum(mixes, axis=0).min() > 0  # yet no class is left out


def test_another_seed_makes_other_writers() -> None:
    one, other = SyntheticWriters(5, seed=0), SyntheticWriters(5, seed=1)
    assert not any(same(one.examples(client), other.examples(client)) for client in range(5))


def test_the_fingerprint_tells_data_apart_and_instances_not() -> None:
    """Or a worker could join a run with other data, or be refused with the same."""
    variants = [
        SyntheticWriters(5, seed=0),
        SyntheticWriters(6, seed=0),
        SyntheticWriters(5, seed=1),
        SyntheticWriters(5, seed=0, mean_num_examples=100),
    ]
    assert len({writers.fingerprint for writers in variants}) == len(variants)
    assert SyntheticWriters(5, seed=0, mean_num_examples=110.0).fingerprint == variants[0].fingerprint


def test_nothing_is_made_for_clients_nobody_asks_for() -> None:
    """A loop or an array over 10^12 clients would end neither here nor in memory."""
    writers = SyntheticWriters(10**12, seed=0)
    assert writers.fingerprint
    last = 10**12 - 1
    assert len(writers.examples(last)[1]) == writers.num_examples(last)
    assert not same(writers.examples(last), writers.examples(last % 2**32))  # the id's upper half counts


def test_clients_that_do_not_exist_are_refused() -> None:
    """A negative id would else fail inside numpy, and one too large would be a writer that no other process has."""
    for client in (-1, 5):
        with pytest.raises(IndexError, match=rf"client {client} is not in 0\.\.4"):
            SyntheticWriters(5, seed=0).examples(client)


@pytest.mark.parametrize("font", range(len(FONTS)), ids=FONTS)
def test_a_font_has_ink_for_every_character(font: int) -> None:
    """A font that lacks a character draws an empty box for it, the same for all that it lacks."""
    ink = glyph_fields(font) > 0
    assert len(ink) == SyntheticWriters.num_classes == 62
    assert ink.any(axis=(1, 2)).all()
    for image in ink:
        sides = [np.ptp(np.flatnonzero(image.any(axis=axis))) + 1 for axis in (0, 1)]
        assert max(sides) >= GLYPH_SIDE - 2  # the threshold may take off thin ends
    assert len(np.unique(ink, axis=0)) == 62


def test_signed_distance_against_all_pairs() -> None:
    """Or strokes would thicken unevenly. The reference measures every pair of cells."""
    ink = np.random.default_rng(0).random((3, 24, 24)) < 0.03
    ink[0, 5:20, 4:18] = True
    cells = np.stack(np.mgrid[:24, :24], axis=-1).reshape(-1, 2)
    apart = np.linalg.norm(cells[:, None] - cells, axis=-1)
    for image, result in zip(ink, signed_distance(ink), strict=True):
        flat = image.ravel()
        to_ink, to_paper = apart[:, flat].min(axis=1), apart[:, ~flat].min(axis=1)
        expected = np.clip(np.where(flat, to_paper - 0.5, 0.5 - to_ink), -REACH, REACH)
        np.testing.assert_allclose(result.ravel(), expected, atol=1e-5)
