"""Exits on networks that were not made for them: torchvision's, and some that are hard to cut."""

import copy
import pickle
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import exitkit
from exitkit.data.torchvision_import import torchvision
from exitkit.errors import Note, UserError
from exitkit.networks import unreached
from exitkit.networks.attach.exits import attach_exits
from exitkit.networks.attach.torchvision import TorchvisionModel
from exitkit.networks.cascade import Head, map_tensors

from toy import exit_gradients

SMALL = (3, 32, 32)


class Residual(nn.Module):
    """Pre- and post-activated in place, with a functional dropout that follows the mode."""

    def __init__(self, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = F.dropout(out, 0.5, self.training)
        out = self.conv2(out)
        out += x
        return self.relu(out)


class ResNetLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = Residual()
        self.b = Residual()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.b(self.a(F.relu(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class SizeCrosses(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        x = self.first(x.flatten(1))
        images = x.shape[0]
        x = self.second(x)
        x = x.view(images, 12)
        return self.fc(self.third(x))


class SizeOutlivesValues(SizeCrosses):
    def forward(self, x):
        x = self.first(x.flatten(1))
        y = self.second(x * 2) + x
        return self.fc(self.third(y).view(-1, x.shape[1]))


class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 4, 4)
        self.norm = nn.LayerNorm(6)
        self.mix = nn.Linear(6, 10)
        self.fc = nn.Linear(10, 4)

    def forward(self, x):
        x = self.norm(self.patch(x).permute(0, 2, 3, 1))
        return self.fc(self.mix(x).relu().mean((1, 2)))


def plain():
    body = [nn.Conv2d(3, 6, 3, 2), nn.ReLU(inplace=True), nn.Conv2d(6, 7, 3, 2), nn.ReLU(inplace=True)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4))


def images(network, count=3, dtype=torch.float64):
    return torch.randn(count, *network.input_shape, dtype=dtype)


def check(model, network):
    """What holds for every attached network in evaluation."""
    model.eval(), network.eval()
    x = images(network, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        whole, want = network(x).logits, model(x)
        assert torch.equal(whole[-1], want)
        assert all(torch.equal(lazy.logits, logits) for lazy, logits in zip(network.iterate(x), whole, strict=True))
        state, carry = x, None
        for index in range(network.num_exits):
            output, state, carry = network.step(index, state, carry)
            if index == 0:
                state = map_tensors(lambda tensor: tensor[[0, 2]], state)
        torch.testing.assert_close(output.logits, want[[0, 2]], rtol=1e-4, atol=1e-5)
        assert torch.equal(copy.deepcopy(network)(x).logits[-1], want)
    return x


FAMILIES = {
    "resnet18": 64,
    "mobilenet_v3_small": 64,
    "efficientnet_b0": 64,
    "convnext_tiny": 64,
    "vit_b_32": 64,
    "swin_t": 64,
    "densenet121": 64,
    "regnet_y_400mf": 64,
    "vgg11_bn": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "mnasnet0_5": 64,
    "alexnet": 64,
    "googlenet": 64,
}


def family(name, size):
    arguments = {"image_size": size} if name.startswith("vit") else {}
    if name == "googlenet":
        arguments = {"aux_logits": False, "init_weights": False}
    if name == "vgg11_bn":  # its first linear layer alone has 100 million parameters
        models = torchvision("models")
        model = models.vgg11_bn(num_classes=7)
        model.classifier = nn.Sequential(nn.Linear(512 * 49, 7))
        return model.eval()
    return torchvision("models").get_model(name, num_classes=7, **arguments).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_becomes_a_cascade_that_ends_in_itself(name):
    size = FAMILIES[name]
    model = family(name, size)
    network = attach_exits(model, fractions=(0.33, 0.66), input_shape=(3, size, size))
    check(model, network)
    assert {id(p) for p in model.parameters()} <= {id(p) for p in network.parameters()}
    names = {key.split(".", 2)[2] for key, _ in network.named_parameters() if key.startswith("stages.")}
    assert names <= {key for key, _ in model.named_parameters()}
    first, second, last = (row.macs for row in exitkit.cost(network))
    assert 0.1 < first / last < second / last < 0.9


@pytest.mark.parametrize("name", ["swin_v2_t", "maxvit_t", "inception_v3", "regnet_x_400mf", "vit_b_16"])
def test_large_families_without_storage(name):
    with torch.device("meta"):
        network = TorchvisionModel(name).build((3, 224, 224), 11)
    assert all(parameter.is_meta for parameter in network.parameters())
    rows = exitkit.cost(network)
    shares = [row.macs / rows[-1].macs for row in rows]
    assert shares[:3] == pytest.approx([0.25, 0.5, 0.75], abs=0.12) and shares[3] == 1
    assert [logits.shape for logits in network(torch.empty(2, 3, 224, 224, device="meta")).logits] == [(2, 11)] * 4


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "mobilenet_v3_small"])
def test_stages_are_exported_pickled_and_cut(name):
    model = family(name, 64)
    network = attach_exits(model, fractions=(0.4,), input_shape=(3, 64, 64))
    state = x = images(network, 2, torch.float32)
    with torch.no_grad():
        want = network(x).logits
        for stage in network.stages:
            state = torch.export.export(stage, (state,)).module()(state)
        torch.testing.assert_close(network.heads[-1](network.view(state)), want[-1])
        assert torch.equal(pickle.loads(pickle.dumps(network))(x).logits[-1], want[-1])
        for number in (1, 2):
            assert torch.equal(exitkit.prune_to(network, number)(x).logits[0], want[number - 1])


def test_names_are_those_that_torchvision_prints():
    model = family("resnet18", 64)
    _, names = torchvision("models.feature_extraction").get_graph_node_names(model)
    inside = [name for name in names if name.startswith("layer2.1")]
    network = attach_exits(model, at=inside, input_shape=(3, 64, 64))
    assert network.num_exits == len(inside) + 1
    check(model, network)
    # A module means its last node, and the state is what torchvision's own extractor returns there.
    extractor = torchvision("models.feature_extraction").create_feature_extractor(model, ["layer2", "layer3.0"])
    network = attach_exits(model, at=["layer2", "layer3.0"], input_shape=(3, 64, 64))
    x, state = images(network, 2, torch.float32), None
    state = x
    for stage, feature in zip(network.stages[:2], extractor.eval()(x).values(), strict=True):
        state = stage(state)
        assert torch.equal(state, feature)


def residual(points=("a", "b.bn1")):
    model = ResNetLike().double()
    return model, attach_exits(model, at=points, input_shape=SMALL)


def test_a_cut_inside_a_residual_block_carries_its_input_along():
    model, network = residual()
    check(model, network)
    state = network.stages[0](images(network))
    assert isinstance(state, torch.Tensor)
    state = network.stages[1](state)
    assert isinstance(state, tuple) and len(state) == 2
    assert network.view(state) is state[0]
    changed = network.with_view(state, torch.zeros_like(state[0]))
    assert not network.view(changed).any() and changed[1] is state[1]


def test_gradients_are_those_of_the_network_and_reach_all_of_it():
    model, network = residual()
    model.eval(), network.eval()
    x = images(network)
    named = dict(model.named_parameters())
    want = torch.autograd.grad(model(x).square().sum(), list(named.values()))
    got = torch.autograd.grad(network(x).logits[-1].square().sum(), list(named.values()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    sum(logits.sum() for logits in network(x).logits).backward()  # through operations in place behind every exit
    assert unreached(network) == [] and all(parameter.grad is not None for parameter in network.parameters())


def test_a_functional_dropout_follows_the_mode_and_so_does_a_copy():
    model, network = residual()
    for twin in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        x = images(network)
        twin.eval()
        assert torch.equal(twin(x).logits[-1], twin(x).logits[-1])
        twin.train()
        assert not torch.equal(twin(x).logits[-1], twin(x).logits[-1])
    model.train()
    torch.manual_seed(3)
    want = model(x)
    torch.manual_seed(3)
    assert torch.equal(network(x).logits[-1], want)


def test_the_mode_of_each_module_is_left_as_it_is():
    model = ResNetLike()
    model.a.bn1.eval()
    network = attach_exits(model, at=["a"], input_shape=SMALL)
    assert network.training and network.stages[0].training and network.heads[0].training
    assert not network.stages[0].a.bn1.training and model.training


@pytest.mark.parametrize("points", [("a", "b"), ("a.bn1", "a", "b.conv1"), ("stem", "a.conv2", "b.relu")])
def test_equation_5_holds_exactly_for_every_exit_and_stage(points):
    _, network = residual(points)
    network.eval()
    x, y = images(network, 4), torch.tensor([0, 1, 2, 4])
    plain_gradients = exit_gradients(network, x, y)
    exitkit.build_strategy("ge").adapt(network)
    scaled = exit_gradients(network, x, y)
    exits = network.num_exits
    for index in range(exits):
        for name, gradient in plain_gradients[index].items():
            if gradient is None:
                assert scaled[index][name] is None
                continue
            stage = int(name.split(".")[1])
            factor = 1 / (exits - stage) if name.startswith("stages") else 1.0
            assert torch.allclose(scaled[index][name], factor * gradient, rtol=1e-10, atol=1e-14), name


def test_a_sequential_and_a_cut_before_an_operation_in_place():
    model = plain().double()
    network = attach_exits(model, at=["0", "2"], input_shape=SMALL)
    x = check(model, network)
    outputs = network(x)
    outputs.logits[0].sum().backward(retain_graph=True)
    torch.testing.assert_close(outputs.embeddings[0], model[0](x).mean((2, 3)))
    assert network.heads[-1].classify is model[-1]
    exitkit.build_strategy("ge").adapt(network)
    sum(logits.sum() for logits in network(x).logits).backward()


def test_channels_are_found_where_they_do_not_grow_with_the_image():
    model = ChannelsLast()
    network = attach_exits(model, at=["patch", "norm", "mix"], input_shape=SMALL)
    assert [head.classify.in_features for head in network.heads] == [6, 6, 10, 10]
    x = images(network, dtype=torch.float32)
    embeddings = network(x).embeddings
    torch.testing.assert_close(embeddings[0], model.patch(x).mean((2, 3)))
    torch.testing.assert_close(embeddings[1], model.norm(model.patch(x).permute(0, 2, 3, 1)).mean((1, 2)))


def test_a_head_of_ones_own():
    def head(shape, classes):
        return Head(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))

    network = attach_exits(ResNetLike().double(), at=["a"], input_shape=SMALL, head=head)
    assert network.heads[0].classify.in_features == 8 * 32 * 32
    assert network(images(network)).logits[0].shape == (3, 5)


@pytest.mark.parametrize(
    ("points", "complaint"),
    [
        (["b.conv3"], r"unknown point of ResNetLike 'b.conv3'; did you mean b.conv"),
        (["a", "b", "fc"], "can't be cut at fc: nothing trainable follows it.*nearest possible points.*mean"),
        (["b", "a"], "a comes before b in ResNetLike"),
        (["a", "a.relu_1"], "are the same point"),
        ([], "expected a list of points"),
        ("a", "expected a list of points"),
    ],
)
def test_points_that_bear_no_exit_are_refused(points, complaint):
    with pytest.raises(UserError, match=complaint):
        attach_exits(ResNetLike(), at=points, input_shape=SMALL)


@pytest.mark.parametrize("points", [("second",), ("first", "view"), ("first", "second", "view")])
def test_a_size_that_is_read_early_is_read_again_where_it_is_used(points):
    model = SizeCrosses()
    network = attach_exits(model, at=points, input_shape=(3, 2, 2))
    state = network.stages[0](torch.randn(4, 3, 2, 2))
    assert isinstance(state, torch.Tensor)  # the number of images does not cross: it changes when images leave
    check(model, network)


def test_a_size_crosses_further_than_the_tensor_that_crossed_with_its_values():
    model = SizeOutlivesValues()
    network = attach_exits(model, at=["mul", "second", "add"], input_shape=(3, 2, 2))
    check(model, network)


class SharedMemory(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.fc = nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = self.first(x.flatten(1))
        y = x.view(-1, 3, 4)
        x.relu_()
        return self.fc(x + y.flatten(1))


def test_tensors_of_one_memory_that_change_in_place_do_not_cross_apart():
    with pytest.raises(UserError, match=r"at view: first shares memory with another tensor.*are first and relu_"):
        attach_exits(SharedMemory(), at=["view"], input_shape=(3, 2, 2))
    model = SharedMemory()
    check(model, attach_exits(model, at=["first", "relu_"], input_shape=(3, 2, 2)))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        return self.fc(x.flatten(1)) if x.sum() > 0 else x


class TwoInputs(Branches):
    def forward(self, x, y):
        return self.fc(x.flatten(1)) + y


class Pair(Branches):
    def forward(self, x):
        return self.fc(x.flatten(1)), x


class OnlyInEvaluation(Branches):
    def forward(self, x):
        x = self.fc(x.flatten(1))
        return x if self.training else x.softmax(1)


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (Branches(), "Branches can't be cut into stages: torch.fx can't trace it .*control flow"),
        (TwoInputs(), r"TwoInputs has further inputs \(y\)"),
        (Pair(), "Pair returns a tuple; expected one tensor of logits"),
        (OnlyInEvaluation(), "OnlyInEvaluation computes softmax in evaluation only"),
        ("resnet18", "model is a str"),
    ],
)
def test_networks_that_make_no_cascade_are_refused(model, complaint):
    with pytest.raises(UserError, match=complaint):
        attach_exits(model, at=["fc"], input_shape=(3, 2, 2))


def test_exactly_one_way_to_say_where_and_images_that_fit():
    with pytest.raises(UserError, match="give one of at and fractions"):
        attach_exits(ResNetLike(), input_shape=SMALL)
    with pytest.raises(UserError, match="give one of at and fractions"):
        attach_exits(ResNetLike(), at=["a"], fractions=[0.5], input_shape=SMALL)
    with pytest.raises(UserError, match="ResNetLike does not accept images of 4x32x32"):
        attach_exits(ResNetLike(), at=["a"], input_shape=(4, 32, 32))
    with pytest.raises(UserError, match="ascending shares"):
        attach_exits(ResNetLike(), fractions=[0.5, 0.2], input_shape=SMALL)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"fractions": 0.5}, r"fractions is 0\.5; expected a list of shares, such as \[0\.25, 0\.5\]"),
        ({"fractions": "0.5"}, r"fractions is '0\.5'; expected a list of shares"),
        ({"at": 1}, r"at is 1; expected a list of points, such as \['layer1', 'layer2'\]"),
        ({"fractions": ["half"]}, r"fractions is \['half'\]; expected shares between 0 and 1"),
        ({"at": ["a"], "head": nn.Linear(8, 5)}, "head is a Linear, of one point; expected a name, or a function"),
        ({"at": ["a"], "head": 5}, "head is 5; expected a name, or a function"),
    ],
)
def test_shares_and_heads_of_another_type_are_one_line(given, says):
    with pytest.raises(UserError, match=says):
        attach_exits(ResNetLike(), input_shape=SMALL, **given)


