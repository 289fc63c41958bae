"""`exitkit policies`: every policy against plain confidence, on stored outputs."""

import dataclasses
import json
import shutil
from io import StringIO
from pathlib import Path

import fake_runs
import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

import exitkit
from exitkit.benchmarks.campaign.plan import Plan
from exitkit.benchmarks.report import ReportOptions, collect, print_report, write_report, write_summary
from exitkit.benchmarks.report.comparisons import policy_differences
from exitkit.benchmarks.report.figures import policies_figure, policy_differences_figure
from exitkit.benchmarks.report.policies import Outputs, comparison, curves, default_budgets, measure, policies
from exitkit.benchmarks.report.policy_tables import print_table
from exitkit.benchmarks.report.statistics import holm
from exitkit.errors import UserError
from exitkit.inference.choose import outcome, policies_of_run
from exitkit.inference.combinations import COMBINATIONS
from exitkit.inference.operating_points import most_accurate_within
from exitkit.inference.policy import BASELINE, PolicyName, read_policy
from exitkit.inference.rules import RULES, SCORED
from exitkit.inference.scores import SCORES, confidence
from exitkit.inference.targets import Target
from exitkit.inference.thresholds import budgeted, correct, exit_counts, paper_shares

from toy import FEW, FEW_OPTIONS

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
    assert set(policies(embeddings=True)) == {*made, PolicyName("laplace"), PolicyName("mie-laplace")}
    assert set(policies(names=["all"], embeddings=True)) == set(policies(embeddings=True))


def test_all_names_give_all_policies_and_the_baseline_is_first():
    made = policies(full=True)
    assert made[0] == BASELINE and len(set(made)) == len(made)
    assert {policy.combination for policy in made} == {"plain", *COMBINATIONS}
    assert {policy.rule for policy in made} == set(RULES)
    assert {policy.score for policy in made if policy.rule in SCORED} == set(SCORES)
    assert all(policy.score == "" for policy in made if policy.rule not in SCORED)


def test_names_narrow_the_choice_but_the_baseline_stays():
    made = policies(["mie"], ["margin"], ["shares"])
    assert made == (BASELINE, PolicyName("mie", "margin", "shares"))
    assert policies(["mie"]) == (BASELINE, PolicyName("mie", "confidence", "shares"))
    assert policies([], [], ["jei"]) == (BASELINE, PolicyName("plain", "", "jei"))


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
    for run in measure(noise, [BASELINE, PolicyName("geometric", "confidence", "fitted")]):
        assert abs(run.validation_accuracy.mean() - 0.25) < 0.06


@pytest.mark.parametrize("names", [([], ["margin"], ["agreement"]), ([], ["patience"], ["stopping"])])
def test_a_score_that_no_rule_reads_is_refused(names):
    with pytest.raises(UserError, match="can't use the score"):
        policies(*names)


def test_every_given_rule_and_score_needs_a_partner():
    with pytest.raises(UserError, match=r"^jei can't use the score margin; rules with a score: "):
        policies([], ["margin"], ["jei", "shares"])
    with pytest.raises(UserError, match=r"^stopping and jei can't use the score patience"):
        policies([], ["confidence", "patience"], ["stopping", "jei"])
    assert {str(policy) for policy in policies([], ["margin"], ["shares"])} == {str(BASELINE), "margin"}


def test_a_field_of_a_policy_is_given_once():
    with pytest.raises(UserError, match="has weights twice"):
        read_policy("agreement:weights=linear,weights=cost")


def test_policies_that_miss_a_budget_are_ranked_last_and_times_have_their_unit():
    rows = [("plain", "confidence", "shares", 70.0), ("plain", "", "eenet", np.nan), ("plain", "", "jei", 60.0)]
    frame = pd.DataFrame(
        [
            {
                "combination": c,
                "score": s,
                "rule": r,
                "budget": budget,
                "accuracy": at,
                "difference": 0.0,
                "high": np.nan,
            }
            for c, s, r, low in rows
            for budget, at in ((1.5, low), (150.0, 80.0))
        ]
    ).assign(p_holm=np.nan, falls=1.0, calibration=1.0, seconds=0.1, preferred=lambda f: f["rule"] == "shares")
    console = Console(width=80, record=True, file=StringIO())
    print_table(frame, console, None, "latency")
    text = console.export_text()
    places = [text.index(name) for name in ("confidence", "jei", "eenet")]
    assert places == sorted(places) and "150 ms" in text and "1.5 ms" in text and "K" not in text


