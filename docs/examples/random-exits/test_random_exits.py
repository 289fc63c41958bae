"""A step follows the losses of the drawn exits, and the draw is repeatable."""

import torch
from random_exits import RandomExits
from torch.nn.functional import cross_entropy

import exitkit


def test_a_step_moves_along_the_drawn_exits_losses_alone():
    """In float64, compared with a gradient that is computed without the method."""
    network = exitkit.build_network("msdnet-tiny").double()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    run = exitkit.Run.local(network, RandomExits(keep=0.5), optimizer)
    images = torch.randn(8, 1, 16, 16, dtype=torch.float64)
    labels = torch.randint(10, (8,))
    drawn = run.weights()
    assert drawn == run.weights() and drawn[-1] == 1
    outputs = network(images).logits
    loss = sum(
        w * cross_entropy(z, labels) for w, z in zip(drawn, outputs, strict=True)
    )
    parameters = [p for p in network.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
    expected = [
        p.detach() - (0 if g is None else g)
        for p, g in zip(parameters, slopes, strict=True)
    ]
    run.train_step((images, labels))
    assert all(map(torch.allclose, parameters, expected))