def test_auxiliary_classifiers_are_left_out_and_that_is_said():
    model = torchvision("models").googlenet(init_weights=False, num_classes=5)
    with pytest.warns(Note, match=r"GoogLeNet runs .*aux.* in training only"):
        network = attach_exits(model, at=["inception3b"], input_shape=(3, 64, 64))
    assert not any("aux" in name for name, _ in network.named_parameters())


@pytest.mark.parametrize("channels", [1, 3])
def test_the_backbone_takes_digits(channels):
    network = TorchvisionModel("resnet18").build((channels, 16, 16), 10)
    assert network.num_exits == 4 and network.family == "torchvision"
    logits = network(torch.randn(4, channels, 16, 16)).logits
    assert [one.shape for one in logits] == [(4, 10)] * 4
    assert "stages.0.conv1.weight" in network.state_dict()
    sum(one.sum() for one in logits).backward()
    assert exitkit.cost(network)[-1].params == sum(parameter.numel() for parameter in network.parameters())


def test_one_channel_is_shown_to_all_three():
    network = TorchvisionModel("resnet18", exits=("layer2",)).build((1, 32, 32), 10).eval()
    twin = TorchvisionModel("resnet18", exits=("layer2",)).build((3, 32, 32), 10).eval()
    twin.load_state_dict(network.state_dict())
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(x).logits[1], twin(x.repeat(1, 3, 1, 1)).logits[1])


