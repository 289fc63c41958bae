"""Meta-GF's two released drivers against a plain second implementation: explicit loops, hand-written SGD and Adam."""

import pytest
import torch
import torch.nn.functional as F
from test_metagf import DECAY, LR, MOMENTUM, exits_below, local_run

import exitkit
from exitkit.errors import UserError

from toy import batches, chain, sgd

OTHERS = {"released": [1.0, 1.0, 0.6], "released-channel": [3.0, 0.6, 0.45]}  # of the first three exits
SHARES = [0.15, 0.3]


class Reference:
    """What the drivers carry from epoch to epoch; they differ in what is asked of `driver`."""

    def __init__(self, network, driver):
        self.network, self.driver, self.exits = network, driver, network.num_exits
        self.momentum, self.adam, self.steps = {}, {}, 0
        self.shared = [name for name, _ in network.named_parameters() if len(exits_below(name, self.exits)) > 1]
        self.eta = {}
        for name in self.shared:
            rows = len(network.get_parameter(name)) if driver == "released-channel" else 1
            for e in exits_below(name, self.exits):
                value = 5.0 if driver == "released-channel" and e == self.exits - 1 else 1.0
                self.eta[name, e] = torch.full((rows,), value, dtype=torch.float64)

    def branch(self, index, data):
        parameters = dict(self.network.named_parameters())
        for images, labels in data:
            loss = 0
            for j, logits in enumerate(self.network(images).logits):
                weight = 1.0 if j == index else 0.1 * OTHERS[self.driver][j]
                loss = loss + weight * F.cross_entropy(logits, labels)
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            with torch.no_grad():
                for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                    gradient = gradient + DECAY * parameter
                    known = self.momentum.get(name)
                    self.momentum[name] = gradient if known is None else MOMENTUM * known + gradient
                    parameter -= LR * self.momentum[name]
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def strength(self, eta):
        return eta.sigmoid() if self.driver == "released" else (0.1 * eta).exp()

    def fuse(self, eta, ends):
        fused = {}
        for name in ends[0]:
            own = exits_below(name, self.exits)
            if name not in self.shared:
                fused[name] = ends[own[0]][name]
                continue
            total = sum(self.strength(eta[name, e]) for e in own)
            fused[name] = 0
            for e in own:
                share = (self.strength(eta[name, e]) / total).reshape(-1, *[1] * (ends[e][name].dim() - 1))
                fused[name] = fused[name] + share * ends[e][name]
        return fused

    def epoch(self, number, epochs, data):
        start = {name: parameter.detach().clone() for name, parameter in self.network.named_parameters()}
        ends = []
        for index in range(self.exits):
            ends.append(self.branch(index, data))
            with torch.no_grad():  # parameters alone: statistics and momentum go on
                for name, parameter in self.network.named_parameters():
                    parameter.copy_(start[name])
        before = dict(self.eta)
        ramp = [min(share, 0.01 + number * share / epochs) for share in SHARES] + [1.0]
        rate = 0.1 * (0.1 if self.driver == "released-channel" and number / epochs >= 0.5 else 1.0)
        for images, labels in data:
            leaves = {key: value.clone().requires_grad_() for key, value in self.eta.items()}
            fused = self.fuse(leaves, ends)
            outputs = torch.func.functional_call(self.network, fused, (images,))
            loss = sum(w * F.cross_entropy(z, labels) for w, z in zip(ramp, outputs.logits, strict=True))
            if self.driver == "released-channel" or number == 0:
                self.adam_step(torch.autograd.grad(loss, list(leaves.values())), rate)
        with torch.no_grad():
            for name, value in fused.items():
                self.network.get_parameter(name).copy_(value)
        keep = {"released": 0.9, "released-channel": 0.1}[self.driver]
        self.eta = {key: (1 - keep) * value + keep * before[key] for key, value in self.eta.items()}

    def adam_step(self, gradients, rate):
        self.steps += 1
        for key, gradient in zip(self.eta, gradients, strict=True):
            m, v = self.adam.get(key, (0.0, 0.0))
            self.adam[key] = m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            step = (m / (1 - 0.9**self.steps)) / ((v / (1 - 0.999**self.steps)).sqrt() + 1e-8)
            self.eta[key] = self.eta[key] - rate * step


