"""Mixed training: its phases, its limits joint and separate training, and what each phase moves."""

from itertools import pairwise

import pytest
import torch

import exitkit
from exitkit.errors import UserError
from exitkit.files import load_tensors
from exitkit.methods.phases import split_epochs

from toy import FEW, batches, chain, sgd


def planned(epochs=10, exits=4, **settings):
    return exitkit.build_strategy("mixed", **settings).phases(epochs, exits)


def weights_of(method, folder, epochs=2, **settings):
    run = exitkit.train({"method": method, "epochs": epochs, "method_settings": settings, **FEW}, folder)
    return load_tensors(run.path / "weights.safetensors")


def test_the_phases_and_what_they_train():
    trunk, together, heads = phases = planned(third=0.2)
    assert [(phase.name, phase.epochs) for phase in phases] == [
        ("trunk", 4),
        ("all", 4),
        ("heads", 2),
    ]
    assert trunk.train == ("stages.", "heads.3.") and trunk.batchnorm == "frozen"
    assert together.train == "all" and together.batchnorm == "train"
    assert heads.train == ("heads.0.", "heads.1.", "heads.2.") and heads.batchnorm == "frozen"
    network = chain(4)
    for phase, expected in ((trunk, [0, 0, 0, 1]), (together, [1, 1, 1, 1]), (heads, [1, 1, 1, 0])):
        assert list(exitkit.Run.local(network, phase.strategy, sgd(network)).weights()) == expected


def test_the_mean_divides_by_the_number_of_exits_but_not_the_trunks_loss():
    network = chain(4)
    for phase, expected in zip(
        planned(third=0.2, reduction="mean", label_smoothing=0.1),
        ([0, 0, 0, 1], [0.25] * 4, [0.25, 0.25, 0.25, 0]),
        strict=True,
    ):
        assert list(exitkit.Run.local(network, phase.strategy, sgd(network)).weights()) == expected
        assert phase.strategy.label_smoothing == 0.1


@pytest.mark.parametrize(
    ("epochs", "settings", "expected"),
    [
        (10, {}, [5, 5]),
        (10, {"shares": (3.0, 1.0)}, [8, 2]),  # 7.5 rounds to even
        (10, {"shares": (1.0, 1.0), "third": 0.5}, [2, 3, 5]),
        (10, {"shares": (0.0, 1.0)}, [10]),
        (10, {"shares": (1.0, 0.0), "third": 0.5}, [5, 5]),
        (3, {"shares": (0.98, 0.01), "third": 0.01}, [1, 1, 1]),
    ],
)
def test_the_phases_last_their_shares_of_the_epochs(epochs, settings, expected):
    assert [phase.epochs for phase in planned(epochs, **settings)] == expected
    assert split_epochs(epochs, [float(length) for length in expected], "it") == expected


def test_one_exit_has_no_early_heads():
    assert [phase.name for phase in planned(exits=1, third=0.3)] == ["trunk", "all"]
    assert [(phase.name, phase.epochs) for phase in planned(exits=1, shares=(1.0, 0.0), third=0.3)] == [("trunk", 10)]
    assert [phase.name for phase in planned(exits=2, third=0.3)] == ["trunk", "all", "heads"]


def test_without_a_trunk_phase_it_is_joint_training(tmp_path):
    joint = weights_of("joint", tmp_path / "joint")
    mixed = weights_of("mixed", tmp_path / "mixed", shares=(0.0, 1.0))
    assert all(torch.equal(value, mixed[name]) for name, value in joint.items())


def test_without_a_phase_of_all_exits_it_is_separate_training(tmp_path):
    separate = weights_of("separate", tmp_path / "separate")
    disjoint = weights_of("mixed", tmp_path / "mixed", shares=(1.0, 0.0), third=0.5)
    assert all(torch.equal(value, disjoint[name]) for name, value in separate.items())


def test_each_phase_starts_from_the_one_before_and_moves_its_own_part_alone(tmp_path, monkeypatch):
    from exitkit.training.phase import PhaseSetup

    seen, begin = [], PhaseSetup.begin

    def begun(setup, number):
        phase = begin(setup, number)
        seen.append({name: value.clone() for name, value in setup.job.network.state_dict().items()})
        return phase

    monkeypatch.setattr(PhaseSetup, "begin", begun)
    seen.append(weights_of("mixed", tmp_path, epochs=3, third=0.34))
    trunk, together, heads = (
        {name for name in before if not torch.equal(before[name], after[name])} for before, after in pairwise(seen)
    )
    # The early heads keep their first values through phase 1 to the bit, their batch norm's statistics included.
    assert trunk and all(name.startswith(("stages.", "heads.3.")) for name in trunk)
    assert any("running_mean" in name for name in trunk)
    assert {name.split(".")[1] for name in together if name.startswith("heads.")} == {"0", "1", "2", "3"}
    assert any(name.startswith("stages.") for name in together)
    assert heads and all(name.startswith(("heads.0.", "heads.1.", "heads.2.")) for name in heads)


def test_the_mean_is_the_sum_with_a_smaller_rate_and_a_larger_decay():
    ends = []
    for reduction, rate, decay in (("mean", 0.3, 0.01), ("sum", 0.1, 0.03)):
        network = chain(3)
        (phase,) = planned(exits=3, shares=(0.0, 1.0), reduction=reduction)
        run = exitkit.Run.local(network, phase.strategy, sgd(network, rate, momentum=0.0, weight_decay=decay))
        run.train_epoch(batches(3))
        ends.append(network.state_dict())
    assert all(torch.allclose(value, ends[1][name], rtol=1e-12, atol=1e-15) for name, value in ends[0].items())


def test_driven_by_hand_a_step_is_one_of_the_phase_of_all_exits():
    ends = []
    for strategy in (exitkit.build_strategy("mixed"), exitkit.build_strategy("joint")):
        network = chain(3)
        exitkit.Run.local(network, strategy, sgd(network)).train_step(batches(1)[0])
        ends.append(network.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_objectives_taps_and_updates_rule_every_phase_with_it():
    strategy = exitkit.build_strategy("mixed+kd+ge+bdl", **{"mixed.third": 0.2})
    phases = strategy.phases(10, 3)
    assert [phase.name for phase in phases] == ["trunk", "all", "heads"]
    for phase in phases:
        assert sorted(phase.strategy.parts) == ["bdl", "ge", "kd", "mixed"]
        assert phase.strategy.parts["mixed"].claims() == {"exit weights"}
    with pytest.raises(UserError, match="both claim the slot 'exit weights'"):
        exitkit.build_strategy("mixed+joint", weights=(1.0, 1.0, 1.0, 1.0))
    with pytest.raises(UserError, match="both claim the slot"):
        exitkit.build_strategy("mixed+separate")


def test_impossible_values_are_refused():
    for settings, complaint in (
        ({"shares": (1.0,)}, r"shares is \(1.0,\); expected two numbers"),
        ({"shares": (-1.0, 1.0)}, "shares is .* at least 0"),
        ({"shares": (float("inf"), 1.0)}, "shares is .* expected"),
        ({"shares": (0.0, 0.0), "third": 0.5}, "one of them above 0"),
        ({"shares": (1.0, 0.0)}, "early exits are not trained"),
        ({"third": 1.0}, "third is 1.0"),
        ({"third": -0.1}, "third is -0.1"),
        ({"reduction": "max"}, "reduction"),
    ):
        with pytest.raises(UserError, match=complaint):
            exitkit.build_strategy("mixed", **settings)
    with pytest.raises(UserError, match="mixed training has 2 phases and 1 epoch; expected"):
        planned(1)
