"""L2W-DEN: its meta-gradient against differentiating through the whole step, its weights, its allocation."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import exitkit
from exitkit.benchmarks.speed.plain import DoubleBackward
from exitkit.data.base import Batch
from exitkit.errors import Note, UserError
from exitkit.inference.thresholds import leave_at, thresholds
from exitkit.methods.allocation import allocate
from exitkit.strategy import Composition
from exitkit.strategy.functional import pseudo_step

from toy import batches, chain, sgd


def run_of(network, optimizer=None, gradient="forward", **settings):
    strategy = exitkit.build_strategy("l2w", **settings) if gradient == "forward" else DoubleBackward(**settings)
    return exitkit.Run.local(network, strategy, optimizer or sgd(network))


def side_gradients(run, batch):
    """The gradient that the weight prediction network's optimiser gets at the first half's meta step."""
    seen = []
    side = run.auxiliaries["weights"]
    step = side.step

    def noted(loss, half):
        parameters = list(side.module.parameters())
        seen.append(torch.autograd.grad(loss, parameters, retain_graph=True))
        step(loss, half)

    side.step = noted
    run.strategy.train_step(run, batch)
    return seen


def through_everything(network, optimizer, side, batch, settings):
    """The same by plain autograd through loss, weights, step of SGD, meta half and its allocation, in one graph."""
    x, y = batch
    train, meta = (x[::2], y[::2]), (x[1::2], y[1::2])
    named = dict(network.named_parameters())
    buffers = {name: value.clone() for name, value in network.named_buffers()}

    def losses(parameters, half):
        outputs = functional_call(network, {**parameters, **{k: v.clone() for k, v in buffers.items()}}, (half[0],))
        return torch.stack([F.cross_entropy(z, half[1], reduction="none") for z in outputs.logits], 1), outputs

    table, outputs = losses(named, train)
    seen = table.detach()
    if settings["inputs"] != "loss":
        sure = torch.stack([z.detach().softmax(1).amax(1) for z in outputs.logits], 1)
        seen = sure if settings["inputs"] == "confidence" else torch.cat([seen, sure], 1)
    guess = side.module(seen)
    mean = {"exits": guess.mean(1, keepdim=True), "samples": guess.mean(0, keepdim=True), "all": guess.mean()}
    weights = 1 + 0.8 * (guess - mean[settings["normalise"]])
    gradients = torch.autograd.grad((weights * table).mean(0).sum(), list(named.values()), create_graph=True)
    group = optimizer.param_groups[0]
    moved = {}
    for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer", 0)
        moved[name] = parameter - group["lr"] * (
            group["momentum"] * buffer + gradient + group["weight_decay"] * parameter
        )
    table, outputs = losses(moved, meta)
    if settings["objective"] == "vanilla":
        wanted = table.mean(0).sum()
    else:
        wanted, free = 0.0, set(range(len(table)))
        shares = [0.75**k for k in range(1, 4)]
        for k, logits in enumerate(outputs.logits):
            count = len(free) if k == 2 else int(len(table) * shares[k] / sum(shares))
            order = sorted(free, key=lambda i, z=logits: -float(z[i].detach().softmax(0).max()))
            chosen = order[:count]
            free -= set(chosen)
            wanted = wanted + (table[chosen, k].mean() if chosen else 0)
    return torch.autograd.grad(wanted, list(side.module.parameters()))


CHOICES = list(
    itertools.product(
        ["forward", "double"], ["loss", "confidence", "both"], ["exits", "samples", "all"], ["allocated", "vanilla"]
    )
)


@pytest.mark.parametrize(("gradient", "inputs", "normalise", "objective"), CHOICES)
def test_the_meta_gradient_is_that_of_the_whole_step(gradient, inputs, normalise, objective):
    settings = {"inputs": inputs, "normalise": normalise, "objective": objective}
    network = chain(batchnorm=True)
    run = run_of(network, gradient=gradient, **settings)
    run.strategy.train_step(run, batches(1, size=9, seed=8)[0])  # momentum is there now
    batch = batches(1, size=13)[0]
    expected = through_everything(network, run.optimizer, run.auxiliaries["weights"], batch, settings)
    found = side_gradients(run, batch)[0]
    for theirs, ours in zip(expected, found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("method", ["l2w+ge", "l2w+boostnet", "l2w+ofa", "l2w+isc"])
def test_both_forms_agree_in_compositions(method):
    ends = []
    for gradient in ("forward", "double"):
        network = chain(batchnorm=True)
        torch.manual_seed(4)
        strategy = exitkit.build_strategy(method, meta_lr=0.1)
        if gradient == "double":
            strategy = Composition(strategy.parts | {"l2w": DoubleBackward(meta_lr=0.1)})
        run = exitkit.Run.local(network, strategy, sgd(network))
        strategy.train_epoch(run, batches(4, size=10))
        ends.append(network.state_dict() | run.auxiliaries["weights"].module.state_dict())
    for name, value in ends[0].items():
        assert torch.allclose(value, ends[1][name], rtol=1e-9, atol=1e-11), name


def test_a_real_step_is_sgd_on_the_weighed_losses_of_each_half_in_turn():
    network, (x, y) = chain(), batches(1, size=8)[0]
    run = run_of(network, weights="frozen")
    twin = chain()
    optimizer = sgd(twin)
    side = run.auxiliaries["weights"].module
    for half in (slice(0, None, 2), slice(1, None, 2)):
        losses = torch.stack([F.cross_entropy(z, y[half], reduction="none") for z in twin(x[half]).logits], 1)
        guess = side(losses.detach()).detach()
        weights = 1 + 0.8 * (guess - guess.mean(1, keepdim=True))
        assert torch.allclose(weights.mean(1), torch.ones(4, dtype=torch.float64), rtol=1e-14)
        optimizer.zero_grad()
        (weights * losses).mean(0).sum().backward()
        optimizer.step()
    run.strategy.train_step(run, (x, y))
    for name, value in network.state_dict().items():
        assert torch.allclose(value, twin.state_dict()[name], rtol=1e-12), name


def test_fixed_weights_are_joint_training_on_half_batches_and_a_small_batch_is_one_step():
    network, twin = chain(), chain()
    run = run_of(network, weights="fixed")
    joint = exitkit.Run.local(twin, exitkit.build_strategy("joint"), sgd(twin))
    x, y = batches(1, size=8)[0]
    run.strategy.train_step(run, (x, y))
    for half in (slice(0, None, 2), slice(1, None, 2)):
        joint.strategy.train_step(joint, (x[half], y[half]))
    few = batches(1, size=3)[0]
    run.strategy.train_step(run, few)
    joint.strategy.train_step(joint, few)
    for name, value in network.state_dict().items():
        assert torch.allclose(value, twin.state_dict()[name], rtol=1e-12), name


def test_allocation_instead_of_weighting_trains_each_exit_on_its_share():
    network, (x, y) = chain(), batches(1, size=20)[0]
    run = run_of(network, weights="allocated")
    with torch.no_grad():
        taken = allocate(torch.stack([z.softmax(1).amax(1) for z in network(x[::2]).logits], 1), 0.75)
    losses = [F.cross_entropy(z, y[::2], reduction="none") for z in network(x[::2]).logits]
    wanted = sum(loss[taken[:, k] > 0].mean() for k, loss in enumerate(losses))
    gradient = torch.autograd.grad(wanted, network.heads[1].classify.weight)[0]
    before = network.heads[1].classify.weight.detach().clone()
    halves = run.halves(Batch(x, y))
    run.strategy._real_step(run, halves[0], *run.losses_and_outputs(halves[0]))
    after = network.heads[1].classify.weight.detach()
    assert torch.allclose(before - after, 0.1 * (gradient + 1e-2 * before), rtol=1e-10)


@pytest.mark.parametrize(
    ("samples", "exits", "q"), [(64, 5, 0.75), (7, 3, 0.5), (3, 4, 0.9), (50, 2, 1.5), (9, 1, 0.7)]
)
def test_allocation_partitions_as_budgeted_inference_does(samples, exits, q):
    confidence = torch.rand(samples, exits, generator=torch.Generator().manual_seed(samples), dtype=torch.float64)
    taken = allocate(confidence, q)
    assert ((taken > 0).sum(1) == 1).all()
    shares = [q**k for k in range(1, exits + 1)]
    counts = [int(samples * share / sum(shares) + 1e-9) for share in shares[:-1]]
    sizes = (taken > 0).sum(0).tolist()
    assert sizes == [*counts, samples - sum(counts)]
    for k, size in enumerate(sizes):
        assert taken[:, k].mean().item() == pytest.approx(float(size > 0))
    if all(counts):
        limits = thresholds(confidence.numpy(), [counts])
        assert leave_at(confidence.numpy(), limits)[0].tolist() == taken.argmax(1).tolist()


def test_running_statistics_see_the_real_passes_alone():
    network, twin = chain(batchnorm=True), chain(batchnorm=True)
    for each, settings in ((network, {}), (twin, {"weights": "frozen"})):
        run = run_of(each, torch.optim.SGD(each.parameters(), 1e-12), **settings)
        run.strategy.train_step(run, batches(1, size=8)[0])
    for name, value in network.named_buffers():
        assert torch.allclose(value.double(), dict(twin.named_buffers())[name].double(), rtol=1e-9), name
        if "num_batches" in name:
            assert value == 2


def test_the_network_of_weights_is_updated_at_the_interval_and_by_the_cosine():
    network = chain()
    run = run_of(network, interval=3, meta_lr=0.01)
    run.position.steps, run.position.epochs = 7, 1
    changed = []
    for step, batch in enumerate(batches(7, size=8)):
        run.position.step = step
        before = [p.clone() for p in run.auxiliaries["weights"].module.parameters()]
        run.strategy.train_step(run, batch)
        after = run.auxiliaries["weights"].module.parameters()
        changed.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    assert changed == [True, False, False, True, False, False, True]
    rate = run.auxiliaries["weights"].optimizer.param_groups[0]["lr"]
    assert rate == pytest.approx(0.005 * (1 + torch.cos(torch.tensor(torch.pi * 6 / 7)).item()), rel=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "dampening": 0.3}]
)
def test_a_pseudo_step_is_where_the_optimiser_goes_and_its_slope_is_right(options):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(3)]
    optimizer = torch.optim.SGD(weights, 0.1, weight_decay=0.05, **options)
    names = {id(p): str(i) for i, p in enumerate(weights)}
    for _ in range(3):
        gradients = [torch.randn(3, dtype=torch.float64), None, torch.randn(3, dtype=torch.float64)]
        ahead = pseudo_step(optimizer, gradients, names)
        shifted = pseudo_step(optimizer, [None if g is None else g + 1 for g in gradients], names)
        for p, g in zip(weights, gradients, strict=True):
            p.grad = g
        optimizer.step()
        assert ahead.parameters.keys() == {"0", "2"}
        for name, value in ahead.parameters.items():
            assert torch.allclose(value, weights[int(name)], rtol=1e-13)
            assert torch.allclose(
                shifted.parameters[name] - value, torch.tensor(ahead.slopes[name]).double(), rtol=1e-6
            )


def test_a_frozen_network_can_be_that_of_an_earlier_run(tmp_path):
    short = {"epochs": 1, "batch_size": 256}
    first = exitkit.train({"method": "l2w", **short}, tmp_path)
    settings = {"weights": "frozen", "frozen_from": str(first.path)}
    second = exitkit.train({"method": "l2w", "method_settings": settings, **short, "seed": 1}, tmp_path)
    states = [torch.load(run.path / "checkpoint.pt")["auxiliaries"]["weights"]["module"] for run in (first, second)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    plain = exitkit.train({"method": "joint", **short}, tmp_path)
    for settings, reason in (
        ({"weights": "frozen", "frozen_from": str(plain.path)}, "has no weights network"),
        ({"weights": "frozen", "frozen_from": str(first.path), "hidden": 7}, "does not fit this run"),
        ({"frozen_from": str(first.path)}, "is for weights=frozen"),
    ):
        with pytest.raises(UserError, match=reason):
            exitkit.train({"method": "l2w", "method_settings": settings, **short}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refusals():
    network = chain()
    with pytest.raises(UserError, match="expected SGD"):
        run_of(network, torch.optim.Adam(network.parameters()))
    for field in ("epsilon", "q", "interval", "hidden", "meta_lr"):
        with pytest.raises(UserError, match=field):
            exitkit.build_strategy("l2w", **{field: 0})
    with pytest.raises(UserError, match="'update'"):
        exitkit.build_strategy("l2w+pcgrad")


def test_a_recipe_of_the_release_that_had_the_double_backward_is_still_read():
    assert exitkit.build_strategy("l2w", gradient="forward").settings() == exitkit.build_strategy("l2w").settings()
    with pytest.warns(Note, match="gradient=double of method l2w no longer exists"):
        exitkit.build_strategy("l2w", gradient="double")
