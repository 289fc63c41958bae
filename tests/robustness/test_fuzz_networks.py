"""Random small networks through `attach_exits`: the last exit is the network, bit for bit, or one line says why not."""

import random
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from exitkit.errors import UserError
from exitkit.networks.attach.exits import attach_exits
from exitkit.networks.copying import copied

SHAPE, WIDTH, CLASSES = (3, 8, 8), 6, 4


class Counts(nn.Module):
    """Counts its calls in a buffer, which its output depends on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x + self.calls


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Parallel(nn.Module):
    def __init__(self, one, other):
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x):
        first, second = self.one(x), self.other(x)
        return torch.cat([first[:, : WIDTH // 2], second[:, WIDTH // 2 :]], 1)


class Twice(nn.Module):
    """Applies one module twice."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(torch.tanh(self.inner(x)))


class Functional(nn.Module):
    """Dropout that follows the mode, a size that is read, and an operation in place."""

    def forward(self, x):
        batch, channels = x.shape[:2]
        y = F.dropout(x, 0.3, self.training).reshape(batch, channels, -1)
        y = y - y.mean(-1, keepdim=True)
        return F.relu_(y.reshape(x.shape))


class Depends(nn.Module):
    """Control flow that depends on the images."""

    def forward(self, x):
        return x * 2 if x.mean() > 0 else x


class Draws(nn.Module):
    """Draws numbers of Python and of torch."""

    def forward(self, x):
        return x + random.random() + torch.rand_like(x) if self.training else x


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return self.attend(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).reshape(x.shape)


def conv():
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1)


LAYERS = [
    conv,
    lambda: nn.BatchNorm2d(WIDTH),
    lambda: nn.BatchNorm2d(WIDTH, affine=False, momentum=None),
    lambda: nn.GroupNorm(2, WIDTH),
    lambda: nn.InstanceNorm2d(WIDTH, track_running_stats=True),
    lambda: nn.ReLU(inplace=True),
    nn.GELU,
    lambda: nn.Dropout2d(0.4),
    lambda: nn.RReLU(),
    lambda: parametrizations.weight_norm(conv()),
    lambda: parametrizations.spectral_norm(conv()),
    Counts,
    Functional,
    Depends,
    Draws,
    Attention,
]


def block(chance, shared, depth=0):
    """Return a random module that keeps the shape; `shared` collects modules, which are used again."""
    kind = chance.random()
    if kind < 0.12 and shared:
        return chance.choice(shared)
    if kind < 0.4 and depth < 2:
        make = chance.choice([Residual, Twice, nn.Sequential, Parallel])
        parts = 2 if make in (nn.Sequential, Parallel) else 1
        made = make(*(block(chance, shared, depth + 1) for _ in range(parts)))
    else:
        made = chance.choice(LAYERS)()
    shared.append(made)
    return made


class Net(nn.Module):
    def __init__(self, chance):
        super().__init__()
        shared = []
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.blocks = nn.ModuleList(block(chance, shared) for _ in range(chance.randint(2, 5)))
        self.fc = nn.Linear(WIDTH, CLASSES)
        self.early = chance.random() < 0.2
        if chance.random() < 0.3:
            self.blocks[0].requires_grad_(False)

    def forward(self, x):
        size = x.size(0) if self.early else -1
        x = self.stem(x)
        for module in self.blocks:
            x = module(x)
        return self.fc(x.mean((2, 3)).reshape(size, WIDTH))


def state(module):
    return [*module.parameters(), *module.buffers()]


def check(number):
    """Attach exits to network `number`, and compare six forward passes; return whether it could be cut."""
    chance = random.Random(number)
    torch.manual_seed(number)
    model = Net(chance)
    model.train(chance.random() < 0.7)
    reference = copied(model)
    where = {"fractions": [0.5]} if chance.random() < 0.5 else {"at": [f"blocks.{chance.randrange(len(model.blocks))}"]}
    try:
        network = attach_exits(model, **where, input_shape=SHAPE)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 900, error
        assert all(torch.equal(a, b) for a, b in zip(state(model), state(reference), strict=True)), "changed"
        return False
    for step, training in enumerate([model.training, True, False, True, False, True]):
        results = []
        for runner in (reference, network):
            runner.train(training)
            random.seed(step), torch.manual_seed(step)
            x = torch.randn(3, *SHAPE)
            results.append(runner(x) if runner is reference else without_heads(network, x))
        assert torch.equal(*results), (step, training, where)
    assert all(torch.equal(a, b) for a, b in zip(state(model), state(reference), strict=True)), where
    return True


def without_heads(network, x):
    """Return the last exit's logits, without heads of other exits, which may draw random numbers."""
    for stage in network.stages:
        x = stage(x)
    return network.heads[-1](network.view(x))


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(number, marks=pytest.mark.full) for number in range(12, 1200, 12))]
)
def test_random_networks_are_cut_exactly_or_refused(first):
    with warnings.catch_warnings(action="ignore"):
        cut = [check(number) for number in range(first, first + 12)]
    assert any(cut)
