"""Joint training, composition and the slots."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import exitkit
from exitkit.errors import UserError
from exitkit.networks.cascade import LogitLink
from exitkit.plugins import registered
from exitkit.strategy.base import Phase, TrainingStrategy
from exitkit.strategy.composition import Composition

from toy import batches, chain, exit_gradients, sgd


def trained(name, network=None, **settings):
    network = network or chain()
    run = exitkit.Run.local(network, exitkit.build_strategy(name, **settings), sgd(network))
    run.strategy.train_epoch(run, batches())
    return network


def same(a, b):
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def test_a_joint_step_is_sgd_on_the_sum_of_the_mean_losses():
    network, (x, y) = chain(), batches(1)[0]
    gradients = exit_gradients(network, x, y)
    expected = {
        name: p.detach() - 0.1 * (sum(g[name] for g in gradients if g[name] is not None) + 1e-2 * p.detach())
        for name, p in network.named_parameters()
    }
    run = exitkit.Run.local(network, exitkit.build_strategy("joint"), sgd(network))
    run.strategy.train_step(run, (x, y))
    for name, parameter in network.named_parameters():
        assert torch.allclose(parameter, expected[name], rtol=1e-13, atol=1e-15)


def test_weights_of_joint_weigh_the_exits_and_a_zero_leaves_an_exit_out():
    network, (x, y) = chain(), batches(1)[0]
    gradients = exit_gradients(network, x, y)
    run = exitkit.Run.local(network, exitkit.build_strategy("joint", weights=(2.0, 0.0, 0.5)), sgd(network))
    run.backward(sum(w * loss.mean() for w, loss in zip(run.weights(), run.losses((x, y)), strict=True)))
    name = "stages.0.1.weight"
    assert torch.allclose(network.get_parameter(name).grad, 2 * gradients[0][name] + 0.5 * gradients[2][name])
    run.strategy.train_step(run, (x, y))
    assert network.heads[1].classify.weight.grad is None


def test_exit_gradients_add_up_to_the_joint_gradient_and_are_none_where_an_exit_does_not_read():
    network, batch = chain(), batches(1)[0]
    run = exitkit.Run.local(network, exitkit.build_strategy("joint"), sgd(network))
    rows = run.exit_gradients(run.losses(batch))
    expected = exit_gradients(network, *batch)
    for row, truth in zip(rows, expected, strict=True):
        for gradient, (name, value) in zip(row, truth.items(), strict=True):
            assert (gradient is None) == (value is None), name
            assert value is None or torch.allclose(gradient, value, rtol=1e-13)


def test_apply_makes_the_step_of_the_given_gradients():
    network, batch = chain(), batches(1)[0]
    run = exitkit.Run.local(network, exitkit.build_strategy("joint"), sgd(network))
    rows = run.exit_gradients(run.losses(batch))
    run.apply(
        [
            None if all(g is None for g in column) else sum(g for g in column if g is not None)
            for column in zip(*rows, strict=True)
        ]
    )
    other = chain()
    second = exitkit.Run.local(other, exitkit.build_strategy("joint"), sgd(other))
    second.strategy.train_step(second, batch)
    for name, value in network.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], rtol=1e-13, atol=1e-15)


def test_boostnet_is_gradient_equilibrium_and_its_link():
    assert same(trained("ge+boostnet"), trained("boostnet"))
    assert same(trained("joint+ge"), trained("ge"))
    assert same(trained("joint"), trained("joint", weights=(1.0, 1.0, 1.0)))


def test_metagf_composes_with_taps_and_links():
    network = trained("metagf+boostnet", chain(batchnorm=True), temperature=0.3)
    assert network.link.config[0] == (0.3, 0.3, 0.3) and len(network.taps) == 1
    assert not same(network, trained("metagf", chain(batchnorm=True)))


class Taking(LogitLink):
    """A link that is not BoostNet's."""


