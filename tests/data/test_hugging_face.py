"""Data sets of the library `datasets`: saved to disk, and Parquet files with the bytes of images."""

import io

import numpy as np
import pytest
import torch
from test_folder import images, read
from test_objects import Mine, pictures

from exitkit.data import from_datasets
from exitkit.data.base import build_dataset
from exitkit.errors import UserError

datasets = pytest.importorskip("datasets")
SETTINGS = {"image_size": 16, "workers": 0}
NAMES = ["ant", "bee", "cow"]


@pytest.fixture(autouse=True)
def _own_cache_of_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(count, seed=0, **columns):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    values = {"image": pictures(count, seed), "label": [index % 3 for index in range(count)]}
    made = datasets.Dataset.from_dict(values, features=features)
    for name, value in columns.items():
        made = made.add_column(name, [value] * count)
    return made


def bytes_of(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def load(folder, **settings):
    return build_dataset(f"hf:{folder}", SETTINGS | settings).load(None)


@pytest.fixture
def saved(tmp_path):
    datasets.DatasetDict({"train": rows(60), "test": rows(12, 1), "valid": rows(9, 2)}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_data_set_is_that_of_its_objects(saved):
    data = load(saved)
    assert data.class_names == NAMES
    assert [len(data.labels(part)) for part in ("train", "validation", "test")] == [60, 9, 12]
    ours = from_datasets(Mine(), Mine(12, 1), Mine(9, 2))(**SETTINGS).load(None)
    for part in ("train", "validation", "test"):
        assert torch.equal(images(read(data, part)), images(read(ours, part)))
    direct = from_datasets(rows(60), rows(12, 1))(**SETTINGS).load(None)
    assert direct.class_names == NAMES and torch.equal(images(read(direct, "test")), images(read(ours, "test")))


def test_a_saved_data_set_without_splits_is_split(tmp_path):
    rows(60).save_to_disk(tmp_path / "one")
    assert [len(load(tmp_path / "one").labels(part)) for part in ("train", "validation", "test")] == [44, 4, 12]


def test_parquet_files_with_bytes_are_read_through_the_library(saved, tmp_path):
    reference = images(read(load(saved), "test"))
    folder = tmp_path / "files"
    folder.mkdir()
    rows(60).to_parquet(folder / "train-00000-of-00001.parquet")
    rows(12, 1).to_parquet(folder / "test.parquet")
    assert torch.equal(images(read(load(folder), "test")), reference)
    import pandas as pd

    table = {"picture": [bytes_of(image) for image in pictures(60)], "label": [NAMES[i % 3] for i in range(60)]}
    pd.DataFrame(table).to_parquet(tmp_path / "raw.parquet")
    raw = load(tmp_path / "raw.parquet")
    assert raw.class_names == NAMES and torch.bincount(raw.labels("train")).sum() == 44
    table["picture"] = [{"bytes": value, "path": "x.png"} for value in table["picture"]]
    pd.DataFrame(table).to_parquet(tmp_path / "raw.parquet")
    again = load(tmp_path / "raw.parquet")
    assert torch.equal(images(read(again, "test")), images(read(raw, "test")))


def test_columns_are_chosen_where_there_are_several(tmp_path):
    made = rows(60).add_column("grade", [NAMES[i % 2] for i in range(60)])
    made.save_to_disk(tmp_path / "graded")
    assert load(tmp_path / "graded").class_names == NAMES
    graded = load(tmp_path / "graded", label="grade")
    assert graded.class_names == ["ant", "bee"] and graded.num_classes == 2
    with pytest.raises(UserError, match=r"unknown column of .*graded 'grad'; did you mean grade"):
        load(tmp_path / "graded", label="grad")
    made.rename_column("label", "species").cast_column("species", datasets.Value("int64")).save_to_disk(
        tmp_path / "none"
    )
    with pytest.raises(UserError, match=r"has 0 columns that may be the label .its columns are .*--set label=COLUMN"):
        load(tmp_path / "none")


def test_the_fingerprint_is_that_of_the_contents(saved, tmp_path):
    def digest(folder, **settings):
        return build_dataset(f"hf:{folder}", SETTINGS | settings).digest(None)

    known = digest(saved)
    parts = {"train": rows(60), "test": rows(12, 1), "valid": rows(9, 2)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "again")
    assert digest(tmp_path / "again") == known and digest(tmp_path / "nowhere") is None
    datasets.DatasetDict(parts | {"test": rows(12, 3)}).save_to_disk(tmp_path / "other")
    assert digest(tmp_path / "other") != known


def test_folders_that_are_not_right_are_refused_in_one_line(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    datasets.DatasetDict({"all": rows(60), "more": rows(12)}).save_to_disk(tmp_path / "parts")
    for folder, words in (
        ("nowhere", "nowhere does not exist; expected a folder that save_to_disk wrote"),
        ("empty", "is not a saved data set, and has no Parquet files"),
        ("parts", "has the splits all, more; expected train"),
    ):
        with pytest.raises(UserError, match=words):
            load(tmp_path / folder)
    with pytest.raises(UserError, match="expected --dataset hf:FOLDER"):
        build_dataset("hf", {}).load(None)
    (saved / "test" / "data-00000-of-00001.arrow").write_bytes(b"damaged")
    with pytest.raises(UserError, match="saved can't be read") as caught:
        load(saved)
    assert "\n" not in str(caught.value)


def test_without_the_library_one_line_names_the_extra(saved, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"need datasets; install it with: pip install 'exitkit\[hf\]'"):
        load(saved)


def test_a_saved_data_set_is_trained_on_by_the_command_line(saved, cli):
    options = ("--backbone", "msdnet-tiny", "--epochs", "1", "--batch-size", "16", "--set", "workers=0")
    done = cli("train", "--dataset", f"hf:{saved}", "--set", "image_size=16", *options)
    assert done.code == 0, done.errors
    assert np.isfinite(__import__("exitkit").load_runs("runs").accuracy).all()