def test_a_policy_without_a_point_within_the_budget_has_no_result():
    stored = outputs()
    runs = measure(stored, [BASELINE, PolicyName("plain", "", "eenet")])
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
    assert all(name in done.out for name in ("confidence", "mie+stopping", "mie+agreement"))
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


# In reports


NAMED = ("mean+agreement", "margin")


@pytest.fixture(scope="module")
def reported():
    members = fake_runs.runs()
    return members, collect(members, options=ReportOptions(policy=NAMED), budgets=3)


def test_a_report_has_the_policies_of_every_method(reported):
    members, found = reported
    names = ["confidence", *NAMED]
    for method in ("joint", "ge", "boost_net"):
        assert list(dict.fromkeys(found.policies[found.policies["method"] == method]["policy"])) == names
    run = members[0]
    parts = [(part["logits"], part["labels"]) for part in run.parts.values()]
    chosen = policies(names=NAMED)
    expected = measure(Outputs(*parts, np.array(run.macs, float)), chosen)
    own = collect([run], options=ReportOptions(policy=NAMED), budgets=3)
    budgets = own.policies["budget"].unique()
    table = comparison([expected], budgets)
    np.testing.assert_allclose(own.policies["accuracy_mean"], table["accuracy"])
    np.testing.assert_allclose(own.policies["cost_mean"], table["cost"])
    np.testing.assert_allclose(own.policy_curve["accuracy_mean"], curves([expected])["accuracy"])


def test_a_policy_is_compared_at_the_budgets_of_its_operating_points():
    given = {
        ("confidence", 0): (70.0, 80.0, 90.0),
        ("eenet", 0): (np.nan, 81.0, 92.0),
        ("confidence", 1): (71.0, 82.0, 91.0),
        ("eenet", 1): (np.nan, np.nan, 94.0),
    }
    rows = [
        ("ge", seed, "net", "digits", policy, budget, accuracy)
        for (policy, seed), accuracies in given.items()
        for budget, accuracy in zip((1.0, 2.0, 3.0), accuracies, strict=True)
    ]
    frame = pd.DataFrame(rows, columns=["method", "seed", "backbone", "dataset", "policy", "budget", "accuracy"])
    (row,) = policy_differences(frame).to_dict("records")
    assert (row["policy"], row["budgets"], row["mean"], row["n"]) == ("eenet", 1, 2.5, 2)
    none = frame[(frame["policy"] != "eenet") | (frame["budget"] == 1.0)]
    assert policy_differences(none).empty


def test_differences_of_policies_are_paired_by_seed(reported):
    members, found = reported
    each = []
    for run in members:
        if run.label == "ge":
            table = collect([run], options=ReportOptions(policy=NAMED), budgets=3).policies
            wide = table.pivot(index="budget", columns="policy", values="accuracy_mean")
            each.append((wide["margin"] - wide["confidence"]).mean())
    row = found.policy_differences.set_index(["method", "policy"]).loc[("ge", "margin")]
    expected = stats.ttest_1samp(each, 0)
    assert row["mean"] == pytest.approx(np.mean(each)) and row["n"] == 2
    assert row["p"] == pytest.approx(expected.pvalue)
    np.testing.assert_allclose(found.policy_differences["p_holm"], holm(found.policy_differences["p"]))


