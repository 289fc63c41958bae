"""The loop: schedules, order, phases, what is written down."""

import json
import math
import re
import warnings
from dataclasses import dataclass

import pandas as pd
import pytest
import torch
from torch import nn

import exitkit
from exitkit import Recipe, plugins
from exitkit.data.base import TensorData
from exitkit.errors import Note
from exitkit.files import load_tensors
from exitkit.networks.cascade import LogitLink
from exitkit.runs import fingerprints as sameness
from exitkit.strategy.base import PHASES, Phase, TrainingStrategy
from exitkit.strategy.position import Position
from exitkit.training.batches import learning_rate
from exitkit.training.checkpoint import Checkpoints

from toy import FEW

FAST = {"epochs": 2, **FEW}


def test_cosine_falls_with_every_step_from_the_rate_to_nothing():
    recipe = Recipe.make(lr=0.4, schedule="cosine", milestones=())
    for epoch, step in [(0, 0), (3, 5), (9, 9)]:
        rate = learning_rate(recipe, Position(epoch=epoch, step=step, epochs=10, steps=10))
        assert rate == pytest.approx(0.2 * (1 + math.cos(math.pi * (10 * epoch + step) / 100)))


def test_steps_drop_at_the_first_epoch_past_each_milestone():
    recipe = Recipe.make(lr=0.1, schedule="step", milestones=(0.5, 0.75))
    rates = [learning_rate(recipe, Position(epoch=epoch, step=3, epochs=300, steps=4)) for epoch in range(300)]
    assert rates == pytest.approx([0.1] * 150 + [0.01] * 75 + [0.001] * 75)
    recipe = Recipe.make(lr=0.1, schedule="step", milestones=(1 / 3, 2 / 3))
    rates = [learning_rate(recipe, Position(epoch=epoch, epochs=90)) for epoch in range(90)]
    assert rates == pytest.approx([0.1] * 30 + [0.01] * 30 + [0.001] * 30)
    assert learning_rate(Recipe.make(lr=0.1, schedule="constant"), Position(epoch=9, epochs=10)) == 0.1


def watched(monkeypatch, method, out, **more):
    """Train and note the first bytes of every batch, in order, and the weights at the start."""
    seen, weights = [], []
    original = TensorData.batches

    def batches(self, part, positions, *, augment, seed):
        for batch in original(self, part, positions, augment=augment, seed=seed):
            if part == "train":
                seen.append((len(batch.labels), float(batch.images.sum())))
            yield batch

    steps = {name: getattr(exitkit.Run, name) for name in ("step", "apply")}

    def watching(name):
        def first(self, change, *more, **named):
            if not weights:
                weights.append({name: p.clone() for name, p in self.network.named_parameters()})
            steps[name](self, change, *more, **named)

        return first

    monkeypatch.setattr("exitkit.data.base.TensorData.batches", batches)
    monkeypatch.setattr("exitkit.training.loop.evaluate_held", lambda folder, recipe: None)
    for name in steps:
        monkeypatch.setattr(exitkit.Run, name, watching(name))
    exitkit.train({"method": method, **FAST, **more}, out)
    monkeypatch.undo()
    return seen, weights[0]


AGGREGATORS = {name for name in plugins.registered("method") if hasattr(plugins.load("method", name), "aggregator")}
OTHERS = plugins.registered("method").keys() - AGGREGATORS - {"joint", "heads"}  # heads reads stored features


@pytest.mark.parametrize("methods", [OTHERS | {"pcgrad"}, pytest.param(AGGREGATORS, marks=pytest.mark.full)])
def test_all_methods_see_the_same_images_in_the_same_order_from_the_same_weights(methods, monkeypatch, tmp_path):
    order, weights = watched(monkeypatch, "joint", out=tmp_path)
    assert [size for size, _ in order] == [32, 32, 16] * 2  # the last, smaller batch counts too
    assert order[:3] != order[3:]  # every epoch has an order of its own
    for method in sorted(methods):
        seen, start = watched(monkeypatch, method, out=tmp_path)
        if PHASES in exitkit.build_strategy(method).claims():
            seen = [*seen[:3], *order[3:]]  # a later phase has orders of its own
        passes = len(seen) // len(order)
        assert seen == order[:3] * passes + order[3:] * passes
        assert all(torch.equal(weights[name], start[name]) for name in weights)


