"""Zero Time Waste: the cascade by hand, what its second phase moves, and separate training as its limit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import exitkit
from exitkit.errors import UserError
from exitkit.methods.ztw import CascadeLink
from exitkit.networks.cascade import Head, MultiExitNetwork
from exitkit.training.phase import BegunPhase

from toy import FEW, batches, chain


def adapted(exits=3, **settings):
    network = chain(exits)
    torch.manual_seed(1)
    exitkit.build_strategy("ztw", **settings).adapt(network)
    return network


def with_layers_in_its_heads(exits=3):
    """A network whose heads have parameters and batch norm of their own in front of the classifier."""
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Conv2d(1 if k == 0 else 3, 3, 1), nn.BatchNorm2d(3), nn.Tanh()) for k in range(exits)]
    heads = [
        Head(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Flatten()), nn.Linear(12, 4)) for _ in range(exits)
    ]
    return MultiExitNetwork(stages, heads, (1, 2, 2), 4).double()


def second_phase(network, name="ztw", **settings):
    """A run of the second phase, set up as training does."""
    phase = exitkit.build_strategy(name, **settings).phases(4, network.num_exits)[1]
    modules = {name for name, _ in network.named_modules()}
    torch.manual_seed(1)
    phase.strategy.adapt(network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(phase.train))
    trained = [p for p in network.parameters() if p.requires_grad]
    run = exitkit.Run.local(network, phase.strategy, torch.optim.Adam(trained, 1e-2))
    BegunPhase(phase, run, {name for name, _ in network.named_modules()} - modules).train_mode()
    return run


@pytest.mark.parametrize("normalise", [False, True])
def test_the_cascade_by_hand(normalise):
    network, (x, _) = adapted(4, normalise=normalise), batches(1)[0]
    link, outputs = network.link, network(x)
    expected = F.linear(outputs.embeddings[0], link.answers[0].weight, link.answers[0].bias)
    assert torch.equal(outputs.logits[0], expected)
    for k in (1, 2):
        before = expected
        if normalise:
            before = (before - before.mean(1, keepdim=True)) / (
                before.var(1, unbiased=False, keepdim=True) + 1e-5
            ).sqrt()
        both = torch.cat([outputs.embeddings[k], before], 1)
        expected = both @ link.answers[k].weight.t() + link.answers[k].bias
        assert torch.allclose(outputs.logits[k], expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(outputs.logits[3], outputs.raw[3])
    assert [layer.in_features for layer in link.answers] == [5, 9, 9]


def test_logits_are_normalised_where_there_are_many_classes():
    for classes in (200, 201):
        network = chain(2, classes=classes)
        exitkit.build_strategy("ztw").adapt(network)
        exitkit.build_strategy("ztw").adapt(network)  # again: the same link
        assert network.link.config == ((5, 5), classes, classes > 200)
    assert isinstance(CascadeLink((5, 5, 5), 4, True).norms[0], nn.LayerNorm)


def test_no_gradient_passes_from_an_exit_to_the_one_before():
    network, (x, y) = adapted(), batches(1)[0]
    loss = F.cross_entropy(network(x).logits[1], y)
    first, second = (
        torch.autograd.grad(loss, layer.weight, allow_unused=True, retain_graph=True)[0]
        for layer in network.link.answers
    )
    assert first is None and second.abs().sum() > 0


def test_without_the_logits_before_the_second_phase_is_that_of_separate_training():
    plain, network = chain(), adapted()
    for k, layer in enumerate(network.link.answers):
        with torch.no_grad():
            layer.weight[:, :5].copy_(network.heads[k].classify.weight)
            layer.weight[:, 5:].zero_()
            layer.bias.copy_(network.heads[k].classify.bias)
    x, y = batches(1)[0]
    ours, theirs = network(x).logits, plain(x).logits
    for k in range(3):
        assert torch.allclose(ours[k], theirs[k], rtol=1e-13)
    loss = sum(F.cross_entropy(z, y) for z in ours[:2])
    separate = sum(F.cross_entropy(z, y) for z in theirs[:2])
    for k in range(2):
        gradient = torch.autograd.grad(loss, network.link.answers[k].weight, retain_graph=True)[0]
        expected = torch.autograd.grad(separate, plain.heads[k].classify.weight, retain_graph=True)[0]
        assert torch.allclose(gradient[:, :5], expected, rtol=1e-12)


def test_the_phases():
    trunk, heads = exitkit.build_strategy("ztw", label_smoothing=0.1).phases(100, 4)
    assert (trunk.name, trunk.epochs, trunk.train, trunk.optimizer, trunk.lr) == (
        "trunk",
        100,
        ("stages.", "heads.3."),
        None,  # the recipe's
        None,
    )
    assert (heads.name, heads.epochs, heads.optimizer, heads.lr, heads.batchnorm) == (
        "heads",
        50,
        "adam",
        1e-3,
        "frozen",
    )
    assert trunk.strategy.label_smoothing == heads.strategy.label_smoothing == 0.1
    assert [phase.epochs for phase in exitkit.build_strategy("ztw", ratio=0.3).phases(1, 4)] == [1, 1]
    assert [phase.name for phase in exitkit.build_strategy("ztw").phases(5, 1)] == ["trunk"]
    network = chain()
    exitkit.build_strategy("ztw").phases(1, 3)[0].strategy.adapt(network)
    assert type(network.link).__name__ == "LogitLink"  # the trunk is trained with its own last head


def test_the_second_phase_moves_the_early_exits_alone():
    network = with_layers_in_its_heads()
    run = second_phase(network)
    before = copy.deepcopy(network.state_dict())
    run.train_epoch(batches(3))
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    early = ("heads.0.embed.", "heads.1.embed.", "link.")
    # The bias of a convolution in front of batch norm has no effect; what Adam makes of its rounding is no matter.
    assert {name for name in before if name.startswith(early) and not name.endswith(".0.bias")} <= moved
    assert all(name.startswith(early) for name in moved)
    training = {name for name, module in network.named_modules() if isinstance(module, _BatchNorm) and module.training}
    assert training == {"heads.0.embed.1", "heads.1.embed.1"}


def test_the_last_exit_answers_as_it_did_after_the_first_phase():
    network = with_layers_in_its_heads()
    x = batches(1)[0][0]
    expected = network.eval()(x).logits[-1]
    run = second_phase(network)
    run.train_epoch(batches(3))
    assert torch.equal(network.eval()(x).logits[-1], expected)


def test_it_trains_both_phases_and_composes_with_an_objective_and_a_tap(tmp_path):
    for method in ("ztw", "ztw+kd+ge"):
        run = exitkit.train({"method": method, "epochs": 2, "schedule": "constant", **FEW}, tmp_path)
        assert list(run.metrics().lr)[-1] == 1e-3 and len(run.metrics()) == 3


def test_the_early_exits_cost_what_they_read():
    network = chain()
    before = exitkit.cost(network)
    exitkit.build_strategy("ztw").adapt(network)
    after = exitkit.cost(network)
    # One classifier more at exits 1 and 2, (5 + 0) * 4 and (5 + 4) * 4; the old ones still run.
    assert [b.macs - a.macs for a, b in zip(before, after, strict=True)] == [20, 56, 56]
    # Pruned, exit 2 needs exit 1's new classifier; the last exit needs none of them.
    assert [row.pruned for row in after] == [40, 20 + 25 + 20 + 36, before[2].pruned]


def test_refusals():
    for settings in ({"ratio": 0.0}, {"heads_lr": -1.0}):
        with pytest.raises(UserError, match=next(iter(settings))):
            exitkit.build_strategy("ztw", **settings)
    for method, slot in (
        ("ztw+boostnet", "logit link"),
        ("ztw+adaloss", "exit weights"),
        ("ztw+imta", "phases"),
        ("ztw+pcgrad", "update"),
    ):
        with pytest.raises(UserError, match="both claim the slot"):
            exitkit.build_strategy(method)
        assert slot in exitkit.build_strategy("ztw").claims()
