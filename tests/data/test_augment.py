"""Crops and flips against a plain loop, and what an image's augmentation may depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exitkit.data.augment import crops_and_flips
from exitkit.data.base import TensorData
from exitkit.data.split import Split

MEAN, STD = (0.5, 0.25, 0.125), (0.25, 0.5, 1.0)


def small(count=40, side=6, padding=4, channels=3):
    """Random bytes, none zero, so that padding can be told from image; the last tenth is the validation part."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(1, 256, (count, channels, side, side), generator=generator).to(torch.uint8)
    labels = torch.arange(count) % 4
    order = torch.randperm(count, generator=generator)
    split = Split(order[count // 10 :], order[: count // 10], torch.arange(count))
    names = list("abcd")
    shape = (channels, side, side)
    return TensorData(names, shape, labels, labels, split, images, images, MEAN[:channels], STD[:channels], padding)


def together(data, batches, seed=5, part="train", augment=True):
    """{position: image} of whatever batches."""
    parts = [torch.as_tensor(batch) for batch in batches]
    seen = {}
    for positions, (images, labels) in zip(parts, data.batches(part, parts, augment=augment, seed=seed), strict=True):
        assert torch.equal(labels, data.labels(part)[positions])
        seen |= dict(zip(positions.tolist(), images, strict=True))
    return seen


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def unnormalised(images):
    return (images * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)) * 255


def find_crop(image, original, padding):
    """Every (row, column, flipped) whose crop of the padded original is `image`, by trying all."""
    side = original.shape[-1]
    padded = np.pad(original, ((0, 0), (padding, padding), (padding, padding)))
    found = []
    for row in range(2 * padding + 1):
        for column in range(2 * padding + 1):
            crop = padded[:, row : row + side, column : column + side]
            found += [
                (row, column, flip)
                for flip in (False, True)
                if np.array_equal(crop[:, :, ::-1] if flip else crop, image)
            ]
    return found


@pytest.mark.parametrize(("channels", "height", "width", "padding"), [(3, 8, 8, 4), (1, 5, 7, 2), (2, 4, 3, 1)])
def test_crops_equal_a_loop_over_images(channels, height, width, padding):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50, channels, height, width), generator=generator).to(torch.uint8)
    offsets = torch.randint(2 * padding + 1, (50, 2), generator=generator)
    flips = torch.rand(50, generator=generator) < 0.5
    cropped = crops_and_flips(images, padding, offsets, flips)
    assert cropped.dtype == torch.uint8
    assert cropped.is_contiguous()
    for image, (row, column), flip, got in zip(images.numpy(), offsets.tolist(), flips, cropped, strict=True):
        expected = np.zeros_like(image)
        for y in range(height):
            for x in range(width):
                source_y, source_x = y + row - padding, (width - 1 - x if flip else x) + column - padding
                if 0 <= source_y < height and 0 <= source_x < width:
                    expected[:, y, x] = image[:, source_y, source_x]
        np.testing.assert_array_equal(got, expected)


def test_no_augmentation_is_the_normalised_image():
    data = small()
    for part, images in (("train", data.train_images), ("validation", data.train_images), ("test", data.test_images)):
        indices = getattr(data.split, part)
        ((got, labels),) = data.batches(part, [torch.arange(len(indices))], augment=False, seed=1)
        raw = images[indices].double() / 255
        expected = (raw - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-6)
        assert torch.equal(labels, data.train_labels[indices])


def test_padding_is_black_before_normalisation_and_crops_are_of_the_same_image():
    data = small(side=6)
    for position, image in together(data, [range(36)]).items():
        raw = unnormalised(image).round().to(torch.uint8).numpy()
        assert find_crop(raw, data.train_images[data.split.train[position]].numpy(), 4), position


def test_every_offset_is_drawn_alike_and_half_are_flipped():
    count, side, padding = 16200, 11, 4
    # The bright middle stays inside every crop, with both neighbours; its grey one, on the left, tells a flip.
    image = torch.zeros(1, 1, side, side, dtype=torch.uint8)
    image[0, 0, 5, 4:6] = torch.tensor([128, 255])
    images = image.expand(count, -1, -1, -1)
    labels = torch.zeros(count, dtype=torch.int64)
    split = Split(torch.arange(count), torch.arange(1), torch.arange(1))
    data = TensorData(["a"], (1, side, side), labels, labels, split, images, images, (0.0,), (1.0,), padding)
    ((seen, _),) = data.batches("train", [torch.arange(count)], augment=True, seed=11)
    pixels, each = seen.flatten(1), torch.arange(count)
    middle = pixels.argmax(1)
    flipped = pixels[each, middle + 1] > 0
    assert torch.equal(flipped, pixels[each, middle - 1] == 0)
    assert abs(flipped.double().mean() - 0.5) < 4 * 0.5 / count**0.5
    rows, columns = middle // side - 1, middle % side - 1
    for some in (torch.ones(count, dtype=torch.bool), flipped, ~flipped):
        counts = torch.bincount((rows * 9 + columns)[some], minlength=81).double()
        assert len(counts) == 81
        # Chi-squared with 80 degrees of freedom: mean 80, sd 12.6.
        assert 40 < ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 140


def test_an_image_looks_alike_in_any_batch_on_any_rank():
    data = small()
    whole = together(data, [range(36)])
    assert same(whole, together(data, torch.randperm(36).split(5)))
    assert same(whole, together(data, [[position] for position in range(36)]))
    ranks = [together(data, [batch[rank::2] for batch in torch.arange(36).split(8)]) for rank in range(2)]
    assert same(whole, ranks[0] | ranks[1])


def test_another_seed_another_crop():
    data = small()
    one, other = together(data, [range(36)], seed=1), together(data, [range(36)], seed=2)
    differ = [key for key in one if not torch.equal(one[key], other[key])]
    assert len(differ) > 25
    assert same(one, together(data, [range(36)], seed=1))


def test_the_validation_part_can_be_augmented_and_the_plain_set_never_is():
    data = small()
    plain = together(data, [range(4)], part="validation", augment=False)
    assert not same(plain, together(data, [range(4)], part="validation"))
    unpadded = small(padding=0)
    assert same(together(unpadded, [range(36)]), together(unpadded, [range(36)], augment=False))


def test_batches_leave_the_global_generator_alone_and_ignore_it():
    data = small()
    before = torch.get_rng_state()
    first = together(data, [range(36)])
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert same(first, together(data, [range(36)]))


def test_batches_may_be_read_side_by_side():
    data = small()
    parts = list(torch.arange(36).split(6))
    one, other = (data.batches("train", parts, augment=True, seed=5) for _ in range(2))
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left.images, right.images)