@dataclass(eq=False)
class Linked(TrainingStrategy):
    slots = frozenset({"logit link"})

    def adapt(self, network):
        network.set_link(Taking())


@dataclass(eq=False)
class Stepping(TrainingStrategy):
    slots = frozenset({"update"})

    def train_step(self, run, batch):
        raise AssertionError


@pytest.mark.parametrize(
    ("rival", "slot", "other"), [(Linked(), "logit link", "boostnet"), (Stepping(), "update", "metagf")]
)
def test_two_claims_on_one_slot_are_refused_by_name_and_slot(rival, slot, other):
    with pytest.raises(UserError) as refusal:
        Composition({other: exitkit.build_strategy(other), "rival": rival})
    assert other in str(refusal.value) and "rival" in str(refusal.value) and slot in str(refusal.value)


def test_a_network_takes_one_link():
    network = chain()
    exitkit.build_strategy("boostnet").adapt(network)
    exitkit.build_strategy("boostnet").adapt(network)  # the same once more changes nothing
    with pytest.raises(UserError, match="already has the logit link"):
        Linked().adapt(network)
    with pytest.raises(UserError, match="already has the logit link"):
        exitkit.build_strategy("boostnet", temperature=0.9).adapt(network)


def test_a_slot_that_there_is_not_is_refused_with_the_nearest():
    with pytest.raises(TypeError, match="unknown slot of Mistaken 'exit weight'; did you mean exit weights"):

        class Mistaken(TrainingStrategy):
            slots = frozenset({"exit weight"})


@pytest.mark.parametrize("hook", ["exit_weights", "exit_losses"])
def test_a_hook_that_gives_too_few_is_named(hook):
    network, (x, y) = chain(), batches(1)[0]
    strategy = exitkit.build_strategy("joint")
    run = exitkit.Run.local(network, strategy, sgd(network))
    whole = getattr(strategy, hook)
    setattr(strategy, hook, lambda *arguments: list(whole(*arguments))[:-1])
    with pytest.raises(UserError, match=f"{hook} of Joint returned 2 values; expected 3, one per exit"):
        run.train_step((x, y))


def test_a_loop_of_ones_own_takes_a_name():
    network = chain()
    assert type(exitkit.Run.local(network, "boostnet", sgd(network)).strategy).__name__ == "BoostNet"


def test_overriding_a_hook_without_claiming_its_slot_is_refused_at_once():
    with pytest.raises(TypeError, match="objective"):

        class Forgetful(TrainingStrategy):
            def exit_losses(self, run, outputs, batch):
                return [F.cross_entropy(logits, batch[1], reduction="none") for logits in outputs.logits]


@dataclass(eq=False)
class TwoPhases(TrainingStrategy):
    slots = frozenset({"phases"})

    def phases(self, epochs, exits):
        return [Phase("one", TrainingStrategy(), epochs), Phase("two", Linked(), 2, train="heads")]


def test_a_partner_rules_every_phase_of_a_schedule():
    phases = Composition({"two": TwoPhases(), "ge": exitkit.build_strategy("ge")}).phases(5, 3)
    assert [(phase.name, phase.epochs, phase.train) for phase in phases] == [
        ("one", 5, "all"),
        ("two", 2, "heads"),
    ]
    network = chain()
    phases[0].strategy.adapt(network)
    assert len(network.taps) == 1 and type(network.link) is LogitLink
    phases[1].strategy.adapt(network)
    assert len(network.taps) == 1 and type(network.link) is Taking


def test_settings_of_a_composition_go_to_the_part_that_is_meant():
    both = exitkit.build_strategy("ge+boostnet", temperature=0.2, **{"ge.ge_scope": "all"})
    assert both.settings()["boostnet.temperature"] == 0.2
    with pytest.raises(UserError, match=r"use ge\.variant or boostnet\.variant"):
        exitkit.build_strategy("ge+boostnet", variant="paper")
    with pytest.raises(UserError, match="did you mean temperature"):
        exitkit.build_strategy("boostnet", temprature=0.2)
    with pytest.raises(UserError, match="did you mean boostnet"):
        exitkit.build_strategy("bostnet")
    with pytest.raises(UserError, match="twice"):
        exitkit.build_strategy("ge+ge")


