"""RANet's structure, against the widths and sizes measured on the published networks."""

import pytest
import torch
from torch import nn

import exitkit
from exitkit.errors import UserError
from exitkit.networks.families import ranet

from toy import exit_gradients

# What the heads read: channels, and pixels along one side.
READ = {
    "ranet-cifar-any": ([160, 256, 140, 188, 93, 117, 180, 204], 8),
    "ranet-cifar-123": ([112, 208, 145, 241, 146, 218], 8),
    "ranet-imagenet-64": ([768, 1280, 716, 972, 975, 1231, 588, 716], 7),
}
# Fusion blocks by sub-network, as channels@pixels behind the transition.
FUSED = {
    "ranet-cifar-any": {
        2: "100@16 92@8",
        3: "50@32 46@16 87@16 69@8",
        4: "50@32 46@32 87@32 138@16 101@16 156@8",
    },
    "ranet-cifar-123": {2: "70@16 73@8", 3: "35@32 36@16 90@16 86@8"},
    "ranet-imagenet-64": {
        2: "480@14 460@7",
        3: "480@28 460@14 895@14 719@7",
        4: "240@56 230@28 447@28 359@14 608@14 460@7",
    },
}


def ghost(name, **settings):
    with torch.device("meta"):
        return exitkit.build_network(name, **settings)


def blocks_by_sub_network(network):
    sub_networks = []
    for stage in network.stages:
        if stage.starts:
            sub_networks.append([])
        sub_networks[-1] += stage.blocks
    return sub_networks


@pytest.mark.parametrize("name", READ)
def test_what_the_heads_read(name):
    network = ghost(name)
    widths, pixels = READ[name]
    state = torch.empty(1, *network.input_shape, device="meta")
    for index, width in enumerate(widths):
        _, state, _ = network.step(index, state)
        assert network.view(state).shape == (1, width, pixels, pixels)


@pytest.mark.parametrize("name", FUSED)
def test_the_fusion_blocks(name):
    network = ghost(name)
    shapes = {}
    for module in network.modules():
        if isinstance(module, ranet.Block):
            module.register_forward_hook(lambda block, _, out: shapes.update({block: out[0].shape}))
    network(torch.empty(2, *network.input_shape, device="meta"))
    for number, blocks in enumerate(blocks_by_sub_network(network), 1):
        fused = [shapes[block] for block in blocks if block.last is not None]
        assert " ".join(f"{shape[1]}@{shape[2]}" for shape in fused) == FUSED[name].get(number, "")


def test_what_crosses_an_exit():
    network = ghost("ranet-cifar-any")
    state, crossing = torch.empty(1, 3, 32, 32, device="meta"), []
    for index in range(8):
        _, state, _ = network.step(index, state)
        crossing.append(([len(block) for block in state.dense], len(state.base)))
    five = 5  # four layers' outputs and the input
    assert crossing == [
        ([five], 3),
        ([five] * 2, 3),
        ([five] * 3, 2),
        ([five] * 4, 2),
        ([five] * 5, 1),
        ([five] * 6, 1),
        ([], 0),
        ([], 0),
    ]


def test_nothing_is_resized_to_the_size_it_has(monkeypatch):
    resizes = []
    interpolate = ranet.interpolate

    def spy(x, size, **how):
        resizes.append((tuple(x.shape[-2:]), tuple(size)))
        assert how == {"mode": "bilinear", "align_corners": True}
        return interpolate(x, size=size, **how)

    monkeypatch.setattr(ranet, "interpolate", spy)
    ghost("ranet-cifar-any").eval()(torch.empty(1, 3, 32, 32, device="meta"))
    assert resizes and all(before != after for before, after in resizes)


@pytest.mark.parametrize("settings", [{}, {"step": 1}, {"compress": 0.0}, {"reduction": 0.0}, {"scales": (1, 1, 2)}])
def test_a_layer_is_enough_and_any_structure_answers(settings):
    network = exitkit.build_network("ranet-tiny", **settings)
    assert len(network(torch.randn(2, 1, 16, 16)).logits) == 4


def test_equation_5_of_gradient_equilibrium_holds_for_every_parameter():
    network = exitkit.build_network("ranet-tiny").double()
    x, y = torch.randn(4, 1, 16, 16).double(), torch.tensor([0, 3, 5, 9])
    plain = exit_gradients(network, x, y)
    exitkit.build_strategy("ge").adapt(network)
    scaled = exit_gradients(network, x, y)
    for index in range(4):
        for name, gradient in plain[index].items():
            if gradient is not None:
                factor = 1 / (4 - int(name.split(".")[1])) if name.startswith("stages") else 1.0
                assert torch.allclose(scaled[index][name], factor * gradient, rtol=1e-9, atol=1e-14), name


def test_the_released_he_rule_reaches_all_but_the_stem():
    def deviation(conv):
        return conv.weight.std().item()

    for init in ("released", "default", "he"):
        network = exitkit.build_network("ranet-imagenet-32", init=init)
        stem, head = network.stages[0].stem.features[0][0], network.heads[0]
        he_stem, he_head = (2 / (49 * 32)) ** 0.5, (2 / (9 * head.embed[0][0].out_channels)) ** 0.5
        own_stem, own_head = (1 / (3 * 49 * 3)) ** 0.5, (1 / (3 * 9 * head.embed[0][0].in_channels)) ** 0.5
        assert deviation(stem) == pytest.approx(he_stem if init == "he" else own_stem, rel=0.05)
        assert deviation(head.embed[0][0]) == pytest.approx(own_head if init == "default" else he_head, rel=0.05)
        assert head.classify.bias.any().item() == (init == "default")
        assert all((module.weight == 1).all() for module in network.modules() if isinstance(module, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"scales": (2, 3, 3, 3)}, "expected levels that start at 1"),
        ({"scales": (1, 3, 3, 3)}, "expected levels that start at 1"),
        ({"growth_factors": (4, 2, 1)}, "one factor of at least 1 for each of the 4 sub-networks"),
        ({"compress": 1.0}, "below 1"),
        ({"blocks": 0}, "blocks is 0; expected at least 1"),
        ({"reduction": 0.001}, "keeps none of 185 channels"),
        ({"input_shape": (3, 3, 32)}, "too small for 3 resolutions; expected at least 4x4"),
    ],
)
def test_what_makes_no_network_is_refused(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        exitkit.build_network("ranet-cifar-any", **settings)
