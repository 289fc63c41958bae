"""Gradient aggregators: closed forms for two exits, a known Pareto set, and what becomes of a step."""

import pytest
import torch

import exitkit
from exitkit.errors import UserError
from exitkit.plugins import load, registered

from toy import batches, chain, exit_gradients, sgd

NAMES = [name for name in registered("method") if registered("method")[name].module.endswith("aggregators")]


def run_of(name, network=None, **settings):
    network = network or chain(2)
    return exitkit.Run.local(network, exitkit.build_strategy(name, **settings), sgd(network))


def conflicting(seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    first, noise = torch.randn(2, size, generator=generator, dtype=torch.float64)
    return torch.stack([first, 0.5 * noise - 0.7 * first])


def combined(name, matrix, **settings):
    run = run_of(name, **settings)
    return run.strategy.combine(run, matrix)


def test_all_that_the_issue_of_conflicting_gradients_has_brought_forth_are_here():
    assert set(NAMES) >= {"pcgrad", "cagrad", "mgda", "imtlg", "nashmtl", "aligned", "graddrop", "upgrad", "dualproj"}
    assert all(load("method", name).slots == {"update"} for name in NAMES)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_pcgrad_takes_each_gradient_off_the_other(variant):
    a, b = matrix = conflicting()
    assert a @ b < 0
    by_hand = (a - (a @ b) / (b @ b) * b) + (b - (a @ b) / (a @ a) * a)
    assert torch.allclose(combined("pcgrad", matrix, variant=variant), by_hand, rtol=1e-12)
    agreeing = torch.stack([a, a + 0.1 * b])
    assert torch.allclose(combined("pcgrad", agreeing, variant=variant), agreeing.sum(0), rtol=1e-12)


def test_the_released_pcgrad_is_its_loop_over_all_originals():
    generator = torch.Generator().manual_seed(2)
    originals = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    run = run_of("pcgrad", variant="released")
    order, wanted = run.rng("aggregate"), torch.zeros(7, dtype=torch.float64)
    for row in originals:
        changed = row.clone()
        for other in torch.randperm(4, generator=order).tolist():
            product = changed @ originals[other]
            if product < 0:
                changed = changed - product / (originals[other] @ originals[other]) * originals[other]
        wanted += changed
    assert torch.allclose(run.strategy.combine(run, originals), wanted, rtol=1e-12)


@pytest.mark.parametrize("c", [0.0, 0.2, 0.5])
def test_cagrad_solves_its_dual(c):
    matrix = conflicting(1)
    mean = matrix.mean(0)
    share = torch.linspace(0, 1, 200001, dtype=torch.float64)
    mixed = share[:, None] * matrix[0] + (1 - share[:, None]) * matrix[1]
    value = mixed @ mean + c * mean.norm() * mixed.norm(dim=1)
    best = mixed[value.argmin()]
    wanted = mean + c * mean.norm() * best / best.norm()
    assert torch.allclose(combined("cagrad", matrix, c=c), wanted, rtol=1e-3, atol=1e-4)
    released = combined("cagrad", matrix, c=c, variant="released")
    assert torch.nn.functional.cosine_similarity(released * (1 + c**2), wanted, dim=0) > 0.99


def test_the_released_cagrad_is_its_recipe():
    matrix, c = conflicting(3), 0.5
    gram = matrix @ matrix.t()
    gram = gram / torch.stack([(gram[i, i] + 1e-4).sqrt() for i in range(2)]).mean() ** 2
    # Two weights that sum to 1: w = (s, 1 - s), scores (u, v); the gradient of the value by hand.
    scores, momentum, best = torch.zeros(2).double(), torch.zeros(2).double(), None
    middle = gram.mean(0)
    radius = c * (gram.mean() + 1e-4).sqrt()
    for _ in range(21):
        w = scores.exp() / scores.exp().sum()
        norm = (w @ gram @ w + 1e-4).sqrt()
        value = w @ middle + radius * norm
        if best is None or value < best[0]:
            best = (value, w, norm)
        slope = middle + radius * (gram @ w) / norm
        momentum = 0.5 * momentum + w * (slope - w @ slope)
        scores = scores - 25 * momentum
    _, w, norm = best
    wanted = (0.5 + radius / (norm + 1e-4) * w) @ matrix / (1 + c**2)
    assert torch.allclose(combined("cagrad", matrix, variant="released"), wanted, rtol=1e-9)


def test_mgda_is_the_shortest_vector_between_two():
    a, b = matrix = conflicting(4)
    share = ((b - a) @ b / ((a - b) @ (a - b))).clamp(0, 1)
    assert torch.allclose(combined("mgda", matrix), share * a + (1 - share) * b, rtol=1e-6)


def test_imtlg_projects_alike_on_both():
    direction = combined("imtlg", matrix := conflicting(5))
    products = matrix @ direction / matrix.norm(dim=1)
    assert products[0].item() == pytest.approx(products[1].item(), rel=1e-9)


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "mgda", "config", "imtlg"])
def test_directions_that_must_not_contradict_an_exit_do_not(name):
    for seed in range(5):
        matrix = conflicting(seed)
        assert (matrix @ combined(name, matrix) > -2e-3).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_aggregator_reaches_a_known_pareto_set(name):
    # |x - a|^2 and |x - b|^2 with a and b along one axis: the points between them are the Pareto set.
    a, b = torch.tensor([[-1.0, 0.5, 0.0], [1.0, 0.5, 0.0]], dtype=torch.float64)
    x = torch.tensor([0.6, -1.0, 2.0], dtype=torch.float64)
    run = run_of(name)
    for step in range(150):  # IMTL-G has no direction once it is there
        run.position.step = step
        matrix = torch.stack([2 * (x - a), 2 * (x - b)])
        x = x - 0.05 * run.strategy.combine(run, matrix)
    assert -1.02 <= x[0] <= 1.02
    assert (x[1:] - a[1:]).norm() < 0.05  # Nash-MTL steps are 1 long