@pytest.mark.parametrize("networks", [1, 2])
def test_the_figure_of_differences_has_a_panel_per_method_and_the_best_policy_at_the_top(networks):
    values = {
        ("joint", "margin"): (-1.0, 0.5, 0.2),
        ("joint", "mie"): (2.0, 0.5, 0.01),
        ("ge", "margin"): (1.0, np.nan, np.nan),
        ("ge", "mie"): (-0.5, 2.0, 0.7),
    }
    columns = ["method", "policy", "mean", "low", "high", "p", "p_holm"]
    rows = [(*names, mean, mean - half, mean + half, p, p) for names, (mean, half, p) in values.items()]
    frame = pd.DataFrame(rows, columns=columns).assign(backbone="net", dataset="digits", n=3)
    frame = pd.concat([frame, frame.assign(backbone="ranet")][:networks])
    figure = policy_differences_figure(frame)
    figure.draw_without_rendering()
    named = [f"{method}\n{network} on digits" for network in ("net", "ranet") for method in ("joint", "ge")]
    assert [axes.get_title() for axes in figure.axes] == (["joint", "ge"] if networks == 1 else named)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["mie", "margin"]
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in figure.axes}) == 1
    assert figure.axes[0].get_ylim()[0] > figure.axes[0].get_ylim()[1]
    for axes, method in zip(figure.axes, ["joint", "ge"] * networks, strict=True):
        points = [line for line in axes.lines if len(line.get_xdata()) == 1]
        found = {("mie", "margin")[round(point.get_ydata()[0])]: point for point in points}
        for policy, point in found.items():
            mean, _, p = values[method, policy]
            assert point.get_xdata()[0] == mean and (point.get_markerfacecolor() != "white") == (p < 0.05)
        assert len(points) == 2 and len(found) == 2


def test_four_panels_of_policies_are_two_by_two(reported):
    _, found = reported
    names = ["a", "b", "c", "d"]
    curves = [found.policy_curve[found.policy_curve["method"] == "ge"].assign(method=name) for name in names]
    figure = policies_figure(dataclasses.replace(found, policy_curve=pd.concat(curves)))
    places = [axes.get_subplotspec().get_geometry()[:2] for axes in figure.axes]
    assert places == [(2, 2)] * 4


def test_a_report_without_policies_has_none_of_their_tables(tmp_path):
    plain = collect(fake_runs.runs(), budgets=3)
    assert plain.policies.empty and plain.policy_curve.empty and plain.policy_differences.empty
    assert not [path for path in write_report(plain, tmp_path, formats=("csv", "md", "html")) if "polic" in path.name]


