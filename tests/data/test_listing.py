"""Listing of image folders: parts by any of their names, each file once, and what is passed over."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from PIL import Image

from exitkit.data.describe import describe
from exitkit.data.folder import ImageFolder
from exitkit.data.listing import list_parts
from exitkit.errors import UserError


def write_images(folder, classes=("ant", "bee"), count=12):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.new("RGB", (8, 8), (20 * index, 90 * number, 0)).save(folder / name / f"{index}.png")


def load(folder):
    return ImageFolder(image_size=16, workers=0).load(folder)


def sizes(data):
    return [len(data.labels(part)) for part in ("train", "validation", "test")]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("Train", "Test"), [22, 2, 24]),
        (("training", "testing"), [22, 2, 24]),
        (("TRAIN", "VAL"), [22, 2, 24]),
        (("train", "valid", "test"), [24, 24, 24]),
        (("train", "validation", "test"), [24, 24, 24]),
        (("Training", "Validation"), [22, 2, 24]),
    ],
)
def test_parts_are_known_by_any_of_their_names(tmp_path, names, expected):
    for name in names:
        write_images(tmp_path / name)
    data = load(tmp_path)
    assert data.class_names == ["ant", "bee"]
    assert sizes(data) == expected


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("train2017", "val2017"), "has train2017, val2017, which look like parts; name the parts train, val and test"),
        (("Train_set", "cat"), "has Train_set, which looks like a part"),
        (("train", "test_images"), "has test_images, which looks like a part"),
        (("train", "Train", "test"), "has Train and train, which are the same part"),
        (("dev", "holdout"), "has dev, holdout, which look like parts"),
        (("Train", "cat"), "has the subfolder Train but not test or val"),
    ],
)
def test_what_looks_like_a_part_is_no_class(tmp_path, names, words):
    for name in names:
        write_images(tmp_path / name)
    with pytest.raises(UserError, match=words):
        load(tmp_path)


def test_parts_inside_of_classes_and_one_folder_too_many_are_refused(tmp_path):
    for name in ("ant", "bee"):
        for part in ("train", "test"):
            write_images(tmp_path / "inside" / name / part, ("x",))
    with pytest.raises(UserError, match=r"ant has the parts test, train; .*such as .*inside/test/ant"):
        load(tmp_path / "inside")
    write_images(tmp_path / "outer" / "archive")
    with pytest.raises(UserError, match=r"has 1 class folders; .*did you mean .*outer/archive\?"):
        load(tmp_path / "outer")


def test_what_is_passed_over_is_told(tmp_path):
    for part in ("train", "test"):
        write_images(tmp_path / part)
    (tmp_path / "extras").mkdir()
    (tmp_path / "readme.md").touch()
    (tmp_path / "train" / "ant" / "a.heic").touch()
    (tmp_path / "train" / "ant" / "b.heic").touch()
    (tmp_path / "train" / "bee" / "noending").touch()
    (tmp_path / "train" / "bee" / ".hidden.png").touch()
    shutil.copy(tmp_path / "train" / "ant" / "1.png", tmp_path / "test" / "loose.png")
    (tmp_path / "__MACOSX").mkdir()
    os.mkfifo(tmp_path / "train" / "bee" / "pipe.png")
    data = load(tmp_path)
    assert sizes(data) == [22, 2, 24]
    assert data.passed_over == [
        "3 files of other formats (2 .heic, 1 without ending)",
        "1 pipe or device",
        "2 hidden entries",
        "2 files beside the class folders (loose.png, readme.md)",
        "folder extras",
    ]
    assert describe(data) == [
        "2 classes: ant, bee; 11 training images per class",
        "22 training, 2 validation and 24 test images",
        f"passed over: {'; '.join(data.passed_over)}",
    ]


def test_many_classes_of_different_sizes_are_described_in_short(tmp_path):
    for number in range(8):
        write_images(tmp_path, (f"class{number}",), count=4 + number)
    first = describe(load(tmp_path))[0]
    assert first == "8 classes: class0, class1, ..., class7; 2 (class0) to 8 (class7) training images per class"


def test_each_file_counts_once_and_a_real_name_comes_before_a_link(tmp_path):
    for part in ("train", "test"):
        write_images(tmp_path / part)
    plain = load(tmp_path)
    (tmp_path / "train" / "ant" / "0-linked").symlink_to(tmp_path / "test" / "bee")  # another part, and class
    (tmp_path / "train" / "ant" / "loop").symlink_to(tmp_path / "train")
    (tmp_path / "train" / "ant" / "00.png").symlink_to(tmp_path / "test" / "ant" / "3.png")
    os.link(tmp_path / "train" / "bee" / "4.png", tmp_path / "train" / "bee" / "once-more.png")
    linked = load(tmp_path)
    assert linked.paths("train") == plain.paths("train")
    assert linked.paths("test") == plain.paths("test")
    assert linked.passed_over == ["4 links or second names of what is counted already"]


def test_links_that_lead_elsewhere_are_followed_and_count_once(tmp_path):
    write_images(tmp_path / "data")
    write_images(tmp_path / "store", ("more",), count=3)
    (tmp_path / "data" / "ant" / "more").symlink_to(tmp_path / "store" / "more")
    (tmp_path / "data" / "bee" / "more").symlink_to(tmp_path / "store" / "more")
    (tmp_path / "data" / "bee" / "x.png").symlink_to(tmp_path / "store" / "more" / "1.png")
    (listing,), passed_over = list_parts(tmp_path / "data", [tmp_path / "data"])
    assert torch.bincount(listing.labels).tolist() == [15, 12]
    assert passed_over.links == 2


def test_a_part_or_a_class_that_is_a_link_to_another_one_is_refused(tmp_path):
    write_images(tmp_path / "train")
    (tmp_path / "test").symlink_to(tmp_path / "train")
    with pytest.raises(UserError, match=r"class folder .*test/ant holds no images; .*\(passed over: .*links"):
        load(tmp_path)
    (tmp_path / "test").unlink()
    write_images(tmp_path / "test", ("ant",))
    (tmp_path / "test" / "bee").symlink_to(tmp_path / "train" / "bee")
    with pytest.raises(UserError, match=r"class folder .*test/bee holds no images"):
        load(tmp_path)


def test_a_link_that_leads_nowhere_is_a_file_that_can_not_be_read(tmp_path):
    write_images(tmp_path)
    (tmp_path / "ant" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=r"image .*ant/broken\.png does not exist"):
        load(tmp_path).check()


def test_entries_that_share_a_number_by_mistake_are_different_files(tmp_path, monkeypatch):
    """Some network file systems give all entries of a folder the same number."""
    write_images(tmp_path)
    scandir = os.scandir

    class Entry:
        def __init__(self, entry):
            self.entry = entry

        def __getattr__(self, name):
            return getattr(self.entry, name)

        def inode(self):
            return 7

    class Entries:
        def __init__(self, path):
            self.entries = scandir(path)

        def __enter__(self):
            return (Entry(entry) for entry in self.entries)

        def __exit__(self, *error):
            self.entries.close()

    monkeypatch.setattr("exitkit.data.listing._scan", Entries)
    (listing,), passed_over = list_parts(tmp_path, [tmp_path])
    assert len(listing.paths) == 24 and passed_over.links == 0