@pytest.mark.parametrize("classes", [1000, 6])
@pytest.mark.parametrize(
    ("name", "point", "last"), [("squeezenet1_1", "features.5", "classifier.1"), ("resnet18", "layer1", "fc")]
)
def test_pretrained_weights_stay_but_for_other_classes(name, point, last, classes, tmp_path, monkeypatch):
    models = torchvision("models")
    source = models.get_model(name).state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(source, folder / models.get_model_weights(name).DEFAULT.url.rsplit("/", 1)[1])
    network = TorchvisionModel(name, exits=(point,), weights="DEFAULT").build((3, 64, 64), classes)
    ours = {key.split(".", 2)[2]: value for key, value in network.state_dict().items()}
    assert all(torch.equal(ours[key], value) for key, value in source.items() if key in ours and last not in key)
    assert len([key for key in source if key in ours]) == len(source) - (2 if last == "fc" else 0)
    classifier = ours["classify.weight"] if last == "fc" else ours["classifier.1.weight"]
    old = source["fc.weight" if last == "fc" else "classifier.1.weight"]
    assert classifier.shape[0] == classes and (classes == 6 or torch.equal(classifier, old))


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    with pytest.raises(UserError, match=r"weights DEFAULT of resnet18 can't be loaded .*no route to host"):
        TorchvisionModel("resnet18", weights="DEFAULT").build((3, 64, 64), 1000)


