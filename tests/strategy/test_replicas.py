"""Replicas side by side against the same passes one after the other, in float64."""

import copy
import warnings

import pytest
import torch
from torch import nn

import exitkit
from exitkit import Recipe, Run
from exitkit.engine.engine import Engine
from exitkit.errors import UserError
from exitkit.networks.cascade import Head, MultiExitNetwork
from exitkit.strategy import Replicas
from exitkit.strategy.base import weighted_sum

from toy import batches, chain, sgd

NETWORKS = ["msdnet-tiny", "ranet-tiny", "sdn-tiny", "attached"]


def build(name):
    torch.manual_seed(0)
    if name != "attached":
        return exitkit.build_network(name).double()
    body = [nn.Conv2d(1, 4, 3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 10)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", exitkit.errors.Note)
        return exitkit.attach_exits(nn.Sequential(*body), at=["2"], input_shape=(1, 16, 16)).double()


class Passes(list):
    """Batches that move the position and seed what is random by their place in the pass, as training's do."""

    run = None

    def __iter__(self):
        at = self.run.position
        at.steps, at.abreast = len(self), 1
        for at.step, batch in enumerate(super().__iter__()):
            torch.manual_seed(at.step)
            for group in self.run.optimizer.param_groups:
                group["lr"] = 0.05 / (1 + at.step)
            yield batch
        at.passes += at.abreast


def images(run, count=2, size=4):
    generator = torch.Generator().manual_seed(1)
    shape, classes = run.network.input_shape, run.network.num_classes
    made = Passes(
        (
            torch.randn(size, *shape, generator=generator, dtype=torch.float64),
            torch.randint(classes, (size,), generator=generator),
        )
        for _ in range(count)
    )
    made.run = run
    return made


def local(network, method="metagf", optimizer=None, **settings):
    torch.manual_seed(3)
    strategy = method if not isinstance(method, str) else exitkit.build_strategy(method, **settings)
    return Run.local(network, strategy, optimizer or sgd(network))


def same(one, other, tolerance=1e-12):
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name], value, rtol=tolerance, atol=tolerance) for name, value in other.items())


@pytest.mark.parametrize(("name", "nesterov"), list(zip(NETWORKS, [False, True, False, True], strict=True)))
def test_replicas_are_the_passes_one_after_the_other(name, nesterov):
    def fresh():
        network = build(name)
        return local(
            network, "ge", torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=0.01, nesterov=nesterov)
        )

    exits = fresh().network.num_exits
    emphasis = [[1.0 if exit == row else 0.1 + row for exit in range(exits)] for row in range(2)]
    run = fresh()
    before = copy.deepcopy(run.network.state_dict())
    replicas = Replicas(run, emphasis)
    for batch in images(run, 2):
        replicas.step(batch)
    assert same(run.network.state_dict(), before, 0) and not run.optimizer.state
    for row, state in zip(emphasis, replicas.states(), strict=True):
        alone = fresh()
        for batch in images(alone, 2):
            alone.step(weighted_sum(alone.losses(batch), row))
        assert same(alone.network.state_dict(), {key: state[key] for key in before})
        assert not same(alone.network.state_dict(), before)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "metagf") for name in NETWORKS),
        ("msdnet-tiny", "boostnet+metagf"),
        ("sdn-tiny", "metagf+ofa"),
        ("sdn-tiny", "metagf+isc"),
        ("attached", "ge+metagf+kd"),
    ],
)
def test_epochs_of_metagf_side_by_side_are_those_in_turn(name, method):
    states = []
    for branches in ("one-by-one", "side-by-side"):
        run = local(build(name), method, branches=branches, label_smoothing=0.1)
        run.position.epochs = 2
        for run.position.epoch in range(2):
            run.strategy.train_epoch(run, images(run))
            run.position.passes = 0
        states.append({**run.network.state_dict(), "eta": run.auxiliaries["fusion"].module.eta.detach()})
    assert same(*states)
    assert not torch.equal(states[0]["eta"], torch.ones_like(states[0]["eta"]))


