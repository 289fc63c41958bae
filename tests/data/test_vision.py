"""Fashion-MNIST and CIFAR from tiny files in their official layouts, and every way in which files can be wrong."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import struct
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from exitkit.data.vision import CIFAR10, CIFAR100, FashionMNIST, _download_lock
from exitkit.errors import UserError


class TinyCIFAR10(CIFAR10):
    records = (24, 40)


class TinyCIFAR100(CIFAR100):
    records = (400, 200)


def write_records(path, count, label_bytes, classes, seed):
    """Random records; returns images [N, 3, 32, 32] and labels [N] as they were written."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    coarse = random.integers(0, 20, (count, label_bytes - 1))
    pixels = random.integers(0, 256, (count, 3072))
    np.hstack([coarse, labels[:, None], pixels]).astype(np.uint8).tofile(path)
    return pixels.reshape(count, 3, 32, 32), labels


def write_cifar10(folder):
    folder.mkdir(parents=True, exist_ok=True)
    train = [write_records(folder / f"data_batch_{number}.bin", 24, 1, 10, number) for number in range(1, 6)]
    test = write_records(folder / "test_batch.bin", 40, 1, 10, 6)
    return tuple(np.concatenate(column) for column in zip(*train, strict=True)), test


def write_cifar100(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return write_records(folder / "train.bin", 400, 2, 100, 1), write_records(folder / "test.bin", 200, 2, 100, 2)


def write_fashion(folder, train=60, test=30):
    """torchvision's raw files: big-endian header, then bytes."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for stem, count in (("train", train), ("t10k", test)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        pixels = random.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, count, 28, 28) + pixels.tobytes())
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())
    return raw


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_args, **_keywords):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("inside", [True, False], ids=["parent", "itself"])
@pytest.mark.parametrize(
    ("dataset", "name", "write", "classes"),
    [
        (TinyCIFAR10(validation=20), "cifar-10-batches-bin", write_cifar10, 10),
        (TinyCIFAR100(validation=100), "cifar-100-binary", write_cifar100, 100),
    ],
    ids=["cifar10", "cifar100"],
)
def test_cifar_comes_from_its_binary_layout_in_the_official_order(tmp_path, dataset, name, write, classes, inside):
    (images, labels), (test_images, test_labels) = write(tmp_path / name)
    data = dataset.load(tmp_path if inside else tmp_path / name, download=False)
    assert data.input_shape == (3, 32, 32)
    assert data.num_classes == classes == len(set(data.class_names))
    np.testing.assert_array_equal(data.train_images, images)
    np.testing.assert_array_equal(data.train_labels, labels)
    np.testing.assert_array_equal(data.test_images, test_images)
    np.testing.assert_array_equal(data.labels("test"), test_labels)
    learning = torch.cat([data.split.train, data.split.validation]).sort().values
    assert torch.equal(learning, torch.arange(len(labels)))
    assert torch.equal(data.split.test, torch.arange(len(test_labels)))
    assert torch.equal(torch.bincount(data.labels("validation")), torch.full((classes,), dataset.validation // classes))


@pytest.mark.parametrize(
    ("dataset", "write", "mean", "std"),
    [
        (TinyCIFAR10(validation=20), write_cifar10, (0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)),
        (TinyCIFAR100(validation=100), write_cifar100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ],
    ids=["cifar10", "cifar100"],
)
def test_cifar_is_normalised_by_the_papers_constants_and_augmented(tmp_path, dataset, write, mean, std):
    write(tmp_path / dataset.binary[0])
    data = dataset.load(tmp_path, download=False)
    everything = [torch.arange(len(data.split.train))]
    ((images, _),) = data.batches("train", everything, augment=False, seed=0)
    mean, std = np.reshape(mean, (3, 1, 1)), np.reshape(std, (3, 1, 1))
    expected = (data.train_images[data.split.train].numpy() / 255 - mean) / std
    np.testing.assert_allclose(images, expected, atol=1e-5)
    ((augmented, _),) = data.batches("train", everything, augment=True, seed=0)
    black = torch.from_numpy(-mean / std).float()
    first_rows = torch.isclose(augmented[:, :, 0], black[:, 0], atol=1e-5).all(1).all(1)
    assert 0.25 < first_rows.double().mean() < 0.65  # padding in 4 of 9 crops


def test_fashion_mnist_comes_through_torchvision(tmp_path):
    raw = write_fashion(tmp_path)
    data = FashionMNIST(validation=20).load(tmp_path, download=False)
    assert data.input_shape == (1, 28, 28)
    pixels = np.frombuffer((raw / "train-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(60, 1, 28, 28)
    np.testing.assert_array_equal(data.train_images, pixels)
    assert [len(data.labels(part)) for part in ("train", "validation", "test")] == [40, 20, 30]
    ((plain, labels),) = data.batches("train", [torch.arange(40)], augment=True, seed=0)
    np.testing.assert_allclose(plain, (pixels[data.split.train] / 255 - 0.2860) / 0.3530, atol=1e-5)
    assert torch.equal(labels, data.split.train % 10)


def cut(path, count):
    path.write_bytes(path.read_bytes()[:count])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: cut(folder / "data_batch_3.bin", 5000), "data_batch_3.bin has 5000 bytes; expected 73752"),
        (lambda folder: cut(folder / "data_batch_3.bin", 23 * 3073), "has 70679 bytes; expected 73752 .24 records"),
        (lambda folder: cut(folder / "test_batch.bin", 0), "test_batch.bin has 0 bytes"),
        (lambda folder: (folder / "data_batch_2.bin").unlink(), "lacks data_batch_2.bin; expected the whole"),
        (
            lambda folder: write_records(folder / "data_batch_1.bin", 24, 1, 20, 0),
            "data_batch_1.bin holds the label 19; expected 0 to 9",
        ),
    ],
    ids=["cut", "cut-at-a-record", "empty", "lacking", "label"],
)
def test_damaged_binary_files_are_named(tmp_path, damage, words):
    folder = tmp_path / "cifar-10-batches-bin"
    write_cifar10(folder)
    damage(folder)
    with pytest.raises(UserError, match=words) as caught:
        TinyCIFAR10(validation=20).load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dataset", [FashionMNIST(), CIFAR10(), CIFAR100()], ids=lambda dataset: dataset.title)
@pytest.mark.parametrize("there", [True, False], ids=["empty", "absent"])
@pytest.mark.parametrize("download", [True, False], ids=["fetch", "stay"])
def test_a_missing_folder_says_what_was_looked_for_and_where(tmp_path, offline, dataset, there, download):
    folder = tmp_path / "images"
    if there:
        folder.mkdir()
    with pytest.raises(UserError) as caught:
        dataset.load(folder, download)
    message = str(caught.value)
    assert "\n" not in message
    for words in (dataset.title, str(folder), dataset.layouts, "--data-dir"):
        assert words in message
    assert ("or downloaded" in message) == ("no network here" in message) == download
    assert ("Dataset not found" in message) != download
    assert folder.exists() == there  # what could not be fetched leaves no empty folder


@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize(
    ("name", "keep"),
    [("train-images-idx3-ubyte", 5000), ("train-images-idx3-ubyte", 0), ("t10k-labels-idx1-ubyte", 20)],
)
def test_damaged_fashion_mnist_is_said_to_be_damaged(tmp_path, offline, name, keep, download):
    cut(write_fashion(tmp_path) / name, keep)
    with pytest.raises(UserError, match=r"FashionMNIST/raw: .*\); .* delete damaged files there") as caught:
        FashionMNIST(validation=20).load(tmp_path, download)
    assert "\n" not in str(caught.value)


def test_images_without_their_labels_are_refused(tmp_path):
    raw = write_fashion(tmp_path)
    (raw / "train-labels-idx1-ubyte").write_bytes((raw / "t10k-labels-idx1-ubyte").read_bytes())
    with pytest.raises(UserError, match="60 images and 30 labels"):
        FashionMNIST(validation=20).load(tmp_path, download=False)


def test_missing_files_are_fetched_once(tmp_path, monkeypatch):
    from exitkit.data.torchvision_import import torchvision

    source = write_fashion(tmp_path / "elsewhere")
    mnist = torchvision("datasets.mnist")
    fetched = []

    def fetch(url, download_root, filename, **_):
        fetched.append(filename)
        Path(download_root).mkdir(parents=True, exist_ok=True)
        content = (source / filename.removesuffix(".gz")).read_bytes()
        (Path(download_root) / filename.removesuffix(".gz")).write_bytes(gzip.decompress(gzip.compress(content)))

    monkeypatch.setattr(mnist, "download_and_extract_archive", fetch)
    for _ in range(2):
        data = FashionMNIST(validation=20).load(tmp_path / "new")
        assert len(data.train_images) == 60
    assert len(fetched) == 4


def test_who_waits_for_a_fetch_that_fails_takes_its_turn(tmp_path):
    """The first finds no network, and takes away the folder that it has made; the second has waited for its lock."""
    folder, began, goes_on = tmp_path / "deep" / "images", threading.Event(), threading.Event()

    def fails():
        with pytest.raises(OSError, match="no network"), _download_lock(folder):
            began.set()
            assert goes_on.wait(60)
            raise OSError("no network")

    def waits():
        with _download_lock(folder):
            (folder / "images").write_text("fetched")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fails)
        assert began.wait(60)
        second = pool.submit(waits)
        time.sleep(0.3)
        goes_on.set()
        first.result(60)
        second.result(60)
    assert (folder / "images").read_text() == "fetched"


def test_cifar_comes_through_torchvision_where_its_python_layout_lies(tmp_path, offline, monkeypatch):
    from exitkit.data.torchvision_import import torchvision

    folder, official = tmp_path / "cifar-10-batches-py", torchvision("datasets").CIFAR10
    folder.mkdir()
    random, pixels = np.random.default_rng(0), []

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    def records():
        pixels.append(random.integers(0, 256, (20, 3072)).astype(np.uint8))
        return {"data": pixels[-1], "labels": [number % 10 for number in range(20)]}

    monkeypatch.setattr(official, "train_list", [list(write(name, records())) for name, _ in official.train_list])
    monkeypatch.setattr(official, "test_list", [list(write(name, records())) for name, _ in official.test_list])
    name, checksum = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(official, "meta", {"filename": name, "key": "label_names", "md5": checksum})
    data = CIFAR10(validation=20).load(tmp_path)
    np.testing.assert_array_equal(data.train_images, np.concatenate(pixels[:5]).reshape(-1, 3, 32, 32))
    np.testing.assert_array_equal(data.test_images, pixels[5].reshape(-1, 3, 32, 32))
    assert torch.equal(data.train_labels, torch.arange(100) % 10)
    (folder / "data_batch_2").write_bytes(b"changed")  # no longer what the checksum says: never unpickled
    with pytest.raises(UserError, match="cifar-10-batches-py"):
        CIFAR10(validation=20).load(tmp_path)


@pytest.mark.skipif("EXITKIT_DATA" not in os.environ, reason="EXITKIT_DATA names no folder with the real images")
def test_the_real_images_where_they_are():
    folder = Path(os.environ["EXITKIT_DATA"])
    data = CIFAR100().load(folder, download=False)
    assert [len(data.labels(part)) for part in ("train", "validation", "test")] == [45000, 5000, 10000]
    assert torch.equal(torch.bincount(data.labels("validation")), torch.full((100,), 50))
    mean = data.train_images.double().mean((0, 2, 3))
    torch.testing.assert_close(mean, torch.tensor([129.304, 124.070, 112.434], dtype=torch.double), rtol=0, atol=1e-3)
    data = FashionMNIST().load(folder, download=False)
    assert [len(data.labels(part)) for part in ("train", "validation", "test")] == [55000, 5000, 10000]
    pixels = data.train_images.double() / 255
    assert abs(pixels.mean() - 0.2860) < 1e-4
    assert abs(pixels.std() - 0.3530) < 1e-4
