"""Policies by name; deployed, each decides as its evaluation does: in adaptive inference, and as exported."""

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import exitkit
from exitkit import ExitPolicy, ExitRule
from exitkit.benchmarks.report.policies import Outputs, comparison, measure, policies
from exitkit.cli.export import export as command
from exitkit.cli.options import policy_option
from exitkit.errors import UserError
from exitkit.inference.choose import policies_of_run
from exitkit.inference.combinations import COMBINATIONS
from exitkit.inference.export import runner
from exitkit.inference.export.export import export
from exitkit.inference.policy import BASELINE, KNOWN, PolicyName, cross_fit, fit_policy, read_policy
from exitkit.inference.rules import RULES, SCORED
from exitkit.inference.rules.base import Validation
from exitkit.inference.scores import SCORES
from exitkit.inference.targets import Target
from exitkit.networks.cascade import Head, MultiExitNetwork

from toy import FEW

COSTS = [1.0, 2.0, 4.0]
ALL = sorted(map(str, policies(full=True)))
"""Every combination with every score and rule."""


def network():
    """Three exits of a small network in float64, where no batch's size can move a decision, with a carried link."""
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())]
    stages.append(nn.Conv2d(4, 4, 3, 2))
    heads = [Head(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(4, 3)) for _ in range(3)]
    made = MultiExitNetwork(stages, heads, (1, 8, 8), 3)
    exitkit.build_strategy("boostnet").adapt(made)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
    return made.eval()


def images(count, seed=1):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def logits_of(made, x):
    return torch.stack(made(x).logits, 1)


@pytest.fixture(scope="module")
def double():
    return network().double()


@pytest.fixture(scope="module")
def validation(double):
    """Logits and labels of which the exits are more often right than chance."""
    logits = logits_of(double, images(150, seed=2).double()).numpy()
    noise = np.random.default_rng(0).normal(size=(150, 3)) * logits[:, -1].std()
    return logits, (logits[:, -1] + noise).argmax(axis=1)


def same(answers, expected):
    outputs, exits = expected
    assert torch.equal(answers.exits, exits)
    torch.testing.assert_close(answers.logits, outputs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_every_policy_decides_as_its_evaluation_in_adaptive_inference_and_in_the_exported_runner(
    name, double, validation
):
    policy = fit_policy(name, *validation, COSTS)
    x = images(60).double()
    logits = logits_of(double, x)
    leaves = policy.leave_at(logits.numpy())
    outputs = policy.outputs(logits.numpy()).logits
    for point in {0, policy.points // 2, policy.points - 1}:
        one = policy.at(point)
        again = ExitPolicy.from_json(one.to_json())
        assert again.to_json() == one.to_json() and again.exits == 3
        exits = torch.from_numpy(leaves[point])
        expected = torch.from_numpy(outputs[np.arange(60), leaves[point]]), exits
        found = again.on_outputs(logits)
        assert torch.equal(found[1], exits) and torch.equal(found[0], expected[0])
        adaptive = exitkit.AdaptiveInference(double, again)
        same(adaptive(x), expected)
        same(exitkit.AdaptiveInference(double, again, buckets=(8, 64))(x), expected)
        streamed = list(adaptive.stream(x.split([7, 20, 33]), 16))
        assert torch.equal(torch.cat([answers.exits for answers in streamed]), exits)
        combined, left = as_exported(one, logits.numpy())
        np.testing.assert_array_equal(left, leaves[point])
        np.testing.assert_array_equal(combined, expected[0].numpy())


def as_exported(policy, logits):
    """Run the exported runner on stages that return stored logits."""

    def stage(index):
        return lambda state: (logits[state[0], index], state[0])

    exported = runner.Runner.__new__(runner.Runner)
    exported.programs = [stage(index) for index in range(policy.exits)]
    exported.policy = runner.decoded(json.loads(policy.to_json()) | {"programs": exported.programs})
    return exported(np.arange(len(logits)))


@pytest.mark.parametrize("score", SCORES)
def test_the_runner_applies_temperatures_of_a_rule(score, double):
    logits = logits_of(double, images(60).double())
    temperatures = None if score == "patience" else (0.4, 3.0, 1.0)
    middle = 1.0 if score == "patience" else 0.3
    rule = ExitPolicy(ExitRule(score, (middle + 1, middle, -math.inf), temperatures))
    np.testing.assert_array_equal(as_exported(rule, logits.numpy())[1], rule.on_outputs(logits)[1])


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_exported_programs_run_a_policy_with_a_combination(form, tmp_path, validation):
    single = network()
    policy = fit_policy("geometric+stopping", *validation, COSTS)
    one = policy.at(policy.points // 2)
    written = export(single, one, tmp_path / "out", images(12), {"costs": [{"exit": 1}]}, form)
    assert ExitPolicy.from_json(json.dumps(written)).to_json() == one.to_json()
    logits, exits = runner.Runner(tmp_path / "out")(images(40).numpy())
    expected = exitkit.AdaptiveInference(single, one)(images(40))
    np.testing.assert_array_equal(exits, expected.exits)
    np.testing.assert_allclose(logits, expected.logits, rtol=1e-3, atol=1e-4)
    assert len(set(exits)) > 1


def test_the_runner_refuses_outputs_that_are_not_finite(double):
    logits = logits_of(double, images(5).double()).numpy()
    logits[2, 1, 0] = np.nan
    with pytest.raises(RuntimeError, match="the outputs of exit 2 are not finite"):
        as_exported(ExitPolicy(ExitRule("confidence", (2.0, 0.5, -math.inf))), logits)


# Names


@pytest.mark.parametrize("name", ALL)
def test_a_name_is_read_as_it_is_printed(name):
    assert str(read_policy(name)) == name


def test_words_are_of_one_kind_and_in_any_order():
    words = [*KNOWN, *SCORES, *RULES]
    assert len(set(words)) == len(words)
    assert read_policy("fitted+margin+mie") == PolicyName("mie", "margin", "fitted")
    assert read_policy("confidence") == read_policy("plain+shares") == BASELINE
    agreement = read_policy("agreement:weights=linear")
    assert agreement == PolicyName(score="", rule="agreement", fields=(("weights", "linear"),))
    assert str(agreement) == "agreement:weights=linear"
    assert read_policy("fitted:soft=false,count=20").fields == (("soft", False), ("count", 20))
    assert str(read_policy("fitted:soft=false,count=20")) == "fitted:soft=false,count=20"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("mies", "unknown combination, score or rule 'mies'; did you mean mie"),
        ("", "unknown combination, score or rule ''"),
        ("mie+mean", "policy 'mie+mean' has two combinations, mie and mean"),
        ("margin+jei", "jei can't use the score margin; rules that can: shares, stopping, fitted"),
        ("patience+stopping", "stopping can't use the score patience; rules that can: shares, fitted"),
        ("mie:a=1", "mie has no fields; expected mie alone"),
        ("fitted:sof=1", "unknown field of the rule fitted 'sof'; did you mean soft?"),
        ("fitted:soft", "'soft' is not a field and its value; expected fitted:FIELD=VALUE"),
        ("fitted:count=x", "fitted: count is 'x'; expected integer"),
        ("agreement:weights=cos", "agreement: weights is 'cos'; expected cost | linear | accuracy"),
    ],
)
def test_a_wrong_name_is_refused_in_one_line(text, line):
    with pytest.raises(UserError) as caught:
        read_policy(text)
    assert line in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "line"),
    [("fitted:count=0", "count is 0; expected at least 1"), ("jei:seed=-1", "seed is -1; expected 0 or more")],
)
def test_values_out_of_range_are_refused_by_the_fit(name, line, validation):
    with pytest.raises(UserError, match=line):
        fit_policy(name, *validation, COSTS)


