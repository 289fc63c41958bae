"""Costs against those measured on the networks behind the papers' tables, to the last multiply-add."""

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import exitkit
from exitkit.errors import UserError
from exitkit.networks import Head, MultiExitNetwork

from toy import chain

# As counted on the released networks. `lazy` is what exits 1 to k need together: what our `pruned` is, and the heads
# before exit k.
MEASURED = json.loads((Path(__file__).parent / "measured_costs.json").read_text(encoding="utf-8"))

# What the tables print, in millions, multiply-adds and then (where a table has them) parameters; the digits are the
# paper's own. Its one misprint, 285.68 for 285.60 at exit 6 of Meta-GF's table 3, is put right here.
PRINTED = {
    ("msdnet-cifar-k10", 100): ("15.14 25.51 37.79 52.06 62.18 74.07 87.73 100.0 110.1 121.7", ""),
    ("msdnet-cifar-lg7", 100): (
        "6.86 14.35 27.29 48.45 76.43 108.9 137.3",
        "0.30 0.65 1.11 1.73 2.38 3.05 4.0",
    ),
    ("msdnet-cifar-k7-g16", 100): (
        "56.43 101.00 155.31 198.10 249.53 298.05 340.64",
        "0.90 1.84 2.80 3.76 4.92 6.10 7.36",
    ),
    ("msdnet-imagenet-s4", 1000): ("339.90 685.46 1008.16 1254.47 1360.53", "4.24 8.77 13.07 16.75 23.96"),
    ("msdnet-imagenet-s7", 1000): ("615.7 1436 2283 2967 3254", ""),
    ("ranet-cifar-any", 100): ("15.83 31.31 44.69 50.40 60.71 63.72 90.26 95.00", ""),
    ("ranet-imagenet-64", 1000): ("435.0 888.7 1153 1352 2280 2588 3236 3333", ""),
    ("sdn-vgg16", 10): (
        "39.76 96.52 153.25 191.08 247.81 285.60 314.45",
        "0.05 0.29 1.22 1.85 5.47 7.86 15.47",
    ),
    ("sdn-resnet56", 10): (
        "19.50 38.54 56.47 75.43 93.32 112.25 126.44",
        "0.02 0.04 0.10 0.18 0.36 0.67 0.89",
    ),
}


@functools.cache
def ghost(preset, num_classes=None):
    """A network without storage."""
    with torch.device("meta"):
        return exitkit.build_network(preset, num_classes=num_classes)


@functools.cache
def rows_of(preset, num_classes=None):
    return exitkit.cost(ghost(preset, num_classes))


def macs_of_heads(network):
    """Each head's convolutions and linear layers, by their own shapes."""
    macs, state = [], torch.empty(1, *network.input_shape, device="meta")

    def add(module, inputs, output):
        macs[-1] += module.weight[0].numel() * output[0].numel()

    for module in network.heads.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(add)
    for index in range(network.num_exits):
        macs.append(0)
        _, state, _ = network.step(index, state)
    return macs


@pytest.mark.parametrize("measured", MEASURED, ids=lambda measured: f"{measured['backbone']}-{measured['num_classes']}")
def test_every_exit_costs_what_was_measured(measured):
    rows = rows_of(measured["backbone"], measured["num_classes"])
    for column in ("papers", "macs", "params"):
        assert [getattr(row, column) for row in rows] == measured[column], column
    heads = macs_of_heads(copy.deepcopy(ghost(measured["backbone"], measured["num_classes"])).eval())
    assert [row.pruned + sum(heads[: row.exit - 1]) for row in rows] == measured["lazy"]
    assert [row.exit for row in rows] == list(range(1, len(rows) + 1))


@pytest.mark.parametrize(("preset", "num_classes"), PRINTED)
def test_the_papers_columns_come_out_to_the_printed_digit(preset, num_classes):
    rows = rows_of(preset, num_classes)
    operations, parameters = PRINTED[preset, num_classes]
    assert as_printed([row.papers for row in rows], operations) == operations
    if parameters:
        assert as_printed([row.params for row in rows], parameters) == parameters


def as_printed(counts, printed):
    """The counts in millions, with the digits that the table has."""
    digits = [len(number.partition(".")[2]) for number in printed.split()]
    return " ".join(f"{count / 1e6:.{places}f}" for count, places in zip(counts, digits, strict=True))


def test_a_chain_by_hand():
    # Linear 4->5 and 5->5, each read by a Linear 5->4; tanh is free.
    first, second = exitkit.cost(chain(exits=2))
    assert (first.macs, second.macs) == (4 * 5 + 5 * 4, 4 * 5 + 5 * 4 + 5 * 5 + 5 * 4)
    assert (first.papers - first.macs, second.papers - second.macs) == (5 + 4, 5 + 4 + 5 + 4)
    assert (first.params, second.params) == (25 + 24, 25 + 24 + 30 + 24)