@pytest.mark.parametrize("name", NAMES)
def test_a_step_moves_along_what_the_exits_gradients_give(name):
    network, batch = chain(3), batches(1)[0]
    named = dict(network.named_parameters())
    rows = [
        torch.cat([torch.zeros_like(named[key]).flatten() if g is None else g.flatten() for key, g in row.items()])
        for row in exit_gradients(network, *batch)
    ]
    run = run_of(name, network)
    direction = run.strategy.combine(run, torch.stack(rows))
    if name == "nashmtl":  # it remembers
        run.strategy.prepare(run)
    before = torch.cat([p.detach().flatten() for p in named.values()])
    run.strategy.train_step(run, batch)
    after = torch.cat([p.detach().flatten() for p in named.values()])
    readers = torch.cat(
        [
            torch.full((p.numel(),), float(3 - int(key.split(".")[1])) if "stages" in key else 1.0)
            for key, p in named.items()
        ]
    ).double()
    scale = 1 / readers if name == "pcgrad" else 1.0
    assert torch.allclose(before - after, 0.1 * (scale * direction + 1e-2 * before), rtol=1e-8, atol=1e-12)


def test_the_released_merge_is_the_mean_where_all_exits_share_and_the_sum_elsewhere():
    strategy = exitkit.build_strategy("pcgrad", variant="released")
    assert [strategy.scale(readers, 3) for readers in (1, 2, 3)] == [1.0, 1.0, 1 / 3]
    assert [exitkit.build_strategy("pcgrad").scale(readers, 3) for readers in (1, 2, 3)] == [1.0, 1 / 2, 1 / 3]