def test_another_seed_is_another_start_and_another_order(monkeypatch, tmp_path):
    order, weights = watched(monkeypatch, "joint", out=tmp_path)
    other, start = watched(monkeypatch, "joint", out=tmp_path, seed=1)
    assert order != other
    assert not torch.equal(weights["stages.0.0.scales.0.0.weight"], start["stages.0.0.scales.0.0.weight"])


class Shift(LogitLink):
    """A link with parameters of its own: what a phase adds."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm1d(10)

    def forward(self, index, raw, embedding, carry):
        return self.scale * self.norm(raw), carry


@dataclass(eq=False)
class Linked(TrainingStrategy):
    slots = frozenset({"logit link"})

    def adapt(self, network):
        network.set_link(Shift())


@dataclass(eq=False)
class ThreePhases(TrainingStrategy):
    """All; then the heads over frozen statistics; then only what the phase added."""

    slots = frozenset({"phases"})

    def phases(self, epochs, exits):
        return [
            Phase("all", TrainingStrategy(), epochs),
            Phase("heads", TrainingStrategy(), 1, train="heads", batchnorm="frozen"),
            Phase("new", Linked(), 1, train="new", batchnorm="frozen"),
        ]


@pytest.fixture
def three_phases(monkeypatch):
    """The method `three`, found as any method is."""
    loaded, points = plugins.load, plugins.registered
    monkeypatch.setattr(plugins, "load", lambda kind, name: ThreePhases if name == "three" else loaded(kind, name))
    monkeypatch.setattr(
        plugins, "registered", lambda kind: {**points(kind), **({"three": None} if kind == "method" else {})}
    )


def test_phases_train_what_they_say_and_leave_the_rest(three_phases, monkeypatch, tmp_path):
    states, save = [], Checkpoints.save

    def keep(self, begun, history, **rest):
        states.append({name: tensor.clone() for name, tensor in begun.run.network.state_dict().items()})
        save(self, begun, history, **rest)

    monkeypatch.setattr(Checkpoints, "save", keep)
    run = exitkit.train({"method": "three", **FAST}, tmp_path)
    first, heads, new = states[-3:]
    moved = {name for name in first if not torch.equal(first[name], heads[name])}
    assert moved == {name for name in first if name.startswith("heads.")}
    assert {name for name in heads if not torch.equal(heads[name], new[name])} == set()
    assert new["link.scale"] != 1
    assert new["link.norm.num_batches_tracked"] > 0  # what the phase added is not frozen
    assert torch.equal(load_tensors(run.path / "weights.safetensors")["link.scale"], new["link.scale"])
    metrics = pd.read_csv(run.path / "metrics.csv")
    assert list(metrics.phase) == ["all", "all", "heads", "new"] and list(metrics.epoch) == [1, 2, 1, 1]


@pytest.mark.parametrize("saves", [1, 2, 3, 4])
def test_a_schedule_of_phases_goes_on_after_each_of_its_epochs(saves, three_phases, monkeypatch, tmp_path):
    whole = exitkit.train({"method": "three", **FAST}, tmp_path / "whole")
    save, count = Checkpoints.save, []

    class Stop(Exception):
        pass

    def stop(self, begun, history, **rest):
        save(self, begun, history, **rest)
        count.append(1)
        if len(count) == saves:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        with pytest.raises(Stop):
            exitkit.train({"method": "three", **FAST}, tmp_path / "cut")
    resumed = exitkit.train({"method": "three", **FAST}, tmp_path / "cut", resume=True)
    for name in ("weights.safetensors", "metrics.csv", "outputs-test.safetensors"):
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes(), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["boostnet", "metagf"])
def test_half_precision_trains_on_the_cpu(precision, method, tmp_path):
    run = exitkit.train({"method": method, "epochs": 4, **FEW, "precision": precision}, tmp_path)
    losses = pd.read_csv(run.path / "metrics.csv").train_loss_1
    assert losses.iloc[-1] < losses.iloc[0]
    assert run.outputs("test")["logits"].dtype == "float32"


def test_what_is_written_down(tmp_path):
    run = exitkit.train({"method": "ge", **FAST, "seed": 3}, tmp_path)
    metrics = pd.read_csv(run.path / "metrics.csv")
    measured = [
        f"{part}_{kind}_{k}" for part in ("train", "validation") for kind in ("loss", "accuracy") for k in (1, 2, 3, 4)
    ]
    assert list(metrics) == ["phase", "epoch", "lr", *measured]
    assert metrics[[name for name in metrics if "accuracy" in name]].max().max() > 1  # percent
    timing = pd.read_csv(run.path / "timing.csv")
    assert list(timing) == ["phase", "epoch", "seconds", "peak_mib"] and len(timing) == 2
    outputs = run.outputs("validation")
    assert outputs["logits"].shape == (40, 4, 10) and len(outputs["indices"]) == 40
    test = run.outputs("test")
    accuracy = 100 * (test["logits"].argmax(2) == test["labels"][:, None]).mean(0)
    assert list(accuracy) == pytest.approx(run.results()["test"])
    table = exitkit.load_runs(tmp_path)
    assert list(table) == [
        *("run", "method", "backbone", "dataset", "seed", "epochs", "exit", "papers", "macs", "pruned", "params"),
        *("accuracy", "validation_accuracy", "path"),
    ]
    assert list(table.accuracy) == pytest.approx(list(accuracy)) and set(table.seed) == {3}
    # The last epoch's validation accuracy, measured while training, is what the stored outputs say.
    assert list(metrics.iloc[-1][[f"validation_accuracy_{k}" for k in (1, 2, 3, 4)]]) == pytest.approx(
        run.results()["validation"]
    )


def test_thresholds_never_see_test_labels(tmp_path):
    from safetensors.numpy import load_file, save_file

    from exitkit.benchmarks.report import collect

    run = exitkit.train({"method": "joint", **FAST}, tmp_path)
    before = collect([run])
    path = run.path / "outputs-test.safetensors"
    arrays = load_file(path)
    arrays["labels"] = (arrays["labels"] + 1) % 10
    save_file(arrays, path)
    hits = arrays["logits"].argmax(2) == arrays["labels"][:, None]  # results and outputs have to be of one evaluation
    results = run.results() | {"test": (100 * hits.mean(0)).tolist()}
    (run.path / "results.json").write_text(json.dumps(results))
    after = collect([run])
    assert list(after.curve.cost_mean) == list(before.curve.cost_mean)
    assert list(after.curve.accuracy_mean) != list(before.curve.accuracy_mean)


def test_a_run_of_a_method_whose_file_has_changed_since_is_said_to_be_one(tmp_path, monkeypatch):
    recipe = {"method": "ge+ofa", **FEW, "epochs": 1}
    run = exitkit.train(recipe, tmp_path)
    with warnings.catch_warnings(action="error"):
        exitkit.train(recipe, tmp_path)
    monkeypatch.setattr(sameness, "code_digest", lambda method: "edited")
    with pytest.warns(Note, match=rf"{re.escape(str(run.path))} is finished, and the code of ge\+ofa "):
        exitkit.train(recipe, tmp_path)


def test_the_code_of_a_method_is_that_of_all_its_parts(monkeypatch):
    codes = {name: sameness.code_digest(name) for name in ("joint", "ge", "ofa", "isc", "ge+ofa", "ofa+ge")}
    assert len(set(codes.values())) == 5 and codes["ofa"] == codes["isc"]  # these two share a file
