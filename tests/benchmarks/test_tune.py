"""The search for methods and settings: spaces, objective, resuming, and the comparison on fresh seeds."""

import os
import platform

import numpy as np
import optuna
import pandas as pd
import pytest
from fake_runs import FakeRun

from exitkit import find_runs
from exitkit.benchmarks.campaign import tuning
from exitkit.benchmarks.campaign.tuning import (
    JOURNAL,
    Limits,
    Range,
    Space,
    default_ranges,
    objective,
    open_study,
    policy_scores,
    search,
)
from exitkit.benchmarks.commands.tune import policy_difference, sentence
from exitkit.errors import HeldError, UserError
from exitkit.inference.policy import BASELINE, read_policy

STATES = optuna.trial.TrialState


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:1", Range(0, 1)),
        ("1e-3:0.1:log", Range(1e-3, 0.1, log=True)),
        ("a,b", Range(choices=("a", "b"))),
    ],
)
def test_a_range_is_read(text, expected):
    assert Range.parse("lr", text) == expected


@pytest.mark.parametrize("text", ["", "0.1", "1:0", "0:1:log", "0:1:linear", "a:b", "0:inf", "nan:1", "1:2:log:log"])
def test_what_is_no_range_is_refused_with_its_field(text):
    with pytest.raises(UserError, match="--space lr="):
        Range.parse("lr", text)


def test_the_default_space_has_the_declared_ranges_and_the_learning_rate():
    space = Space.make({"dataset": "digits"}, ["joint", "boostnet"], {"boostnet.temperature": "0.2:0.4"})
    assert space.ranges["joint"] == {"lr": Range(0.01, 0.3, log=True)}
    assert space.ranges["boostnet"]["temperature"] == Range(0.2, 0.4)
    assert default_ranges("ge+kd")["weight"] == Range(0.1, 0.9)


def test_an_unknown_field_of_the_space_is_named():
    with pytest.raises(UserError, match="temprature"):
        Space.make({"dataset": "digits"}, ["boostnet"], {"temprature": "0:1"})


@pytest.mark.parametrize(
    ("method", "key", "text", "says"),
    [
        ("joint", "learning_rate", "0:1", "available: batch_size, epochs, label_smoothing, lr"),
        ("boostnet", "rescale", "true,maybe", "--space rescale=true,maybe can't be searched: rescale is 'maybe'"),
        ("ge", "variant", "0:1", "--space variant=0:1 can't be searched: variant is 0.01; expected paper | released"),
        ("joint", "batch_size", "0:1", "can't be searched: batch_size is 0; expected greater than or equal to 2"),
        ("joint", "momentum", "0.5,high", "can't be searched: momentum is 'high'"),
        ("ge+ofa", "lr", "-2:-1", "can't be searched: lr is -1.99; expected greater than 0"),
    ],
)
def test_a_space_of_impossible_values_is_refused_before_the_search(method, key, text, says):
    with pytest.raises(UserError) as error:
        Space.make({"dataset": "digits"}, [method], {key: text})
    assert says in str(error.value)


@pytest.mark.parametrize("key", ["temperature", "boostnet.temperature"])
def test_a_field_that_is_set_is_not_searched(key):
    values = {"dataset": "digits", "set": {key: "0.5"}}
    space = Space.make(values, ["boostnet"], {})
    assert "temperature" in default_ranges("boostnet") and set(space.ranges["boostnet"]) == {"lr"}
    (run,) = space.plan([{"name": "boostnet", "lr": 0.1}], "boostnet", 0, 1).runs()
    assert run.recipe.method_settings["temperature"] == 0.5
    with pytest.raises(UserError, match="temperature is given by --set and by --space; expected one of them"):
        Space.make(values, ["boostnet"], {"temperature": "0:1"})


def test_a_range_may_begin_at_an_excluded_value():
    space = Space.make({"dataset": "digits"}, ["joint"], {"lr": "0:0.1", "batch_size": "16:64"})
    assert space.ranges["joint"] == {"lr": Range(0, 0.1), "batch_size": Range(16, 64)}


