"""Joint training's weights, label smoothing in every method, and separate training."""

import dataclasses
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import exitkit
from exitkit import plugins
from exitkit.errors import UserError
from exitkit.files import load_tensors

from toy import FEW, batches, chain, sgd


def run_of(strategy, network=None):
    network = network or chain()
    return exitkit.Run.local(network, strategy, sgd(network))


def test_the_ramp_of_sdn_is_kayas():
    run = run_of(exitkit.build_strategy("joint", weights="sdn"), chain(7))
    run.position.epochs = 100
    for epoch, expected in [
        (0, [0.0115, 0.013, 0.0145, 0.016, 0.0175, 0.019, 1.0]),
        (49, [0.085, 0.16, 0.235, 0.31, 0.385, 0.46, 1.0]),
        (99, [0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0]),
    ]:
        run.position.epoch = epoch
        assert run.weights() == pytest.approx(expected, abs=1e-12)


def test_the_ramp_weighs_the_losses():
    ramp, plain = chain(3), chain(3)
    for network, settings in ((ramp, {"weights": "sdn"}), (plain, {"weights": (0.15, 0.3, 1.0)})):
        run = run_of(exitkit.build_strategy("joint", **settings), network)  # one epoch of one: the ramp is at its end
        run.strategy.train_step(run, batches()[0])
    for name, value in ramp.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name])


FIXED = {
    "uniform": {1: [1], 4: [1, 1, 1, 1]},
    "mean": {1: [1], 4: [1 / 4] * 4},
    "linear": {1: [1], 2: [1 / 3, 2 / 3], 4: [0.1, 0.2, 0.3, 0.4]},
    "rise": {1: [1], 2: [0.25, 1], 4: [0.25, 0.5, 0.75, 1]},
    "last": {1: [1], 4: [0, 0, 0, 1]},
    "half": {1: [1], 2: [1, 1], 5: [0.25, 0.25, 0.25, 0.25, 1]},
    "warm": {1: [1], 4: [4, 3, 2, 1]},
    "sieve": {1: [1], 2: [1, 1], 5: [3 / 7, 1 / 7, 2 / 7, 1 / 7, 1], 7: [0.2, 0.1, 0.3, 0.1, 0.2, 0.1, 1]},
}


@pytest.mark.parametrize(("name", "exits"), [(name, exits) for name, rows in FIXED.items() for exits in rows])
def test_fixed_weights_by_hand(name, exits):
    run = run_of(exitkit.build_strategy("joint", weights=name), chain(exits))
    assert run.weights() == pytest.approx(FIXED[name][exits], rel=1e-12)


def test_weights_by_cost_are_proportional_to_the_multiply_adds_and_sum_to_the_exits():
    # Stage 1 has 4 * 5 of them, each later one 5 * 5, each head 5 * 4: in all 40, 85 and 130.
    run = run_of(exitkit.build_strategy("joint", weights="flops"))
    assert run.weights() == pytest.approx([3 * macs / 255 for macs in (40, 85, 130)], rel=1e-12)
    # What a link adds counts, in whichever order the methods are named: 5 * 4 for the new classifier of exit 1.
    for methods in ("joint+isc", "isc+joint"):
        network = chain()
        run = run_of(exitkit.build_strategy(methods, weights="flops"), network)
        macs = [row.macs for row in exitkit.cost(network)]
        assert macs[0] == 60 and run.weights() == pytest.approx([3 * own / sum(macs) for own in macs], rel=1e-12)