def test_fields_change_the_fit(validation):
    plain, linear = (fit_policy(name, *validation, COSTS) for name in ("agreement", "agreement:weights=linear"))
    np.testing.assert_array_equal(linear.rule.weights, [1, 2, 3])
    np.testing.assert_array_equal(plain.rule.weights, [0.25, 0.5, 1])


def test_words_of_the_option_are_all_names():
    option = policy_option(lambda: None).__click_params__[0]
    completed = [item.value for item in option._custom_shell_complete(None, option, "mie+")]
    assert completed == [f"mie+{word}" for word in (*KNOWN, *SCORES, *RULES)]


@pytest.mark.parametrize("text", ["", "3", "{}", '{"rule": 1}', '{"score": "confidence", "thresholds": [1]}'])
def test_text_that_is_no_policy_is_refused(text):
    with pytest.raises(UserError, match=r"is not|expected"):
        ExitPolicy.from_json(text)


COMBINATION = {"name": "mean", "exits": 3, "weights": [], "biases": [], "temperatures": []}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"thresholds": [0.5, True, "-inf"]}, r"thresholds\.1"),
        ({"thresholds": [0.5, "0.5", "-inf"]}, r"thresholds\.1"),
        ({"thresholds": 3}, "thresholds"),
        ({"score": 7}, "score"),
        (
            {"combination": {"name": "mie", "exits": 10**15, "weights": [], "biases": [], "temperatures": []}},
            "1 to 1000",
        ),
        ({"combination": COMBINATION | {"exits": 3.0}}, "exits"),
        ({"more": json.loads("[" * 30 + "]" * 30)}, "more is nested more than 20 levels deep"),
    ],
)
def test_a_strangers_policy_is_refused_by_the_name_of_its_field(changes, words):
    good = json.loads(ExitRule("confidence", (0.5, 0.5, -math.inf)).to_json())
    with pytest.raises(UserError, match=words) as caught:
        ExitPolicy.from_json(json.dumps(good | changes))
    assert "\n" not in str(caught.value)


def test_a_damaged_combination_and_another_number_of_exits_are_refused(validation):
    parts = json.loads(fit_policy("mie", *validation, COSTS).at(3).to_json())
    for wrong in (3, {"name": "mie"}, {**parts["combination"], "name": "mies"}):
        with pytest.raises(UserError, match=r"not a combination|not a policy|unknown combination"):
            ExitPolicy.from_json(json.dumps({**parts, "combination": wrong}))
    two = ExitRule("confidence", (0.5, -math.inf))
    with pytest.raises(UserError, match="for 3 exits and the rule for 2"):
        ExitPolicy.from_json(json.dumps(json.loads(two.to_json()) | {"combination": parts["combination"]}))


