"""Learned weights of dense distillation: the terms by hand, and the meta-gradient through the whole step."""

import copy
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import exitkit
from exitkit.errors import UserError
from exitkit.methods.hdkd import pupils

from toy import batches, chain, sgd


def run_of(name="hdkd", network=None, **settings):
    network = network or chain(3, batchnorm=True)
    torch.manual_seed(7)
    return exitkit.Run.local(network, exitkit.build_strategy(name, **settings), sgd(network))


def terms_of(logits, labels, temperature=1.0):
    """Every term [B] by (exit that learns, teacher or None for the label)."""
    terms = {}
    for i, z in enumerate(logits):
        terms[i, None] = F.cross_entropy(z, labels, reduction="none")
        for j in range(i + 1, len(logits)):
            p = (logits[j].detach() / temperature).softmax(1)
            terms[i, j] = temperature**2 * (p * (p.log() - (z / temperature).log_softmax(1))).sum(1)
    return terms


def eta_of(run):
    return next(run.auxiliaries["terms"].module.parameters())


def test_the_terms_are_in_order_and_their_number_is_k_plus_pairs():
    for exits in range(1, 6):
        assert len(pupils(exits)) == exits + len(list(combinations(range(exits), 2)))
    assert pupils(3) == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("learn", [False, True])
def test_every_exits_loss_by_hand(learn):
    run = run_of(network=chain(3), learn=learn, temperature=2.0)
    images, labels = batches()[0]
    weights = dict.fromkeys(terms_of(run.forward(images).logits, labels), 1.0)
    if learn:
        eta = torch.tensor([0.1, -0.4, 0.3, 0.0, 0.9, -1.0], dtype=torch.float64)
        with torch.no_grad():
            eta_of(run).copy_(eta)
        weights = dict(zip(weights, 6 * eta.exp() / eta.exp().sum(), strict=True))
    terms = terms_of(run.forward(images).logits, labels, 2.0)
    for i, loss in enumerate(run.losses((images, labels))):
        expected = sum(weights[key] * term for key, term in terms.items() if key[0] == i)
        assert torch.allclose(loss, expected, rtol=1e-11)


def test_constant_weights_have_the_gradient_of_all_later_exits_cross_entropies():
    run = run_of(network=chain(4), learn=False)
    images, labels = batches()[0]
    z = run.forward(images).logits
    total = sum(F.cross_entropy(logits, labels) for logits in z)
    total = total + sum(F.cross_entropy(z[i], z[j].detach().softmax(1)) for i, j in combinations(range(4), 2))
    expected = torch.autograd.grad(total, list(run.network.parameters()))
    run.backward(sum(loss.mean() for loss in run.losses((images, labels))))
    for parameter, gradient in zip(run.network.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-10, atol=1e-14)


def test_constant_weights_are_dense_distillation_of_kd():
    # kd gives each of the K (K - 1) / 2 pairs the weight 2 w / (K - 1).
    later = {"teachers": "later", "form": "cross-entropy", "temperature": 1.0, "weight": 1.5}
    ends = []
    for run in (run_of(network=chain(4), learn=False), run_of("kd", chain(4), **later)):
        for batch in batches(3):
            run.train_step(batch)
        ends.append(run.network.state_dict())
    assert all(torch.allclose(ends[1][name], value, rtol=1e-10, atol=1e-13) for name, value in ends[0].items())


@pytest.mark.parametrize("learn", [False, True])
def test_with_one_exit_it_is_joint_training(learn):
    joint, alone = run_of("joint", chain(1)), run_of(network=chain(1), learn=learn)
    for run in (joint, alone):
        for batch in batches(2):
            run.train_step(batch)
    assert all(torch.equal(alone.network.state_dict()[name], v) for name, v in joint.network.state_dict().items())


def through_everything(run, batch, factors):
    """dL_meta/deta of the first half by autograd through the step of SGD, in one graph."""
    (x, y), network = batch, run.network
    train, meta = (x[::2], y[::2]), (x[1::2], y[1::2])
    named = dict(network.named_parameters())
    buffers = {name: value.clone() for name, value in network.named_buffers()}

    def outputs(parameters, half):
        return functional_call(network, {**parameters, **{k: v.clone() for k, v in buffers.items()}}, (half[0],)).logits

    eta = eta_of(run).detach().clone().requires_grad_()
    r = len(eta) * eta.softmax(0)
    terms = terms_of(outputs(named, train), train[1])
    loss = sum(weight * factors[key[0]] * term.mean() for weight, (key, term) in zip(r, terms.items(), strict=True))
    gradients = torch.autograd.grad(loss, list(named.values()), create_graph=True)
    group, moved = run.optimizer.param_groups[0], {}
    for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
        buffer = run.optimizer.state.get(parameter, {}).get("momentum_buffer", 0)
        change = group["momentum"] * buffer + gradient + group["weight_decay"] * parameter
        moved[name] = parameter - group["lr"] * change
    wanted = sum(f * F.cross_entropy(z, meta[1]) for f, z in zip(factors, outputs(moved, meta), strict=True))
    return torch.autograd.grad(wanted, eta)[0]


@pytest.mark.parametrize(("method", "factors"), [("hdkd", (1.0, 1.0, 1.0)), ("joint+hdkd", (0.5, 2.0, 0.25))])
def test_the_meta_gradient_is_that_of_the_whole_step(method, factors):
    run = run_of(method, **({"weights": factors} if "joint" in method else {}))
    run.train_step(batches(1, size=9, seed=8)[0])  # momentum and weights other than 1 are there now
    with torch.no_grad():
        eta_of(run).add_(torch.linspace(-1, 1, 6))
    batch = batches(1, size=13)[0]
    expected = through_everything(run, batch, factors)
    side, found = run.auxiliaries["terms"], []
    step = side.step

    def noted(loss, half):
        found.append(torch.autograd.grad(loss, eta_of(run), retain_graph=True)[0])
        step(loss, half)

    side.step = noted
    run.train_step(batch)
    assert len(found) == 2 and expected.abs().max() > 1e-6
    assert torch.allclose(found[0], expected, rtol=1e-8, atol=1e-13)