def test_equal_weights_are_joint_training_bit_for_bit_and_their_mean_is_a_third_of_its_gradient():
    ends = []
    for settings in ({}, {"weights": "uniform"}):
        run = run_of(exitkit.build_strategy("joint", **settings))
        run.train_step(batches()[0])
        ends.append(run.network.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    gradients = []
    for name in ("uniform", "mean"):
        run = run_of(exitkit.build_strategy("joint", weights=name))
        run.backward(sum(w * loss.mean() for w, loss in zip(run.weights(), run.losses(batches()[0]), strict=True)))
        gradients.append([parameter.grad for parameter in run.parameters])
    assert all(torch.allclose(a / 3, b, rtol=1e-12) for a, b in zip(*gradients, strict=True))


def test_the_last_exit_alone_leaves_the_other_heads_where_they_are():
    run = run_of(exitkit.build_strategy("joint", weights="last"))
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    run.train_step(batches()[0])
    moved = {name for name, value in run.network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if not name.startswith(("heads.0.", "heads.1."))}


def test_an_unknown_name_of_weights_is_refused_and_a_name_claims_the_slot():
    with pytest.raises(UserError, match="weights is 'steep'"):
        exitkit.build_strategy("joint", weights="steep")
    with pytest.raises(UserError, match="both claim the slot 'exit weights'"):
        exitkit.build_strategy("joint+adaloss", weights="uniform")


def test_the_ramp_is_for_seven_exits_at_most():
    with pytest.raises(UserError, match="up to 7 exits; the network has 8"):
        run_of(exitkit.build_strategy("joint", weights="sdn"), chain(8))


@pytest.mark.parametrize("name", plugins.registered("method"))
def test_every_method_has_label_smoothing(name):
    strategy = exitkit.build_strategy(name, label_smoothing=0.1)
    assert "label_smoothing" in {field.name for field in dataclasses.fields(strategy)}
    with pytest.raises(UserError, match=r"label_smoothing is 1.0; expected at least 0 and below 1"):
        exitkit.build_strategy(name, label_smoothing=1.0)


@pytest.mark.parametrize("name", ["joint", "ge", "boostnet", "metagf", "ge+metagf"])
def test_smoothed_losses_are_those_of_smoothed_labels(name):
    run = run_of(exitkit.build_strategy(name, label_smoothing=0.2))
    images, labels = batches()[0]
    outputs = run.forward(images)
    smooth = 0.8 * F.one_hot(labels, 4).double() + 0.2 / 4
    for loss, logits in zip(run.losses((images, labels)), outputs.logits, strict=True):
        assert torch.allclose(loss, -(smooth * logits.log_softmax(1)).sum(1), rtol=1e-12)


def test_in_a_composition_it_is_one_value():
    assert exitkit.build_strategy("ge+metagf", label_smoothing=0.1).label_smoothing == 0.1
    with pytest.raises(UserError, match="different label_smoothing; expected one value"):
        exitkit.build_strategy("ge+metagf", **{"ge.label_smoothing": 0.1})


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("classifier", [("trunk", 3, ("stages.", "heads.3.")), ("heads", 3, ("heads.0.", "heads.1.", "heads.2."))]),
        (
            "branch",
            [
                ("branch 1", 2, ("stages.0.", "heads.0.")),
                ("branch 2", 1, ("stages.1.", "heads.1.")),
                ("branch 3", 1, ("stages.2.", "heads.2.")),
                ("branch 4", 2, ("stages.3.", "heads.3.")),
            ],
        ),
    ],
)
def test_separate_phases(order, expected):
    phases = exitkit.build_strategy("separate", order=order).phases(6, 4)
    assert [(phase.name, phase.epochs, phase.train) for phase in phases] == expected
    assert all(phase.batchnorm == "frozen" for phase in phases)


def test_shares_of_the_epochs():
    def lengths(epochs, *shares):
        return [phase.epochs for phase in exitkit.build_strategy("separate", shares=shares).phases(epochs, 4)]

    assert lengths(10, 0.7, 0.3) == [7, 3]
    assert lengths(2, 0.99, 0.01) == [1, 1]
    for epochs, shares, complaint in [(10, (1.0,), "shares has 1 value; expected 2"), (1, (1.0, 1.0), "2 phases")]:
        with pytest.raises(UserError, match=complaint):
            lengths(epochs, *shares)
    with pytest.raises(UserError, match="expected numbers above 0"):
        exitkit.build_strategy("separate", shares=(1.0, 0.0))
    assert [phase.name for phase in exitkit.build_strategy("separate").phases(1, 1)] == ["trunk"]


@pytest.mark.parametrize("order", ["classifier", "branch"])
def test_each_phase_moves_its_own_part_alone(order, tmp_path, monkeypatch):
    from exitkit.training.phase import PhaseSetup

    seen, begin = [], PhaseSetup.begin

    def begun(setup, number):
        phase = begin(setup, number)
        seen.append((phase.phase.train, {name: v.clone() for name, v in setup.job.network.state_dict().items()}))
        return phase

    monkeypatch.setattr(PhaseSetup, "begin", begun)
    recipe = {"method": "separate", "epochs": 4, **FEW, "method_settings": {"order": order}}
    run = exitkit.train(recipe, tmp_path)
    seen.append(((), load_tensors(run.path / "weights.safetensors")))
    for (trained, before), (_, after) in pairwise(seen):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed and all(name.startswith(trained) for name in changed)
        assert any("running_mean" in name for name in changed) == any(part.startswith("stages") for part in trained)
