"""Costs against those measured on the networks behind the papers' tables, to the last multiply-add."""

import copy
import functools

import pytest
import torch

import exitkit

from toy import chain

# preset: (papers, macs, params) of each exit.
MEASURED = {
    "msdnet-cifar-k10": (
        [15140452, 25505992, 37788460, 52061840, 62181620, 74070872, 87729596, 100038944, 110121860, 121679336],
        [14967296, 25259008, 37467648, 51667968, 61744640, 73590784, 87206400, 99483648, 109548032, 121086976],
        [433876, 876792, 1381628, 1827836, 2279536, 2793444, 3369560, 3864948, 4378040, 4955644],
    ),
    "msdnet-imagenet-s7": (
        [615692968, 1436392016, 2283210200, 2967421456, 3253794488],
        [612030976, 1430810112, 2276388096, 2959942016, 3246180864],
        [8759240, 20154896, 31730040, 41860288, 62314472],
    ),
    "msdnet-cifar-lg7": (
        [6859876, 14350024, 27291436, 48448912, 76432628, 108850520, 137280956],
        [6792704, 14209024, 27041280, 48054272, 75900416, 108191744, 136565248],
        [299704, 649740, 1111388, 1727200, 2384968, 3052244, 3966664],
    ),
    "msdnet-cifar-lg5": (
        [6859876, 14350024, 27536684, 41714576, 58480628],
        [6792704, 14209024, 27278848, 41373696, 58087936],
        [299704, 649740, 1018308, 1492424, 2078924],
    ),
    "msdnet-imagenet-s4": (
        [339902824, 685456720, 1008156120, 1254472688, 1360529624],
        [337214464, 681654272, 1003659008, 1249626240, 1355606016],
        [4238504, 8772240, 13073272, 16748416, 23958440],
    ),
    "msdnet-imagenet-s6": (
        [514661608, 1171181872, 1844515080, 2501402480, 2742059056],
        [511324160, 1166144768, 1838349440, 2494631424, 2735131968],
        [7076712, 15689808, 24014008, 42187744, 56529304],
    ),
    "msdnet-cifar-k7-g16": (
        [56426084, 100998344, 155310892, 198097296, 249534452, 298051160, 340640956],
        [56029696, 100410368, 154555904, 197232640, 248560128, 297004032, 339549696],
        [898996, 1835992, 2797212, 3758208, 4915812, 6102472, 7362348],
    ),
    "msdnet-cifar-k7": (
        [15140452, 25505992, 37095980, 46331024, 57335540, 66960728, 75937724],
        [14967296, 25259008, 36780544, 45972480, 56933888, 66529280, 75487744],
        [433876, 876792, 1274952, 1695548, 2178352, 2603252, 3067960],
    ),
}

# What the tables print, in millions; the last digit is the paper's own.
PRINTED = {
    "msdnet-cifar-k10": "15.14 25.51 37.79 52.06 62.18 74.07 87.73 100.0 110.1 121.7",
    "msdnet-cifar-lg7": "6.86 14.35 27.29 48.45 76.43 108.85 137.28",
    "msdnet-cifar-k7-g16": "56.43 101.00 155.31 198.10 249.53 298.05 340.64",
    "msdnet-imagenet-s4": "339.90 685.46 1008.16 1254.47 1360.53",
    "msdnet-imagenet-s7": "615.7 1436 2283 2967 3254",
}


@functools.cache
def rows_of(preset):
    """A preset's costs, counted once, on a network without storage."""
    with torch.device("meta"):
        return exitkit.cost(exitkit.build_network(preset))


@pytest.mark.parametrize("preset", MEASURED)
def test_every_exit_costs_what_was_measured(preset):
    rows = rows_of(preset)
    papers, macs, params = MEASURED[preset]
    assert [row.papers for row in rows] == papers
    assert [row.macs for row in rows] == macs
    assert [row.params for row in rows] == params
    assert [row.exit for row in rows] == list(range(1, len(papers) + 1))


@pytest.mark.parametrize("preset", PRINTED)
def test_the_papers_columns_come_out_to_the_printed_digit(preset):
    rows = rows_of(preset)
    for row, printed in zip(rows, PRINTED[preset].split(), strict=True):
        digits = len(printed.partition(".")[2])
        assert f"{row.papers / 1e6:.{digits}f}" == printed


def test_a_chain_by_hand():
    # Linear 4->5 and 5->5, each read by a Linear 5->4; tanh is free.
    first, second = exitkit.cost(chain(exits=2))
    assert (first.macs, second.macs) == (4 * 5 + 5 * 4, 4 * 5 + 5 * 4 + 5 * 5 + 5 * 4)
    assert (first.papers - first.macs, second.papers - second.macs) == (5 + 4, 5 + 4 + 5 + 4)
    assert (first.params, second.params) == (25 + 24, 25 + 24 + 30 + 24)


def test_pooling_and_relu_by_hand():
    from torch import nn

    from exitkit.network import Head, MultiExitNetwork

    stage = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2))
    head = Head(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(4, 2))
    (row,) = exitkit.cost(MultiExitNetwork([stage], [head], (3, 8, 8), 2))
    assert row.macs == 4 * 3 * 9 * 64 + 8
    relu, max_pool, average_pool, global_pool, bias = 4 * 64, 4 * 4 * 16, 4 * 4 * 4, 4 * 4, 2
    assert row.papers == row.macs + relu + max_pool + average_pool + global_pool + bias


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

    from exitkit.network import Head, MultiExitNetwork

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

    from exitkit.network import LogitLink

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