def test_a_field_of_several_parts_of_a_composition_is_searched_for_each():
    values = {"dataset": "digits", "backbone": "msdnet-tiny", "epochs": 1}
    space = Space.make(values, ["boostnet+kd"], {"boostnet.temperature": "0.1:0.2"})
    assert space.ranges["boostnet+kd"]["boostnet.temperature"] == Range(0.1, 0.2)
    assert space.ranges["boostnet+kd"]["kd.temperature"] == default_ranges("kd")["temperature"]
    entry = {"name": "boostnet+kd"} | {name: each.high for name, each in space.ranges["boostnet+kd"].items()}
    settings = space.plan([entry], "boostnet+kd", 0, 1).runs()[0].recipe.method_settings
    assert (settings["boostnet.temperature"], settings["kd.temperature"]) == (0.2, entry["kd.temperature"])
    with pytest.raises(UserError, match=r"'temperature'.*boostnet\.temperature"):
        Space.make(values, ["boostnet+kd"], {"temperature": "0.1:0.2"})


def test_a_run_that_another_process_trains_is_no_failure_of_the_search(tmp_path, monkeypatch):
    study, space = study_of(tmp_path)
    held = iter([True] * 25)

    def train(recipe, out, report):
        if next(held, False):
            raise HeldError("in use")
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "train", train)
    with pytest.raises(KeyboardInterrupt):
        search(study, space, tmp_path, seed=0, limits=Limits(epochs=2), budget=None, tell=lambda _: None)


def test_a_dead_process_whose_number_this_one_has_is_dead(tmp_path):
    study, space = study_of(tmp_path)
    killed = study.ask()
    space.propose(killed)
    killed.set_user_attr("host", platform.node())
    killed.set_user_attr("pid", os.getpid())
    assert not tuning._alive(study.get_trials()[0], tmp_path)
    killed.set_user_attr("pid", os.getppid())
    assert tuning._alive(study.get_trials()[0], tmp_path)


def test_the_objective_is_the_validation_accuracy_at_the_budget():
    run = FakeRun("joint", 0)
    run.parts["test"]["labels"] = (run.parts["test"]["labels"] + 1) % 10  # the test images do not count
    validation = run.outputs("validation")
    correct = validation["logits"].argmax(-1) == validation["labels"][:, None]
    macs = [row["macs"] for row in run.costs()]
    assert objective(run, 1.0) == pytest.approx(100 * correct[:, -1].mean())  # all images leave at the last exit
    assert objective(run, macs[0] / macs[-1]) == pytest.approx(100 * correct[:, 0].mean())
    assert 100 * correct[:, 0].mean() < objective(run, None) < 100


def test_policies_are_scored_on_validation_and_test_at_the_same_points():
    run = FakeRun("joint", 0)
    accuracies = {part: np.array(values) for part, values in run.results().items()}
    macs = [row["macs"] for row in run.costs()]
    full, product = policy_scores(run, 1.0, [BASELINE, read_policy("product")])
    assert abs(full.validation - accuracies["validation"].max()) < 5 and abs(full.test - accuracies["test"].max()) < 5
    assert str(product.policy) == "product"
    (first,) = policy_scores(run, macs[0] / macs[-1], [BASELINE])
    assert (first.validation, first.test) == pytest.approx((accuracies["validation"][0], accuracies["test"][0]))
    (below,) = policy_scores(run, 0.5 * macs[0] / macs[-1], [BASELINE])
    assert below.test == pytest.approx(accuracies["test"][0])
    (curve,) = policy_scores(run, None, [BASELINE])
    assert first.test < curve.test < full.test + 1


def test_the_winner_with_its_policy_is_compared_with_joint_on_confidence_by_seed():
    joint, better = ([FakeRun(name, seed) for seed in range(3)] for name in ("joint", "boostnet"))
    for run in better:
        for part in run.parts.values():
            part["logits"][:, :, :] += 3 * np.eye(10, dtype=np.float32)[part["labels"]][:, None]
    rows = policy_difference(joint, better, "mean", None)
    expected = [
        policy_scores(ours, None, [read_policy("mean")])[0].test - policy_scores(theirs, None, [BASELINE])[0].test
        for ours, theirs in zip(better, joint, strict=True)
    ]
    assert rows["mean"][0] == pytest.approx(np.mean(expected)) and rows["low"][0] > 0
    assert sentence(rows).startswith("boostnet with mean beats joint training: ")
    assert sentence(policy_difference(joint, joint, "confidence", None)).startswith("nothing beat joint")
    assert sentence(rows[rows["measure"] == "exit 1"]).startswith("no comparison with joint training")
    at_budget = policy_difference(joint, better, "confidence", 0.6)
    scores = ([policy_scores(run, 0.6, [BASELINE])[0].test for run in runs] for runs in (better, joint))
    assert at_budget["mean"][0] == pytest.approx(np.mean(np.subtract(*scores)))
    assert f"{at_budget['mean'][0]:+.2f} points of accuracy at 60% [" in sentence(at_budget, 0.6)


