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
