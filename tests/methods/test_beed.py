"""Exit-ensemble distillation: the ensemble, the coefficients and the hints by hand, and its limits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import exitkit
from exitkit.errors import UserError
from exitkit.networks import Head, MultiExitNetwork

from toy import batches, chain, sgd


def run_of(name="beed", network=None, **settings):
    network = network or chain(4)
    torch.manual_seed(7)
    return exitkit.Run.local(network, exitkit.build_strategy(name, **settings), sgd(network))


def uneven():
    torch.manual_seed(0)
    widths = (3, 5, 4)
    stages = [
        nn.Sequential(nn.Flatten(), nn.Linear(before, width), nn.Tanh())
        for before, width in zip((4, *widths), widths, strict=False)
    ]
    return MultiExitNetwork(stages, [Head(nn.Identity(), nn.Linear(w, 4)) for w in widths], (1, 2, 2), 4).double()


def maps(channels=(3, 3, 3)):
    """Heads that pool: their maps are [B, channels, 2, 2]."""
    torch.manual_seed(0)
    stages, heads, before = [], [], 1
    for count in channels:
        stages.append(nn.Sequential(nn.Conv2d(before, count, 1), nn.Tanh()))
        embed = nn.Sequential(nn.Conv2d(count, count, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        heads.append(Head(embed, nn.Linear(count, 4), before_pooling=1))
        before = count
    return MultiExitNetwork(stages, heads, (1, 2, 2), 4).double()


def ensemble(values, beta):
    return sum(beta**k * v for k, v in enumerate(values)) / sum(beta**k for k in range(len(values)))


def expected_losses(logits, features, labels, label_parts, teacher_parts, beta=1.6, temperature=3.0, hint=0.1):
    z, f = ensemble(logits, beta), ensemble(features, beta)
    losses = []
    for k, logit in enumerate(logits):
        p = (z / temperature).softmax(1)
        divergence = (p * (p.log() - (logit / temperature).log_softmax(1))).sum(1)
        label_loss = F.cross_entropy(logit, labels, reduction="none")
        distance = ((features[k] - f) ** 2).reshape(len(labels), -1).mean(1)
        losses.append(label_parts[k] * label_loss + teacher_parts[k] * temperature**2 * divergence + hint * distance)
    return losses


def test_the_coefficients_of_four_exits_are_the_released_ones_and_none_is_negative():
    strategy = exitkit.build_strategy("beed")
    assert strategy.coefficients(4) == pytest.approx([1.15**3, 1.15**2, 1.15, 1.0], rel=1e-15)
    assert [round(2 - a, 3) for a in strategy.coefficients(4)] == [0.479, 0.678, 0.85, 1.0]
    assert min(2 - a for a in exitkit.build_strategy("beed", alpha=1.25).coefficients(9)) > 0
    assert strategy.coefficients(1) == [1.0] and strategy.coefficients(2) == pytest.approx([1.15**3, 1.0])
    assert exitkit.build_strategy("beed", mode="eed").coefficients(3) == [1.0] * 3


@pytest.mark.parametrize("mode", ["beed", "eed"])
def test_every_exits_loss_by_hand(mode):
    run = run_of(mode=mode)
    images, labels = batches()[0]
    z, _, f, *_ = run.forward(images)
    teacher_parts = [1.15**3, 1.15**2, 1.15, 1.0] if mode == "beed" else [1.0] * 4
    label_parts = [2 - a for a in teacher_parts] if mode == "beed" else [1.0] * 4
    expected = expected_losses(z, f, labels, label_parts, teacher_parts)
    for loss, wanted in zip(run.losses((images, labels)), expected, strict=True):
        assert torch.allclose(loss, wanted, rtol=1e-11)


def test_with_alpha_one_beed_is_eed_bit_for_bit():
    losses = [run_of(**settings).losses(batches()[0]) for settings in ({"alpha": 1.0}, {"mode": "eed"})]
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


def test_the_ensemble_is_the_mean_for_beta_one_and_the_last_exit_for_a_large_beta():
    strategy = exitkit.build_strategy("beed", beta=1.0)
    values = list(torch.randn(4, 5, 3, dtype=torch.float64))
    assert torch.allclose(strategy._ensemble(values), torch.stack(values).mean(0), rtol=1e-14)
    for beta, index in ((1e150, -1), (1e-150, 0)):
        assert torch.allclose(exitkit.build_strategy("beed", beta=beta)._ensemble(values), values[index], rtol=1e-14)
    run = run_of(beta=1e150, hint_weight=0.0, mode="eed")
    images, labels = batches()[0]
    z = run.forward(images).logits
    losses = run.losses((images, labels))
    assert torch.allclose(losses[3], F.cross_entropy(z[3], labels, reduction="none"), rtol=1e-13)
    p = (z[3] / 3).softmax(1)
    taught = 9 * (p * (p.log() - (z[1] / 3).log_softmax(1))).sum(1)
    assert torch.allclose(losses[1], F.cross_entropy(z[1], labels, reduction="none") + taught, rtol=1e-12)


def test_no_gradient_passes_through_the_ensemble():
    run = run_of(network=maps())  # no stage reads what a head embeds
    outputs = run.forward(batches()[0][0])
    read = (*outputs.logits, *outputs.embeddings)
    for k, loss in enumerate(run.objective(outputs, batches()[0])):
        reached = torch.autograd.grad(loss.sum(), read, retain_graph=True, allow_unused=True)
        assert [place for place, gradient in enumerate(reached) if gradient is not None] == [k, 3 + k]


def test_the_gradients_of_both_terms_are_the_hand_derived_ones():
    # d/dz T^2 KL = T (softmax(z / T) - softmax(z_E / T)), d/df mean (f - f_E)^2 = 2 (f - f_E) / d.
    run = run_of(mode="eed")
    outputs = run.forward(batches()[0][0])
    images, labels = batches()[0]
    losses = run.objective(outputs, (images, labels))
    z, f = ensemble(outputs.logits, 1.6), ensemble(outputs.embeddings, 1.6)
    for k in range(4):
        found = torch.autograd.grad(losses[k].sum(), outputs.logits[k], retain_graph=True)[0]
        label_part = outputs.logits[k].softmax(1) - F.one_hot(labels, 4)
        assert torch.allclose(found, label_part + 3 * ((outputs.logits[k] / 3).softmax(1) - (z / 3).softmax(1)))
        hint = torch.autograd.grad(losses[k].sum(), outputs.embeddings[k], retain_graph=True)[0]
        hint = hint - found @ run.network.heads[k].classify.weight
        assert torch.allclose(hint, 0.1 * 2 * (outputs.embeddings[k] - f) / 5, rtol=1e-9, atol=1e-12)


def test_equal_features_have_no_hint():
    run = run_of()
    images, labels = batches()[0]
    outputs = run.forward(images)
    same = outputs._replace(embeddings=(outputs.embeddings[0],) * 4)
    without = run_of(hint_weight=0.0)
    for a, b in zip(run.objective(same, (images, labels)), without.losses((images, labels)), strict=True):
        assert torch.allclose(a, b, rtol=1e-13)


def test_features_of_other_widths_pass_maps_to_the_last_ones():
    run = run_of(network=uneven(), mode="eed")
    layers = run.auxiliaries["hints"].module
    assert [tuple(layer.weight.shape) for layer in layers[:2]] == [(4, 3), (4, 5)] and type(layers[2]) is nn.Identity
    images, labels = batches()[0]
    z, _, f, *_ = run.forward(images)
    mapped = [layer(feature) for layer, feature in zip(layers, f, strict=True)]
    for loss, wanted in zip(
        run.losses((images, labels)), expected_losses(z, mapped, labels, [1.0] * 3, [1.0] * 3), strict=True
    ):
        assert torch.allclose(loss, wanted, rtol=1e-11)


def test_hints_between_maps_compare_every_pixel():
    run = run_of(network=maps(), hints="maps", mode="eed", hint_weight=0.7)
    images, labels = batches()[0]
    outputs = run.forward(images)
    assert all(feature.shape == (6, 3, 2, 2) for feature in outputs.features) and not run.auxiliaries
    wanted = expected_losses(outputs.logits, outputs.features, labels, [1.0] * 3, [1.0] * 3, hint=0.7)
    pooled = expected_losses(outputs.logits, outputs.embeddings, labels, [1.0] * 3, [1.0] * 3, hint=0.7)
    for loss, with_maps, with_vectors in zip(run.losses((images, labels)), wanted, pooled, strict=True):
        assert torch.allclose(loss, with_maps, rtol=1e-11) and (loss > with_vectors).all()


@pytest.mark.parametrize("backbone", ["msdnet-cifar-lg4", "sdn-mobilenet"])
def test_the_maps_of_a_head_are_those_that_it_pools(backbone):
    network = exitkit.build_network(backbone, num_classes=5)
    for head in network.heads:
        pools = [isinstance(layer, nn.AdaptiveAvgPool2d) for layer in head.embed]
        assert not any(pools) or head.before_pooling == pools.index(True)


def test_maps_of_different_shapes_are_refused():
    run = run_of(network=maps((3, 3, 5)), hints="maps")
    with pytest.raises(UserError, match=r"hints=maps needs maps of the same shape.*3x2x2, 5x2x2; use hints=pooled"):
        run.losses(batches()[0])
    run_of(network=maps((3, 3, 5)), hints="maps", hint_weight=0.0).losses(batches()[0])


def test_with_one_exit_eed_is_joint_training_and_two_exits_are_the_formula():
    joint, alone = run_of("joint", chain(1)), run_of(network=chain(1))
    for run in (joint, alone):
        run.train_step(batches()[0])
    for name, value in joint.network.state_dict().items():
        assert torch.allclose(alone.network.state_dict()[name], value, rtol=1e-13, atol=1e-16)
    run = run_of(network=chain(2))
    images, labels = batches()[0]
    z, _, f, *_ = run.forward(images)
    expected = expected_losses(z, f, labels, [2 - 1.15**3, 1.0], [1.15**3, 1.0])
    for loss, wanted in zip(run.losses((images, labels)), expected, strict=True):
        assert torch.allclose(loss, wanted, rtol=1e-11)


@pytest.mark.parametrize(("network", "settings"), [(uneven, {}), (maps, {"hints": "maps"})])
def test_a_resumed_run_ends_in_the_same_bits(network, settings):
    run = run_of(network=network(), **settings)
    run.train_step(batches(2)[0])
    state = copy.deepcopy(run.state_dict())
    again = run_of(network=network(), **settings)
    again.load_state_dict(state)
    for each in (run, again):
        each.train_step(batches(2)[1])
    for ours, theirs in zip(run.parameters, again.parameters, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("partner", ["ge", "boostnet", "pcgrad", "l2w", "metagf", "separate"])
def test_it_composes(partner):
    network = chain(3)
    for phase in exitkit.build_strategy(f"{partner}+beed").phases(2, 3):
        run = exitkit.Run.local(network, phase.strategy, sgd(network))
        run.train_epoch(batches(2))
    assert all(value.isfinite().all() for value in network.state_dict().values())


def test_impossible_values_are_refused():
    refused = [{"alpha": 1.3}, {"alpha": 0.0}, {"beta": 0.0}, {"temperature": -1.0}, {"hint_weight": -0.1}]
    for settings in refused:
        with pytest.raises(UserError, match=next(iter(settings))):
            exitkit.build_strategy("beed", **settings)
