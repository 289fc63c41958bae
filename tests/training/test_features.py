"""Features of a frozen trunk: equal to running it in every epoch, computed once, and never those of other weights."""

import dataclasses
import functools
import shutil
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import exitkit
from exitkit.data.base import TensorData
from exitkit.errors import Note, UserError
from exitkit.files import load_tensors, save_tensors
from exitkit.networks.cascade import Features, Head, MultiExitNetwork
from exitkit.strategy import FrozenTrunk, Phase, TrainingStrategy
from exitkit.training import features as stored
from exitkit.training import loop

from toy import FEW, chain

RECIPE = {**FEW, "method": "heads", "epochs": 3, "schedule": "cosine"}


def train(out, **given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        return exitkit.train(RECIPE | given, out)


def weights(run):
    return load_tensors(run.path / "weights.safetensors")


def close(ours, others, atol=2e-5):
    assert ours.keys() == others.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, others[name], rtol=2e-4, atol=atol, msg=name)


@pytest.fixture
def runs_of_the_trunk(monkeypatch):
    """How many images have gone through the trunk, by whether the run trains or validates on them, or stores them."""
    counted = []
    plain = MultiExitNetwork.step

    def step(self, index, state, carry=None):
        if index == 0 and isinstance(state, torch.Tensor):
            counted.append(len(state))
        return plain(self, index, state, carry)

    monkeypatch.setattr(MultiExitNetwork, "step", step)
    return counted


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"method": "heads+isc", "method_settings": {"heads.views": 0}},
        {"method": "heads+ofa+pcgrad"},
        {"method": "heads+byot"},
        {"backbone": "sdn-tiny"},
        {"method": "heads+l2w"},
    ],
    ids=["linear", "link", "update", "before-pooling", "other-heads", "halves"],
)
def test_stored_features_train_as_the_trunk_would_in_every_epoch(given, tmp_path):
    part = "heads." if "+" in given.get("method", "") else ""
    settings = given.get("method_settings", {})
    given = {"lr": 0.02, **given}  # a larger rate makes more of the rounding of the folded trunk
    ours = train(tmp_path / "ours", **given)
    plain = train(tmp_path / "plain", **given | {"method_settings": settings | {f"{part}cache": False}})
    assert ours.path.name == plain.path.name  # it changes no result
    # A ReLU of the link that is nearly zero turns the rounding of the folded trunk into a larger difference.
    close(weights(ours), weights(plain), atol=5e-3 if "isc" in ours.path.name else 2e-5)
    for column in ("train_loss_1", "validation_loss_1", "train_accuracy_1"):
        np.testing.assert_allclose(ours.metrics()[column], plain.metrics()[column], rtol=1e-4, atol=1e-4)


def test_the_trunk_runs_once_whatever_the_number_of_epochs(tmp_path, runs_of_the_trunk):
    train(tmp_path / "short", epochs=1)
    short = sum(runs_of_the_trunk)
    runs_of_the_trunk.clear()
    run = train(tmp_path / "long", epochs=4)
    assert sum(runs_of_the_trunk) == short  # the evaluation at the end, and the count of the cost
    assert not (run.path / "features").exists()


def test_a_number_of_augmented_views_is_seen_in_turn(tmp_path, monkeypatch):
    monkeypatch.setattr("exitkit.data.digits.TensorData", functools.partial(TensorData, padding=2))
    runs = {
        (views, cache): train(tmp_path / f"{views}-{cache}", method_settings={"views": views, "cache": cache})
        for views, cache in ((2, True), (2, False), (0, True), (None, True))
    }
    close(weights(runs[2, True]), weights(runs[2, False]))
    losses = [run.metrics()["train_loss_1"].to_numpy() for run in runs.values()]
    assert len({round(loss[2], 4) for loss in losses[1:]}) == 3


def interrupted(out, monkeypatch, epochs):
    """Stop a run after some epochs, try to resume it with a damaged trunk, and return the folder of its features."""
    plain = loop._end_epoch

    def stop(training, begun, *rest):
        plain(training, begun, *rest)
        if begun.run.position.epoch == epochs:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_end_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            train(out)
    (kept,) = out.glob("*/features")
    state = torch.load(kept.with_name("checkpoint.pt"), weights_only=True)
    assert state["trunk"] and not [name for name in state["network"] if name.startswith("stages.")]
    (trunk,) = kept.parent.glob("trunk-*")  # written once
    damaged = kept.with_name("damaged")
    trunk.rename(damaged)
    save_tensors(trunk, {name: tensor + 1 for name, tensor in load_tensors(damaged).items()})
    with pytest.raises(UserError, match=rf"{trunk.name} is damaged; delete checkpoint.pt to start"):
        train(out)
    damaged.replace(trunk)
    return kept


