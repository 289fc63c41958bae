"""Meta-GF against a plain second implementation: copies of the network, hand-written SGD and Adam, explicit sums."""

import copy

import pytest
import torch
import torch.nn.functional as F

import exitkit
from exitkit.errors import UserError

from toy import batches, chain

LR, MOMENTUM, DECAY = 0.1, 0.9, 0.02


def exits_below(name, exits):
    part, stage = name.split(".")[:2]
    return [int(stage)] if part == "heads" else list(range(int(stage), exits))


def losses_of(network, batch):
    return [F.cross_entropy(logits, batch[1]) for logits in network(batch[0]).logits]


def branch(network, index, data, auxiliary):
    """One pass of hand-written SGD (momentum from zero) on the branch's loss, on a copy."""
    network = copy.deepcopy(network)
    parameters = dict(network.named_parameters())
    buffers = {}
    for batch in data:
        losses = losses_of(network, batch)
        loss = sum(value if k == index else auxiliary * value for k, value in enumerate(losses))
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                gradient = gradient + DECAY * parameter
                buffers[name] = gradient if name not in buffers else MOMENTUM * buffers[name] + gradient
                parameter -= LR * buffers[name]
    return {name: parameter.detach() for name, parameter in parameters.items()}


def reference_epoch(network, data, eta, adam, learned, rate, auxiliary=0.1):
    """One epoch of algorithm 1; changes `network`, `eta` {name: {exit: tensor}} and `adam` in place."""
    exits = network.num_exits
    ends = [branch(network, index, data, auxiliary) for index in range(exits)]

    def fuse(values):
        fused = {}
        for name in ends[0]:
            own = exits_below(name, exits)
            if name in learned:
                total = sum(values[name][e].exp() for e in own)
                fused[name] = sum(values[name][e].exp() / total * ends[e][name] for e in own)
            else:
                fused[name] = sum(ends[e][name] for e in own) / len(own)
        return fused

    flat = [(name, e) for name in learned for e in exits_below(name, exits)]
    for batch in data:
        leaves = {name: {e: v.clone().requires_grad_() for e, v in values.items()} for name, values in eta.items()}
        fused = fuse(leaves)
        outputs = torch.func.functional_call(network, fused, (batch[0],))
        loss = sum(F.cross_entropy(logits, batch[1]) for logits in outputs.logits)
        gradients = torch.autograd.grad(loss, [leaves[name][e] for name, e in flat])
        adam["t"] += 1
        for (name, e), gradient in zip(flat, gradients, strict=True):
            key = (name, e)
            adam["m"][key] = 0.9 * adam["m"].get(key, 0) + 0.1 * gradient
            adam["v"][key] = 0.999 * adam["v"].get(key, 0) + 0.001 * gradient**2
            m, v = adam["m"][key] / (1 - 0.9 ** adam["t"]), adam["v"][key] / (1 - 0.999 ** adam["t"])
            eta[name][e] = eta[name][e] - rate * m / (v.sqrt() + 1e-8)
    with torch.no_grad():
        for name, value in fuse(eta).items():
            network.get_parameter(name).copy_(value)


def local_run(network, **settings):
    optimizer = torch.optim.SGD(network.parameters(), LR, MOMENTUM, weight_decay=DECAY)
    return exitkit.Run.local(network, exitkit.build_strategy("metagf", **settings), optimizer)


@pytest.mark.parametrize("fuse_batchnorm", [False, True])
def test_two_epochs_equal_the_second_implementation(fuse_batchnorm):
    ours, theirs = chain(3, batchnorm=True), chain(3, batchnorm=True)
    run = local_run(ours, fuse_batchnorm=fuse_batchnorm)
    run.position.epochs = 2
    normal = {"stages.0.2.weight", "stages.0.2.bias", "stages.1.2.weight", "stages.1.2.bias"}
    learned = [
        name
        for name, _ in theirs.named_parameters()
        if len(exits_below(name, 3)) > 1 and (fuse_batchnorm or name not in normal)
    ]
    one = torch.tensor(1.0, dtype=torch.float64)
    eta = {name: {e: one.clone() for e in exits_below(name, 3)} for name in learned}
    adam = {"t": 0, "m": {}, "v": {}}
    for epoch in range(2):
        data = batches(seed=epoch)
        run.position.epoch = epoch
        run.strategy.train_epoch(run, data)
        reference_epoch(theirs, data, eta, adam, learned, rate=0.1 * 0.1**epoch)
        for name, value in theirs.state_dict().items():
            assert torch.allclose(ours.state_dict()[name], value, rtol=1e-9, atol=1e-11), name
    assert any(abs(value - 1) > 0.05 for values in eta.values() for value in values.values())


