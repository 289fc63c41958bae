"""Shallow-deep networks: classifiers, placement, states, and Gradient Equilibrium as published and as released."""

import pytest
import torch
from torch import nn

import exitkit
from exitkit.errors import UserError
from exitkit.networks import unreached
from exitkit.networks.families import sdn
from exitkit.networks.families.sdn import MixedPool
from exitkit.networks.placement import place

from toy import exit_gradients

NAMES = ["sdn-vgg16", "sdn-resnet56", "sdn-wrn32-4", "sdn-mobilenet"]
TRUNKS = {"sdn-vgg16": sdn.VGG, "sdn-resnet56": sdn.ResNet, "sdn-wrn32-4": sdn.WideResNet}

# What the internal classifiers read: channels@pixels.
READ = {
    "sdn-vgg16": "64@16 128@8 256@8 256@4 512@4 512@2",
    "sdn-resnet56": "16@32 16@32 32@16 32@16 64@8 64@8",
    "sdn-wrn32-4": "64@32 64@32 128@16 128@16 256@8 256@8",
    "sdn-mobilenet": "128@16 256@8 512@4 512@4 1024@2",
}


def ghost(name, **settings):
    with torch.device("meta"):
        return exitkit.build_network(name, **settings)


def views(network):
    state, seen = torch.empty(1, *network.input_shape, device="meta"), []
    for index in range(network.num_exits):
        _, state, _ = network.step(index, state)
        seen.append(network.view(state))
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_what_the_classifiers_read(name):
    network = ghost(name).eval()
    *maps, _ = views(network)
    assert " ".join(f"{each.shape[1]}@{each.shape[2]}" for each in maps) == READ[name]
    for head, each in zip(network.heads, maps, strict=False):
        side = 4 if each.shape[2] >= 4 else each.shape[2]
        assert head.classify.in_features == each.shape[1] * side * side


def test_mixed_pooling_is_the_published_formula():
    pool = MixedPool((2, 2))
    x = torch.arange(16.0, dtype=torch.float64).reshape(1, 1, 4, 4)
    with torch.no_grad():
        pool.double().alpha.fill_(0.3)
    expected = 0.3 * torch.tensor([[5.0, 7.0], [13.0, 15.0]]) + 0.7 * torch.tensor([[2.5, 4.5], [10.5, 12.5]])
    assert torch.allclose(pool(x)[0, 0], expected.double())
    assert torch.autograd.grad(pool(x).sum(), pool.alpha)[0].item() == pytest.approx(10.0)  # maximum - average, summed
    assert 0 <= MixedPool((2, 2)).alpha.item() < 1


def test_the_weight_on_a_4x4_map_decides_nothing_and_is_named():
    assert unreached(ghost("sdn-vgg16")) == ["heads.3.embed.0.alpha", "heads.4.embed.0.alpha"]
    pool = MixedPool((1, 1))
    x = torch.randn(2, 3, 4, 4)
    assert torch.allclose(pool(x), x) and not pool(x).requires_grad


def test_resnets_classifiers_read_the_sum_before_its_relu_and_the_trunk_goes_on_behind_it():
    network = small_resnet()
    state = network.stages[0](torch.randn(4, 1, 16, 16, dtype=torch.float64))
    activated, total = state
    assert total.min() < 0 and torch.equal(activated, total.relu()) and torch.equal(network.view(state), total)
    torch.testing.assert_close(
        network.stages[1]((activated, torch.full_like(total, torch.nan))), network.stages[1](state)
    )
    for index in range(1, 4):
        state = network.stages[index](state)
    assert torch.equal(network.view(state), state[0]) and state[0].min() == 0  # the last head is a ResNet's own


@pytest.mark.parametrize("name", TRUNKS)
def test_the_rule_gives_the_papers_places(name):
    backbone = TRUNKS[name]()
    _, costs = sdn.measure(backbone.trunk((3, 32, 32), 10), (3, 32, 32))
    assert tuple(place(costs, (0.15, 0.3, 0.45, 0.6, 0.75, 0.9))) == backbone.usual
    by_rule = ghost(name, fractions=(0.15, 0.3, 0.45, 0.6, 0.75, 0.9))
    assert exitkit.cost(by_rule) == exitkit.cost(ghost(name))


def test_placing_takes_the_nearest_place():
    assert place([10, 10, 20, 40, 20], [0.12, 0.5, 0.7]) == [0, 2, 3]
    assert place([1, 1], [0.99]) == [0]  # never behind the last unit, where the trunk's own exit stands


