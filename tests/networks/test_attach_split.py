"""What crosses a cut beside features, and modules that compute differently in training."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import exitkit
from exitkit.errors import UserError
from exitkit.networks.attach.exits import attach_exits

SHAPE = (3, 8, 8)


def images(count=4, size=8):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def same_in_both_modes(model, network, x=None):
    """The last exit is the model, bit for bit, with the same random numbers."""
    x = images() if x is None else x
    for training in (False, True):
        model.train(training), network.train(training)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            want = model(x)
        torch.manual_seed(5)
        assert torch.equal(network(x).logits[-1], want)


def dropping_rows(network, x):
    """Rows leave between the stages."""
    network.eval()
    want = network(x).logits
    state, kept = x, torch.arange(len(x))
    for index in range(network.num_exits):
        output, state, _ = network.step(index, state)
        torch.testing.assert_close(output.logits, want[index][kept])
        state = tuple(part[1:] for part in state) if isinstance(state, tuple) else state[1:]
        kept = kept[1:]


class SkipSamples(nn.Module):
    """Stochastic depth: branches on its mode, and draws one number per image."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training:
            return x
        kept = torch.rand((x.shape[0],) + (1,) * (x.dim() - 1)) > self.rate
        return x * kept / (1 - self.rate)


class Tokens(nn.Module):
    """A block of tokens with stochastic depth, and a dropout rate that is 0 in evaluation."""

    def __init__(self, width):
        super().__init__()
        self.mix, self.skip = nn.Linear(width, width), SkipSamples(0.5)

    def forward(self, x, height, width):
        y = self.mix(x)
        y = y + y.transpose(1, 2).reshape(x.shape[0], -1, height, width).mean(3).mean(2)[:, None]
        return x + self.skip(F.dropout(y, 0.3 if self.training else 0.0))


class Transformer(nn.Module):
    """Sizes and a table of positions that are computed first, and used by every block."""

    def __init__(self, width=12, depth=4):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, 2)
        self.scale = nn.Parameter(torch.ones(width))
        self.blocks = nn.ModuleList(Tokens(width) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.patches(x)
        height, width = x.shape[-2:]
        places = torch.arange(height * width, device=self.scale.device)[:, None].sin() * self.scale
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x + places, height, width)
        return self.head(x.mean(1))


@pytest.mark.parametrize("where", [{"at": ["blocks.0", "blocks.2"]}, {"fractions": [0.3, 0.7]}])
def test_stochastic_depth_sizes_and_a_table_for_all_images(where):
    model = Transformer()
    network = attach_exits(model, **where, input_shape=SHAPE)
    same_in_both_modes(model, network)
    same_in_both_modes(model, pickle.loads(pickle.dumps(copy.deepcopy(network))))
    network.train()
    assert not torch.equal(network(images()).logits[0], network(images()).logits[0])
    dropping_rows(network, images())
    gradients = torch.autograd.grad(network(images()).logits[-1].sum(), [*model.parameters()])
    expected = torch.autograd.grad(model.eval()(images()).sum(), [*model.parameters()])
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_a_size_from_before_a_cut_is_that_of_the_images():
    model = Transformer()
    network = attach_exits(model, at=["blocks.0"], input_shape=SHAPE)
    same_in_both_modes(model, network, images(size=16))
    dropping_rows(network, images(size=16))
    (cut,) = exitkit.cost(exitkit.prune_to(network, 1))
    assert cut.macs == exitkit.cost(network)[0].macs


class TwoBranches(nn.Module):
    """Two branches that run side by side up to the end."""

    def __init__(self):
        super().__init__()
        self.left = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.right = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        left = right = x
        for first, second in zip(self.left, self.right, strict=True):
            left, right = first(left).relu(), second(right).relu()
        return self.fc(torch.cat([left, right], 1).mean((2, 3)))


def test_parallel_branches_cross_together():
    model = TwoBranches()
    network = attach_exits(model, fractions=[0.25, 0.5], input_shape=SHAPE)
    same_in_both_modes(model, network)
    shares = [row.macs / exitkit.cost(network)[-1].macs for row in exitkit.cost(network)]
    assert shares[:2] == pytest.approx([0.25, 0.5], abs=0.05)
    dropping_rows(network, images())


class Wrapped(nn.Module):
    """A network whose own forward differs in training: no module inside can be run as a whole instead."""

    def __init__(self):
        super().__init__()
        self.inner = Transformer()

    def forward(self, x):
        x = self.inner(x)
        return x if self.training else x.softmax(1)


def test_a_network_that_differs_itself_is_refused_and_names_where():
    with pytest.raises(UserError, match="Wrapped computes softmax in evaluation only"):
        attach_exits(Wrapped(), fractions=[0.5], input_shape=SHAPE)
