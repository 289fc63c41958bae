"""The hooks that methods share: seeing losses, side networks of the network's optimiser, features, carries, phases."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import exitkit
from exitkit.errors import UserError
from exitkit.files import load_tensors
from exitkit.networks import Head, MultiExitNetwork
from exitkit.strategy import OBJECTIVE, PHASES, Branches, Composition, Phase, Replicas, TrainingStrategy

from toy import FEW, batches, chain, sgd


@dataclass(eq=False)
class Sees(TrainingStrategy):
    """Claims nothing, and keeps the losses that it sees."""

    def __post_init__(self):
        self.seen = []

    def observe(self, run, losses, batch):
        self.seen.append([run.mean(loss.mean(), batch).item() for loss in losses])
        assert not any(loss.requires_grad for loss in losses)


@pytest.mark.parametrize("partner", ["joint", "ge", "pcgrad", "l2w", "metagf", "kd"])
def test_a_method_that_only_sees_losses_composes_with_everything_and_changes_nothing(partner):
    ends = []
    for watched in (False, True):
        network = chain(batchnorm=True)
        torch.manual_seed(0)
        strategy = exitkit.build_strategy(partner)
        if watched:
            observer = Sees()
            strategy = Composition({partner: strategy, "sees": observer})
        run = exitkit.Run.local(network, strategy, sgd(network))
        run.train_epoch(batches(2, size=8))
        ends.append(network.state_dict())
    assert observer.seen and all(len(losses) == 3 for losses in observer.seen)
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@dataclass(eq=False)
class Hints(TrainingStrategy):
    """Trains a side network in the network's own step."""

    slots = frozenset({OBJECTIVE})

    def prepare(self, run):
        run.auxiliary("hints", nn.Linear(5, 5).double())

    def exit_losses(self, run, outputs, batch):
        adapted = run.auxiliaries["hints"].module(outputs.embeddings[0])
        return [loss + (adapted**2).sum(1) for loss in super().exit_losses(run, outputs, batch)]


def test_a_side_network_may_train_with_the_networks_optimiser_and_is_saved_with_the_run():
    network = chain()
    run = exitkit.Run.local(network, Hints(), sgd(network))
    module = run.auxiliaries["hints"].module
    assert run.parameters[-2:] == list(module.parameters())
    before = module.weight.detach().clone()
    run.train_step(batches(1)[0])
    assert not torch.equal(module.weight, before)
    state = copy.deepcopy(run.state_dict())
    again = exitkit.Run.local(fresh := chain(), Hints(), sgd(fresh))
    again.load_state_dict(state)
    run.train_step(batches(2)[1])
    again.train_step(batches(2)[1])
    assert torch.equal(again.auxiliaries["hints"].module.weight, module.weight)
    with pytest.raises(TypeError, match="none of its own"):
        run.auxiliaries["hints"].step(torch.zeros(()))


def test_what_replaces_the_network_alone_refuses_such_side_networks():
    network = chain()
    run = exitkit.Run.local(network, Hints(), sgd(network))
    for what, call in {
        "a pseudo step": lambda: run.pseudo_step([None] * len(run.parameters)),
        "training side by side": lambda: Replicas(run, [[1.0] * 3]),
        "training in branches": lambda: Branches().train(run, batches(1), [[1.0] * 3]),
    }.items():
        with pytest.raises(UserError, match=rf"{what} can't be combined .*\(hints\)"):
            call()


def test_features_before_pooling_are_kept_on_request_and_change_no_output():
    torch.manual_seed(0)
    embed = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    heads = [Head(embed, nn.Linear(3, 4), before_pooling=2), Head(nn.Flatten(), nn.Linear(4, 4))]
    network = MultiExitNetwork([nn.Identity(), nn.Identity()], heads, (1, 2, 2), 4)
    x = torch.randn(5, 1, 2, 2)
    plain = network(x)
    assert plain.features == (None, None) and plain.carry is None
    network.keep_features = True
    kept = network(x)
    assert [tuple(feature.shape) for feature in kept.features] == [(5, 3, 2, 2), (5, 1, 2, 2)]
    assert torch.equal(kept.features[0].mean((2, 3)), kept.embeddings[0])
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, kept.logits, strict=True))


def test_the_carry_of_the_last_exit_is_an_output():
    network = chain()
    exitkit.build_strategy("boostnet").adapt(network)
    outputs = network(batches(1)[0][0])
    assert torch.equal(outputs.carry, outputs.logits[-1])


@dataclass(eq=False)
class TwoRates(TrainingStrategy):
    slots = frozenset({PHASES})
    optimizers: ClassVar[list] = []

    def phases(self, epochs, exits):
        return [Phase("slow", TrainingStrategy(), 1, lr=0.01), Phase("adam", Notes(), 1, lr=1e-3, optimizer="adam")]


@dataclass(eq=False)
class Notes(TrainingStrategy):
    def prepare(self, run):
        TwoRates.optimizers.append(type(run.optimizer).__name__)


def test_a_phase_may_have_a_rate_and_an_optimiser_of_its_own(tmp_path, monkeypatch):
    from exitkit import plugins

    loaded, points = plugins.load, plugins.registered
    monkeypatch.setattr(plugins, "load", lambda kind, name: TwoRates if name == "two" else loaded(kind, name))
    known = lambda kind: {**points(kind), **({"two": None} if kind == "method" else {})}  # noqa: E731
    monkeypatch.setattr(plugins, "registered", known)
    run = exitkit.train({"method": "two", "epochs": 1, "schedule": "constant", **FEW}, tmp_path)
    assert list(run.metrics().lr) == [0.01, 1e-3]
    assert TwoRates.optimizers == ["Adam"]
    assert load_tensors(run.path / "weights.safetensors")