def study_of(folder, **space):
    values = {"dataset": "digits", "epochs": 2, "set": {"per_class": 8}, "batch_size": 32}
    return open_study(folder, 0, 1), Space.make(values, ["joint", "boostnet"], space)


def test_a_search_trains_ordinary_runs_until_its_epochs_are_spent_and_resumes_killed_trials(tmp_path):
    study, space = study_of(tmp_path)
    killed = study.ask()
    entry = space.propose(killed)
    killed.set_user_attr("host", __import__("platform").node())
    killed.set_user_attr("pid", 2**22 + 1)  # above the largest number of a process
    told = []
    search(study, space, tmp_path, seed=0, limits=Limits(epochs=4), budget=None, tell=told.append)
    trials = study.get_trials()
    assert trials[0].state == STATES.FAIL
    assert trials[1].params == killed.params and trials[1].user_attrs["entry"] == entry
    assert sum(len(trial.intermediate_values) for trial in trials) >= 4
    assert [trial.number for trial in told] == list(range(1, len(trials)))
    runs = {run.path.name for run in find_runs(tmp_path / "search")}
    assert runs == {trial.user_attrs["run"] for trial in trials if trial.state == STATES.COMPLETE}
    before = len(trials)
    search(open_study(tmp_path, 0, 1), space, tmp_path, seed=0, limits=Limits(epochs=4), budget=None, tell=told.append)
    assert len(open_study(tmp_path, 0, 1).get_trials()) == before


def test_a_run_that_was_killed_in_the_last_epochs_is_finished(tmp_path):
    study, space = study_of(tmp_path)
    killed = study.ask()
    space.propose(killed)
    killed.set_user_attr("host", __import__("platform").node())
    killed.set_user_attr("pid", 2**22 + 1)  # above the largest number of a process
    killed.report(10.0, step=1)
    search(study, space, tmp_path, seed=0, limits=Limits(epochs=1), budget=None, tell=lambda _: None)
    first, second = study.get_trials()
    assert first.state == STATES.FAIL
    assert second.state == STATES.COMPLETE and second.params == killed.params


def test_a_study_of_other_methods_is_refused_and_stays_as_it_was(tmp_path):
    study, space = study_of(tmp_path)
    space.propose(study.ask())
    journal = (tmp_path / JOURNAL).read_bytes()
    study = open_study(tmp_path, 0, 1)
    for other, message in (
        (Space.make(space.values, ["joint", "ge"], {}), "searches method among joint, boostnet; expected the same"),
        (
            Space.make(space.values, ["joint", "boostnet"], {"lr": "0.1,0.2"}),
            r"searches (joint|boostnet)\.lr in a range",
        ),
    ):
        with pytest.raises(UserError, match=message):
            search(study, other, tmp_path, seed=0, limits=Limits(epochs=4), budget=None, tell=print)
    assert (tmp_path / JOURNAL).read_bytes() == journal


def test_a_search_over_policies_keeps_the_best_one_of_each_run(tmp_path):
    study, space = study_of(tmp_path)
    names = [BASELINE, read_policy("mean"), read_policy("margin")]
    search(study, space, tmp_path, seed=0, limits=Limits(epochs=2), budget=0.6, tell=lambda _: None, policies=names)
    (run,) = find_runs(tmp_path / "search")
    (trial,) = study.get_trials(states=[STATES.COMPLETE])
    scored = {str(each.policy): each.validation for each in policy_scores(run, 0.6, names)}
    assert trial.value == max(scored.values()) == scored[trial.user_attrs["policy"]]


