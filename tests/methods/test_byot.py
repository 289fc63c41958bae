"""Be Your Own Teacher: both variants by hand, the norm's gradient, the maps of the hints, and its limits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import exitkit
from exitkit.errors import UserError
from exitkit.networks import Head, MultiExitNetwork

from toy import batches, chain, sgd

WIDTHS = (3, 5, 6, 4)


def uneven(widths=WIDTHS, classes=4, seed=0):
    """A chain whose exits have features of different widths."""
    torch.manual_seed(seed)
    stages = [
        nn.Sequential(nn.Flatten(), nn.Linear(before, width), nn.Tanh())
        for before, width in zip((4, *widths), widths, strict=False)
    ]
    heads = [Head(nn.Identity(), nn.Linear(width, classes)) for width in widths]
    return MultiExitNetwork(stages, heads, (1, 2, 2), classes).double()


def run_of(name="byot", network=None, **settings):
    network = network or chain(4)
    torch.manual_seed(7)
    return exitkit.Run.local(network, exitkit.build_strategy(name, **settings), sgd(network))


def adapter(run, index):
    return run.auxiliaries["hints"].module[index]


@pytest.mark.parametrize("network", [chain, uneven])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_every_exits_mean_loss_by_hand(network, variant):
    run = run_of(network=network() if network is uneven else chain(4), variant=variant, hint_weight=0.05)
    images, labels = batches()[0]
    z, _, f, *_ = run.forward(images)
    for k, loss in enumerate(run.losses((images, labels))):
        expected = F.cross_entropy(z[k], labels)
        if k < 3:
            p = (z[3] / 3).softmax(1)
            soft = F.cross_entropy(z[k] / 3, p)
            if variant == "paper":
                soft = soft + (p * p.log()).sum(1).mean()
            expected = 0.7 * expected + 0.3 * soft
            if variant == "paper":
                expected = expected + 0.05 * sum(row @ row for row in adapter(run, k)(f[k]) - f[3]) / len(images)
            elif k < 2:  # the released code leaves the second deepest exit out
                expected = expected + 0.05 * torch.linalg.matrix_norm(adapter(run, k)(f[k]) - f[3])
        assert loss.mean().item() == pytest.approx(expected.item(), rel=1e-12), k


def test_maps_are_made_only_where_widths_differ_and_a_hint_is_asked_for():
    def kinds(run):
        return [type(layer).__name__ for layer in run.auxiliaries["hints"].module]

    assert kinds(run_of()) == ["Identity"] * 4
    assert kinds(run_of(network=uneven())) == ["Linear"] * 3 + ["Identity"]
    assert kinds(run_of(network=uneven(), variant="released")) == ["Linear", "Linear", "Identity", "Identity"]
    run = run_of(network=uneven(), hint_weight=0.0)
    assert kinds(run) == ["Identity"] * 4 and len(run.parameters) == len(list(run.network.parameters()))
    run = run_of(network=uneven())
    assert [tuple(adapter(run, k).weight.shape) for k in range(3)] == [(4, 3), (4, 5), (4, 6)]


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_last_exits_output_and_feature_get_no_gradient_from_the_others(variant):
    run = run_of(network=uneven(), variant=variant)
    outputs = run.forward(batches()[0][0])
    losses = run.objective(outputs, batches()[0])
    for k in range(3):
        held = torch.autograd.grad(
            losses[k].sum(), (outputs.logits[3], outputs.embeddings[3]), retain_graph=True, allow_unused=True
        )
        assert held == (None, None)
        hinted = torch.autograd.grad(losses[k].sum(), outputs.embeddings[k], retain_graph=True)[0]
        assert hinted.abs().sum() > 0


def test_the_norms_gradient_has_length_one_and_is_zero_where_features_agree():
    run = run_of(variant="released", alpha=0.0, hint_weight=1.0)
    outputs = run.forward(batches()[0][0])
    label_loss = F.cross_entropy(outputs.logits[0], batches()[0][1])
    whole, label_part = (
        torch.autograd.grad(loss, outputs.embeddings[0], retain_graph=True)[0]
        for loss in (run.objective(outputs, batches()[0])[0].mean(), label_loss)
    )
    distance = outputs.embeddings[0] - outputs.embeddings[3]
    assert torch.allclose(whole - label_part, distance / torch.linalg.matrix_norm(distance), rtol=1e-10)
    assert torch.linalg.matrix_norm(whole - label_part).item() == pytest.approx(1.0, rel=1e-12)
    same = outputs._replace(embeddings=(outputs.embeddings[3].detach().clone().requires_grad_(),) * 4)
    hints = run.strategy._hints(run, same, 0, batches()[0])
    assert not hints.any() and not torch.autograd.grad(hints.mean(), same.embeddings[0])[0].any()


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_hints_gradient_is_that_of_finite_differences(variant):
    run = run_of(network=uneven(), variant=variant, hint_weight=0.4)
    outputs, batch = run.forward(batches()[0][0]), batches()[0]
    weight, target = adapter(run, 0).weight, outputs.embeddings[3].detach()

    def released(matrix):
        distance = F.linear(outputs.embeddings[0].detach(), matrix, adapter(run, 0).bias.detach()) - target
        return torch.linalg.matrix_norm(distance) if variant == "released" else distance.square().sum() / len(distance)

    gradient = torch.autograd.grad(run.objective(outputs, batch)[0].mean(), weight)[0]
    for row, column in ((0, 0), (3, 2), (1, 1)):
        step = torch.zeros_like(weight)
        step[row, column] = 1e-6
        with torch.no_grad():
            difference = 0.4 * (released(weight + step) - released(weight - step)) / 2e-6
        assert gradient[row, column].item() == pytest.approx(difference.item(), rel=1e-6, abs=1e-10)


def test_the_norm_does_not_depend_on_the_size_of_the_batch_as_a_mean_does():
    run = run_of(variant="released", alpha=0.0, hint_weight=1.0)
    images, labels = batches()[0]
    once = run.losses((images, labels))[0].mean() - F.cross_entropy(run.forward(images).logits[0], labels)
    doubled = (torch.cat([images, images]), torch.cat([labels, labels]))
    twice = run.losses(doubled)[0].mean() - F.cross_entropy(run.forward(images).logits[0], labels)
    assert twice.item() == pytest.approx(2**0.5 * once.item(), rel=1e-12)


def states(*runs, steps=3):
    for run in runs:
        for batch in batches(steps):
            run.train_step(batch)
    return [run.network.state_dict() for run in runs]


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_without_teacher_and_hints_or_with_one_exit_it_is_joint_training(variant):
    joint, plain = states(run_of("joint"), run_of(variant=variant, alpha=0.0, hint_weight=0.0))
    assert all(torch.allclose(plain[name], value, rtol=1e-13, atol=1e-16) for name, value in joint.items())
    joint, alone = states(run_of("joint", chain(1)), run_of(network=chain(1), variant=variant))
    assert all(torch.equal(alone[name], value) for name, value in joint.items())


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_without_hints_at_temperature_one_it_is_distillation_from_the_last_exit(variant):
    settings = {"temperature": 1.0, "hint_weight": 0.0, "alpha": 0.4}
    kd, byot = states(run_of("kd", weight=0.4, temperature=1.0), run_of(variant=variant, **settings))
    assert all(torch.allclose(byot[name], value, rtol=1e-11, atol=1e-14) for name, value in kd.items())


def test_two_exits_have_a_hint_in_the_paper_and_none_in_the_released_code():
    paper, released = (run_of(network=chain(2), variant=variant, alpha=0.0) for variant in ("paper", "released"))
    ce = [F.cross_entropy(z, batches()[0][1], reduction="none") for z in paper.forward(batches()[0][0]).logits]
    assert torch.allclose(released.losses(batches()[0])[0], ce[0], rtol=1e-14)
    assert (paper.losses(batches()[0])[0] > ce[0]).all()


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_a_resumed_run_ends_in_the_same_bits_with_its_maps(variant):
    run = run_of(network=uneven(), variant=variant)
    run.train_step(batches(2)[0])
    state = copy.deepcopy(run.state_dict())
    again = run_of(network=uneven(seed=3), variant=variant)
    again.load_state_dict(state)
    before = adapter(run, 0).weight.detach().clone()
    for each in (run, again):
        each.train_step(batches(2)[1])
    assert not torch.equal(adapter(run, 0).weight, before)
    for part in ("network", "auxiliaries"):
        ours, theirs = run.state_dict()[part], again.state_dict()[part]
        ours, theirs = (each.get("hints", {}).get("module", each) for each in (ours, theirs))
        assert ours.keys() == theirs.keys() and all(torch.equal(theirs[name], value) for name, value in ours.items())


@pytest.mark.parametrize("partner", ["ge", "boostnet", "pcgrad", "separate"])
@pytest.mark.parametrize("network", [lambda: chain(3), lambda: uneven((3, 5, 4))])
def test_it_composes(partner, network):
    network = network()
    for phase in exitkit.build_strategy(f"{partner}+byot").phases(2, 3):
        run = exitkit.Run.local(network, phase.strategy, sgd(network))
        run.train_epoch(batches(2))
    assert all(value.isfinite().all() for value in network.state_dict().values())


def test_the_norm_is_the_same_in_forward_mode_and_backward():
    run = run_of(variant="released", hint_weight=1.0)
    batch, named = batches()[0], dict(run.network.named_parameters())
    direction = {name: torch.randn_like(value) for name, value in named.items()}
    tangents = run.loss_tangents(batch, direction)
    for loss, tangent in zip(run.losses(batch), tangents, strict=True):
        found = torch.autograd.grad(loss.mean(), list(named.values()), retain_graph=True, allow_unused=True)
        product = sum((g * direction[name]).sum() for name, g in zip(named, found, strict=True) if g is not None)
        assert tangent.mean().item() == pytest.approx(product.item(), rel=1e-10)


def test_impossible_values_are_refused():
    for settings in ({"alpha": 1.5}, {"temperature": 0.0}, {"hint_weight": -0.1}):
        with pytest.raises(UserError, match=next(iter(settings))):
            exitkit.build_strategy("byot", **settings)


@pytest.mark.parametrize("method", ["l2w+byot", "byot+l2w", "metagf+byot", "byot+metagf"])
def test_maps_beside_an_update_of_the_network_alone_are_refused_before_training(method):
    with pytest.raises(UserError, match=r"can't be combined .*\(hints\)"):
        run_of(method, uneven())
    run_of("l2w+byot").train_step(batches(1)[0])  # features of one width need no maps