@pytest.mark.parametrize("variant", ["released", "released-channel"])
def test_released_drivers_go_side_by_side_where_nothing_leaks(variant):
    with pytest.raises(UserError, match=f"variant={variant} keeps momentum .* expected branches=one-by-one"):
        exitkit.build_strategy("metagf", variant=variant, branches="side-by-side")
    states = []
    for branches in ("one-by-one", "side-by-side"):
        run = local(chain(3, batchnorm=True), variant=variant, clean=True, branches=branches)
        run.strategy.train_epoch(run, batches())
        states.append(run.network.state_dict())
    assert same(*states)


class Drawn(exitkit.TrainingStrategy):
    """Exit weights that are drawn anew in every step of every pass."""

    slots = frozenset({"exit weights"})

    def exit_weights(self, run):
        return (0.5 + torch.rand(run.network.num_exits, generator=run.rng("exits"))).tolist()


def test_each_replica_draws_what_its_own_pass_would_draw():
    from exitkit.strategy.composition import Composition

    states = []
    for branches in ("one-by-one", "side-by-side"):
        parts = {"metagf": exitkit.build_strategy("metagf", branches=branches), "drawn": Drawn()}
        run = local(chain(3, batchnorm=True), Composition(parts))
        run.strategy.train_epoch(run, images(run))
        assert run.position.passes == run.strategy.passes(3) == 4
        states.append(run.network.state_dict())
    assert same(*states)


def test_a_killed_epoch_goes_on_after_its_branches_in_either_form():
    whole = local(chain(3, batchnorm=True), branches="side-by-side")
    saved = []
    whole.on_checkpoint = lambda: saved.append(copy.deepcopy(whole.state_dict()))
    whole.strategy.train_epoch(whole, batches())
    assert len(saved) == 1  # one for all branches
    turns = local(chain(3, batchnorm=True))
    turns.on_checkpoint = lambda: saved.append(copy.deepcopy(turns.state_dict()))
    turns.strategy.train_epoch(turns, batches())
    for state, branches, tolerance in [(saved[0], "side-by-side", 0), (saved[1], "side-by-side", 1e-12)]:
        resumed = local(chain(3, batchnorm=True, seed=5), branches=branches)
        resumed.load_state_dict(state)
        resumed.strategy.train_epoch(resumed, batches())
        assert same(resumed.network.state_dict(), whole.network.state_dict(), tolerance)


def test_the_form_is_no_part_of_what_a_run_is_and_progress_goes_on(tmp_path):
    def recipe(method, **settings):
        return Recipe.make(method=method, method_settings=settings, epochs=1, batch_size=512, lr=0.001).resolve()

    for method, field in (("metagf", "branches"), ("ge+metagf", "metagf.branches"), ("ge+metagf", "branches")):
        assert recipe(method, **{field: "side-by-side"}).id == recipe(method).id
    seen = []
    run = exitkit.train(recipe("metagf", branches="side-by-side"), tmp_path, report=seen.append)
    assert run.finished and run.recipe.method_settings["branches"] == "side-by-side"
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1


def test_what_would_not_be_the_same_is_refused_in_one_line():
    network = chain(2)
    with pytest.raises(UserError, match="side by side does not support Adam; expected SGD"):
        local(network, branches="side-by-side", optimizer=torch.optim.Adam(network.parameters()))
    with pytest.raises(UserError, match="fp16"):
        strategy = exitkit.build_strategy("metagf", branches="side-by-side")
        strategy.prepare(Run(network, strategy, sgd(network), Engine(torch.device("cpu"), "fp16")))
    with pytest.raises(UserError, match="side by side does not support AdaLoss; expected one-by-one"):
        local(network, "metagf+adaloss", branches="side-by-side")
    with pytest.raises(UserError, match="exit 1 has the weight zero in some replicas"):
        local(network, branches="side-by-side", auxiliary_weight=0)
    with pytest.raises(UserError, match="the weights of all exits are zero"):
        Replicas(local(network, "joint"), [[0.0, 0.0]])


class Undecided(nn.Module):
    """A layer whose way depends on what it reads."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_network_that_decides_by_its_data_is_refused_before_training():
    stage = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), Undecided())
    network = MultiExitNetwork([stage], [Head(nn.Identity(), nn.Linear(5, 4))], (1, 2, 2), 4).double()
    with pytest.raises(UserError, match=r"data-dependent control flow\); expected one-by-one") as error:
        local(network, branches="side-by-side")
    assert "\n" not in str(error.value)