def test_pooling_and_relu_by_hand():
    from torch import nn

    from exitkit.networks.cascade import Head, MultiExitNetwork

    stage = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2))
    head = Head(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(4, 2))
    (row,) = exitkit.cost(MultiExitNetwork([stage], [head], (3, 8, 8), 2))
    assert row.macs == 4 * 3 * 9 * 64 + 8
    relu, max_pool, average_pool, global_pool, bias = 4 * 64, 4 * 4 * 16, 4 * 4 * 4, 4 * 4, 2
    assert row.papers == row.macs + relu + max_pool + average_pool + global_pool + bias


class Attention(nn.Module):
    """Reads parameters of a module that it does not call, and one that is nested."""

    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.ParameterList([nn.Parameter(torch.ones(8))])

    def forward(self, x):
        tokens = x.flatten(2).mT * self.scale[0]
        return self.attend(tokens, tokens, tokens, need_weights=False)[0].mean(1)


@pytest.mark.parametrize("values", [False, True])
def test_attention_costs_its_products_and_all_parameters_that_it_reads(values):
    class Needs(nn.Module):
        """May need values, so that the network runs on an image."""

        def forward(self, x):
            assert not values or float(x.sum()) == 0
            return x

    stage, head = nn.Sequential(Needs(), Attention()), Head(nn.Identity(), nn.Linear(8, 3))
    network = MultiExitNetwork([stage], [head], (8, 4, 4), 3)
    (row,) = exitkit.cost(network)
    tokens, width, heads = 16, 8, 2
    assert row.macs == 4 * tokens * width**2 + 2 * heads * tokens**2 * width // heads + 24
    assert row.params == sum(parameter.numel() for parameter in network.parameters())


def test_counting_leaves_the_network_as_it_was():
    network = exitkit.build_network("msdnet-tiny").double()
    network.stages[0].eval()
    before = copy.deepcopy(network.state_dict())
    torch.manual_seed(3)
    exitkit.cost(network)
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(3)))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training and not network.stages[0].training
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_another_image_size_costs_by_its_area():
    network = exitkit.build_network("msdnet-tiny")
    small, large = exitkit.cost(network), exitkit.cost(network, (1, 32, 32))
    head = 10 * 12  # its pooled width does not depend on the image
    assert large[0].macs - head == 4 * (small[0].macs - head)
    assert [row.params for row in small] == [row.params for row in large]


def by_hand(inplace=False):
    """One exit whose head also normalises a 1x1 map, which in training mode one image alone can't."""
    from torch import nn

    from exitkit.networks.cascade import Head, MultiExitNetwork

    stages = [
        nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1, groups=2), nn.ReLU(inplace), nn.Dropout(0.5)),
        nn.Sequential(nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4), nn.ReLU(inplace)),
    ]
    heads = [Head(nn.Flatten(), nn.Linear(16, 3, bias=False)), Head(nn.Flatten(), nn.Linear(4, 3))]
    return MultiExitNetwork(stages, heads, (2, 4, 4), 3)


@pytest.mark.parametrize("inplace", [False, True])
def test_groups_missing_biases_and_in_place_relu_by_hand(inplace):
    first, second = exitkit.cost(by_hand(inplace))
    grouped, plain = 2 * 2 * 4 * 9, 4 * 4 * 4
    assert (first.macs, second.macs) == (grouped + 48, grouped + 48 + plain + 12)
    assert (first.papers - first.macs, second.papers - second.macs) == (16, 16 + 4 + 3)
    assert (first.params, second.params) == (36 + 4 + 48, 36 + 4 + 48 + 64 + 4 + 8 + 15)


def test_a_logit_link_is_counted_where_it_first_works():
    from torch import nn

    from exitkit.networks.cascade import LogitLink

    class Path(LogitLink):
        def __init__(self):
            super().__init__()
            self.path = nn.Linear(3, 3)

        def forward(self, index, raw, embedding, carry):
            logits = raw if carry is None else raw + self.path(carry)
            return logits, logits

    plain, linked = by_hand(), by_hand()
    linked.set_link(Path())
    more = [
        (b.macs - a.macs, b.papers - a.papers, b.params - a.params)
        for a, b in zip(exitkit.cost(plain), exitkit.cost(linked), strict=True)
    ]
    assert more == [(0, 0, 0), (9, 9 + 3, 9 + 3)]


def test_neither_number_format_nor_gradient_mode_changes_a_count():
    expected = exitkit.cost(by_hand())
    assert exitkit.cost(by_hand().to(torch.bfloat16)) == exitkit.cost(by_hand().double()) == expected
    with torch.inference_mode():
        assert exitkit.cost(by_hand()) == expected


def test_an_exit_costs_differently_in_networks_of_different_depth():
    # Scales are dropped by the total depth, so that the third exit of the lin_grow family is not one network.
    third = [rows_of(f"msdnet-cifar-lg{exits}")[2].papers for exits in (4, 5, 6, 8)]
    assert [f"{papers / 1e6:.2f}" for papers in third] == ["26.13", "27.54", "27.29", "27.29"]


def test_images_that_the_network_does_not_take_are_one_line():
    with pytest.raises(UserError, match=r"takes no images of \[3, 16, 16\] .*; it was made for \[1, 16, 16\]"):
        exitkit.cost(exitkit.build_network("sdn-tiny", input_shape=(1, 16, 16)), (3, 16, 16))
