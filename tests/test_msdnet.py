"""MSDNet's structure, and what holds for every network that is registered."""

import copy
from itertools import pairwise

import pytest
import torch

import exitkit
from exitkit import plugins
from exitkit.backbones.base import home
from exitkit.errors import UserError
from exitkit.network import map_tensors


def small(name):
    """Whether a preset runs within moments on one core."""
    return home(plugins.load("backbone", name))[0][1] <= 32


PRESETS = list(plugins.registered("backbone"))
SMALL = [name for name in PRESETS if small(name)]


def images(network, count=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *network.input_shape, generator=generator, dtype=torch.float64)


def without_row_1(tensor):
    return tensor[torch.tensor([0, 2])]


@pytest.mark.parametrize("name", SMALL)
def test_iterating_and_dropping_rows_give_what_forward_gives(name):
    network = exitkit.build_network(name).double().eval()
    x = images(network)
    with torch.no_grad():
        whole = network(x)
        for lazily, at_once in zip(network.iterate(x), whole.logits, strict=True):
            assert torch.equal(lazily.logits, at_once)
        state, carry, kept = x, None, torch.arange(3)
        for index in range(network.num_exits):
            output, state, carry = network.step(index, state, carry)
            assert torch.allclose(output.logits, whole.logits[index][kept], rtol=1e-10, atol=1e-12)
            if index == 1:
                kept = torch.tensor([0, 2])
                state, carry = map_tensors(without_row_1, state), map_tensors(without_row_1, carry)


@pytest.mark.parametrize("name", PRESETS)
def test_costs_grow_along_the_chain_and_the_state_round_trips(name):
    network = exitkit.build_network(name)
    rows = exitkit.cost(network)
    assert len(rows) == network.num_exits
    assert all(a.papers < b.papers and a.macs < b.macs for a, b in pairwise(rows))
    if small(name):
        twin = copy.deepcopy(network)
        twin.load_state_dict(network.state_dict())
        assert torch.equal(
            twin.eval()(images(network).float()).logits[-1], network.eval()(images(network).float()).logits[-1]
        )


def test_the_tiny_preset_has_the_size_that_it_says():
    network = exitkit.build_network("msdnet-tiny")
    assert sum(parameter.numel() for parameter in network.parameters()) == 4330
    assert network.input_shape == (1, 16, 16) and network.num_classes == 10 and network.num_exits == 4


@pytest.mark.parametrize(
    ("name", "widths", "alive"),
    [
        ("msdnet-cifar-k7", [160, 208, 140, 188, 236, 152, 200], [3, 3, 2, 2, 2, 1, 1]),
        ("msdnet-cifar-lg5", [88, 136, 104, 200, 208], [3, 3, 2, 2, 1]),
        ("msdnet-cifar-k7-g16", [320, 448, 320, 448, 576, 384, 512], [3, 3, 2, 2, 2, 1, 1]),
    ],
)
def test_the_widths_that_heads_read_and_the_scales_alive(name, widths, alive):
    network = exitkit.build_network(name).eval()
    state = torch.zeros(1, *network.input_shape)
    with torch.no_grad():
        for index, (width, scales) in enumerate(zip(widths, alive, strict=True)):
            _, state, _ = network.step(index, state)
            assert network.view(state).shape[1] == width and len(state) == scales


def test_pruning_min_drops_scales_at_the_end_only():
    network = exitkit.build_network("msdnet-cifar-k7", prune="min").eval()
    state, lengths = torch.zeros(1, 3, 32, 32), []
    with torch.no_grad():
        for index in range(7):
            _, state, _ = network.step(index, state)
            lengths.append(len(state))
    assert lengths == [3, 3, 3, 3, 3, 3, 1]


def test_gradients_reach_all_parameters_but_the_fine_scales_behind_which_no_exit_lies():
    network = exitkit.build_network("msdnet-tiny")
    idle = network.unreached()
    assert idle and all(name.startswith("stages.3") for name in idle)
    sum(logits.sum() for logits in network(torch.randn(4, 1, 16, 16)).logits).backward()
    assert {name for name, parameter in network.named_parameters() if parameter.grad is None} == set(idle)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 17, 23)])
def test_any_image_that_fits(shape):
    network = exitkit.build_network("msdnet-cifar-lg4", input_shape=shape, num_classes=7).eval()
    assert [logits.shape for logits in network(torch.zeros(2, *shape)).logits] == [(2, 7)] * 4


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"growth": 5, "growth_factors": (1, 1, 2)}, "odd"),
        ({"growth_factors": (1, 2)}, "one factor a scale"),
        ({"blocks": 0}, "blocks is 0; expected at least 1"),
        ({"reduction": 1.5}, "between 0 and 1"),
        ({"step_mode": "evn"}, "'even' or 'lin_grow'"),
        ({"growth_factors": (1,) * 7, "bottleneck_factors": (1,) * 7}, "too small for 7 scales"),
        ({"depth": 3}, "unknown field of backbone msdnet 'depth'"),
    ],
)
def test_settings_that_make_no_network_are_refused(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        exitkit.build_network("msdnet", **settings)
