"""`exitkit policies`: every policy against plain confidence, on stored outputs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import exitkit
from exitkit.benchmarks.report.policies import (
    BASELINE,
    Outputs,
    Policy,
    comparison,
    curves,
    default_budgets,
    measure,
    policies,
)
from exitkit.errors import UserError
from exitkit.inference.combinations import COMBINATIONS
from exitkit.inference.operating_points import most_accurate_within
from exitkit.inference.rules import RULES, SCORED
from exitkit.inference.scores import SCORES, confidence
from exitkit.inference.thresholds import budgeted, correct, exit_counts, paper_shares

COSTS = np.array([10.0, 25.0, 40.0])


def outputs(samples=300, seed=0, classes=4):
    """Logits of three exits, later ones better."""
    random = np.random.default_rng(seed)

    def part():
        labels = random.integers(classes, size=samples)
        logits = random.normal(size=(samples, 3, classes))
        logits[np.arange(samples), :, labels] += np.array([0.7, 1.4, 2.1])
        return logits, labels

    return Outputs(part(), part(), COSTS)


def test_without_names_one_part_of_the_baseline_is_replaced():
    made = policies()
    assert made[0] == BASELINE and len(set(made)) == len(made)
    assert len(made) == 1 + len(COMBINATIONS) + len(SCORES) - 1 + len(RULES) - 1
    for one in made:
        parts = [(one.combination, "plain"), (one.score or "confidence", "confidence"), (one.rule, "shares")]
        assert sum(value != usual for value, usual in parts) <= 1


def test_all_names_give_all_policies_and_the_baseline_is_first():
    made = policies(full=True)
    assert made[0] == BASELINE and len(set(made)) == len(made)
    assert {policy.combination for policy in made} == {"plain", *COMBINATIONS}
    assert {policy.rule for policy in made} == set(RULES)
    assert {policy.score for policy in made if policy.rule in SCORED} == set(SCORES)
    assert all(policy.score == "" for policy in made if policy.rule not in SCORED)


def test_names_narrow_the_choice_but_the_baseline_stays():
    made = policies(["mie"], ["margin"], ["shares"])
    assert made == (BASELINE, Policy("mie", "margin", "shares"))
    assert policies(["mie"]) == (BASELINE, Policy("mie", "confidence", "shares"))
    assert policies([], [], ["jei"]) == (BASELINE, Policy("plain", "", "jei"))


@pytest.mark.parametrize(
    ("names", "line"),
    [
        ((["mies"], [], []), "unknown combination 'mies'; did you mean mie"),
        (([], ["entropie"], []), "unknown score 'entropie'; did you mean entropy?"),
        (([], [], ["stoping"]), "unknown rule 'stoping'; did you mean stopping?"),
    ],
)
def test_an_unknown_name_is_refused(names, line):
    with pytest.raises(UserError, match=line.replace("?", r"\?")):
        policies(*names)


def test_the_baseline_is_the_budgeted_evaluation():
    stored = outputs()
    (measured,) = measure(stored, [BASELINE])
    counts = exit_counts(300, 3, (*paper_shares(), np.inf))
    hits = correct(*stored.test)
    expected = budgeted(confidence(stored.validation[0]), confidence(stored.test[0]), hits, COSTS, counts)
    np.testing.assert_array_equal(measured.accuracy, expected.accuracy)
    np.testing.assert_array_equal(measured.cost, expected.cost)


def test_validation_results_are_of_samples_that_were_not_fitted():
    """Labels that are noise can't be predicted: accuracy on samples that were fitted would be above chance."""
    random = np.random.default_rng(3)
    logits = random.normal(size=(400, 3, 4))
    noise = Outputs((logits, random.integers(4, size=400)), (logits, random.integers(4, size=400)), COSTS)
    for run in measure(noise, [BASELINE, Policy("geometric", "confidence", "fitted")]):
        assert abs(run.validation_accuracy.mean() - 0.25) < 0.06


@pytest.mark.parametrize("names", [([], ["margin"], ["agreement"]), ([], ["patience"], ["stopping"])])
def test_a_score_that_no_rule_reads_is_refused(names):
    with pytest.raises(UserError, match="can't use the score"):
        policies(*names)


def test_a_policy_without_a_point_within_the_budget_has_no_result():
    stored = outputs()
    runs = measure(stored, [BASELINE, Policy("plain", "", "eenet")])
    frame = comparison([runs], np.array([COSTS[0] + 0.01, COSTS[1]]))
    cheap = frame[frame["budget"] < COSTS[0] + 1].set_index("rule")
    assert runs[1].validation_cost.min() > COSTS[0] + 0.01
    assert cheap.loc["eenet", ["cost", "accuracy", "difference", "p", "p_holm"]].isna().all()
    assert frame[frame["budget"] == COSTS[1]]["accuracy"].notna().all()


