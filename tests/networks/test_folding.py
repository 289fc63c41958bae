"""A folded network outputs what the network outputs, with no batch normalisation left that follows a convolution."""

import pytest
import torch
from torch import nn
from torch.nn.functional import relu

import exitkit
from exitkit.engine.batchnorm import SyncedBatchNorm, synchronise_batchnorm
from exitkit.engine.fused import fuse_batchnorm
from exitkit.networks import Head, MultiExitNetwork, attach_exits, fold, prune_to

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def norms(network):
    return sum(isinstance(module, NORMS) for module in network.modules())


def trained(network, seed=0):
    """The network in float64, with running statistics and scales as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.double().modules():
        if isinstance(module, NORMS):
            for values in (module.running_mean, module.weight.data, module.bias.data):
                values.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network.eval()


def same(folded, network, shape):
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        for actual, expected in zip(folded(x).logits, network(x).logits, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert not any(parameter.requires_grad for parameter in folded.parameters()) and not folded.training


@pytest.mark.parametrize("method", ["boostnet", "isc", "ge"])
@pytest.mark.parametrize("backbone", ["msdnet-tiny", "ranet-tiny", "sdn-tiny", "sdn-resnet56", "sdn-mobilenet"])
def test_every_family_is_folded_whole_with_the_outputs_of_the_network(backbone, method):
    shape = (1, 16, 16)
    network = exitkit.build_network(backbone, num_classes=5, input_shape=shape)
    exitkit.build_strategy(method).adapt(network)
    before = {name: value.clone() for name, value in trained(network).state_dict().items()}
    taps, count = list(network.taps), norms(network)
    folded = fold(network)
    assert norms(folded) == 0 < count == norms(network) and not folded.taps and network.taps == taps
    same(folded, network, shape)
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("replace", [fuse_batchnorm, synchronise_batchnorm])
@pytest.mark.parametrize("backbone", ["msdnet-tiny", "sdn-mobilenet"])
def test_a_network_that_was_prepared_for_training_is_folded_as_well(backbone, replace):
    network = trained(exitkit.build_network(backbone, num_classes=5, input_shape=(1, 16, 16)))
    plain = fold(network)
    replace(network)
    folded = fold(network)
    assert not any(isinstance(module, (*NORMS, SyncedBatchNorm)) for module in folded.modules())
    same(folded, plain, (1, 16, 16))


def test_norms_before_a_convolution_remain_and_dropout_goes():
    shape = (1, 16, 16)
    network = trained(exitkit.build_network("sdn-wrn32-4", num_classes=5, input_shape=shape))
    folded = fold(network)
    assert norms(network) == 31 and norms(folded) == 16  # the second of a block follows a convolution and dropout
    assert not any(isinstance(module, nn.Dropout) for module in folded.modules())
    same(folded, network, shape)
    pruned = prune_to(network, 2)
    assert norms(fold(pruned)) == 5 < norms(pruned) == 10
    same(fold(pruned), pruned, shape)


@pytest.mark.parametrize("backbone", ["msdnet-tiny", "ranet-tiny", "sdn-tiny"])
def test_what_hooks_do_is_kept(backbone):
    shape = (1, 16, 16)
    network = exitkit.build_network(backbone, num_classes=5, input_shape=shape)
    exitkit.build_strategy("dfs", referencing=False).adapt(network)  # by hooks of stages and heads
    for head in network.heads:  # and of single layers
        for layer in head.modules():
            if isinstance(layer, (nn.ReLU, nn.Conv2d, nn.Flatten)):
                layer.register_forward_hook(lambda module, inputs, output: 1.5 * output)
    same(fold(trained(network)), network, shape)
    images = torch.randn(3, *shape, dtype=torch.float64)
    with torch.no_grad():
        for actual, expected in zip(fold(network).features(images), network.features(images), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


class Hooked(nn.Module):
    """A network with a layer that does nothing, and that is read by a norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.same, self.norm = nn.Conv2d(1, 4, 3), nn.Identity(), nn.BatchNorm2d(4)
        self.answer = nn.Linear(4, 3)

    def forward(self, x):
        return self.answer(self.norm(self.same(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("name", ["conv", "same", "norm"])
def test_what_hooks_do_in_a_traced_network_is_kept(name):
    model = trained(Hooked())
    network = attach_exits(model, at=["norm"], input_shape=(1, 8, 8)).eval()
    for module in network.modules():
        if type(module) is type(getattr(model, name)):
            module.register_forward_hook(lambda module, inputs, output: 1.5 * output)
    same(fold(network), network, (1, 8, 8))


class Plain(nn.Module):
    """A network in which some layers can be joined and others can't."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.again = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.drop, self.relu = nn.Dropout(0.5), nn.ReLU()
        self.hidden, self.scale, self.answer = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        x = relu(self.norm(self.conv(x)), inplace=True)
        y = self.again(x)
        x = self.drop(y) + self.other(y)  # two layers read y, so that it must stay
        x = self.relu(self.again(x)).mean((2, 3))
        return self.answer(self.scale(self.hidden(x)))


def test_a_traced_network_is_folded_where_one_layer_reads_another():
    network = attach_exits(trained(Plain()), at=["norm", "relu"], input_shape=(1, 8, 8))
    network.eval()
    folded = fold(network)
    assert norms(network) == 3 and [type(m) for m in folded.modules() if isinstance(m, NORMS)] == [nn.BatchNorm2d]
    same(folded, network, (1, 8, 8))


def test_layers_of_a_kind_of_their_own_are_left_alone():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    class Twice(nn.Sequential):
        def forward(self, x):
            return super().forward(super().forward(x))

    stage = nn.Sequential(
        Doubled(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 3, 1),
        nn.BatchNorm2d(3, track_running_stats=False),
        Twice(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 3, 1)),
        nn.BatchNorm2d(3, affine=False),
        nn.ReLU(),
    )
    head = Head(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout()), nn.Linear(3, 2))
    network = MultiExitNetwork([stage], [head], (1, 6, 6), 2).double()
    for _ in range(3):
        network(torch.randn(16, 1, 6, 6, dtype=torch.float64))
    folded = fold(network.eval())
    assert norms(network) == 4 and norms(folded) == 3
    same(folded, network, (1, 6, 6))


def test_parametrised_layers_are_folded_after_a_forward_pass():
    torch.manual_seed(0)
    layers = [nn.utils.spectral_norm(nn.Conv2d(1, 3, 3)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    network = MultiExitNetwork([nn.Sequential(*layers)], [Head(nn.Identity(), nn.Linear(3, 2))], (1, 8, 8), 2)
    x = torch.randn(2, 1, 8, 8)
    network(x)  # the weight is then a tensor with a graph, which deepcopy refuses
    network.eval()
    torch.testing.assert_close(fold(network)(x).logits, network(x).logits)
