"""Map-style data sets as they are: torchvision's, Hugging Face's, one's own; what is refused, and the fingerprint."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from test_folder import images, read
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset

import exitkit
from exitkit.data import from_datasets
from exitkit.data.items import Items
from exitkit.data.preprocessing import Preprocessing
from exitkit.errors import UserError


def pictures(count, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (count, 20, 28, 3))
    return [Image.fromarray(value.astype(np.uint8)) for value in values]


class Mine:
    """Pictures with labels; what it reads is counted."""

    def __init__(self, count=60, seed=0, classes=3, change=None, form=None):
        self.images, self.labels_of = pictures(count, seed), [index % classes for index in range(count)]
        self.change, self.form = change or (lambda image: image), form or (lambda image, label: (image, label))
        self.read = 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.read += 1
        return self.form(self.change(self.images[index]), self.labels_of[index])


def as_tensor(image):
    return torch.from_numpy(np.array(image)).movedim(-1, 0)


def normalised(image):
    return as_tensor(image)[:, :16, :16] / 128 - 1


def load(*data, settings=None, **given):
    return from_datasets(*data, **given)(**({"image_size": 16, "workers": 0} | (settings or {}))).load(None)


def test_images_are_read_resized_and_normalised_as_those_of_a_folder(tmp_path):
    from exitkit.data.folder import ImageFolder

    for part, count, seed in (("train", 60, 0), ("test", 12, 1)):
        for number, image in enumerate(pictures(count, seed)):
            folder = tmp_path / part / str(number % 3)
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{number:02}.png")
    folders = ImageFolder(image_size=16, workers=0).load(tmp_path)
    files = [(int(path.parent.name), Image.open(path)) for path in sorted((tmp_path / "train").rglob("*.png"))]
    train = Mine()
    train.images, train.labels_of = [image for _, image in files], [label for label, _ in files]
    test = Subset(Mine(12, 1), sorted(range(12), key=lambda number: number % 3))
    ours = load(train, test)
    assert ours.class_names == folders.class_names
    for part in ("train", "validation", "test"):
        for augment in (False, True):
            assert torch.equal(
                images(read(ours, part, augment=augment)), images(read(folders, part, augment=augment))
            ), part


def test_pictures_are_converted_as_image_files_are(tmp_path):
    turned, hidden = Image.new("RGB", (4, 2), "red"), Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    turned.getexif()[0x0112] = 6
    ours = Items([(turned, 0), (hidden, 1)], "train")
    assert ours.image(0).size == (2, 4) and turned.size == (4, 2)
    assert np.asarray(ours.image(1)).min() == 255


@pytest.mark.parametrize("workers", [0, 2])
def test_every_form_of_image_and_item_gives_the_same(workers):
    settings = {"workers": workers}
    reference = images(read(load(Mine(change=as_tensor), Mine(9, 1, change=as_tensor)), "test", augment=False))
    forms = [
        {"change": as_tensor, "form": lambda image, label: {"image": image, "label": label, "more": 1}},
        {"change": as_tensor, "form": lambda image, label: {"pixel_values": image, "labels": np.int64(label)}},
        {"change": lambda image: np.array(image), "form": lambda image, label: [image, torch.tensor(label), "more"]},
    ]
    for form in forms:
        got = load(Mine(**form), Mine(9, 1, **form), settings=settings)
        assert torch.equal(images(read(got, "test", augment=False)), reference)
    strange = {"change": as_tensor, "form": lambda image, label: {"x": label, "pixels": image}}
    got = load(Mine(**strange), Mine(9, 1, **strange), keys=("pixels", "x"))
    assert torch.equal(images(read(got, "test", augment=False)), reference)


def test_floating_point_tensors_are_used_as_they_are():
    data = load(Mine(change=normalised), Mine(9, 1, change=normalised), settings={"image_size": None})
    assert data.input_shape == (3, 16, 16) and data.preprocessing is None
    assert torch.equal(images(read(data, "test")), torch.stack([normalised(image) for image in pictures(9, 1)]))
    assert (data.mean, data.std) == ((0.0,) * 3, (1.0,) * 3)
    plugin = from_datasets(Mine(change=normalised))()
    assert plugin.suited(Preprocessing(64)) == plugin


def test_random_transforms_of_ones_own_depend_on_the_image_and_the_epoch_only():
    def jittered(image):
        return normalised(image) + torch.randn(1) + np.random.normal() + random.gauss(0, 1)

    parts = [Mine(60, change=jittered), Mine(9, 1, change=normalised), Mine(9, 2, change=normalised)]
    data = load(*parts, settings={"image_size": None})
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    whole = images(read(data))
    assert torch.equal(whole, images(read(data, size=4)))
    parallel = load(*parts, settings={"image_size": None, "workers": 2})
    assert torch.equal(whole, images(read(parallel)))
    assert (whole != images(read(data, seed=4))).flatten(1).any(1).all()
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()
    digests = {from_datasets(*parts)().digest(None) for _ in range(2)}
    assert len(digests) == 1


def test_labels_are_looked_up_where_a_data_set_has_them_and_else_read():
    listed = Mine(200)
    listed.targets = list(listed.labels_of)
    assert torch.equal(Items(listed, "train").labels, torch.arange(200) % 3) and listed.read <= 2 * 64 + 2
    subset = Items(Subset(listed, range(0, 200, 2)), "train")
    assert torch.equal(subset.labels, torch.arange(0, 200, 2) % 3)
    joined = Items(ConcatDataset([listed, Subset(listed, [2, 0])]), "train")
    assert torch.equal(joined.labels, torch.tensor([*(i % 3 for i in range(200)), 2, 0]))
    tensors = TensorDataset(torch.zeros(9, 3, 8, 8), torch.arange(9) % 3)
    assert torch.equal(Items(tensors, "train").labels, torch.arange(9) % 3)
    other = Mine(200, form=lambda image, label: (image, 2 - label))  # as with a transform of the labels
    other.targets = list(other.labels_of)
    assert torch.equal(Items(other, "train").labels, 2 - torch.arange(200) % 3)


def test_class_names_are_given_known_or_numbers():
    known = Mine()
    known.classes = ["ant", "bee", "cow"]
    assert load(known).class_names == load(Subset(known, range(60))).class_names == ["ant", "bee", "cow"]
    assert load(Mine()).class_names == ["0", "1", "2"]
    assert load(known, class_names=["a", "b", "c"]).class_names == ["a", "b", "c"]


def test_the_fingerprint_knows_number_labels_and_contents():
    def digest(*parts):
        return from_datasets(*parts)().digest(None)

    known = digest(Mine(), Mine(9))
    assert known == digest(Mine(), Mine(9))
    relabelled, redrawn = Mine(), Mine()
    relabelled.labels_of[7] = 2
    redrawn.images[7] = pictures(1, 5)[0]
    others = [
        digest(relabelled, Mine(9)),
        digest(redrawn, Mine(9)),
        digest(Mine(61), Mine(9)),
        digest(Mine()),
        digest(Mine(), Mine(9), Mine(9)),
        digest(Mine(9), Mine()),
    ]
    assert len({known, *others}) == 7


class Stream(IterableDataset):
    def __iter__(self):
        yield from ()


def fails(index):
    raise KeyError("no\nsuch file")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: (Stream(),), r"train data is a Stream; expected a data set with len\(\) and items"),
        (lambda: (Mine(0),), "train data has no images"),
        (lambda: (None,), "train is None; expected a data set"),
        (lambda: (Mine(change=fails),), r"item 0 of the train data can't be read \(KeyError: 'no\\nsuch file'\)"),
        (lambda: (Mine(form=lambda image, label: image),), "is a Image; expected a tuple"),
        (lambda: (Mine(form=lambda image, label: {"a": image, "b": label}),), "has the names a, b; say which are"),
        (lambda: (Mine(change=lambda image: torch.zeros(8, 8)),), r"is a Tensor of shape \(8, 8\); expected PIL"),
        (lambda: (Mine(change=lambda image: "x.png"),), "is a str; expected PIL"),
        (lambda: (Mine(change=lambda image: image.convert("I")),), "has an image that has more than 8 bits"),
        (lambda: (Mine(change=lambda image: as_tensor(image).int()),), "image of torch.int32 and 3 channels"),
        (lambda: (Mine(form=lambda image, label: (image, "cat")),), "has the label 'cat'; expected an integer"),
        (
            lambda: (Mine(form=lambda image, label: (image, label - 1)),),
            "has the label -1; expected an integer, from 0",
        ),
        (lambda: (Mine(form=lambda image, label: (image, label + 1)),), "has no image of class 0"),
        (lambda: (Mine(classes=1),), "has 1 class; expected at least 2"),
        (lambda: (Mine(), Mine(9, classes=5)), "the train data has no image of class 3"),
        (lambda: (Mine(), Mine(9, change=normalised)), "train data has PIL images or uint8 tensors, and the test data"),
    ],
)
def test_data_sets_that_are_not_right_are_refused_in_one_line(data, words):
    with pytest.raises(UserError, match=words) as caught:
        load(*data())
    assert "\n" not in str(caught.value)


def test_a_test_label_beyond_the_class_names_is_refused():
    with pytest.raises(UserError, match=r"test data has the label 4, and there are 3 class names; .*from 0 to 2"):
        load(Mine(), Mine(9, classes=5), class_names=["a", "b", "c"])


def test_a_negative_label_in_a_list_of_labels_is_refused_by_its_item():
    data = Mine()
    data.targets = list(data.labels_of)
    data.labels_of[41] = data.targets[41] = -1
    with pytest.raises(UserError, match="item 41 of the train data has the label -1; expected an integer, from 0"):
        load(data, Mine(9, 1))


def test_arrays_in_reverse_or_for_reading_only_are_images_and_arrays_of_objects_are_refused():
    plain = load(Mine(change=np.asarray), Mine(9, 1, change=np.asarray))
    # Colours stored backwards, as OpenCV reads them, and turned by a view.
    turned = load(Mine(change=lambda image: np.array(np.asarray(image)[..., ::-1])[..., ::-1]), Mine(9, 1))
    assert torch.equal(read(plain, "train")[0].images, read(turned, "train")[0].images)
    with pytest.raises(UserError, match="has an image of object; expected uint8 with 1 or 3 channels"):
        load(Mine(change=lambda image: np.asarray(image).astype(object)))


def test_an_item_that_fails_in_a_worker_is_named_on_one_line():
    data = load(Mine(), Mine(9, 1), settings={"workers": 2})
    data.test_source._parts[0].items.images[7] = None
    with pytest.raises(UserError, match="item 7 of the test data ") as caught:
        read(data, "test")
    assert "\n" not in str(caught.value)


def test_tensors_of_several_sizes_are_refused():
    uneven = Mine(12, 1, change=normalised)
    data = load(Mine(change=normalised), uneven, settings={"image_size": None})
    uneven.change = lambda image: normalised(image)[:, : 8 + len(image.tobytes()) % 3 + (image is uneven.images[3])]
    with pytest.raises(UserError, match=r"a batch has images of 3x8x16 and 3x9x16; expected tensors of one size"):
        read(data, "test")


def test_images_held_out_of_augmented_ones_are_refused_unless_that_is_asked_for():
    def noisy(image):
        return normalised(image) + torch.randn(1)

    words = "transforms its images at random, and so would validation images that are drawn from it; give validation"
    with pytest.raises(UserError, match=words):
        load(Mine(change=noisy), Mine(9, change=normalised), settings={"image_size": None})
    data = load(Mine(change=noisy), Mine(9, change=noisy), settings={"image_size": None, "val_transform": "train"})
    assert len(data.labels("validation")) == 6


def test_a_setting_of_the_transform_is_not_ignored():
    with pytest.raises(UserError, match="crop is set, but the data set gives float32 tensors"):
        load(Mine(change=normalised), settings={"image_size": None, "crop": 1.0})


def test_a_registered_data_set_is_trained_evaluated_and_timed(tmp_path, cli):
    plain = Mine(60, 0), Mine(12, 1)
    exitkit.register("dataset", "mine", from_datasets(*plain, class_names=["ant", "bee", "cow"]))
    recipe = {"dataset": "mine", "backbone": "msdnet-tiny", "epochs": 1, "batch_size": 16}
    recipe["dataset_settings"] = {"image_size": 16, "workers": 0}
    run = exitkit.train(recipe, tmp_path / "runs")
    about = run.environment()
    assert about["num_classes"] == 3 and about["preprocessing"]["size"] == 16
    assert run.results()["images"] == about["images"] == from_datasets(*plain)().digest(None)
    assert len(exitkit.evaluate(run)) == len(run.costs())
    assert exitkit.load_data(run).class_names == ["ant", "bee", "cow"]
    assert cli("bench", run.path, "--repeats", "1").code == 0
    exitkit.register("dataset", "mine", from_datasets(Mine(60, 4), Mine(12, 1)))
    with pytest.raises(UserError, match="evaluated on other images than those of mine now"):
        exitkit.evaluate(run)
    with pytest.raises(UserError, match="is finished, on other images than those of mine now; choose another --out"):
        exitkit.train(recipe, tmp_path / "runs")


@pytest.mark.parametrize(
    ("names", "says"),
    [("abc", "class_names is 'abc'; expected a list of names"), (["a", "b", "a"], "class_names has 'a' twice")],
)
def test_class_names_are_a_list_of_different_names(names, says):
    with pytest.raises(UserError, match=says):
        from_datasets(Mine(), class_names=names)