@pytest.mark.parametrize("name", ["pcgrad", "graddrop"])
def test_what_is_drawn_depends_on_the_place_alone(name):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    run = run_of(name)
    first = run.strategy.combine(run, matrix)
    state = torch.random.get_rng_state()
    assert torch.equal(run.strategy.combine(run, matrix), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    run.position.step = 1
    assert not torch.equal(run.strategy.combine(run, matrix), first)


def test_nash_mtl_goes_on_from_its_last_bargain():
    run, again = run_of("nashmtl"), run_of("nashmtl")
    steps = [conflicting(seed) for seed in range(4)]
    for matrix in steps[:2]:
        run.strategy.combine(run, matrix)
    again.strategy.load_state_dict(run.strategy.state_dict())
    for matrix in steps[2:]:
        assert torch.equal(run.strategy.combine(run, matrix), again.strategy.combine(again, matrix))
    with pytest.raises(UserError, match="max_norm"):
        exitkit.build_strategy("nashmtl", max_norm=-1)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_exit_has_the_direction_of_its_gradient(name):
    network, batch = chain(1), batches(1)[0]
    gradient = torch.randn(1, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    run = run_of(name, network)
    direction = run.strategy.combine(run, gradient)
    length = {"cagrad": 1.5 * gradient.norm(), "nashmtl": 1.0}.get(name, gradient.norm())
    assert torch.allclose(direction, length * gradient[0] / gradient.norm(), rtol=1e-6)
    assert name != "nashmtl" or not run.strategy.combine(run, torch.zeros_like(gradient)).any()
    assert not run_of(name).strategy.combine(run, torch.zeros(2, gradient.numel()).to(gradient)).any()
    run.strategy.train_step(run, batch)
    for size in (0.0, 0.25, 4.0) if name == "nashmtl" else ():
        run = run_of(name, network, max_norm=size)
        expected = min(size, 1.0) if size else 1.0  # a = 1 / |g| solves G G^T a = 1 / a
        assert run.strategy.combine(run, gradient).norm().item() == pytest.approx(expected)


def test_exit_weights_scale_the_rows_and_a_zero_leaves_an_exit_out():
    network, batch = chain(3), batches(1)[0]
    run = run_of("mgda+joint", network, **{"joint.weights": (1.0, 0.0, 2.0)})
    head = network.heads[1].classify.weight.detach().clone()
    run.strategy.train_step(run, batch)
    assert torch.equal(network.heads[1].classify.weight, head)


def test_refusals():
    with pytest.raises(UserError, match="'update'"):
        exitkit.build_strategy("metagf+pcgrad")
    with pytest.raises(UserError, match="c is -1"):
        exitkit.build_strategy("cagrad", c=-1)


SIZES = {"cagrad": 1.5, "graddrop": 4, "config": 4, "nashmtl": None}


@pytest.mark.parametrize("name", NAMES)
def test_the_size_of_a_direction_is_the_documented_one_and_a_sum_on_request(name):
    gradient = torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    matrix = gradient.repeat(4, 1)
    for size in ("default", "sum"):
        strategy = exitkit.build_strategy(name, size=size)
        run = run_of(name, chain(4))
        ratio = (strategy.scale(4, 4) * strategy.combine(run, matrix)).norm() / gradient.norm()
        if SIZES.get(name, 1) is None:
            assert ratio * gradient.norm() <= 1 + 1e-6  # max_norm
        elif size == "default":
            assert ratio.item() == pytest.approx(SIZES.get(name, 1), rel=1e-5)
        else:
            assert ratio.item() == pytest.approx(6 if name == "cagrad" else 4, rel=1e-5)


def test_equal_gradients_summed_are_the_step_of_joint_training():
    ends = []
    for name, settings in (("joint", {}), ("upgrad", {"size": "sum"}), ("dualproj", {"size": "sum"})):
        network = chain(1)
        run = exitkit.Run.local(network, exitkit.build_strategy(name, **settings), sgd(network))
        run.train_step(batches(1)[0])
        ends.append(network.state_dict())
    for name, value in ends[0].items():
        assert all(torch.allclose(value, end[name], rtol=1e-6) for end in ends[1:]), name


def test_the_size_is_no_part_of_the_identity_unless_it_is_set():
    plain, summed = (exitkit.Recipe.make(method="upgrad", method_settings=s) for s in ({}, {"size": "sum"}))
    assert "size" not in plain.resolve().identity()["method_settings"]
    assert plain.resolve().id != summed.resolve().id
