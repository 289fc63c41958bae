"""Few labels and long tails."""

import pytest
import torch

from exitkit import Recipe
from exitkit.data.base import build_dataset
from exitkit.data.thinning import thin
from exitkit.errors import UserError
from exitkit.runs.job import load_data


@pytest.fixture(scope="module")
def digits():
    return build_dataset("digits", {}).load(None)


def test_few_labels_are_the_first_of_each_class_and_nothing_else_changes(digits):
    few = thin(digits, per_class=7)
    labels = digits.labels("train")
    wanted = torch.cat([digits.split.train[labels == c][:7] for c in range(10)]).sort().values
    assert torch.equal(few.split.train, wanted)
    assert torch.equal(few.split.validation, digits.split.validation)
    assert torch.equal(few.split.test, digits.split.test)
    assert few.labels("train").bincount().tolist() == [7] * 10


def test_a_long_tail_falls_exponentially_from_class_to_class(digits):
    tail = thin(digits, imbalance=100.0)
    full = digits.labels("train").bincount().tolist()
    counts = tail.labels("train").bincount(minlength=10).tolist()
    assert counts == [max(int(n * 100 ** (-c / 9) + 1e-9), 1) for c, n in enumerate(full)]
    assert counts[0] == full[0] and counts[9] == 1
    both = thin(digits, per_class=50, imbalance=5.0)
    assert both.labels("train").bincount().tolist()[0] == 50 and both.labels("train").bincount().tolist()[-1] == 10


def test_few_labels_also_thin_the_validation_part_unless_told_otherwise():
    whole = load_data(Recipe.make().resolve())
    thinned = load_data(Recipe.make(dataset_settings={"per_class": 20}).resolve())
    sizes, before = whole.labels("train").bincount(), whole.labels("validation").bincount()
    expected = [max(round(int(n) * 20 / int(size)), 1) for n, size in zip(before, sizes, strict=True)]
    assert thinned.labels("validation").bincount().tolist() == expected == [4] * 10
    first = [whole.split.validation[whole.labels("validation") == label][:4] for label in range(10)]
    assert torch.equal(thinned.split.validation, torch.cat(first).sort().values)
    assert torch.equal(thinned.split.test, whole.split.test)
    for told in ({"thin_validation": False}, {"validation": 150}):
        kept = load_data(Recipe.make(dataset_settings={"per_class": 20} | told).resolve())
        assert len(kept.split.validation) == told.get("validation", 200)
    both = load_data(
        Recipe.make(dataset_settings={"per_class": 20, "validation": 150, "thin_validation": True}).resolve()
    )
    assert 25 < len(both.split.validation) < 35
    with pytest.raises(UserError, match="thin_validation is true, which has an effect only with per_class"):
        build_dataset("digits", {"thin_validation": True})


def test_runs_of_earlier_releases_keep_their_name_and_their_validation_images():
    """Their recipe lists all settings but `thin_validation`."""
    values = Recipe.make(dataset_settings={"per_class": 20}).resolve().model_dump()
    new = Recipe.make(**values)
    del values["dataset_settings"]["thin_validation"]
    old = Recipe.make(**values)
    assert old.resolve().id == old.id != new.id == new.resolve().id
    assert len(load_data(old).split.validation) == 200
    assert Recipe.make().resolve().id == Recipe.make(dataset_settings={"thin_validation": False}).resolve().id


def test_both_are_options_of_every_data_set_and_survive_a_stored_split(tmp_path):
    recipe = Recipe.make(dataset_settings={"per_class": 9, "imbalance": 3}).resolve()
    data = load_data(recipe)
    data.split.save(tmp_path / "split.safetensors")
    again = load_data(recipe, tmp_path / "split.safetensors")
    assert torch.equal(again.split.train, data.split.train) and len(data.split.train) < 90
    with pytest.raises(UserError, match="training and validation images"):
        load_data(Recipe.make().resolve(), tmp_path / "split.safetensors")


def test_refusals(digits):
    with pytest.raises(UserError, match="per_class is 500, and class"):
        thin(digits, per_class=500)
    for name, settings in (("per_class", {"per_class": 0}), ("imbalance", {"imbalance": 0.5})):
        for dataset in ("digits", "cifar100", "folder"):
            with pytest.raises(UserError, match=name):
                build_dataset(dataset, settings)
