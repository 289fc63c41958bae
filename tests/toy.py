"""Small networks and batches in float64, for tests that check a method against its equations; runs of few images."""

import torch
from torch import nn

from exitkit.networks.cascade import Head, MultiExitNetwork

# Runs on 80 digits, in batches of 32, 32 and 16: for tests of what becomes of a run, and not of what it learns.
FEW = {"batch_size": 32, "dataset_settings": {"per_class": 8, "validation": 40}}
FEW_OPTIONS = ("--batch-size", "32", "--set", "per_class=8", "--set", "validation=40")


def chain(exits=3, width=5, classes=4, batchnorm=False, seed=0):
    """A plain chain: one tensor from stage to stage, so that every path to a stage leads through the one before it."""
    torch.manual_seed(seed)
    stages, heads = [], []
    for index in range(exits):
        layers = [nn.Flatten() if index == 0 else nn.Identity(), nn.Linear(4 if index == 0 else width, width)]
        layers += [nn.BatchNorm1d(width)] if batchnorm else []
        stages.append(nn.Sequential(*layers, nn.Tanh()))
        heads.append(Head(nn.Identity(), nn.Linear(width, classes)))
    return MultiExitNetwork(stages, heads, (1, 2, 2), classes).double()


def batches(count=3, size=6, classes=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 1, 2, 2, generator=generator, dtype=torch.float64),
            torch.randint(classes, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def sgd(network, lr=0.1, momentum=0.9, weight_decay=1e-2):
    return torch.optim.SGD(network.parameters(), lr, momentum, weight_decay=weight_decay)


def exit_gradients(network, x, y):
    """{parameter: gradient of exit k's mean cross-entropy, or None} for each exit k."""
    named = dict(network.named_parameters())
    out = []
    for logits in network(x).logits:
        loss = nn.functional.cross_entropy(logits, y)
        grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
        out.append(dict(zip(named, grads, strict=True)))
    return out