@pytest.mark.parametrize(
    ("fractions", "complaint"),
    [
        ((0.5, 0.2), "expected ascending shares between 0 and 1"),
        ((0.0, 0.5), "expected ascending shares between 0 and 1"),
        ((), "fractions is empty"),
        ((0.1, 0.12), "fractions 0.1 and 0.12 give the same place; possible shares are 0.25, 0.50, 0.75"),
        ((0.1, 0.2, 0.3, 0.4), "fractions is 0.1, 0.2, 0.3, 0.4; expected at most 3 shares"),
    ],
)
def test_impossible_places_are_refused(fractions, complaint):
    with pytest.raises(UserError, match=complaint):
        place([1, 1, 1, 1], fractions)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"exits": (1, 3), "fractions": (0.5,)}, "give one of them"),
        ({"exits": (3, 1)}, "expected ascending units from 0 to 25"),
        ({"exits": (26,)}, "expected ascending units from 0 to 25"),
        ({"exits": ()}, "exits is empty"),
    ],
)
def test_impossible_exits_are_refused(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        ghost("sdn-resnet56", **settings)


@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        ("sdn-vgg16", {"channels": ()}, "channels is .*expected at least 1"),
        ("sdn-vgg16", {"pools": (1, 13)}, "pools contains unit 13; expected units from 0 to 12"),
        ("sdn-vgg16", {"hidden": (0, 4)}, "hidden is .*expected at least 1"),
        ("sdn-resnet56", {"blocks": (9, 0, 9)}, "blocks is .*expected at least 1"),
        ("sdn-wrn32-4", {"dropout": 1.5}, "dropout is 1.5; expected a share"),
        ("sdn-wrn32-4", {"widen": 0}, "widen is 0; expected at least 1"),
        ("sdn-mobilenet", {"halving": (-1,)}, "halving contains unit -1; expected units from 0 to 12"),
    ],
)
def test_impossible_structures_are_refused(name, settings, complaint):
    with pytest.raises(UserError, match=complaint):
        ghost(name, **settings)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 64, 64), (1, 28, 30)])
def test_any_image(name, shape):
    network = ghost(name, input_shape=shape, num_classes=7)
    assert all(logits.shape == (2, 7) for logits in network(torch.empty(2, *shape, device="meta")).logits)


def test_released_initialisation():
    conv = {
        "sdn-vgg16": lambda n: n.stages[2][0][0],
        "sdn-resnet56": lambda n: n.stages[5][1].paths[0][0],
        "sdn-wrn32-4": lambda n: n.stages[5][1].path[2],
        "sdn-mobilenet": lambda n: n.stages[3][0][3],
    }
    for name, pick in conv.items():
        for init in ("released", "default"):
            layer = pick(exitkit.build_network(name, init=init))
            area = layer.kernel_size[0] * layer.kernel_size[1]
            plain, he_rule = 1 / (3 * area * layer.in_channels), 2 / (area * layer.out_channels)
            variance = he_rule if init == "released" and name != "sdn-mobilenet" else plain
            assert layer.weight.var().item() == pytest.approx(variance, rel=0.1), (name, init)
    vgg = exitkit.build_network("sdn-vgg16")
    assert all(module.weight.std().item() == pytest.approx(0.01, rel=0.1) for module in linears(vgg))
    assert not any(module.bias.any() for module in linears(vgg))
    assert not any(module.bias.any() for module in linears(exitkit.build_network("sdn-wrn32-4")))
    assert all(module.bias.any() for module in linears(exitkit.build_network("sdn-resnet56")))


def linears(network):
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


def small_resnet():
    backbone = sdn.ResNet(blocks=(2, 2, 2), channels=2, exits=(0, 2, 4))
    return backbone.build((1, 16, 16), 4).double().eval()


def small_vgg():
    backbone = sdn.VGG(channels=(2, 3, 2, 3, 2, 3), pools=(1, 3), hidden=(4, 4), exits=(1, 4))
    return backbone.build((1, 8, 8), 4).double().eval()


@pytest.mark.parametrize("make", [small_vgg, small_resnet])
def test_equation_5_holds_for_every_unit(make):
    plain, scaled = gradients(make, {})
    for index, (before, after) in enumerate(zip(plain, scaled, strict=True)):
        for name, gradient in before.items():
            if gradient is not None:
                factor = 1 / (len(plain) - int(name.split(".")[1])) if name.startswith("stages") else 1.0
                torch.testing.assert_close(after[name], factor * gradient, rtol=1e-9, atol=1e-14), (index, name)


@pytest.mark.parametrize("make", [small_vgg, small_resnet])
def test_as_released_exit_bearing_units_feel_the_plain_sum_and_the_others_equation_5(make):
    plain, scaled = gradients(make, {"variant": "released"})
    exits, lengths = len(plain), [len(stage) for stage in make().stages]
    for before, after in zip(plain, scaled, strict=True):
        for name, gradient in before.items():
            if gradient is None:
                continue
            factor = 1.0
            if name.startswith("stages"):
                stage, unit = map(int, name.split(".")[1:3])
                bears = stage < exits - 1 and unit == lengths[stage] - 1
                factor = 1.0 if bears else 1 / (exits - stage)
            torch.testing.assert_close(after[name], factor * gradient, rtol=1e-9, atol=1e-14)


def gradients(make, settings):
    torch.manual_seed(0)
    network = make()
    x, y = torch.randn(5, *network.input_shape, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 2])
    plain = exit_gradients(network, x, y)
    exitkit.build_strategy("ge", **settings).adapt(network)
    return plain, exit_gradients(network, x, y)


@pytest.mark.parametrize("name", ["sdn-wrn32-4", "sdn-mobilenet"])
def test_what_was_released_broken_or_not_at_all_is_not_reproduced(name):
    with pytest.raises(UserError, match="only for msdnet, sdn-vgg, sdn-resnet; use variant=paper"):
        exitkit.build_strategy("ge", variant="released").adapt(ghost(name))
