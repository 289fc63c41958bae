"""Random image folders with links, odd names and other formats: each file counts once, or one line says why not."""

import os
import random
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from exitkit.data.base import PARTS
from exitkit.data.describe import describe
from exitkit.data.folder import ImageFolder
from exitkit.errors import Note, UserError

LAYOUTS = [
    [""],
    [""],
    [""],
    ["train", "test"],
    ["train", "test"],
    ["Train", "Test"],
    ["training", "testing"],
    ["train", "val", "test"],
    ["train", "valid"],
    ["train2017", "val2017"],
    ["train", "Train"],
]
CLASSES = [
    "ant",
    "bee",
    "cow",
    "名前",
    "a b",
    "=cmd",
    "-x",
    "c\nd",
    "x" * 60,
    "\udcff",
    "<b>",
    "%s",
    ".hidden",
    "train",
]
NAMES = ["{}", "{} copy", "é{}", "{}\n", "-{}", "{}\udc80", ".{}", "{}.tar", "%{}"]
ENDINGS = ["png"] * 6 + ["PNG", "jpg", "JPEG", "jfif", "gif", "bmp", "webp", "tif", "ppm"]


def image(chance, path):
    png = path.suffix.lower() == ".png"
    picture = Image.new("RGB", (chance.randint(1, 20), chance.randint(1, 20)), tuple(chance.choices(range(256), k=3)))
    picture = picture.convert(chance.choice(["RGB", "L", "RGBA", "P", "1"] if png else ["RGB", "L"]))
    exif = Image.Exif()
    if chance.random() < 0.2:
        exif[0x0112] = chance.randint(0, 9)
    formats = {".jfif": "JPEG", ".ppm": "PPM"}
    picture.save(path, format=formats.get(path.suffix), **({"exif": exif} if png else {}))


def build(root, chance):
    """Write a random folder."""
    files, folders = [], [root]
    names = chance.sample(CLASSES, chance.choice([1, 2, 2, 3, 3]))
    for part in chance.choice(LAYOUTS):
        for name in names[: -1 if len(names) > 2 and chance.random() < 0.1 else None]:
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            folders.append(folder)
            inner = folder / "deeper" if chance.random() < 0.1 else folder
            inner.mkdir(exist_ok=True)
            for number in range(chance.choice([2, 3, 9, 12] if chance.random() < 0.95 else [1])):
                path = inner / f"{chance.choice(NAMES).format(number)}.{chance.choice(ENDINGS)}"
                image(chance, path)
                files.append(path)
    for _ in range(chance.choice([0, 0, 1, 2, 4])):
        disturb(chance, root, files, folders)


def disturb(chance, root, files, folders):
    """Add a link, a loop, a copy, an empty, a damaged or a foreign file."""
    target, folder = chance.choice(files), chance.choice(folders)
    place = folder / f"new{len([*folder.iterdir()])}.png"
    kind = chance.randrange(9)
    if kind == 0:
        place.symlink_to(target)
    elif kind == 1:
        os.link(target, place)
    elif kind == 2:
        (folder / f"loop{len([*folder.iterdir()])}").symlink_to(chance.choice(folders), target_is_directory=True)
    elif kind == 3:
        place.symlink_to(root / "nowhere.png")
    elif kind == 4:
        place.write_bytes(target.read_bytes())
    elif kind == 5:
        place.write_bytes(b"" if chance.random() < 0.5 else target.read_bytes()[:30])
    elif kind == 6:
        place.with_suffix(".txt").write_text("no image")
    elif kind == 7:
        place.mkdir()
    else:
        (folder / f"empty{len([*folder.iterdir()])}").mkdir()


def check(root, number):
    """Load a random folder; return whether it could be."""
    chance = random.Random(number)
    build(root, chance)
    before = sorted(os.walk(root))
    try:
        data = ImageFolder(image_size=8, workers=0, validation=chance.choice([1, 2, 5])).load(root)
        said = [*describe(data), data.check()]
    except UserError as error:
        assert "\n" not in str(error).replace("c\nd", "").replace("\n.", "."), error  # names may have line breaks
        return False
    finally:
        assert sorted(os.walk(root)) == before
    assert said[0].startswith(f"{data.num_classes:,} classes: ") and data.num_classes >= 2
    real = [Path(path).stat().st_ino for part in PARTS for path in data.paths(part)]
    assert len(real) == len(set(real)), "a file counts twice"
    for part in PARTS:
        paths, labels = data.paths(part), data.labels(part)
        assert len(paths) == len(labels) and set(labels.tolist()) <= set(range(data.num_classes))
        for path, label in zip(paths, labels.tolist(), strict=True):
            assert data.class_names[label] in Path(path).parts, (path, data.class_names[label])
        if len(paths):
            (batch,) = data.batches(part, [torch.arange(min(3, len(paths)))], augment=part == "train", seed=0)
            assert batch.images.isfinite().all() and batch.images.shape[1:] == data.input_shape
    return True


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(number, marks=pytest.mark.full) for number in range(30, 3000, 30))]
)
def test_random_folders_are_read_once_or_refused(first, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", Note)  # of this machine's torchvision
        loaded = [check(tmp_path / str(number), number) for number in range(first, first + 30)]
    assert any(loaded) and not all(loaded)