def is_the_mean_of_end_points(network, start, data):
    """Check that each parameter is the mean over the end points of its owners' branches."""
    ends = [branch(start, index, data, 0.1) for index in range(3)]
    for name, parameter in network.named_parameters():
        own = exits_below(name, 3)
        mean = sum(ends[e][name] for e in own) / len(own)
        assert torch.allclose(parameter, mean, rtol=1e-10, atol=1e-12), name


def test_weights_that_hardly_move_give_the_mean_over_the_owners_and_sole_owners_their_own_end_point():
    network, start = chain(3), chain(3)
    data = batches()
    run = local_run(network, fusion_lr=1e-14)
    run.strategy.train_epoch(run, data)
    is_the_mean_of_end_points(network, start, data)


class Scaled(torch.nn.Module):
    """A layer whose parameter has no dimensions."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x):
        return self.scale * x


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_parameter_without_dimensions_is_fused_like_any_other(granularity):
    network, data = chain(3), batches()
    for stage in network.stages:
        stage.append(Scaled())
    start = copy.deepcopy(network)
    run = local_run(network, fusion_lr=1e-14, granularity=granularity)
    run.strategy.train_epoch(run, data)
    is_the_mean_of_end_points(network, start, data)


def test_the_gradient_of_the_weights_is_the_finite_difference():
    from exitkit.methods.fusion import FusionWeights

    torch.manual_seed(0)
    weights = FusionWeights([(0, 1, 2), (1, 2)], 3).double()
    ends = torch.randn(2, 3, 7, dtype=torch.float64)

    def fused(eta):
        weights.eta.data.copy_(eta)
        return (torch.einsum("tk,tkn->tn", weights(), ends) ** 3).sum()

    point = torch.randn(2, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(fused(point), weights.eta)
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(3)):
        nudge = torch.zeros_like(point)
        nudge[tuple(index)] = 1e-6
        with torch.no_grad():
            difference = (fused(point + nudge) - fused(point - nudge)) / 2e-6
        assert gradient[tuple(index)].item() == pytest.approx(difference.item(), rel=1e-6, abs=1e-8)
    assert weights()[1, 0] == 0 and torch.allclose(weights().sum(1), torch.ones(2, dtype=torch.float64))


def test_momentum_is_clear_after_every_pass_and_the_weights_stay_trainable():
    network = chain(3, batchnorm=True)
    run = local_run(network)
    for seed in range(3):
        before = run.auxiliaries["fusion"].module.eta.detach().clone()
        run.strategy.train_epoch(run, batches(seed=seed))
        after = run.auxiliaries["fusion"].module.eta
        assert after.requires_grad and not torch.equal(before, after)
        assert not run.optimizer.state


def test_a_pass_boundary_is_a_place_to_go_on_from():
    whole, cut = chain(3, batchnorm=True), chain(3, batchnorm=True)
    reference = local_run(whole)
    reference.strategy.train_epoch(reference, batches())

    first = local_run(cut)
    saved = []

    class Killed(Exception):
        pass

    def save_then_die():
        saved.append(copy.deepcopy(first.state_dict()))
        if len(saved) == 2:
            raise Killed

    first.on_checkpoint = save_then_die
    with pytest.raises(Killed):
        first.strategy.train_epoch(first, batches())
    resumed = local_run(chain(3, batchnorm=True, seed=5))
    resumed.load_state_dict(saved[-1])
    resumed.strategy.train_epoch(resumed, batches())
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name


def test_a_single_exit_is_plain_training():
    ours, plain = chain(1), chain(1)
    run = local_run(ours)
    run.strategy.train_epoch(run, batches())
    joint = exitkit.Run.local(
        plain,
        exitkit.build_strategy("joint"),
        torch.optim.SGD(plain.parameters(), LR, MOMENTUM, weight_decay=DECAY),
    )
    joint.strategy.train_epoch(joint, batches())
    for name, value in plain.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, rtol=1e-13, atol=1e-15)


def test_impossible_values_are_refused():
    with pytest.raises(UserError, match="auxiliary_weight"):
        exitkit.build_strategy("metagf", auxiliary_weight=-0.1)
    with pytest.raises(UserError, match="fusion_lr"):
        exitkit.build_strategy("metagf", fusion_lr=0)