def test_too_few_validation_images_are_refused():
    stored = outputs()
    few = Outputs((stored.validation[0][:4], stored.validation[1][:4]), stored.test, COSTS)
    with pytest.raises(UserError, match="4 validation images; expected at least 5"):
        measure(few, [BASELINE])


def test_differences_are_paired_by_image():
    stored = outputs()
    chosen = policies(["plain", "mean"], ["confidence"], ["shares"])
    runs = measure(stored, chosen)
    budgets = default_budgets(COSTS)
    frame = comparison([runs], budgets)
    assert len(frame) == len(chosen) * len(budgets)
    at = [most_accurate_within(run.validation_cost, run.validation_accuracy, budgets)[1] for run in runs]
    expected = stats.ttest_rel(100.0 * runs[1].hits[at[1]], 100.0 * runs[0].hits[at[0]])
    row = frame[(frame["combination"] == "mean") & (frame["budget"] == budgets[1])].iloc[0]
    assert row["p"] == pytest.approx(expected.pvalue, rel=1e-9)
    low, high = expected.confidence_interval()
    assert (row["low"], row["high"]) == pytest.approx((low, high), rel=1e-9)
    assert row["cost"] == pytest.approx(runs[1].cost[at[1]])
    assert frame.loc[frame["combination"] == "plain", "p"].isna().all()


def test_seeds_are_averaged_image_by_image():
    stored = [outputs(seed=seed) for seed in (0, 1)]
    stored[1] = Outputs(stored[1].validation, (stored[1].test[0], stored[0].test[1]), COSTS)
    both = [measure(one, [BASELINE]) for one in stored]
    budgets = default_budgets(COSTS)
    alone = [comparison([runs], budgets)["accuracy"] for runs in both]
    np.testing.assert_allclose(comparison(both, budgets)["accuracy"], (alone[0] + alone[1]) / 2)
    assert curves(both)["accuracy"].to_numpy() == pytest.approx(
        50 * (both[0][0].accuracy + both[1][0].accuracy), rel=1e-12
    )


def test_falls_are_counted_by_hand():
    logits = np.log([[[0.6, 0.4], [0.5, 0.5], [0.7, 0.3]], [[0.2, 0.8], [0.1, 0.9], [0.1, 0.9]]])
    labels = np.array([0, 1])
    (run,) = measure(Outputs((np.repeat(logits, 10, 0), np.repeat(labels, 10)), (logits, labels), COSTS), [BASELINE])
    assert run.falls == pytest.approx(1 / 4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two seeds of one recipe, finished."""
    out = tmp_path_factory.mktemp("policies")
    recipe = {"backbone": "msdnet-tiny", "dataset_settings": {"per_class": 30}, "epochs": 2, "device": "cpu"}
    for seed in (0, 1):
        exitkit.train(recipe | {"seed": seed}, out)
    return out


@pytest.fixture
def runs(trained, cli):
    shutil.copytree(trained, "runs")
    return sorted(map(str, Path("runs").iterdir()))


def test_the_command_compares_all_policies_and_writes_them(cli, runs):
    done = cli("policies", *runs, "--combination", "mie", "--rule", "stopping", "--rule", "agreement")
    assert done.code == 0, done.errors
    assert all(len(line) <= 80 for line in done.out.splitlines())
    assert all(name in done.out for name in ("plain confidence", "mie, stopping", "mie, agreement"))
    assert {path.name for path in Path("policies").iterdir()} == {
        *("policies.csv", "curves.csv", "policies.html", "policies.png", "policies.pdf")
    }
    frame = pd.read_csv("policies/policies.csv")
    assert set(frame["rule"]) == {"shares", "stopping", "agreement"} and set(frame["combination"]) == {"plain", "mie"}
    assert frame["accuracy"].between(0, 100).all() and (frame["seconds"] > 0).all()
    assert "<h1>Comparison of exit policies</h1>" in Path("policies/policies.html").read_text("utf-8")


def test_json_is_all_that_is_printed_and_budgets_are_taken(cli, runs):
    done = cli(
        "policies",
        runs[0],
        "--rule",
        "shares",
        "--combination",
        "plain",
        "--budget",
        "1M",
        "--budget",
        "1000K",
        "--json",
    )
    assert done.code == 0, done.errors
    ((title, rows),) = json.loads(done.out).items()
    assert title.startswith("joint on msdnet-tiny") and [row["budget"] for row in rows] == [1e6]
    assert Path(runs[0], "policies", "policies.csv").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rule", "stoping"], "did you mean stopping?"),
        (["--cost", "time"], "unknown cost 'time'"),
        (["--budget", "2ms"], "expected multiply-adds, such as 40M"),
        (["--budget", "1"], "below the cost of the first exit"),
        (["--budget", "nan"], "budget 'nan' is not a cost"),
        (["--budget", "-5M"], "budget '-5M' is not a cost"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(cli, runs, arguments, words):
    cli("policies", runs[0], *arguments).refused(words)
    assert not Path(runs[0], "policies").exists()