def test_a_run_that_diverges_fails_and_the_search_goes_on(tmp_path):
    study, space = study_of(tmp_path, lr="1e20:1e30:log")
    failed = []

    def tell(trial):
        failed.append(trial)
        if len(failed) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(study, space, tmp_path, seed=0, limits=Limits(epochs=9), budget=None, tell=tell)
    assert [trial.state for trial in failed] == [STATES.FAIL] * 2
    assert "not finite" in failed[0].user_attrs["reason"]


def test_a_search_whose_runs_all_fail_at_once_ends(tmp_path):
    study, space = study_of(tmp_path, **{"boostnet.temperature": "-9:-8"})
    ranges = {"boostnet": space.ranges["boostnet"]}
    failed = []
    with pytest.raises(UserError, match=r"the last 20 runs of the search failed in their first epoch: .*temperature"):
        search(
            study,
            Space(space.values, ranges),
            tmp_path,
            seed=0,
            limits=Limits(epochs=1),
            budget=None,
            tell=failed.append,
        )
    assert len(failed) == 20 and not (tmp_path / "search").exists()


def test_a_search_of_a_small_space_ends_when_its_runs_are_finished(tmp_path):
    study, _ = study_of(tmp_path)
    values = {"dataset": "digits", "epochs": 1, "set": {"per_class": 8}, "batch_size": 32}
    space, told = Space.make(values, ["joint"], {"lr": "0.05,0.1"}), []
    search(study, space, tmp_path, seed=0, limits=Limits(epochs=9), budget=None, tell=told.append)
    assert len(find_runs(tmp_path / "search")) == 2 and told[-1].state == STATES.COMPLETE
    assert [bool(trial.intermediate_values) for trial in told].count(True) == 2


def test_a_trial_that_another_process_has_ended_is_left_as_it_is(tmp_path):
    study, space = study_of(tmp_path)

    def tell(trial):
        told.append(trial)
        raise KeyboardInterrupt

    told = []
    ask = study.ask

    def asked():
        trial = ask()
        open_study(tmp_path, 0, 1).tell(trial.number, state=STATES.FAIL)  # taken for dead
        return trial

    study.ask = asked
    with pytest.raises(KeyboardInterrupt):
        search(study, space, tmp_path, seed=0, limits=Limits(epochs=2), budget=None, tell=tell)
    assert told[0].state == STATES.FAIL


def test_a_damaged_journal_is_named(tmp_path):
    (tmp_path / "study.log").write_text('{"op_code": 0}\nnot json\n{}\n')
    with pytest.raises(UserError, match=r"study\.log is damaged"):
        open_study(tmp_path, 0, 1)


@pytest.mark.parametrize(("low", "says"), [(0.1, "boostnet beats joint"), (-0.1, "nothing beat joint")])
def test_the_last_line_says_whether_it_helped(low, says):
    row = {"method": "boostnet", "measure": "area", "mean": 1.0, "low": low, "high": 2.0, "n": 3}
    assert sentence(pd.DataFrame([row])).startswith(says)


def test_mistakes_are_refused_before_anything_is_written(cli, tmp_path):
    cli("tune", "--methods", "boostnett").refused("boostnett", "boostnet")
    cli("tune", "--budget", "20").refused("--budget 20", "60%")
    cli("tune", "--space", "lr=3").refused("--space lr=3")
    cli("tune", "--policy", "mie-laplace").refused("--policy mie-laplace reads embeddings")
    cli("tune", "--budget", "1%").refused("--budget 1% is below the first exit's cost; expected at least 24%")
    cli("tune", "--dataset", "folder", "--data-dir", "nowhere").refused("nowhere")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine.toml").write_text("methods = 'boostnet'\n[set]\ntemperature = 0.9\n")
    words = ("tune", "--methods", "boostnet", "--recipe", "mine.toml", "--space", "temperature=0:1")
    cli(*words).refused("temperature is given by --set and by --space")


def test_a_field_without_effect_is_not_a_part_of_the_trial():
    class Asked:
        def suggest_float(self, name, low, high, log=False):
            return high

        def suggest_categorical(self, name, choices):
            return choices[-1]

    for gate, expected in (("hard", {"name", "lr", "gate"}), ("soft", {"name", "lr", "gate", "sharpness"})):
        space = Space.make({"dataset": "digits"}, ["cgt"], {"gate": f"soft,{gate}"})
        assert space.propose(Asked()).keys() == expected