@pytest.mark.parametrize(
    ("settings", "shape", "complaint"),
    [
        ({"model": "resnet81"}, None, "unknown torchvision model 'resnet81'; did you mean resnet18"),
        ({"weights": "IMAGENET"}, None, "unknown weights of resnet18 'IMAGENET'; did you mean IMAGENET1K_V1"),
        ({"exits": ("layer1",), "fractions": (0.5,)}, None, "give one of them"),
        ({}, (4, 32, 32), "the images have 4 channels; expected 3"),
        ({"model": "vit_b_16"}, (3, 40, 40), "the images are 40x40; .* multiple of 16"),
        ({"model": "alexnet"}, (1, 16, 16), "AlexNet does not accept images of 3x16x16"),
        ({"exits": ("layer5",)}, (3, 32, 32), "unknown point of ResNet 'layer5'; did you mean layer"),
    ],
)
def test_settings_of_the_backbone_that_make_no_network_are_refused(settings, shape, complaint):
    with pytest.raises(UserError, match=complaint):
        TorchvisionModel(**settings).build(shape or (3, 32, 32), 10)


def test_a_cut_of_a_network_in_training_keeps_both_modes():
    torch.manual_seed(0)
    network = exitkit.build_network("torchvision:convnext_tiny", input_shape=(3, 32, 32), num_classes=10).train()
    cut, x = exitkit.prune_to(network, 2), torch.randn(2, 3, 32, 32)
    assert cut.training and network.training
    with torch.no_grad():
        torch.testing.assert_close(cut.eval()(x).logits[0], network.eval()(x).logits[1])


def test_shares_may_be_an_array():
    network = attach_exits(ResNetLike(), fractions=np.array([0.3, 0.6]), input_shape=SMALL)
    assert network.num_exits == attach_exits(ResNetLike(), fractions=[0.3, 0.6], input_shape=SMALL).num_exits


def test_images_that_are_no_whole_patches_of_timm_are_noted():
    pytest.importorskip("timm")
    with pytest.warns(Note, match="reads patches of 16x16 pixels, and of images of 40x32 only 32x32; multiples of"):
        exitkit.build_network("timm:vit_tiny_patch16_224", input_shape=(3, 40, 32))
