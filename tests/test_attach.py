"""Exits on any network: where a graph can be cut, and what the pieces give together."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import exitkit
from exitkit.backbones.torchvision_models import TorchvisionModel
from exitkit.data.torchvision_import import torchvision
from exitkit.errors import UserError
from exitkit.network import Head, map_tensors

from toy import exit_gradients

FAMILIES = {
    "resnet18": 64,
    "mobilenet_v3_small": 64,
    "efficientnet_b0": 64,
    "convnext_tiny": 64,
    "vit_b_16": 32,
    "swin_t": 64,
    "densenet121": 64,
    "regnet_y_400mf": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "mnasnet0_5": 64,
    "maxvit_t": 224,
    "vgg11_bn": 32,
    "googlenet": 64,
}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.second(torch.tanh(self.first(x)))
        y += x
        return self.relu(y)


class Residual(nn.Module):
    """Blocks with a shortcut, and a shape that is used far behind where it was read."""

    def __init__(self, width=3):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(3)))
        self.scale = nn.Parameter(torch.ones(width, 1, 1))
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        rows = x.shape[0]
        y = self.blocks(self.stem(x))
        y = F.adaptive_avg_pool2d(y * self.scale, 1)
        return self.fc(y.reshape(rows, -1))


class Plain(Residual):
    def forward(self, x):
        return self.fc(F.adaptive_avg_pool2d(self.blocks(self.stem(x)) * self.scale, 1).flatten(1))


def images(count=3, size=8, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attach(model, *at, **options):
    return exitkit.attach_exits(model.double(), list(at) or None, input_shape=(3, 8, 8), **options)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Plain()


def test_the_last_exit_is_the_model_itself(model):
    network = attach(model, "stem", "blocks.1")
    assert network.num_exits == 3 and network.num_classes == 4
    assert torch.equal(network(images()).logits[-1], model(images()))
    assert network.heads[-1].classify is model.fc
    own = {id(parameter) for parameter in network.parameters()}
    assert all(id(parameter) in own for parameter in model.parameters())
    assert "stages.1.blocks.0.first.weight" in dict(network.named_parameters())
    assert network.unreached() == []


def test_a_prefix_is_its_last_point_and_points_come_in_the_networks_order(model):
    by_prefix, by_name = attach(model, "blocks.1", "blocks.0"), attach(model, "blocks.0.relu", "blocks.1.relu")
    assert exitkit.cost(by_prefix) == exitkit.cost(by_name)


def test_a_cut_inside_a_block_carries_the_shortcut_too(model):
    network = attach(model, "blocks.1.second")
    state = network.stages[0](images())
    assert [tensor.shape for tensor in state] == [(3, 3, 8, 8)] * 2
    assert torch.equal(network.view(state), model.blocks[1].second(torch.tanh(model.blocks[1].first(state[1]))))
    kept = network.stages[1](map_tensors(lambda tensor: tensor[1:], state))
    assert torch.allclose(network.heads[1](kept), model(images())[1:], rtol=1e-12)


def test_what_comes_behind_changes_no_state_in_place(model):
    network = attach(model, "blocks.1.second", "blocks.1.add", "blocks.2.second")
    assert torch.equal(network(images()).logits[-1], model(images()))
    state = images()
    for stage in network.stages:
        before = map_tensors(torch.clone, state)
        following = stage(state)
        torch.testing.assert_close(state, before, rtol=0, atol=0)
        state = following
    sum(logits.square().sum() for logits in network(images()).logits).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_where_a_size_is_needed_on_both_sides_there_is_no_cut():
    with pytest.raises(UserError) as caught:
        attach(Residual(), "blocks.1")
    assert str(caught.value) == (
        "Residual can't be cut at blocks.1: getitem, which is no tensor of one row an image, is needed on both sides; "
        "the nearest point is reshape"
    )


@pytest.mark.parametrize(
    ("at", "complaint"),
    [
        ("fc", "can't be cut at fc: nothing behind it is trained; the nearest point is flatten"),
        ("x", "can't be cut at x: nothing before it is trained; the nearest point is stem"),
        ("block", "unknown point of Plain 'block'; did you mean blocks.1.add"),
    ],
)
def test_other_points_are_refused_and_the_nearest_named(model, at, complaint):
    with pytest.raises(UserError) as caught:
        attach(model, at)
    assert complaint.split(";")[0] in str(caught.value) and complaint.split()[-1][:6] in str(caught.value)


def test_what_else_is_refused(model):
    with pytest.raises(UserError, match="give one of them"):
        attach(model)
    with pytest.raises(UserError, match="give one of them"):
        attach(model, "stem", fractions=(0.5,))
    with pytest.raises(UserError, match="names a point twice"):
        attach(model, "blocks.1", "blocks.1.relu")
    with pytest.raises(UserError, match="expected a list of points"):
        exitkit.attach_exits(model, "stem", input_shape=(3, 8, 8))
    with pytest.raises(UserError, match="does not take images of 5x8x8"):
        exitkit.attach_exits(model, ["stem"], input_shape=(5, 8, 8))
    with pytest.raises(UserError, match=r"gives no tensor \[B, classes\]"):
        exitkit.attach_exits(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), ["0"], input_shape=(3, 8, 8))


class Undecided(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Two(nn.Module):
    def forward(self, x, y):
        return x + y


@pytest.mark.parametrize(
    ("module", "complaint"),
    [(Undecided(), "Undecided can't be traced by torch.fx .*control flow"), (Two(), "Two reads 2 inputs")],
)
def test_what_has_no_fixed_graph_is_refused(module, complaint):
    with pytest.raises(UserError, match=complaint):
        exitkit.attach_exits(module, ["x"], input_shape=(3, 8, 8))


def test_shares_of_the_cost_fall_on_block_ends(model):
    network = attach(model, fractions=(0.4, 0.7))
    rows = exitkit.cost(network)
    assert exitkit.cost(attach(model, "blocks.0", "blocks.1")) == rows
    convolution = 3 * 3 * 9 * 64
    heads = [index * 12 for index in (1, 2, 3)]
    assert [row.macs for row in rows] == [
        count * convolution + head for count, head in zip((3, 5, 7), heads, strict=True)
    ]


def test_ones_own_heads(model):
    def head(shape, num_classes):
        assert shape == (3, 8, 8)
        return Head(nn.Flatten(), nn.Linear(3 * 64, num_classes))

    network = attach(model, "blocks.0", head=head)
    assert network.heads[0].classify.in_features == 192
    assert [logits.shape for logits in network(images()).logits] == [(3, 4)] * 2


def test_equation_5_of_gradient_equilibrium_holds(model):
    network = attach(model, "stem", "blocks.0.second", "blocks.1")
    x, y = images(4), torch.tensor([0, 3, 1, 2])
    plain = exit_gradients(network, x, y)
    exitkit.build_strategy("ge").adapt(network)
    scaled = exit_gradients(network, x, y)
    for before, after in zip(plain, scaled, strict=True):
        for name, gradient in before.items():
            if gradient is not None:
                factor = 1 / (4 - int(name.split(".")[1])) if name.startswith("stages") else 1.0
                torch.testing.assert_close(after[name], factor * gradient, rtol=1e-10, atol=1e-16)


def test_modes_are_the_models_own():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    network = exitkit.attach_exits(model, ["1"], input_shape=(3, 8, 8))
    assert network.training and model.training
    x = images().float()
    assert not torch.equal(network(x).logits[-1], network(x).logits[-1])  # dropout
    network.eval()
    assert torch.equal(network(x).logits[-1], network(x).logits[-1])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_torchvision(name):
    size = FAMILIES[name]
    torch.manual_seed(0)
    backbone = TorchvisionModel(name, fractions=(0.33, 0.66))
    if size > 64:
        with torch.device("meta"):
            network = backbone.build((3, size, size), 10)
    else:
        network = backbone.build((3, size, size), 10).eval()
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            whole = network(x).logits
            assert all(logits.shape == (2, 10) and logits.isfinite().all() for logits in whole)
            first, state, _ = network.step(0, x)
            second = network.step(1, map_tensors(lambda tensor: tensor[1:], state))[0]
            scale = whole[1].abs().max()
            assert torch.equal(first.logits, whole[0])
            assert (second.logits - whole[1][1:]).abs().max() < 1e-4 * scale + 1e-12
            cut = exitkit.prune_to(network, 2)
            assert (cut(x).logits[0] - whole[1]).abs().max() < 1e-4 * scale + 1e-12
    rows = exitkit.cost(network)
    shares = [row.pruned / rows[-1].pruned for row in rows]
    assert abs(shares[0] - 0.33) < 0.12 and abs(shares[1] - 0.66) < 0.12
    assert network.unreached() == []


def test_the_last_exit_of_a_torchvision_model_is_that_model():
    models = torchvision("models")
    for name in ("resnet18", "swin_t"):
        model = models.get_model(name, weights=None).eval()
        state = copy.deepcopy(model.state_dict())
        network = exitkit.attach_exits(model, fractions=(0.5,), input_shape=(3, 64, 64))
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(network(x).logits[-1], model(x))
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_grey_images_are_shown_as_colours():
    network = exitkit.build_network("torchvision:resnet18", input_shape=(1, 16, 16), num_classes=10).eval()
    assert network.input_shape == (1, 16, 16) and network.num_exits == 4
    grey = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        colours = network.stages[0][1](grey.expand(-1, 3, -1, -1))
        assert torch.equal(network.stages[0](grey), colours)


@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        ("torchvision:resnet1", {}, "unknown torchvision model 'resnet1'; did you mean resnet18"),
        ("torchvision:vit_b_16", {"input_shape": (3, 100, 100)}, "can't be made for images of 100x100"),
        ("torchvision:vgg11", {"input_shape": (3, 16, 16)}, "VGG does not take images of 3x16x16: .*too small$"),
        ("torchvision:resnet18", {"input_shape": (4, 64, 64)}, "images have 4 channels"),
        ("torchvision:resnet18", {"weights": "DEFULT"}, "unknown weights of resnet18 'DEFULT'; did you mean DEFAULT"),
        ("torchvision:resnet18", {"exits": ("layer9",)}, "unknown point of ResNet 'layer9'"),
        ("torchvision:resnet18", {"exits": ("layer1",), "fractions": (0.5,)}, "give one of them"),
        ("msdnet:5", {}, "unknown backbone 'msdnet:5'; did you mean msdnet"),
    ],
)
def test_mistakes_in_names_and_settings(name, settings, complaint):
    with pytest.raises(UserError, match=complaint):
        exitkit.build_network(name, **settings)