@pytest.mark.parametrize("driver", ["released", "released-channel"])
def test_three_epochs_equal_the_second_implementation(driver):
    ours, theirs = chain(3, batchnorm=True), chain(3, batchnorm=True)
    run, reference = local_run(ours, variant=driver), Reference(theirs, driver)
    run.position.epochs = 3
    for epoch in range(3):
        data = batches(seed=epoch)
        run.position.epoch = epoch
        run.strategy.train_epoch(run, data)
        reference.epoch(epoch, 3, data)
        for name, value in theirs.state_dict().items():
            assert torch.allclose(ours.state_dict()[name], value, rtol=1e-9, atol=1e-11), (epoch, name)
    learned = run.auxiliaries["fusion"].module.eta.detach()
    assert torch.allclose(
        learned[run.auxiliaries["fusion"].module.owns].sum(), sum(value.sum() for value in reference.eta.values())
    )


def test_the_layer_wise_driver_hardly_learns_its_weights():
    run = local_run(chain(3), variant="released")
    run.position.epochs = 4
    etas = []
    for epoch in range(3):
        run.position.epoch = epoch
        run.strategy.train_epoch(run, batches(seed=epoch))
        etas.append(run.auxiliaries["fusion"].module.eta.detach().clone())
    assert 0 < (etas[0] - 1).abs().max() < 0.1 * 3 * 0.11  # three steps of Adam, a tenth of which is kept
    assert torch.allclose(etas[0], etas[2], rtol=1e-12)


def test_on_sdn_networks_branches_are_weighted_by_the_ramp():
    plain, ramped = chain(3), chain(3)
    ramped.family = "sdn-resnet"
    losses = []
    for network in (plain, ramped):
        run = local_run(network, variant="released")
        steps = []
        run.step = lambda loss, steps=steps: steps.append(loss.item())
        run.strategy._branches.train(run, batches(1), run.strategy._emphasis(run))
        losses.append(steps)
    assert losses[1] == pytest.approx([0.01 * losses[0][0], 0.01 * losses[0][1], losses[0][2]], rel=1e-12)


@pytest.mark.parametrize("settings", [{"ema": 1.0}, {"ema": -0.1}, {"fusion_temperature": 0.0}, {"variant": "relased"}])
def test_impossible_values_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        exitkit.build_strategy("metagf", **settings)


def test_the_released_lists_are_for_seven_exits_at_most():
    with pytest.raises(UserError, match="variant=released is for up to 7 exits; the network has 8"):
        exitkit.build_strategy("metagf", variant="released").adapt(chain(8))
    ranet = exitkit.build_network("ranet-tiny")
    with pytest.raises(UserError, match="variant is released, and none was released for ranet networks; expected"):
        exitkit.Run.local(ranet, exitkit.build_strategy("metagf", variant="released"), sgd(ranet))


@pytest.mark.parametrize(
    "settings", [{"granularity": "channel"}, {"weighting": "sigmoid"}, {"fusion_temperature": 0.3}]
)
def test_every_choice_is_free_and_fuses_into_shares_that_sum_to_one(settings):
    network = chain(3, batchnorm=True)
    run = local_run(network, **settings)
    run.strategy.train_epoch(run, batches())
    module = run.auxiliaries["fusion"].module
    shares = module()
    assert torch.allclose(shares.sum(1), torch.ones(len(shares), dtype=torch.float64))
    assert not shares[~module.owns].any()
    rows = sum(len(network.get_parameter(name)) for name in ("stages.0.1.weight", "stages.0.1.bias"))
    assert settings != {"granularity": "channel"} or len(shares) == 2 * rows
