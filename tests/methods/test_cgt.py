"""Confidence-gated training: gates and weights by hand, its limits, and what of an image reaches which exit."""

import pytest
import torch
import torch.nn.functional as F

import exitkit
from exitkit.data.base import Batch
from exitkit.errors import UserError
from exitkit.networks.cascade import Outputs
from exitkit.strategy import LocalBatch
from exitkit.training.probe import probe

from toy import batches, chain, sgd


def run_of(name="cgt", exits=3, epochs=1, **settings):
    network = chain(exits)
    return exitkit.Run.local(network, exitkit.build_strategy(name, **settings), sgd(network), epochs=epochs)


def weights_of(probabilities, labels, epoch=0, epochs=1, **settings):
    """W [B, K] for given probabilities, [B][K][C]."""
    table = torch.tensor(probabilities, dtype=torch.float64)
    run = run_of(exits=table.shape[1], epochs=epochs, **settings)
    run.position.epoch = epoch
    run.batch = LocalBatch.make(torch.zeros(len(labels), 1), torch.tensor(labels))
    logits = table.log().unbind(1)
    return run.strategy.sample_weights(run, [], Outputs(logits, logits, logits))


IMAGES = [
    [[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]],  # right with confidence at once
    [[0.3, 0.7], [0.6, 0.4], [0.9, 0.1]],  # wrong, then right
    [[0.3, 0.7], [0.2, 0.8], [0.1, 0.9]],  # always wrong
]


def test_the_hard_gate_by_hand():
    weights = weights_of(IMAGES, [0, 0, 0], epsilon=0.1)
    unnormalised = torch.tensor([[1.1, 0.1, 0.1], [1.1, 1.1, 0.1], [1.1, 1.1, 1.1]], dtype=torch.float64)
    assert torch.allclose(weights, unnormalised / unnormalised.sum(1, keepdim=True), rtol=1e-12)
    # At a threshold above 0.6, the second image is not confident at exit 2.
    weights = weights_of(IMAGES, [0, 0, 0], epsilon=0.0, threshold=0.65)
    expected = torch.tensor([[1, 0, 0], [1 / 3] * 3, [1 / 3] * 3], dtype=torch.float64)
    assert torch.allclose(weights, expected, rtol=1e-12)


def test_the_soft_gate_by_hand():
    weights = weights_of(IMAGES, [0, 0, 0], gate="soft", epsilon=0.0, sharpness=10.0, threshold=0.5)
    for row, image in zip(weights.tolist(), IMAGES, strict=True):
        passed = [1.0]
        for exit in image[:2]:
            passed.append(passed[-1] * (1 - 1 / (1 + pow(2.718281828459045, -10 * (exit[0] - 0.5)))))
        assert row == pytest.approx([value / sum(passed) for value in passed], rel=1e-9)


def test_a_published_soft_gate_hardly_depends_on_the_image():
    extremes = [[[1 - 1e-12, 1e-12], [0.5, 0.5]], [[1e-12, 1 - 1e-12], [0.5, 0.5]]]
    weights = weights_of(extremes, [0, 0], gate="soft", epsilon=0.0)
    gates = weights[:, 1] / weights[:, 0]
    assert gates.tolist() == pytest.approx([0.475, 0.711], abs=5e-4)


def test_a_steep_soft_gate_is_a_hard_gate_on_the_labels_probability():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(50, 4, 3, generator=generator).mul(2).softmax(2).tolist()
    labels = torch.randint(3, (50,), generator=generator).tolist()
    soft = weights_of(images, labels, gate="soft", sharpness=1e6, threshold=0.6)
    hard = weights_of(images, labels, gate="hard", threshold=0.6)
    assert torch.allclose(soft, hard, atol=1e-9)
    assert len(hard.unique(dim=0)) == 4  # images leave at each of the four exits


@pytest.mark.parametrize("gate", ["hard", "soft"])
@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("exits", [1, 2, 5])
def test_an_images_weights_sum_to_one(gate, variant, exits):
    run = run_of(exits=exits, gate=gate, variant=variant)
    run.train_step(batches()[0])
    losses, outputs = run.losses_and_outputs(run.batch)
    weights = run.strategy.sample_weights(run, losses, outputs)
    assert weights.shape == (6, exits) and not weights.requires_grad
    assert torch.allclose(weights.sum(1), torch.ones(6, dtype=torch.float64), rtol=1e-12)


