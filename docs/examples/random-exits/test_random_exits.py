"""A step follows the drawn exits' losses, and the same draw comes again at the same place."""

import torch
from random_exits import RandomExits

import exitkit


def test_a_step_moves_along_the_drawn_exits_losses_alone():
    """In float64, against a gradient that the method has no part in."""
    network = exitkit.build_network("msdnet-tiny").double()
    run = exitkit.Run.local(network, RandomExits(keep=0.5), torch.optim.SGD(network.parameters(), lr=1.0))
    batch = torch.randn(8, 1, 16, 16, dtype=torch.float64), torch.randint(10, (8,))
    drawn = run.exit_weights()
    assert drawn == run.exit_weights() and drawn[-1] == 1
    losses = [torch.nn.functional.cross_entropy(logits, batch[1]) for logits in network(batch[0]).logits]
    head = network.heads[-1].classify.weight
    (slope,) = torch.autograd.grad(sum(w * loss for w, loss in zip(drawn, losses, strict=True)), head)
    expected = head.detach() - slope
    run.strategy.train_step(run, batch)
    assert torch.allclose(head, expected)
