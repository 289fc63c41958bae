"""Images that processes share: read once, mapped by all, and equal to those that are loaded."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exitkit.benchmarks.speed.loading import noise_images
from exitkit.benchmarks.speed.work import Work
from exitkit.data.base import TensorData
from exitkit.data.sharing import shared
from exitkit.files import SHARED_IMAGES
from exitkit.runs.job import load_data
from exitkit.runs.recipe import Recipe


def anonymous_mib():
    """Return the memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def test_shared_images_are_those_that_are_loaded(monkeypatch, tmp_path):
    plain = load_data(Recipe.make(dataset="digits"))
    monkeypatch.setenv(SHARED_IMAGES, str(tmp_path))
    for _ in range(2):
        data = load_data(Recipe.make(dataset="digits"))
        for name in ("class_names", "input_shape", "mean", "std", "padding"):
            assert getattr(data, name) == getattr(plain, name)
        for name in ("train_images", "test_images", "train_labels", "test_labels"):
            assert torch.equal(getattr(data, name), getattr(plain, name))
        assert torch.equal(data.labels("validation"), plain.labels("validation"))
    other = load_data(Recipe.make(dataset="digits").with_settings({"validation": 100}))
    assert len(other.split.validation) == 100


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory is read from Linux's /proc")
def test_the_images_are_read_once_and_need_no_memory_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setenv(SHARED_IMAGES, str(tmp_path))
    calls = []

    def load():
        calls.append(1)
        return noise_images(Work(shape=(3, 64, 64)), 4000)  # 47 MiB

    shared(load, "noise")
    before = anonymous_mib()
    data = shared(load, "noise")
    assert int(data.train_images.sum(dtype=torch.int64)) > 0  # every page is read
    assert anonymous_mib() - before < 10
    assert len(calls) == 1


def test_images_that_are_read_on_demand_are_left_alone(monkeypatch, tmp_path):
    class Lazy(TensorData):
        pass

    monkeypatch.setenv(SHARED_IMAGES, str(tmp_path))
    lazy = Lazy(**vars(replace(noise_images(Work(), 10))))
    assert shared(lambda: lazy, "lazy") is lazy
    assert not list(tmp_path.glob("*.safetensors"))
