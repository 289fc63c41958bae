"""Byte-identical copies of training images among the others are found, and told before training."""

import itertools
import re

import numpy as np
from PIL import Image

from exitkit.data import copies
from exitkit.data.copies import describe_copies
from exitkit.data.folder import ImageFolder


def files(folder, contents):
    folder.mkdir(parents=True)
    paths = [folder / f"{number}.png" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return [str(path) for path in paths]


def test_copies_are_counted_with_an_example(tmp_path):
    train = files(tmp_path / "train" / "a", [b"one", b"two", b"three"])
    assert describe_copies(train, files(tmp_path / "none" / "a", [b"six", b"seven"])) == ""
    assert describe_copies(train, []) == describe_copies([], train) == ""
    one = files(tmp_path / "test" / "b", [b"six", b"two"])
    assert describe_copies(train, one) == (
        "1 validation or test image is a copy of training images, byte for byte (test/b/1.png = train/a/1.png)"
    )
    assert describe_copies(train, [*one, *files(tmp_path / "more", [b"three"])]).startswith("2 validation or test im")


def test_the_time_is_limited_and_files_that_are_gone_are_no_copies(tmp_path, monkeypatch):
    train, held_out = files(tmp_path / "a", [b"x"] * 9), files(tmp_path / "b", [b"x"] * 9)
    assert describe_copies(train, ["gone.png", *held_out]).startswith("9 validation or test images are copies")
    clock = itertools.count()
    monkeypatch.setattr(copies.time, "perf_counter", lambda: float(next(clock)))
    assert describe_copies(train, held_out, seconds=13.5).startswith("at least 4 validation or test images are")
    assert describe_copies(["gone.png"], ["lost.png"]) == ""


def test_a_run_tells_of_copies(tmp_path):
    noise = np.random.default_rng(0)
    for part, name in itertools.product(("train", "test"), "ab"):
        (tmp_path / "data" / part / name).mkdir(parents=True)
        for number in range(12):
            image = Image.fromarray(noise.integers(0, 256, (16, 16, 3)).astype(np.uint8))
            image.save(tmp_path / "data" / part / name / f"{number}.png")
    for number in range(6):  # of which some are validation images
        original = tmp_path / "data" / "train" / "a" / f"{number}.png"
        (tmp_path / "data" / "test" / "b" / f"{number}.png").write_bytes(original.read_bytes())
    fields = {"image_size": 16, "validation": 4, "workers": 0}
    data = ImageFolder(**fields).load(tmp_path / "data")
    said = data.check()
    assert re.match(r"48 images checked in [\d.]+ s; [3-6] validation or test images are copies of training im", said)