def test_policies_are_in_every_form_of_a_report(reported, tmp_path):
    _, found = reported
    names = {path.name for path in write_report(found, tmp_path)}
    assert names >= {"policies.csv", "policy_curve.csv", "policy_differences.csv", "policies.md", "policies.png"}
    text = (tmp_path / "report.md").read_text("utf-8")
    places = [text.index(part) for part in ("## Exit policies", "](policies.png)", "](policy_differences.png)")]
    assert places == sorted(places) and "\n## " not in text[places[0] + 3 : places[2]]
    assert "mean+agreement" in (tmp_path / "report.md").read_text("utf-8")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count(">difference to confidence (percentage points)</text>") == 3
    assert "Exit policies, boost_net" in page and page.count("<h3>Exit policies</h3>") <= 1
    console = Console(width=80, record=True, file=StringIO())
    print_report(found, console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80 and any("mean+agreement" in line for line in lines)


def test_a_summary_keeps_its_policies_and_refuses_others(reported, tmp_path):
    trained_out = tmp_path / "runs"
    recipe = {"backbone": "msdnet-tiny", "dataset_settings": {"per_class": 30}, "epochs": 1, "device": "cpu"}
    run = exitkit.train(recipe, trained_out)
    options = ReportOptions(policy=("margin",))
    found = collect([run], options=options)
    write_summary(found, [run], tmp_path / "summary")
    (small,) = exitkit.find_runs(tmp_path / "summary")
    pd.testing.assert_frame_equal(collect([small], options=options).policies, found.policies)
    with pytest.raises(UserError, match=r"a summary made with policy margin, .*not mie"):
        collect([small], options=ReportOptions(policy=("mie",)))


def test_a_plan_hands_its_policies_to_the_report():
    plan = Plan.make({"policy": ["mie", "all"], "report": {"points": 9}})
    assert plan.report == {"points": 9, "policy": ["mie", "all"]}
    names = [str(policy) for policy in ReportOptions.make(plan.report).policies()]
    assert names[:2] == ["confidence", "mie"] and set(names) == set(map(str, policies()))
    assert Plan.make({"policy": "mie"}).report == {"policy": ["mie"]}
    with pytest.raises(UserError, match="unknown combination, score or rule 'mies'; did you mean mie"):
        Plan.make({"policy": ["mies"]})


def test_compare_and_report_take_policies(cli, runs):
    done = cli("report", "runs", "--policy", "margin", "--policy", "mean", "--format", "csv")
    assert done.code == 0, done.errors
    assert set(pd.read_csv("runs/report/policies.csv")["policy"]) == {"confidence", "margin", "mean"}
    cli("report", "runs", "--policy", "mies").refused("did you mean mie")
    cli("compare", "--methods", "joint", "--policy", "margn", "--plan").refused("did you mean margin")


# Last-layer Laplace, which reads stored embeddings


def test_laplace_from_evaluation_to_bench_and_report(cli, tmp_path):
    """A run without embeddings names the command that stores them; with them, every command takes the policy."""
    run = exitkit.train({"backbone": "msdnet-tiny", "epochs": 1, "device": "cpu", **FEW}, tmp_path / "runs")
    before = run.outputs("validation")["logits"]
    for words in (("policies", run.path, "--combination", "laplace"), ("bench", run.path, "--policy", "laplace")):
        line = f"has no stored embeddings; store them with: exitkit evaluate {run.path} --embeddings"
        cli(*words).refused(line)
    cli("report", "runs", "--policy", "laplace").refused("has no stored embeddings")
    cli("evaluate", run.path, "--embeddings")
    np.testing.assert_array_equal(run.outputs("validation")["logits"], before)
    for k, head in enumerate(exitkit.load_network(run).heads):
        weight, bias = (part.detach().numpy() for part in (head.classify.weight, head.classify.bias))
        np.testing.assert_allclose(run.embeddings("validation")[k] @ weight.T + bias, before[:, k], atol=1e-4)
    assert run.curvature()["images"] == [80]
    words = ("--combination", "laplace", "--combination", "mie-laplace", "--budget", "100K", "--json")
    (rows,) = json.loads(cli("policies", run.path, *words).out).values()
    assert [row["combination"] for row in rows] == ["plain", "laplace", "mie-laplace"]
    policy = exitkit.ExitPolicy.from_run(run, "mie-laplace", budget="100K")
    (row,) = [row for row in rows if row["combination"] == "mie-laplace"]
    assert outcome(run, policy)["test"]["accuracy"] == pytest.approx(row["accuracy"])
    facts = json.loads(cli("bench", run.path, "--policy", "mie-laplace", "--repeats", "1", "--json").out)
    assert "noise" not in json.dumps(facts)
    cli("export", run.path, "--policy", "laplace", "--int8").refused("--policy laplace reads embeddings")
    words = ("export", run.path, "--policy", "laplace", "--budget", "100K", "--format", "torch-export", "--json")
    written = json.loads(cli(*words, "--out", "out").out)
    (chosen,) = policies_of_run(run, "laplace", [Target.of(budget="100K")])
    assert written["expected"]["validation"] == chosen.validation != outcome(run, chosen.policy)["validation"]
    assert "noise" not in json.dumps(written) and {"default", "100%"} <= {row["name"] for row in written["points"]}
    cli("evaluate", run.path)
    assert not run.has_embeddings() and not list(run.path.glob("embeddings-*"))


def test_compare_stores_embeddings_for_its_policies_and_refuses_methods_with_a_link_before_training(cli, tmp_path):
    words = ("compare", "--methods", "ge", "--seeds", "1", "--epochs", "1", "--launcher", "here", *FEW_OPTIONS)
    cli(*words, "--methods", "boostnet", "--policy", "laplace").refused("boostnet on", "has the logit link BoostedLink")
    assert not list(tmp_path.glob("runs/*/weights.safetensors"))
    done = cli(*words, "--policy", "laplace", "--out", "runs")
    assert "laplace" in done.out
    assert all(run.has_embeddings() for run in exitkit.find_runs("runs"))
