"""Folders of images: layouts, what is an image, the papers' transforms, workers, and every way to be wrong."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from exitkit.data.folder import ImageFolder, ImageNet
from exitkit.errors import UserError

CLASSES = ("ant", "bee", "cow")
SIZE = 16


def write_images(folder, counts, seed=0, suffix="png"):
    """Smooth random images, so that resizing hardly matters to their colours."""
    random = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            small = Image.fromarray(random.integers(0, 256, (3, 4, 3)).astype(np.uint8))
            small.resize((28, 20), Image.Resampling.BICUBIC).save(folder / name / f"{number:02}.{suffix}")


def settings(**given):
    return {"image_size": SIZE, "workers": 0} | given


@pytest.fixture
def two_parts(tmp_path):
    write_images(tmp_path / "train", dict.fromkeys(CLASSES, 10))
    write_images(tmp_path / "val", dict.fromkeys(CLASSES, 4), seed=1)
    return tmp_path


def read(data, part="train", size=7, augment=True, seed=3):
    count = len(data.labels(part))
    return list(data.batches(part, list(torch.arange(count).split(size)), augment=augment, seed=seed))


def images(batches):
    return torch.cat([batch.images for batch in batches])


def test_training_and_test_folders(two_parts):
    data = ImageFolder(**settings()).load(two_parts)
    assert data.class_names == list(CLASSES)
    assert data.input_shape == (3, SIZE, SIZE)
    assert [len(data.labels(part)) for part in ("train", "validation", "test")] == [27, 3, 12]
    assert torch.bincount(data.labels("validation")).tolist() == [1, 1, 1]
    assert torch.bincount(data.labels("test")).tolist() == [4, 4, 4]
    batches = read(data)
    assert [tuple(batch.images.shape) for batch in batches] == [(7, 3, SIZE, SIZE)] * 3 + [(6, 3, SIZE, SIZE)]
    assert torch.equal(torch.cat([batch.labels for batch in batches]), data.labels("train"))
    assert batches[0].images.dtype == torch.float32
    assert batches[0].labels.dtype == torch.int64
    called_val = images(read(data, "test", augment=False))
    (two_parts / "val").rename(two_parts / "test")
    renamed = ImageFolder(**settings()).load(two_parts)
    assert torch.equal(images(read(renamed, "test", augment=False)), called_val)


def test_class_folders_alone_give_a_fifth_for_testing(tmp_path):
    write_images(tmp_path, {"ant": 20, "bee": 40, "cow": 40})
    data = ImageFolder(**settings(validation=10)).load(tmp_path)
    assert torch.bincount(data.labels("test")).tolist() == [4, 8, 8]
    assert torch.bincount(data.labels("validation")).tolist() == [2, 4, 4]
    split = data.split
    assert torch.equal(torch.cat([split.train, split.validation, split.test]).sort().values, torch.arange(100))
    again = ImageFolder(**settings(validation=10)).load(tmp_path).split
    assert torch.equal(split.test, again.test)
    assert torch.equal(split.train, again.train)


def test_val_beside_test_is_the_validation_part_unless_a_number_is_set(two_parts):
    write_images(two_parts / "test", dict.fromkeys(CLASSES, 2), seed=2)
    data = ImageFolder(**settings()).load(two_parts)
    assert [len(data.labels(part)) for part in ("train", "validation", "test")] == [30, 12, 6]
    assert torch.bincount(data.labels("validation")).tolist() == [4, 4, 4]
    imagenet = ImageNet(**settings(validation=3)).load(two_parts)
    assert torch.equal(images(read(data, "validation", augment=False)), images(read(imagenet, "test", augment=False)))
    data = ImageFolder(**settings(validation=3)).load(two_parts)
    assert [len(data.labels(part)) for part in ("train", "validation", "test")] == [27, 3, 6]


def test_plain_reading_is_resize_crop_and_imagenets_normalisation(two_parts):
    data = ImageNet(**settings(validation=3)).load(two_parts)
    got = images(read(data, "test", augment=False))
    paths = sorted((two_parts / "val").rglob("*.png"))
    for image, path in zip(got, paths, strict=True):
        short = round(SIZE * 256 / 224)  # 18: 28 x 20 becomes 25 x 18
        large = Image.open(path).resize((int(short * 28 / 20), short), Image.Resampling.BILINEAR)
        left, top = round((large.width - SIZE) / 2), round((large.height - SIZE) / 2)
        pixels = np.asarray(large.crop((left, top, left + SIZE, top + SIZE))).transpose(2, 0, 1) / 255
        mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(2, 3, 1, 1)
        np.testing.assert_allclose(image, (pixels - mean) / std, atol=1e-5)


def test_augmentation_is_the_images_own_whatever_batch_rank_worker_or_history(two_parts):
    data = ImageNet(**settings(validation=3)).load(two_parts)
    whole = images(read(data))
    torch.manual_seed(77)
    state = torch.get_rng_state()
    assert torch.equal(whole, images(read(data, size=4)))
    order = torch.randperm(27, generator=torch.Generator().manual_seed(0))
    mixed = images(data.batches("train", list(order.split(5)), augment=True, seed=3))
    assert torch.equal(whole[order], mixed)
    parallel = ImageNet(**settings(validation=3, workers=2)).load(two_parts)
    assert torch.equal(whole, images(read(parallel)))
    assert torch.equal(state, torch.get_rng_state())
    for other in (images(read(data, seed=4)), images(read(data, augment=False))):
        assert (whole != other).flatten(1).any(1).all()


def test_flips_and_crops_vary_from_image_to_image(tmp_path):
    """Every file holds the same ramp, so that all that differs is the augmentation."""
    ramp = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    for name in CLASSES:
        for part in ("train", "val"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(40 if part == "train" else 1):
                Image.fromarray(ramp).save(tmp_path / part / name / f"{number}.bmp")
    data = ImageNet(**settings(validation=3)).load(tmp_path)
    seen = images(read(data))
    rising = seen[:, 0, 0, -1] > seen[:, 0, 0, 0]
    assert 0.3 < rising.double().mean() < 0.7
    spans = (seen[:, 0, 0, -1] - seen[:, 0, 0, 0]).abs() * 0.229
    assert len(spans.unique()) > 40
    assert spans.max() > 0.8 > 0.4 > spans.min()


@pytest.mark.parametrize(
    "suffix", ["png", "jpg", "jpeg", "jfif", "webp", "bmp", "ppm", "pbm", "tif", "gif", "avif", "jp2", "PNG"]
)
def test_kinds_of_images(tmp_path, suffix):
    write_images(tmp_path, {"ant": 8, "bee": 8}, suffix=suffix)
    data = ImageFolder(**settings()).load(tmp_path)
    assert images(read(data)).isfinite().all()


def test_grey_and_palette_and_transparent_images_become_rgb(tmp_path):
    write_images(tmp_path, {"ant": 8, "bee": 8})
    for number, mode in enumerate(("L", "P", "RGBA", "1", "LA", "CMYK")):
        name = f"{number:02}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.open(tmp_path / "ant" / "07.png").convert(mode).save(tmp_path / "ant" / f"x{name}")
    data = ImageFolder(**settings()).load(tmp_path)
    assert images(read(data, "train")).shape[1:] == (3, SIZE, SIZE)
    grey = data.train_source.paths.index(str(tmp_path / "ant" / "x00.png"))
    parts = [part for part in ("train", "validation", "test") if grey in getattr(data.split, part)]
    position = getattr(data.split, parts[0]).tolist().index(grey)
    ((image, _),) = data.batches(parts[0], [torch.tensor([position])], augment=False, seed=0)
    raw = image[0] * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) + torch.tensor([0.485, 0.456, 0.406]).view(
        3, 1, 1
    )
    torch.testing.assert_close(raw[0], raw[1])
    torch.testing.assert_close(raw[0], raw[2])


def test_what_begins_with_a_dot_and_what_is_no_image_is_passed_over(tmp_path):
    write_images(tmp_path, {"ant": 8, "bee": 8})
    write_images(tmp_path / "ant" / "deeper", {"still": 1}, seed=5)
    plain = ImageFolder(**settings()).load(tmp_path)
    assert len(plain.train_source.paths) == 17
    (tmp_path / ".cache").mkdir()
    shutil.copytree(tmp_path / "bee", tmp_path / "ant" / ".thumbnails")
    (tmp_path / "ant" / "._00.png").write_bytes(b"not an image")
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "readme.md").write_text("not a class")
    again = ImageFolder(**settings()).load(tmp_path)
    assert again.train_source.paths == plain.train_source.paths
    assert again.class_names == ["ant", "bee"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"no image at all", b"", "cut"], ids=["foreign", "empty", "cut"])
def test_an_unreadable_image_is_named_on_one_line(two_parts, workers, content):
    """One that was damaged after the headers were looked at, or behind its header."""
    data = ImageFolder(**settings(workers=workers)).load(two_parts)
    bad = two_parts / "val" / "bee" / "02.png"
    bad.write_bytes(bad.read_bytes()[:200] if content == "cut" else content)
    with pytest.raises(UserError, match=r"image .*val/bee/02\.png can't be read: ") as caught:
        read(data, "test", augment=False)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("image ")


@pytest.mark.parametrize("content", [b"no image at all", b"", "cut"], ids=["foreign", "empty", "cut"])
def test_the_check_before_training_names_every_kind_of_unreadable_file(two_parts, content):
    bad = two_parts / "val" / "bee" / "02.png"
    bad.write_bytes(bad.read_bytes()[:200] if content == "cut" else content)
    with pytest.raises(UserError, match=r"image .*val/bee/02\.png can't be read: ") as caught:
        ImageFolder(**settings()).load(two_parts).check()
    assert "\n" not in str(caught.value)


def test_images_are_known_by_their_names_sizes_and_contents(two_parts):
    known = ImageFolder(**settings()).digest(two_parts)
    moved = shutil.copytree(two_parts, two_parts.parent / "moved")
    assert ImageFolder(**settings()).digest(moved) == known
    assert ImageFolder(**settings()).digest(two_parts / "nowhere") is ImageNet().digest(two_parts) is None
    image, digests = moved / "val" / "bee" / "02.png", {known}
    image.write_bytes(image.read_bytes()[:-1] + b"?")
    digests.add(ImageFolder(**settings()).digest(moved))
    image.write_bytes(b"longer" * 1000)
    digests.add(ImageFolder(**settings()).digest(moved))
    image.rename(moved / "val" / "bee" / "20.png")
    digests.add(ImageFolder(**settings()).digest(moved))
    assert len(digests) == 4


def test_sixteen_bits_a_channel_are_refused_and_not_cut_off(two_parts):
    deep = np.full((20, 28), 40000, dtype=np.uint16)
    Image.fromarray(deep).save(two_parts / "val" / "ant" / "00.png")
    data = ImageFolder(**settings()).load(two_parts)
    for reading in (data.check, lambda: read(data, "test")):
        with pytest.raises(UserError, match=r"00\.png has more than 8 bits per channel"):
            reading()


def remove(path):
    shutil.rmtree(path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: remove(folder / "val" / "cow"), "3 classes and .*val has 2; .*not in both: cow"),
        (lambda folder: (folder / "val" / "cow").rename(folder / "val" / "cat"), "not in both: cat, cow"),
        (lambda folder: remove(folder / "val"), "has the subfolder train but not test or val; expected both"),
        (lambda folder: remove(folder / "train"), "has the subfolder val but not train; expected both"),
        (
            lambda folder: [path.unlink() for path in (folder / "train" / "bee").iterdir()],
            "class folder .*train/bee holds no images; expected .jpg",
        ),
        (lambda folder: [remove(folder / "train" / name) for name in CLASSES], "train has 0 class folders"),
        (lambda folder: [remove(folder / "train" / name) for name in CLASSES[1:]], "train has 1 class folders"),
        (
            lambda folder: [remove(folder / name) for name in ("train", "val")],
            "has 0 class folders; expected at least 2",
        ),
        (
            lambda folder: [(folder / "train" / "bee" / f"{number:02}.png").unlink() for number in range(9)],
            "class bee has a single image to draw a validation set from",
        ),
    ],
    ids=["fewer", "other", "no-test", "no-train", "empty-class", "none", "one", "empty", "single"],
)
def test_folders_that_are_not_right_are_refused(two_parts, spoil, words):
    spoil(two_parts)
    with pytest.raises(UserError, match=words) as caught:
        ImageFolder(**settings()).load(two_parts)
    assert "\n" not in str(caught.value)


def test_other_mistakes(tmp_path, two_parts):
    with pytest.raises(UserError, match="expected --data-dir DIR"):
        ImageFolder().load(None)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        ImageNet().load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="50,000 images can't be drawn from 30 images in 3 classes; expected 3 to 27"):
        ImageNet().load(two_parts)
    with pytest.raises(UserError, match="not laid out as ImageNet"):
        ImageNet().load(two_parts / "train")
    for wrong, words in (
        ({"image_size": 4}, "image_size is 4"),
        ({"workers": -1}, "workers is -1"),
        ({"workers": 100_000}, "workers is 100000; expected 0 to 1024"),
        ({"validation": 0}, "validation is 0"),
    ):
        with pytest.raises(UserError, match=words):
            ImageFolder(**wrong)


def test_a_stored_split_of_a_folder_that_has_changed_is_refused(two_parts):
    dataset = ImageFolder(**settings())
    stored = dataset.load(two_parts).split
    assert torch.equal(dataset.load(two_parts).with_split(stored).split.train, stored.train)
    shutil.copy(two_parts / "train" / "ant" / "00.png", two_parts / "train" / "ant" / "new.png")
    words = r"has 30 training and validation images, but the data has 31; .*added or removed"
    with pytest.raises(UserError, match=words):
        dataset.load(two_parts).with_split(stored)
