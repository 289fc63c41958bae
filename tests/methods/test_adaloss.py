"""AdaLoss: its weights by hand, the geometric mean whose gradient it follows, its limits, and its state."""

import copy
import math

import pytest
import torch

import exitkit
from exitkit.errors import UserError
from exitkit.methods.adaloss import balanced
from exitkit.strategy import Branches

from toy import batches, chain, sgd


def run_of(name="adaloss", exits=3, **settings):
    network = chain(exits)
    return exitkit.Run.local(network, exitkit.build_strategy(name, **settings), sgd(network))


def means(run, batch):
    return torch.stack([loss.mean() for loss in run.objective(run.forward(batch[0]), batch)]).detach()


def test_the_weights_by_hand():
    losses = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    assert balanced(losses, 0.0, 0.0).tolist() == pytest.approx([0.25, 0.5, 1.0], rel=1e-7)
    assert balanced(losses, 0.1, 0.0).tolist() == pytest.approx([0.325, 0.55, 1.0], rel=1e-7)
    # 1 is added to the last exit's weight, where the largest is 1, and all are scaled again.
    assert balanced(losses, 0.1, 1.0).tolist() == pytest.approx([0.2125, 0.325, 1.0], rel=1e-7)
    assert balanced(losses.flip(0), 0.0, 1.0).tolist() == pytest.approx([0.8, 0.4, 1.0], rel=1e-7)
    assert balanced(torch.zeros(3), 0.0, 0.0).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("seed", range(5))
def test_the_weights_lie_between_gamma_and_one_whatever_the_losses(seed):
    losses = torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 8
    for gamma, extra in ((0.0, 0.0), (0.07, 1.0), (0.5, 3.0)):
        weights = balanced(losses, gamma, extra)
        assert weights.max().item() == pytest.approx(1.0) and weights.min() >= gamma


def test_the_running_means_and_the_period_step_by_step():
    run = run_of(ema=0.75, gamma=0.2, period=2)
    expected, weights = None, [1.0, 1.0, 1.0]
    for step, batch in enumerate(batches(6)):
        seen = means(run, batch)
        if step in (2, 4):  # after the second and the fourth step: from the losses before this one
            weights = balanced(expected, 0.2, 0.0).tolist()
        expected = seen if expected is None else 0.75 * expected + 0.25 * seen
        run.train_step(batch)
        assert run.weights() == pytest.approx(weights, rel=1e-12)
        assert torch.allclose(run.strategy.state_dict()["means"], expected, rtol=1e-12)


def test_its_gradient_is_that_of_the_geometric_mean_of_the_losses():
    run = run_of(ema=0.0, gamma=0.0, period=1)
    batch = batches()[0]
    run.losses(batch)
    losses = torch.stack([loss.mean() for loss in run.losses(batch)])
    adaptive = torch.autograd.grad((losses * losses.new_tensor(run.weights())).sum(), run.parameters, retain_graph=True)
    logarithm = torch.autograd.grad(losses.log().sum(), run.parameters)
    for ours, expected in zip(adaptive, logarithm, strict=True):
        assert torch.allclose(ours, losses.min() * expected, rtol=1e-6, atol=1e-12)


def test_a_loss_in_another_unit_counts_as_much():
    # Up to the largest weight being 1, w_k L_k does not change as one exit's loss is multiplied by a constant.
    losses = torch.tensor([1.7, 0.9, 1.2], dtype=torch.float64)
    scaled = losses * torch.tensor([1.0, 5.0, 1.0])
    shares = [values * balanced(values, 0.0, 0.0) for values in (losses, scaled)]
    assert all(torch.allclose(share, share[0].expand(3), rtol=1e-6) for share in shares)


@pytest.mark.parametrize("exits", [1, 3])
def test_with_gamma_one_and_with_a_single_exit_it_is_joint_training_bit_for_bit(exits):
    ends = []
    for name, settings in (("joint", {}), ("adaloss", {"period": 1, "gamma": 1.0 if exits > 1 else 0.0})):
        run = run_of(name, exits, **settings)
        for batch in batches(4):
            run.train_step(batch)
        ends.append(run.network.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_losses_that_are_not_finite_stay_out():
    strategy = exitkit.build_strategy("adaloss", period=1)
    network = chain()
    run = exitkit.Run.local(network, strategy, sgd(network))
    good = [torch.full((6,), value, dtype=torch.float64) for value in (3.0, 2.0, 1.0)]
    bad = [good[0], torch.full((6,), float("inf"), dtype=torch.float64), good[2] * float("nan")]
    means = []
    for losses in (bad, good, bad, [2 * loss for loss in good]):
        strategy.observe(run, losses, batches()[0])
        means.append(strategy.state_dict()["means"].tolist())
        assert all(0 < weight <= 1 for weight in run.weights())
    assert all(map(math.isnan, means[0]))  # none yet
    assert means[1] == means[2] == [3.0, 2.0, 1.0]
    assert means[3] == pytest.approx([0.9 * 3 + 0.1 * 6, 0.9 * 2 + 0.1 * 4, 0.9 + 0.1 * 2])


@pytest.mark.parametrize("name", ["adaloss", "adaloss+ge+kd", "adaloss+pcgrad"])
def test_a_run_goes_on_to_the_same_bits(name):
    settings = {"period": 2, "ema": 0.5}
    run = run_of(name, **settings)
    data = batches(6)
    for batch in data[:3]:
        run.train_step(batch)
    state = copy.deepcopy(run.state_dict())
    again = run_of(name, **settings)
    again.load_state_dict(state)
    for batch in data[3:]:
        run.train_step(batch)
        again.train_step(batch)
    assert list(run.weights()) == list(again.weights()) != [1.0, 1.0, 1.0]
    for key, value in run.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[key])


def test_a_branch_has_the_weights_of_plain_training():
    run, alone, data = run_of("metagf+adaloss", period=1), run_of(period=1), batches(4)
    (ends,) = Branches().train(run, data, [[1.0, 1.0, 1.0]])
    for batch in data:
        alone.train_step(batch)
    for name, value in alone.network.named_parameters():
        assert torch.equal(ends[name], value)


def test_a_new_phase_begins_anew_and_the_weights_are_a_table():
    run = run_of(period=1)
    for batch in batches(3):
        run.train_step(batch)
    (table,) = run.strategy.learned(run)
    assert table.columns == ["exit 1", "exit 2", "exit 3"] and table.values == [list(run.weights())]
    run.strategy.prepare(run)
    assert list(run.weights()) == [1.0, 1.0, 1.0]


def test_impossible_values_are_refused():
    for settings in ({"ema": 1.0}, {"gamma": 1.5}, {"gamma": -0.1}, {"period": 0}, {"final_extra": -1.0}):
        with pytest.raises(UserError, match=next(iter(settings))):
            exitkit.build_strategy("adaloss", **settings)
    with pytest.raises(UserError, match="exit weights"):
        exitkit.build_strategy("adaloss+separate")