class Scheduled(exitkit.TrainingStrategy):
    """Notes where in the schedule it is asked, over two passes an epoch."""

    slots = frozenset({"update"})

    def __init__(self):
        self.seen = []

    def passes(self, exits):
        return 2

    def train_epoch(self, run, batches):
        for _ in range(2):
            for batch in batches:
                at = run.position
                self.seen.append((at.epoch, at.passes, at.step, at.fraction, batch.labels.tolist()))


def test_a_loop_of_ones_own_moves_through_the_schedule():
    network, strategy = exitkit.build_network("msdnet-tiny"), Scheduled()
    run = exitkit.Run.local(network, strategy, sgd(network), epochs=2)
    batches = [(torch.randn(2, 1, 16, 16), torch.tensor([n, n])) for n in range(2)]
    run.train_epoch(batches)
    run.train_epoch(batches)
    first = [(0, p, n, n / 4, [n, n]) for p in range(2) for n in range(2)]
    assert strategy.seen == first + [(1, p, n, fraction + 0.5, labels) for _, p, n, fraction, labels in first]
    assert (run.position.epoch, run.position.passes, run.position.step) == (2, 0, 0)
    with pytest.raises(UserError, match=r"made for 2 epochs; .*Run\.local\(epochs="):
        run.train_epoch(batches)
    with pytest.raises(UserError, match="no batches"):
        run.train_epoch([])
    with pytest.raises(UserError, match="epochs is 0"):
        exitkit.Run.local(network, strategy, sgd(network), epochs=0)


@pytest.mark.parametrize("name", ["joint", "boostnet", "metagf"])  # none of these asks where it is
def test_an_epoch_of_ones_own_is_the_strategys(name):
    torch.manual_seed(0)
    batches = [(torch.randn(8, 1, 16, 16), torch.randint(10, (8,))) for _ in range(2)]
    trained = []
    for own in (True, False):
        torch.manual_seed(1)
        network = exitkit.build_network("msdnet-tiny")
        run = exitkit.Run.local(network, exitkit.build_strategy(name), sgd(network))
        torch.manual_seed(2)
        run.train_epoch(batches) if own else run.strategy.train_epoch(run, batches)
        trained.append(network.state_dict())
    assert all(torch.equal(value, trained[1][key]) for key, value in trained[0].items())


STATEFUL = {  # settings with which the state of a method matters after few steps
    "adaloss": {"period": 1},
    "cgt": {"variant": "released"},
    "hdkd": {"meta_lr": 0.1},
    "l2w": {"interval": 2, "meta_lr": 0.1},
    "metagf": {"variant": "released"},
}


@pytest.mark.parametrize("first", registered("method"))
def test_a_method_trains_and_resumes_to_the_same_bits_with_every_partner_that_it_composes_with(first):
    def run_of(name, seed):
        settings = {f"{part}.{key}": value for part in name.split("+") for key, value in STATEFUL.get(part, {}).items()}
        network = chain(3, batchnorm=True, seed=seed)
        phases = exitkit.build_strategy(name, **settings).phases(6, 3)
        for phase in phases:
            phase.strategy.adapt(network)
        return exitkit.Run.local(network, phases[-1].strategy, sgd(network), epochs=2)

    data = batches(2)
    for second in [name for name in registered("method") if name > first]:
        name = f"{first}+{second}"
        try:
            exitkit.build_strategy(name)
        except UserError:
            continue
        run, again = run_of(name, 0), run_of(name, 1)
        run.train_epoch(data)
        again.load_state_dict(copy.deepcopy(run.state_dict()))
        run.train_epoch(data)
        again.train_epoch(data)
        assert all(value.isfinite().all() for value in run.network.state_dict().values()), name
        assert same(run.network, again.network), name