# Cross-fitting, and the choice of an operating point


def test_cross_fitted_decisions_are_of_fits_on_other_samples(validation):
    """One fold by hand: its samples are decided by the policy fitted on all others."""
    whole = Validation.checked(*validation, COSTS)
    names = [read_policy(name) for name in ("geometric+fitted", "geometric", "mean+stopping", "jei")]
    results = {str(result.policy.name): result for result in cross_fit(names, whole)}
    fold = np.random.default_rng(0).permutation(150) % 5
    for name in names:
        held = fold == 3
        policy = fit_policy(name, validation[0][~held], validation[1][~held], COSTS)
        leaves, outputs = policy.leave_at(validation[0][held]), policy.outputs(validation[0][held]).logits
        hits = outputs.argmax(axis=2) == validation[1][held][:, None]
        result = results[str(name)]
        np.testing.assert_array_equal(result.leaves[:, held], leaves)
        np.testing.assert_array_equal(result.hits[:, held], hits[np.arange(held.sum()), leaves])
        np.testing.assert_array_equal(
            result.policy.leave_at(validation[0]), fit_policy(name, *validation, COSTS).leave_at(validation[0])
        )


@pytest.mark.parametrize("name", ["mie", "mie+stopping", "agreement"])
def test_the_chosen_point_is_the_one_that_policies_reports(name, double, validation):
    """Its accuracy and cost on test images are those of the table, image by image."""
    logits = logits_of(double, images(200, seed=5).double()).numpy()
    labels = logits[:, -1].argmax(axis=1)
    runs = measure(Outputs(validation, (logits, labels), np.array(COSTS)), policies(names=[name]))
    budget = 2.5
    row = comparison([runs], np.array([budget])).iloc[1]
    torch_validation = [torch.from_numpy(part) for part in validation]
    policy = ExitPolicy.from_outputs(name, *torch_validation, COSTS, budget=budget)
    outputs, exits = policy.on_outputs(torch.from_numpy(logits.astype(np.float32)))
    assert row["cost"] == pytest.approx(np.array(COSTS)[exits].mean(), rel=1e-12)
    assert row["accuracy"] == pytest.approx(100 * (outputs.argmax(1).numpy() == labels).mean(), rel=1e-12)


def test_without_a_budget_the_cheapest_point_without_loss_is_chosen(validation):
    arrays = [torch.from_numpy(part) for part in validation]
    whole = Validation.checked(validation[0].astype(np.float32), validation[1], COSTS)
    for result in cross_fit([read_policy("confidence"), read_policy("mie")], whole):
        cost, accuracy = np.array(COSTS)[result.leaves].mean(axis=1), result.hits.mean(axis=1)
        enough = np.flatnonzero(accuracy >= whole.correct()[:, -1].mean())
        # On these images no point of mie is as accurate as the last exit: then the most accurate one is taken.
        chosen = enough[cost[enough].argmin()] if len(enough) else accuracy.argmax()
        assert bool(len(enough)) == (result.policy.name == BASELINE)
        policy = ExitPolicy.from_outputs(result.policy.name, *arrays, COSTS)
        assert policy.to_json() == result.policy.at(int(chosen)).to_json()
    with pytest.raises(UserError, match=r"below the first exit's cost; expected at least 1"):
        ExitPolicy.from_outputs("fitted", *arrays, COSTS, budget=0.5)
    with pytest.raises(UserError, match=r"budget 1\.01 is not met by any operating point; expected at least"):
        ExitPolicy.from_outputs("eenet", *arrays, COSTS, budget=1.01)


def test_a_run_is_exported_with_a_policy_and_the_options_exclude_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = exitkit.train({"backbone": "msdnet-tiny", "epochs": 1, "device": "cpu", **FEW}, "runs")
    written = {}

    def write(network, rule, out, images, about, form):
        written.update(rule=rule)
        return {"programs": ["stage-1.pt2"]}

    monkeypatch.setattr("exitkit.inference.export.export.export", write)
    done = CliRunner().invoke(command, [str(run.path), "--policy", "mean+agreement", "--budget", "100K"])
    assert done.exit_code == 0, done.output
    assert written["rule"].to_json() == ExitPolicy.from_run(run, "mean+agreement", budget="100K").to_json()
    many = policies_of_run(run, "mean+agreement", [Target.of(budget="100K"), Target.of(budget="120K")])
    assert many[0].policy.to_json() == written["rule"].to_json() != many[1].policy.to_json()
    for other in (["--score", "margin"], ["--calibrated"]):
        failed = CliRunner().invoke(command, [str(run.path), "--policy", "mie", *other])
        assert "no --score and no --calibrated beside it" in str(failed.exception)


def test_rules_with_and_without_scores_are_all_in_the_default_comparison():
    default = {str(policy) for policy in policies()}
    assert default >= {*COMBINATIONS, *SCORES, *(set(RULES) - {"shares"})} and len(SCORED) == 3
