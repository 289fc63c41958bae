"""Splits: whole, disjoint, stratified, one and the same for every run, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from exitkit.data.digits import Digits
from exitkit.data.split import Split, hold_out
from exitkit.errors import Note, UserError

PARTS = ("train", "validation", "test")


def equal(one, other):
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in PARTS)


def test_digits_are_split_whole_disjoint_and_by_class():
    data = Digits().load(None)
    assert [len(getattr(data.split, part)) for part in PARTS] == [1097, 200, 500]
    assert torch.equal(torch.cat([getattr(data.split, part) for part in PARTS]).sort().values, torch.arange(1797))
    of_all = torch.bincount(data.train_labels) / 1797
    for part in PARTS:
        labels = data.labels(part)
        assert (torch.bincount(labels, minlength=10) - of_all * len(labels)).abs().max() < 2, part


def test_digits_say_that_they_use_no_folder():
    with pytest.warns(Note, match="the digits are part of scikit-learn, so --data-dir here is not used"):
        Digits().load(Path("here"))


def test_digits_are_the_real_ones_brought_to_sixteen_and_normalised():
    from sklearn.datasets import load_digits

    data = Digits().load(None)
    assert data.input_shape == (1, 16, 16)
    assert data.num_classes == 10
    assert data.class_names == [str(digit) for digit in range(10)]
    # Bilinear: the same 16 x 8 interpolation matrix on both sides, pixel centres half a pixel in.
    centres = (np.arange(16) + 0.5) / 2 - 0.5
    matrix = np.stack([np.interp(centres, np.arange(8), unit) for unit in np.eye(8)], 1)
    error = data.train_images.squeeze(1).double().numpy() * 16 / 255 - matrix @ load_digits().images @ matrix.T
    assert np.abs(error).max() <= 0.5 * 16 / 255 + 1e-9
    ((images, _),) = data.batches("train", [torch.arange(1097)], augment=True, seed=0)
    assert abs(images.mean()) < 2e-3
    assert abs(images.std() - 1) < 2e-3


def test_the_split_is_the_data_sets_own_whatever_ran_before():
    first = Digits().load(None)
    torch.manual_seed(123)
    np.random.seed(123)
    before = torch.get_rng_state()
    again = Digits().load(None)
    assert equal(first.split, again.split)
    assert torch.equal(before, torch.get_rng_state())
    # Another number of validation images leaves the test part alone.
    other = Digits(validation=300).load(None).split
    assert torch.equal(first.split.test, other.test)
    assert len(other.validation) == 300


def test_hold_out_keeps_shares_to_an_image():
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([400, 300, 200, 100]))
    pool = torch.arange(0, 1000, 2)
    rest, drawn = hold_out(labels, pool, 50, 0, "a part")
    assert torch.equal(torch.cat([rest, drawn]).sort().values, pool)
    assert torch.bincount(labels[drawn]).tolist() == [20, 15, 10, 5]
    assert torch.equal(drawn, drawn.sort().values)
    assert not torch.equal(drawn, hold_out(labels, pool, 50, 1, "a part")[1])


@pytest.mark.parametrize("count", [4, 5, 9, 95, 99])
def test_every_class_is_on_both_sides_however_rare_it_is(count):
    """By its share, a class of two images would have none on one side."""
    labels = torch.cat(
        [torch.zeros(96, dtype=torch.int64), torch.ones(2), torch.full((2,), 2), torch.full((3,), 3)]
    ).long()
    pool = torch.arange(len(labels))
    for seed in range(5):
        rest, drawn = hold_out(labels, pool, count, seed, "a part")
        assert torch.equal(torch.cat([rest, drawn]).sort().values, pool)
        assert len(drawn) == count and torch.equal(drawn, drawn.sort().values)
        assert set(labels[rest].tolist()) == set(labels[drawn].tolist()) == {0, 1, 2, 3}
        again = hold_out(labels, pool, count, seed, "a part")
        assert torch.equal(rest, again[0])


@pytest.mark.parametrize(
    ("validation", "words"),
    [(1297, "1,297 images can't be drawn from 1,297"), (5, "expected 10 to 1287"), (1288, "expected 10 to 1287")],
)
def test_impossible_numbers_of_validation_images_are_refused(validation, words):
    with pytest.raises(UserError, match=words):
        Digits(validation=validation).load(None)


@pytest.mark.parametrize("validation", [0, -3])
def test_no_validation_images_is_refused_at_once(validation):
    with pytest.raises(UserError, match=f"validation is {validation}; expected at least 1"):
        Digits(validation=validation)


def test_a_class_of_one_image_is_named():
    labels = torch.tensor([0] * 10 + [1] + [2] * 10)
    with pytest.raises(UserError, match="class owl has a single image to draw a test set from"):
        hold_out(labels, torch.arange(21), 5, 0, "a test set", ["cat", "owl", "dog"])


def test_a_stored_split_comes_back_and_rules(tmp_path):
    data = Digits().load(None)
    Digits(validation=197).load(None).split.save(tmp_path / "split.safetensors")
    stored = Split.load(tmp_path / "split.safetensors")
    moved = data.with_split(stored)
    assert equal(moved.split, Digits(validation=197).load(None).split)
    assert torch.equal(moved.labels("validation"), data.train_labels[stored.validation])
    assert len(data.split.validation) == 200


def test_a_damaged_split_is_one_clear_line(tmp_path):
    path = tmp_path / "split.safetensors"
    with pytest.raises(UserError, match="is missing"):
        Split.load(path)
    Digits().load(None).split.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged") as caught:
        Split.load(path)
    assert "\n" not in str(caught.value)
    save_file({"train": torch.arange(3)}, path)
    with pytest.raises(UserError, match="is not a split"):
        Split.load(path)
    save_file({part: torch.arange(3.0) for part in PARTS}, path)
    with pytest.raises(UserError, match="is not a split"):
        Split.load(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda split: Split(split.train[:-1], split.validation, split.test), "1296 training and validation images"),
        (lambda split: Split(split.train, split.validation, split.test[:0]), "0 test images, but the data has 500"),
        (lambda split: Split(split.train + 1000, split.validation, split.test), "different integers from 0 to 1796"),
        (lambda split: Split(split.train, split.validation, split.test - 1000), "test indices are not"),
        (lambda split: Split(split.train, split.train[:200], split.test), "training and validation indices are not"),
    ],
    ids=["smaller", "empty", "beyond", "negative", "leak"],
)
def test_a_split_that_does_not_fit_is_refused(change, words):
    data = Digits().load(None)
    with pytest.raises(UserError, match=words):
        data.with_split(change(data.split))


def test_a_part_without_images_is_checked_like_any_other():
    split = Split(torch.arange(4), torch.arange(4, 6), torch.arange(0))
    split.check(split, 6, 0)
    with pytest.raises(UserError, match="0 test images, but the data has 1"):
        split.check(Split(split.train, split.validation, torch.arange(1)), 6, 1)


def test_fewer_than_two_images_per_class_are_named():
    with pytest.raises(
        UserError, match="can't be drawn from 3 images in 2 classes; expected at least 4, two per class"
    ):
        hold_out(torch.tensor([0, 0, 1]), torch.arange(3), 2, 0, "a validation set")