def test_an_interrupted_run_ends_in_the_same_bits_and_uses_its_features_again(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole")
    kept = interrupted(tmp_path / "cut", monkeypatch, epochs=2)
    monkeypatch.setattr(stored, "_store", lambda *arguments: pytest.fail("computed again"))
    resumed = train(tmp_path / "cut")
    monkeypatch.undo()
    assert not kept.exists()
    ours, others = weights(resumed), weights(whole)
    assert all(torch.equal(ours[name], others[name]) for name in others)


def test_features_do_not_outlive_a_run_that_was_interrupted_after_its_last_epoch(tmp_path):
    def report(progress):
        if progress.epoch_done and progress.epoch == RECIPE["epochs"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exitkit.train(RECIPE, tmp_path, report=report)
    (folder,) = tmp_path.iterdir()
    assert (folder / "features").exists()
    assert exitkit.train(RECIPE, tmp_path).finished and not (folder / "features").exists()


@pytest.mark.parametrize("damage", ["other", "cut", "gone"])
def test_features_of_other_weights_or_damaged_ones_are_computed_again(tmp_path, monkeypatch, damage):
    whole = train(tmp_path / "whole")
    kept = interrupted(tmp_path / "cut", monkeypatch, epochs=1)
    key = kept / "features.json"
    if damage == "gone":
        shutil.rmtree(kept)
    else:
        text = key.read_text()
        key.write_text(text.replace('"trunk": "', '"trunk": "0') if damage == "other" else text[:20])
        for path in kept.glob("*.npy"):
            np.save(path, np.load(path) + 1)
    resumed = train(tmp_path / "cut")
    ours, others = weights(resumed), weights(whole)
    assert all(torch.equal(ours[name], others[name]) for name in others)


def test_the_size_is_told_before_and_checked_against_the_disk(tmp_path, monkeypatch):
    with pytest.warns(
        Note, match=r"the features of 120 images at 4 exits take 0 MiB in .*features; the trunk runs once"
    ):
        exitkit.train(RECIPE, tmp_path / "runs")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(
        UserError, match="has 0 MiB free; choose another --out, or run the trunk in every epoch by --set"
    ):
        train(tmp_path / "full")
    (run,) = (tmp_path / "full").iterdir()
    assert not list(run.glob("*features*"))


def test_what_needs_the_images_has_them(tmp_path, runs_of_the_trunk):
    phase = exitkit.build_strategy("heads+kd", **{"kd.teacher": "joint"}).phases(3, 4)[0]
    assert not stored.stores_features(phase)
    assert stored.stores_features(exitkit.build_strategy("heads+kd").phases(3, 4)[0])
    assert not stored.stores_features(exitkit.build_strategy("heads", views=None).phases(3, 4)[0])
    assert not stored.stores_features(exitkit.build_strategy("joint").phases(3, 4)[0])


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(x)


def test_only_layers_that_always_give_the_same_are_computed_once():
    layers = [nn.AvgPool2d(2), nn.Flatten(), Dropped(), nn.Identity()]
    fixed, rest = Head(nn.Sequential(*layers), nn.Linear(4, 2)).layers()
    assert fixed == layers[:2] and rest == layers[2:]
    assert Head(nn.Identity(), nn.Linear(4, 2)).layers()[1] == []
    assert Head(nn.BatchNorm1d(4), nn.Linear(4, 2)).layers()[0] == []


@pytest.mark.parametrize("method", ["joint", "isc", "boostnet", "byot", "gpf"])
def test_the_outputs_of_features_are_those_of_images(method):
    network = exitkit.build_network("msdnet-tiny").eval()
    exitkit.build_strategy(method).adapt(network)
    images = torch.randn(5, *network.input_shape)
    outputs, ours = network(images), network(network.features(images))
    for expected, got in zip(outputs.logits + outputs.raw, ours.logits + ours.raw, strict=True):
        torch.testing.assert_close(got, expected)
    assert all((one is None) == (other is None) for one, other in zip(outputs.features, ours.features, strict=True))


def test_temperatures_divide_the_logits_only():
    network = chain(exits=2)
    images = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    before = network(images)
    assert not [name for name in network.state_dict() if name.endswith("temperature")]
    network.add_temperatures()
    network.set_temperatures([2.0, 0.5])
    network.add_temperatures()
    after, first = network(images), next(iter(network.iterate(images)))
    torch.testing.assert_close(after.logits[0] * 2, before.logits[0])
    torch.testing.assert_close(after.logits[1] / 2, before.logits[1])
    assert torch.equal(after.raw[0], before.raw[0]) and torch.equal(first.logits, after.logits[0])
    assert torch.equal(network(network.features(images)).logits[1], after.logits[1])
    small = exitkit.prune_to(network, exit=1)
    torch.testing.assert_close(small(images).logits[0], after.logits[0])


@dataclasses.dataclass(eq=False)
class Wrong(TrainingStrategy):
    """Trains what it calls frozen."""

    slots = frozenset({"phases"})

    def phases(self, epochs, exits):
        return [Phase("wrong", self, epochs, trunk=FrozenTrunk())]


def test_a_phase_that_trains_a_frozen_trunk_is_refused(tmp_path):
    from exitkit.training.phase import check_trains

    network = chain()
    names = {name for name, _ in network.named_parameters()}
    with pytest.raises(UserError, match="phase wrong of method x trains stages, and its trunk is frozen"):
        check_trains(Wrong().phases(1, 3)[0], "x", network, names, set())


def test_a_batch_of_features_is_split_and_placed_like_images():
    from exitkit.engine.devices import Placement
    from exitkit.strategy import LocalBatch

    features = Features((torch.arange(10.0).view(5, 2), torch.arange(20.0).view(5, 1, 2, 2)))
    even, odd = LocalBatch.make(features, torch.arange(5)).halves(1)
    assert torch.equal(even.images.tensors[0], features.tensors[0][::2])
    assert torch.equal(odd.images.tensors[1], features.tensors[1][1::2])
    placed = Placement(torch.device("cpu"), channels_last=True).images(features)
    assert placed.tensors[1].is_contiguous(memory_format=torch.channels_last) and isinstance(placed, Features)