def test_the_released_shares_move_from_early_to_late_exits():
    open_gates = {"threshold": 2.0, "epsilon": 0.0, "variant": "released", "epochs": 11}
    wrong = [[[0.5, 0.5]] * 4]
    for epoch, shares in ((0, [1, 0.7, 0.4, 0.1]), (5, [0.6, 0.6, 0.6, 0.55]), (10, [0.2, 0.5, 0.8, 1])):
        (row,) = weights_of(wrong, [0], epoch=epoch, **open_gates).tolist()
        assert row == pytest.approx([share / sum(shares) for share in shares], rel=1e-12)
    # With other numbers of exits, the first and the last value are the same and the others are equally spaced.
    (row,) = weights_of([[[0.5, 0.5]] * 5], [0], epoch=10, **open_gates).tolist()
    shares = [0.2, 0.4, 0.6, 0.8, 1.0]
    assert row == pytest.approx([share / sum(shares) for share in shares], rel=1e-12)


@pytest.mark.parametrize("scale", ["one", "exits"])
def test_with_open_gates_it_is_joint_training_with_fixed_weights(scale):
    gated = run_of(threshold=2.0, epsilon=0.0, variant="released", scale=scale, exits=4)
    factor = (4 if scale == "exits" else 1) / 2.2
    joint = run_of("joint", weights=tuple(factor * share for share in (1, 0.7, 0.4, 0.1)), exits=4)
    for run in (gated, joint):
        run.train_step(batches()[0])
    for name, value in joint.network.state_dict().items():
        assert torch.allclose(gated.network.state_dict()[name], value, rtol=1e-12, atol=1e-15), name


def test_no_gradient_passes_through_a_soft_gate():
    run = run_of(gate="soft", sharpness=10.0, epsilon=0.01)
    images, labels = batches()[0]
    before = [parameter.detach().clone() for parameter in run.parameters]
    logits = run.forward(images).logits
    passed, constants = torch.ones(6, dtype=torch.float64), []
    for output in logits:
        constants.append(passed + 0.01)
        of_label = output.detach().softmax(1)[torch.arange(6), labels]
        passed = passed * (1 - torch.sigmoid(10 * (of_label - 0.9)))
    total = sum(constants)
    loss = sum(
        (c / total * F.cross_entropy(z, labels, reduction="none")).mean()
        for c, z in zip(constants, logits, strict=True)
    )
    gradients = torch.autograd.grad(loss, run.parameters)
    run.train_step((images, labels))
    for start, gradient, parameter in zip(before, gradients, run.parameters, strict=True):
        assert torch.allclose(parameter, start - 0.1 * (gradient + 0.01 * start), rtol=1e-10, atol=1e-14)


def test_an_image_that_is_right_at_once_does_not_train_later_exits():
    network = chain()
    with torch.no_grad():
        network.heads[0].classify.weight.zero_()
        network.heads[0].classify.bias.copy_(torch.tensor([9.0, 0, 0, 0]))
    run = exitkit.Run.local(network, exitkit.build_strategy("cgt", epsilon=0.0), sgd(network, weight_decay=0.0))
    images, _ = batches()[0]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run.train_step((images, torch.zeros(6, dtype=torch.long)))
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    # (Its weights are zero, so that no gradient comes back to stage 1 either.)
    assert moved == {"heads.0.classify.weight", "heads.0.classify.bias"}


def test_an_exit_of_weight_zero_has_none_and_other_exit_weights_multiply():
    run = run_of("joint+cgt", **{"joint.weights": (0.0, 2.0, 1.0), "threshold": 2.0, "epsilon": 0.0})
    run.train_step(batches()[0])
    losses, outputs = run.losses_and_outputs(run.batch)
    weights = run.strategy.sample_weights(run, losses, outputs)
    assert torch.allclose(weights, torch.tensor([0, 2 / 3, 1 / 3], dtype=torch.float64).expand(6, 3))


def test_it_composes_and_its_weights_are_probed():
    run = run_of("cgt+kd+ge", gate="soft")
    run.train_epoch(batches())
    seen = probe(run, Batch(*batches(1, size=8, seed=4)[0]))["weights"]
    assert seen.shape == (8, 3) and torch.allclose(seen.sum(1), torch.ones(8))
    with pytest.raises(UserError, match="'update'"):
        exitkit.build_strategy("cgt+l2w")


def test_thresholds_follow_the_gate_and_impossible_values_are_refused():
    assert exitkit.build_strategy("cgt").threshold == 0.5
    assert exitkit.build_strategy("cgt", gate="soft").threshold == 0.9
    for settings in ({"threshold": -1.0}, {"sharpness": 0.0}, {"epsilon": -0.1}, {"gate": "firm"}):
        with pytest.raises(UserError, match=next(iter(settings))):
            exitkit.build_strategy("cgt", **settings)