def test_the_meta_gradient_is_that_of_finite_differences_of_the_meta_loss():
    run = run_of(network=chain(3))
    x, y = batches(1, size=12)[0]
    (train, meta), found = ((x[::2], y[::2]), (x[1::2], y[1::2])), []
    run.auxiliaries["terms"].step = lambda loss, half: found.append(torch.autograd.grad(loss, eta_of(run))[0])
    state = copy.deepcopy(run.network.state_dict())
    run.train_step((x, y))

    def meta_loss(eta):
        network = chain(3)
        network.load_state_dict(state)
        terms = terms_of(network(train[0]).logits, train[1])
        r = 6 * eta.softmax(0)
        sum(weight * term.mean() for weight, term in zip(r, terms.values(), strict=True)).backward()
        sgd(network).step()
        return sum(F.cross_entropy(z, meta[1]) for z in network(meta[0]).logits).item()

    for index in range(6):
        step = torch.zeros(6, dtype=torch.float64)
        step[index] = 1e-4
        difference = (meta_loss(step) - meta_loss(-step)) / 2e-4
        assert found[0][index].item() == pytest.approx(difference, rel=1e-4, abs=1e-9)


def test_a_real_step_is_sgd_on_the_new_weights_of_each_half_in_turn():
    run, twin = run_of(network=chain(3), meta_lr=0.2), chain(3)
    seen, optimizer = [], sgd(twin)
    side = run.auxiliaries["terms"]
    step = side.step

    def noted(loss, half):
        step(loss, half)
        seen.append(side.module().detach().clone())

    side.step = noted
    x, y = batches(1, size=8)[0]
    run.train_step((x, y))
    assert not torch.allclose(seen[0], seen[1])
    for weights, half in zip(seen, (slice(0, None, 2), slice(1, None, 2)), strict=True):
        assert weights.mean().item() == pytest.approx(1.0, rel=1e-12)
        terms = terms_of(twin(x[half]).logits, y[half])
        optimizer.zero_grad()
        sum(weight * term.mean() for weight, term in zip(weights, terms.values(), strict=True)).backward()
        optimizer.step()
    for name, value in run.network.state_dict().items():
        assert torch.allclose(value, twin.state_dict()[name], rtol=1e-11, atol=1e-14), name


def test_a_small_batch_is_one_step_and_leaves_the_weights():
    run, twin = run_of(network=chain(3)), run_of(network=chain(3), learn=False)
    few = batches(1, size=3)[0]
    for each in (run, twin):
        each.train_step(few)
    assert not eta_of(run).any()
    for name, value in run.network.state_dict().items():
        assert torch.allclose(value, twin.network.state_dict()[name], rtol=1e-13, atol=1e-16)


def test_the_learned_table_has_a_share_of_each_loss():
    run = run_of(meta_lr=0.1)
    run.train_step(batches(1, size=8)[0])
    (table,) = run.strategy.learned(run)
    shares = eta_of(run).detach().softmax(0).tolist()
    assert table.rows == ["exit 1", "exit 2", "exit 3"] and table.columns == ["label", "exit 2", "exit 3"]
    assert table.values == [shares[:3], [shares[3], None, shares[4]], [shares[5], None, None]]
    assert not run_of(learn=False).strategy.learned(run)


def test_a_resumed_run_ends_in_the_same_bits():
    run = run_of()
    run.train_step(batches(2, size=8)[0])
    state = copy.deepcopy(run.state_dict())
    again = run_of(network=chain(3, batchnorm=True, seed=5))
    again.load_state_dict(state)
    for each in (run, again):
        each.train_step(batches(2, size=8)[1])
    assert eta_of(run).any() and torch.equal(eta_of(run), eta_of(again))
    assert all(torch.equal(again.network.state_dict()[name], v) for name, v in run.network.state_dict().items())


@pytest.mark.parametrize("method", ["ge+hdkd", "boostnet+hdkd", "isc+hdkd", "separate+hdkd"])
def test_it_composes(method):
    network = chain(3)
    for phase in exitkit.build_strategy(method).phases(2, 3):
        run = exitkit.Run.local(network, phase.strategy, sgd(network))
        run.train_epoch(batches(2))
    assert all(value.isfinite().all() for value in network.state_dict().values())


def test_constant_weights_leave_the_update_to_a_partner_and_learned_ones_do_not():
    run = exitkit.Run.local(network := chain(3), exitkit.build_strategy("pcgrad+hdkd", learn=False), sgd(network))
    run.train_epoch(batches(2))
    for partner, slot in (("pcgrad", "update"), ("l2w", "update"), ("kd", "objective")):
        with pytest.raises(UserError, match=slot):
            exitkit.build_strategy(f"{partner}+hdkd")


def test_impossible_values_are_refused():
    for settings in ({"temperature": 0.0}, {"meta_lr": 0.0}, {"meta_lr": -1.0}):
        with pytest.raises(UserError, match=next(iter(settings))):
            exitkit.build_strategy("hdkd", **settings)
    network = chain(3)
    strategy = exitkit.build_strategy("hdkd")
    with pytest.raises(UserError, match="steps of the optimiser in advance, which Adam does not allow; expected SGD"):
        exitkit.Run.local(network, strategy, torch.optim.Adam(network.parameters()))
