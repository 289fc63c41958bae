"""Data sets of images of any size: what a network brings, what is set, and parts that are given or drawn."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from exitkit.data.folder import ImageFolder
from exitkit.data.images import ImageDataSet
from exitkit.data.preprocessing import MEAN, STD, Preprocessing
from exitkit.data.vision import CIFAR10
from exitkit.errors import UserError
from exitkit.networks.families.base import Backbone
from exitkit.runs.job import resolve
from exitkit.runs.recipe import Recipe

OWN = Preprocessing(48, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0.9, "bicubic")


def test_what_is_open_comes_from_the_network_and_what_is_set_stays():
    assert ImageFolder().suited(None).preprocessing == Preprocessing(224, MEAN, STD, 0.875, "bilinear")
    assert ImageFolder().suited(OWN).preprocessing == OWN
    chosen = ImageFolder(image_size=32, std=(1, 1, 1)).suited(OWN).preprocessing
    assert chosen == Preprocessing(32, (0.5, 0.5, 0.5), (1, 1, 1), 0.9, "bicubic")
    assert ImageFolder(image_size=64).suited(None) == ImageFolder(image_size=64)
    assert CIFAR10().suited(OWN) == CIFAR10()


def test_a_network_that_agrees_with_the_data_set_changes_no_setting():
    """So that runs of earlier releases keep their names."""
    assert ImageFolder(image_size=224).suited(Preprocessing()) == ImageFolder(image_size=224).suited(None)


def test_a_resolved_recipe_holds_what_the_network_brings(monkeypatch):
    monkeypatch.setattr(Backbone, "preprocessing", lambda self: OWN)
    recipe = resolve(Recipe.make(dataset="folder", backbone="msdnet-tiny", dataset_settings={"crop": 1.0}))
    settings = recipe.dataset_settings
    assert (settings["image_size"], settings["mean"], settings["crop"]) == (48, [0.5, 0.5, 0.5], 1.0)
    assert resolve(Recipe.make(**recipe.model_dump())) == recipe
    monkeypatch.undo()
    assert resolve(Recipe.make(**recipe.model_dump())).id == recipe.id


def test_torchvision_weights_bring_their_transform():
    from exitkit.networks.attach.torchvision import TorchvisionModel

    assert TorchvisionModel("efficientnet_b3").preprocessing() is None
    small = TorchvisionModel("efficientnet_b3", weights="DEFAULT").preprocessing()
    assert small == Preprocessing(300, crop=300 / 320, interpolation="bicubic")
    resnet = TorchvisionModel("resnet50", weights="DEFAULT").preprocessing()
    assert round(resnet.size / resnet.crop) == 232 and resnet.interpolation == "bilinear"
    large = TorchvisionModel("efficientnet_v2_l", weights="DEFAULT").preprocessing()
    assert (large.size, large.mean) == (480, (0.5, 0.5, 0.5))


@pytest.mark.parametrize("own", [Preprocessing(16), Preprocessing(16, (0.2, 0.3, 0.4), (1, 2, 3), 1.0, "bicubic")])
def test_the_plain_transform_is_resize_crop_and_normalisation(own):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    short = round(16 / own.crop)
    large = image.resize((int(short * 28 / 20), short), getattr(Image.Resampling, own.interpolation.upper()))
    left, top = round((large.width - 16) / 2), round((large.height - 16) / 2)
    expected = np.asarray(large.crop((left, top, left + 16, top + 16))).transpose(2, 0, 1) / 255
    expected = (expected - np.reshape(own.mean, (3, 1, 1))) / np.reshape(own.std, (3, 1, 1))
    np.testing.assert_allclose(own(image, augment=False), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"mean": (0.5,)}, "expected three numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "expected three numbers above 0"),
        ({"crop": 1.5}, "crop is 1.5; expected a share between 0.01 and 1"),
        ({"crop": 0.0}, "crop is 0.0; expected a share"),
    ],
)
def test_settings_that_are_not_possible_are_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        ImageFolder(**wrong)


LABELS = torch.arange(60) % 3
NAMES = ("ant", "bee", "cow")


@dataclass(frozen=True)
class Counted(ImageDataSet):
    """Only arranges."""


@pytest.mark.parametrize(
    ("test", "validation", "count", "sizes"),
    [
        (None, None, None, (44, 4, 12)),
        (LABELS[:6], None, None, (54, 6, 6)),
        (LABELS[:6], LABELS[:9], None, (60, 9, 6)),
        (LABELS[:6], LABELS[:9], 12, (48, 12, 6)),
        (None, LABELS[:9], None, (48, 9, 12)),
    ],
)
def test_missing_parts_are_drawn_from_the_training_images(test, validation, count, sizes):
    labels, test_labels, split = Counted(validation=count).arranged(NAMES, LABELS, test, validation)
    assert tuple(map(len, (split.train, split.validation, split.test))) == sizes
    used = torch.cat([split.train, split.validation, *([split.test] if test is None else [])])
    assert len(used.unique()) == len(used) and used.max() < len(labels)
    assert torch.equal(test_labels, labels if test is None else test)
    assert len(test_labels[split.test].unique()) == len(labels[split.validation].unique()) == 3
