from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
from itertools import pairwise

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from fake_runs import MACS, FakeRun, runs
from rich.console import Console
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, recall_score

from exitkit import ExitPolicy, ExitRule
from exitkit.benchmarks.commands.reproducibility import _table as table_of_runs
from exitkit.benchmarks.report import (
    Context,
    ReportOptions,
    anytime_figure,
    budgeted_figure,
    collect,
    measure,
    print_report,
    write_report,
)
from exitkit.benchmarks.report.comparison import NOT_TRAINED, Missing
from exitkit.benchmarks.report.comparisons import verdicts
from exitkit.benchmarks.report.figures import differences_figure, learning_figure, oracle_figure
from exitkit.benchmarks.report.html import _number as sort_key
from exitkit.benchmarks.report.html import html_report
from exitkit.benchmarks.report.labels import unlike
from exitkit.benchmarks.report.narrow_tables import number, sheets
from exitkit.benchmarks.report.provenance import commands, provenance
from exitkit.benchmarks.report.wide_tables import unit_for, wide_tables, write_costs
from exitkit.cli.options import make_recipe, parse_sets
from exitkit.cli.train import train
from exitkit.errors import Note, UserError
from exitkit.inference.scores import confidence
from exitkit.inference.thresholds import budgeted, correct, exit_counts, share_for_budget
from exitkit.runs.job import resolve
from exitkit.runs.recipe import Recipe, flat_identity

FILES = [f"{kind}.{suffix}" for kind in ("anytime", "budgeted") for suffix in ("csv", "md", "tex", "png", "pdf")]
MORE = [f"{name}.csv" for name in ("curve", "points", "oracle")]
MORE += [f"{name}.{kind}" for name in ("oracle", "differences") for kind in ("png", "pdf")]
MORE += [
    f"{name}.{kind}"
    for name in ("training", "differences", "verdicts", "risk", "calibration", "balanced", "spent")
    for kind in ("csv", "md", "tex")
]
MORE += ["report.md", "report.tex", "report.html"]


def accuracy(run):
    test = run.outputs("test")
    return [100 * np.mean(test["logits"][:, k].argmax(1) == test["labels"]) for k in range(len(run.macs))]


def printed(comparison, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_report(comparison, console)
    return console.file.getvalue()


def test_tables_have_exactly_the_columns_promised():
    found = collect(runs(), budgets=5)
    same, over = ["method", "backbone", "dataset"], ["accuracy_mean", "accuracy_sd", "n"]
    assert list(found.anytime) == [*same, "exit", "papers", "macs", *over]
    assert list(found.budgeted) == [*same, "budget", "cost_mean", *over]
    assert list(found.curve) == [*same, "point", "cost_mean", *over]
    assert [len(found.anytime), len(found.budgeted), len(found.curve)] == [3 * 4, 3 * 5, 3 * 39]
    for frame in (found.anytime, found.budgeted, found.curve):
        assert list(frame["method"].unique()) == ["joint", "ge", "boost_net"]
        assert (frame["n"] == 2).all()
    assert found.anytime["macs"].tolist() == [*MACS] * 3
    assert found.anytime["papers"].tolist() == [m + 10 for m in MACS] * 3
    assert found.anytime[["exit", "papers", "macs", "n"]].dtypes.eq(np.int64).all()
    assert found.curve["point"].tolist() == [*range(1, 40)] * 3


def test_anytime_is_the_mean_and_the_sample_sd_over_seeds():
    given = runs(seeds=3)
    found = collect(given).anytime
    mine = np.array([accuracy(run) for run in given if run.label == "ge"])
    row = found[found["method"] == "ge"]
    np.testing.assert_allclose(row["accuracy_mean"], mine.mean(0))
    np.testing.assert_allclose(row["accuracy_sd"], np.sqrt(((mine - mine.mean(0)) ** 2).sum(0) / 2))


def test_balanced_accuracy_stands_beside_what_ignores_the_image_and_nothing_learned_is_said(tmp_path):
    given = runs(("joint", "ge"), n=600)
    for run in given:
        if run.label == "ge":
            run.parts["test"]["logits"][:, :2] = np.eye(10)[3]  # its first two exits always answer 3
    found = collect(given, options=ReportOptions(classes=True))
    for run in given[:1]:
        test = run.outputs("test")
        recalls = [recall_score(test["labels"], test["logits"][:, k].argmax(1), average=None) for k in range(4)]
    several = [[balanced_accuracy_score(r.parts["test"]["labels"], r.parts["test"]["logits"][:, k].argmax(1))
                for k in range(4)] for r in given if r.label == "joint"]  # fmt: skip
    joint = found.balanced[found.balanced["method"] == "joint"]
    np.testing.assert_allclose(joint["balanced_mean"], 100 * np.mean(several, 0))
    np.testing.assert_allclose(joint["balanced_sd"], 100 * np.std(several, 0, ddof=1))
    assert found.balanced["chance"].eq(10).all() and joint["learned"].eq(1).all()
    majority = np.mean([np.bincount(run.parts["test"]["labels"]).max() / 6 for run in given[::2]])
    assert found.balanced["majority"].iloc[0] == pytest.approx(majority)
    assert found.balanced[found.balanced["method"] == "ge"]["learned"].tolist() == [0, 0, 1, 1]
    note = "tiny_net on digits: no better than chance (balanced accuracy, in all or some seeds): ge, exit 1, 2"
    one = collect(given[:1], options=ReportOptions(classes=True)).recall
    for exit, recall in enumerate(recalls, 1):
        np.testing.assert_allclose(one[one["exit"] == exit]["recall_mean"], 100 * recall)
    assert one["class"].tolist()[:2] == ["class 0", "class 1"]
    write_report(found, tmp_path)
    always = f"has an accuracy of {found.balanced['majority'].mean():.2f} % and a balanced accuracy of 10.00 %"
    for text in (
        " ".join(printed(found, 80).split()),
        *((tmp_path / name).read_text() for name in ("report.md", "report.html")),
        ((tmp_path / "report.tex").read_text() + (tmp_path / "balanced.tex").read_text()).replace("\\", ""),
    ):
        assert note in text and always in text
    assert "| class 0 |" in (tmp_path / "recall.md").read_text()
    assert not len(collect(given).recall) and "Recall" not in printed(collect(given), 80)


def test_one_seed_has_no_sd(tmp_path):
    found = collect(runs(seeds=1))
    for frame in (found.anytime, found.budgeted, found.curve):
        assert frame["accuracy_sd"].isna().all() and (frame["n"] == 1).all()
    write_report(found, tmp_path)
    assert ",,1" in (tmp_path / "anytime.csv").read_text().splitlines()[1]
    for text in (
        (tmp_path / "anytime.md").read_text(),
        (tmp_path / "budgeted.tex").read_text(),
        printed(found, 90),
    ):
        assert "nan" not in text and "±" not in text and "pm" not in text


def test_budgets_are_common_even_and_inside():
    given = [*runs(("joint",)), *runs(("wide",), macs=(200_000, 300_000, 390_000))]
    budgets = collect(given, budgets=4).budgeted.groupby("method")["budget"].apply(list)
    np.testing.assert_allclose(budgets["joint"], np.linspace(200_000, 390_000, 6)[1:-1])
    assert budgets["joint"] == budgets["wide"]


def test_budgeted_uses_validation_thresholds_and_realised_cost():
    given = runs(("joint",), seeds=2)
    found = collect(given, budgets=3).budgeted
    results = []
    for run in given:
        val, test = run.outputs("validation"), run.outputs("test")
        counts = exit_counts(200, 4, share_for_budget(MACS, found["budget"]))
        hits = correct(test["logits"], test["labels"])
        results.append(budgeted(confidence(val["logits"]), confidence(test["logits"]), hits, MACS, counts))
    np.testing.assert_allclose(found["cost_mean"], np.mean([r.cost for r in results], axis=0))
    np.testing.assert_allclose(found["accuracy_mean"], 100 * np.mean([r.accuracy for r in results], axis=0))
    np.testing.assert_allclose(found["accuracy_sd"], 100 * np.std([r.accuracy for r in results], axis=0, ddof=1))
    assert (abs(found["cost_mean"] / found["budget"] - 1) < 0.15).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: [], "no finished runs"),
        (lambda: [FakeRun("ge", 1), FakeRun("joint", 1), FakeRun("ge", 1)], "both ge with seed 1"),
        (lambda: [FakeRun("ge", 1), FakeRun("joint", 1, macs=(10, 20))], "no common budget"),
        (lambda: [FakeRun("ge", 1), FakeRun("joint", 1, n=299)], "different samples"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(given, message):
    with pytest.raises(UserError, match=message) as error:
        collect(given())
    assert "\n" not in str(error.value)


def test_a_collapsed_run_counts_with_its_accuracy_and_leaves_the_areas_of_others():
    sound = collect(runs(("joint", "ge"))).differences
    dead = FakeRun("boostnet", 0)
    for part in dead.parts.values():
        part["logits"][:] = 0
    with_dead = collect([*runs(("joint", "ge")), dead]).differences

    def area(rows, method):
        return rows[(rows["measure"] == "area") & (rows["method"] == method)].iloc[0]

    assert area(with_dead, "ge")["mean"] == area(sound, "ge")["mean"] and area(with_dead, "ge")["n"] == 2
    assert area(with_dead, "boostnet")["mean"] < -50  # 10 % at every cost


def test_networks_with_one_exit_are_reported(tmp_path):
    found = collect([FakeRun(method, seed, macs=(1000,)) for method in ("joint", "ge") for seed in (0, 1)])
    write_report(found, tmp_path)
    assert found.budgeted["budget"].unique().tolist() == [1000]
    assert found.budgeted["accuracy_mean"].tolist() == found.anytime["accuracy_mean"].tolist()


def test_a_lead_on_the_common_seeds_that_is_negative_is_no_lead():
    levels = {"joint": {0: 60.0, 1: 60.1, 2: 60.2, 3: 90.0}, "ge": {0: 61.0, 1: 61.11, 2: 61.2, 4: 50.0}}
    rows = [
        {"method": method, "seed": seed, "backbone": "net", "dataset": "digits", "exit": 1, "accuracy": accuracy}
        for method, seeds in levels.items()
        for seed, accuracy in seeds.items()
    ]
    anytime = pd.DataFrame(rows)
    for line in verdicts(anytime, anytime.rename(columns={"exit": "budget"})).to_dict("records"):
        assert line["best"] == "joint" and line["lead"] < 0 and line["p_holm"] < 0.01 and line["verdict"] == "no"


def test_same_method_and_seed_on_another_dataset_is_another_group(tmp_path):
    found = collect([*runs(), *runs(("ge",), dataset="other", macs=(2_000_000, 15_000_000))])
    assert found.anytime.groupby("dataset", sort=False).size().to_dict() == {"digits": 12, "other": 2}
    write_report(found, tmp_path)
    text = (tmp_path / "anytime.tex").read_text()
    assert text.count(r"\toprule") == text.count(r"\caption") == 2
    assert "exit 2 (15.00 M)" in (tmp_path / "anytime.md").read_text()
    assert len(anytime_figure(found).axes) == len(budgeted_figure(found).axes) == 2


def test_report_writes_every_file_and_csv_holds_the_numbers(tmp_path):
    found = collect(runs())
    folder = tmp_path / "new" / "report"
    assert sorted(path.name for path in write_report(found, folder)) == sorted([*FILES, *MORE])
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, *MORE])
    for name in ("anytime", "budgeted", "curve", "training", "differences"):
        pd.testing.assert_frame_equal(pd.read_csv(folder / f"{name}.csv"), getattr(found, name))


def test_tables_have_the_same_title_in_all_formats(tmp_path):
    found = collect(runs())
    write_report(found, tmp_path, formats=("md", "html"))
    text = (tmp_path / "report.md").read_text()
    headings = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    shown, page = printed(found, 100), (tmp_path / "report.html").read_text()
    tables = [heading for heading in headings if heading != "How this report was made"]
    assert "Best methods" in tables and not [title for title in tables if title not in page]
    assert [title for title in tables if title not in shown] == ["Calibration"]  # not printed


def test_what_training_cost_is_told_beside_the_baselines(tmp_path):
    found = collect(runs(("ge", "joint", "boost_net")))
    table = found.training.set_index("method")
    assert table.seconds_mean.to_dict() == {"ge": 20.5, "joint": 50.5, "boost_net": 90.5}
    assert table.time_relative.to_dict() == pytest.approx({"ge": 20.5 / 50.5, "joint": 1, "boost_net": 90.5 / 50.5})
    assert table.memory_relative["ge"] == pytest.approx(102 / 105) and (table.n == 2).all()
    write_report(found, tmp_path)
    assert "| boost_net |     90.5 ± 0.7 |" in (tmp_path / "training.md").read_text()
    assert r"boost\_net & 90.5 $\pm$ 0.7 & 1.79 &" in (tmp_path / "training.tex").read_text()
    assert "ratios to joint" in printed(found, 100)
    alone = collect(runs(("ge", "boost_net"))).training.set_index("method")
    assert alone.time_relative["ge"] == 1


def test_differences_are_paired_by_seed_and_only_seeds_of_both_count(tmp_path):
    members = [*runs(("joint", "ge"), seeds=3), FakeRun("boost_net", 0), FakeRun("boost_net", 5)]
    found = collect(members)
    table = found.differences.set_index(["method", "measure"])
    pairs = [[accuracy(run)[1] for run in members if run.label == name] for name in ("ge", "joint")]
    known = stats.ttest_rel(*pairs)
    row = table.loc[("ge", "exit 2")]
    assert (row["mean"], row["p"], row["n"]) == pytest.approx((np.subtract(*pairs).mean(), known.pvalue, 3))
    assert row["low"] == pytest.approx(known.confidence_interval(0.95).low)
    assert table.loc[("boost_net", "exit 2"), "n"] == 1 and np.isnan(table.loc[("boost_net", "exit 2"), "p"])
    curve = found.curve[found.curve.method == "ge"]
    assert 0 < abs(table.loc[("ge", "area"), "mean"]) < curve.accuracy_mean.max()
    assert set(found.differences.measure) == {"exit 1", "exit 2", "exit 3", "exit 4", "area"}
    write_report(found, tmp_path)
    written = (tmp_path / "differences.md").read_text()
    assert f"{row['mean']:+.2f}".replace("-", "−") in written and " -" not in written.replace(":-", "").split("|", 1)[1]
    assert "Difference to joint" in printed(found, 100)


PAPERS = {"backbone": "msdnet-cifar-k10", "dataset": "cifar100", "macs": tuple(range(10**7, 11 * 10**7, 10**7))}


def test_ours_stands_beside_the_papers_and_another_schedule_is_said(tmp_path):
    found = collect(runs(("joint", "ge", "boostnet"), **PAPERS))
    assert set(found.published.method) == {"ge", "boostnet"}  # that paper has no joint training
    row = found.published[(found.published.method == "boostnet") & (found.published.exit == 3)].iloc[0]
    assert (row.paper, row.table, row.published, row.published_epochs, row.epochs) == (
        "boostnet",
        "table1",
        72.34,
        300,
        3,
    )
    assert {f"published.{kind}" for kind in ("csv", "md", "tex")} <= {
        path.name for path in write_report(found, tmp_path)
    }
    text = (tmp_path / "published.md").read_text()
    assert "NOT COMPARABLE: our schedule differs from the paper's" in text and "| boostnet | boostnet, table1 |" in text
    assert "72.34" in printed(found, 200)
    few = collect(runs(("ge",), **PAPERS, **{"dataset.per_class": "150"}))
    assert few.published.empty


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "NOT COMPARABLE: our schedule differs from"),
        ({"dataset.per_class": "150"}, "NOT COMPARABLE: our data and schedule differ from"),
        ({"dataset.imbalance": "20.0"}, "NOT COMPARABLE: our data and schedule differ from"),
        ({"backbone.growth": "4"}, "NOT COMPARABLE: our network and schedule differ from"),
        ({"backbone.growth": "6", "dataset.per_class": "null"}, "NOT COMPARABLE: our schedule differs from"),
    ],
)
def test_a_network_or_data_of_the_papers_name_but_not_its_fields_is_said(fields, said, tmp_path):
    given = runs(("ge", "boostnet"), **PAPERS, **fields)
    stands_for = {run.path.name: {"dataset": "cifar100"} for run in given}
    write_report(collect(given, context=Context(stands_for=stands_for)), tmp_path, formats=["md"])
    assert said in (tmp_path / "published.md").read_text()


def test_what_all_runs_have_in_common_is_told_and_what_differs_is_told_once(tmp_path):
    given = [
        *runs(**{"dataset.per_class": "40"}, batch_size="64"),
        *runs(("l2w",), **{"dataset.per_class": "40"}, batch_size="128"),
    ]
    given += [FakeRun(run.label, run.recipe.seed, dataset="other", **run.identity_given) for run in given]
    write_report(collect(given), tmp_path, formats=["md", "latex"])
    text = (tmp_path / "report.md").read_text()
    assert "Shared settings: tiny_net; digits with per_class=40; epochs=3.\n" in text
    assert "Shared settings: tiny_net; other with per_class=40; epochs=3.\n" in text
    assert text.count("Note: batch_size differs: joint 64, ge 64, boost_net 64, l2w 128.") == 1


def test_many_methods_of_one_value_are_not_named_one_by_one():
    labels = [*"abcdef", "long"]
    identities = [{"method": label, "epochs": "48" if label == "long" else "8"} for label in labels]
    assert unlike(identities, labels) == ["epochs differs: long 48, all others 8"]
    assert unlike(identities[3:], labels[3:]) == ["epochs differs: d 8, e 8, f 8, long 48"]


def test_no_minus_stands_before_a_zero():
    assert [number(value, 2, "+") for value in (-0.001, 0.001, -0.005001, np.nan)] == ["+0.00", "+0.00", "-0.01", "–"]


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no TeX")
def test_the_latex_compiles_as_it_is_and_nothing_is_too_wide(tmp_path):
    names = ("joint", "ge_#1", "50%_of<all>", "a ~ long ^ name with $ and & and " * 3)
    given = [*runs(names), *runs(("ge",), **PAPERS, seeds=1)]
    write_report(collect(given, context=Context(title="A & B", note="50 % of {it} \\ all", missing=[])), tmp_path)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    assert "Overfull" not in done.stdout and "undefined" not in done.stdout.lower()


def test_no_threshold_depends_on_a_test_label():
    for options in (ReportOptions(), ReportOptions(calibrated=True, hold=True), ReportOptions(rule="patience")):
        plain, poisoned = runs(("joint", "ge")), runs(("joint", "ge"))
        for run in poisoned:
            run.parts["test"]["labels"] = 9 - run.parts["test"]["labels"]
        a, b = (collect(given, options=options) for given in (plain, poisoned))
        assert not np.allclose(a.anytime.accuracy_mean, b.anytime.accuracy_mean)
        chosen = [c for c in a.points if c.startswith(("threshold", "share", "cost", "method", "point"))]
        pd.testing.assert_frame_equal(a.points[chosen], b.points[chosen])
        for name, column in (
            ("budgeted", "cost_mean"),
            ("risk", "cost_mean"),
            ("risk", "found"),
            ("curve", "cost_mean"),
        ):
            pd.testing.assert_series_equal(getattr(a, name)[column], getattr(b, name)[column])


@pytest.mark.parametrize("options", [{"calibrated": True}, {"rule": "patience", "hold": True}], ids=str)
def test_no_candidate_of_risk_control_depends_on_a_label_that_it_is_tested_with(options, monkeypatch):
    monkeypatch.setattr(measure, "risk_controlled", lambda full, leaving, *_: len(leaving) // 2)
    plain, poisoned = runs(("joint",)), runs(("joint",))
    for run in poisoned:
        run.parts["validation"]["labels"][1::2] = 9 - run.parts["validation"]["labels"][1::2]
    found = [collect(given, options=ReportOptions(**options)).risk["cost_mean"] for given in (plain, poisoned)]
    pd.testing.assert_series_equal(*found)


def test_a_legend_of_many_lines_takes_nothing_from_the_panels():
    def panel(names):
        figure = anytime_figure(collect(runs(names)))
        figure.draw_without_rendering()
        return figure.axes[0].get_window_extent().height / figure.dpi

    few, many = panel(("joint", "ge")), panel(tuple(f"a long name of a method {n}" for n in range(6)))
    assert many > 0.9 * few


def test_a_method_alone_has_nothing_to_differ_from(tmp_path):
    found = collect(runs(("joint",), seeds=1))
    assert found.differences.empty
    write_report(found, tmp_path)
    assert "Difference" not in printed(found, 100)


def test_report_is_the_same_bytes_twice(tmp_path):
    found = collect(runs())
    for folder in ("a", "b"):
        write_report(found, tmp_path / folder)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_markdown_is_one_wide_table(tmp_path):
    found = collect(runs())
    write_report(found, tmp_path)
    lines = [x for x in (tmp_path / "anytime.md").read_text().splitlines() if x.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    costs = ["exit 1 (0.12 M)", "exit 2 (0.25 M)", "exit 3 (0.32 M)", "exit 4 (0.40 M)"]
    assert rows[0] == ["method", *costs, "n"]
    assert [row[0] for row in rows[2:]] == ["joint", "ge", "boost_net"]
    means = found.anytime.pivot(index="method", columns="exit", values="accuracy_mean")
    for k in range(1, 5):
        best = {row[0] for row in rows[2:] if row[k].startswith("**")}
        assert means[k].idxmax() in best
        for row in rows[2:]:
            assert float(row[k].strip("*").split(" ± ")[0]) == pytest.approx(means.loc[row[0], k], abs=0.051)
    budgets = (tmp_path / "budgeted.md").read_text().splitlines()[2]
    assert budgets.count("|") == 9 + 3


def test_latex_has_booktabs_and_one_escaped_row_a_method(tmp_path):
    write_report(collect(runs()), tmp_path)
    for kind, columns in (("anytime", 4), ("budgeted", 9)):
        text = (tmp_path / f"{kind}.tex").read_text()
        assert text.startswith("% needs \\usepackage{booktabs}")
        body = text.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
        assert [row.split(" & ")[0] for row in body] == ["joint", "ge", r"boost\_net"]
        assert all(row.count(" & ") == columns + 1 for row in body)
        assert r"\textbf{" in text and r"tiny\_net" in text and "±" not in text


def test_figures_show_every_point(tmp_path):
    found = collect(runs())
    axes = anytime_figure(found).axes[0]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 4 and line.get_linestyle() != "None"]
    assert len(lines) == 3
    np.testing.assert_allclose(lines[0].get_xdata().astype(float), np.array(MACS) / 1e6)
    low, high = axes.get_xlim()
    assert 0 < low < MACS[0] / 1e6 and MACS[-1] / 1e6 < high < 0.5
    assert axes.get_ylim()[0] < found.anytime["accuracy_mean"].min() < axes.get_ylim()[1] <= 100
    assert axes.get_xlabel() == "multiply-adds (M)"
    for line, (method, curve) in zip(
        budgeted_figure(found).axes[0].lines, found.curve.groupby("method", sort=False), strict=True
    ):
        costs, budgets = line.get_xdata() * 1e6, found.budgeted[found.budgeted.method == method]
        assert line.get_label() == method and set(curve.cost_mean.round(3)) <= set(costs.astype(float).round(3))
        # The curve exists wherever the table has a budget.
        assert costs.min() <= budgets.cost_mean.min() and costs.max() >= budgets.cost_mean.max() - 1e-6
    write_report(found, tmp_path)
    for kind in ("anytime", "budgeted"):
        image = matplotlib.image.imread(tmp_path / f"{kind}.png")
        assert image.shape[1] >= 1000 and image[..., :3].std() > 0.02
        pdf = (tmp_path / f"{kind}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF") and b"CreationDate" not in pdf and b"/Type3" not in pdf


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_printed_tables_fit_and_keep_every_number(width):
    found = collect(runs())
    text = printed(found, width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for kind in ("Anytime", "Budgeted"):
        assert kind in text
    for mean in found.budgeted["accuracy_mean"]:
        assert any(f"{mean:.{digits}f}" in text for digits in (1, 2))
    assert text.count("boost_net") >= 2 and "2 seeds" in text


def test_a_file_that_fails_leaves_the_old_one_whole(tmp_path, monkeypatch):
    found = collect(runs())
    write_report(found, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    plain = pd.DataFrame.to_csv

    def torn(frame, path, **kwargs):
        plain(frame.head(1), path, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", torn)
    with pytest.raises(UserError, match="disk is full"):
        write_report(found, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken"):
        write_report(collect(runs()), tmp_path / "taken")


def test_a_title_stays_over_its_own_panel():
    long = "ranet scales=1,2,2,3 growth_factors=4,2,2,1 bottleneck_factors=4,2,2,1"
    figure = anytime_figure(collect([*runs(seeds=1, backbone=long), *runs(seeds=1, backbone=long + ",9")]))
    figure.draw_without_rendering()
    left, right = (axes.title.get_window_extent() for axes in figure.axes)
    assert left.x1 < right.x0 and left.x0 >= 0 and right.x1 <= figure.bbox.x1


def test_titles_of_learning_curves_stay_in_the_figure_and_over_their_panels():
    groups = ["fashion-mnist validation=1000 per_class=100 thin_validation=none", "fashion-mnist per_class=500"]
    rows = [
        ("joint", "msdnet", group, number, epoch, 50.0 + epoch)
        for group in groups
        for number in (1, 2, 3, 4)
        for epoch in (1, 2)
    ]
    columns = ["method", "backbone", "dataset", "exit", "epoch", "validation_accuracy_mean"]
    figure = learning_figure(pd.DataFrame(rows, columns=columns))
    figure.draw_without_rendering()
    titles = [axes.title.get_window_extent() for axes in figure.axes]
    assert all(title.x0 >= 0 and title.x1 <= figure.bbox.x1 for title in titles)
    assert all(left.x1 < right.x0 for row in (titles[:4], titles[4:]) for left, right in pairwise(row))


def test_a_method_with_fewer_seeds_is_not_called_the_best():
    lucky = FakeRun("ge", 0)
    for part in lucky.parts.values():
        part["logits"] = 9 * np.eye(10, dtype=np.float32)[part["labels"]][:, None] * np.ones((1, 4, 1), np.float32)
    complete = [FakeRun(name, seed) for name in ("joint", "boost") for seed in range(3)]
    comparison = collect([*complete, lucky])
    for kind in ("anytime", "budgeted"):
        (table,) = wide_tables(comparison, kind)
        assert "column among the methods with the most seeds are bold" in table.caption
        marked = {name: sum(cell.best for cell in cells) for name, cells in table.cells.items()}
        assert marked["ge"] == 0 and marked["joint"] + marked["boost"] >= len(table.heads)
    assert set(comparison.verdicts["best"]) | set(comparison.verdicts["second"]) == {"joint", "boost"}
    (whole,) = wide_tables(collect([FakeRun(name, 0) for name in ("joint", "ge")]), "anytime")
    assert "among" not in whole.caption
    one = json.dumps([1.0, 0.0, 0.0, 0.0])
    alone = [FakeRun("alone", seed, **{"method.weights": one}) for seed in range(3)]
    (static,) = [sheet for sheet in sheets(collect([*complete, lucky, *alone])) if sheet.kind == "static"]
    assert static.rows[0][3].mean in ("joint", "boost") and "(of those with the most seeds)" in static.caption
    (balanced,) = [sheet for sheet in sheets(comparison) if sheet.kind == "balanced"]
    marked = {row[0].mean: any(cell.best for cell in row) for row in balanced.rows}
    assert not marked["ge"] and (marked["joint"] or marked["boost"]) and "the most seeds" in balanced.caption


def test_a_budget_that_a_method_cannot_reach_is_not_a_missing_seed():
    members = [FakeRun("joint", seed, macs=(1_000, 2_000, 3_000, 4_000)) for seed in range(2)]
    members += [FakeRun("costly", seed, macs=(2_000, 3_000, 4_000, 5_000)) for seed in range(2)]
    comparison = collect(members, options=ReportOptions(budgets=("1.5K", "3K")))
    (table,) = wide_tables(comparison, "budgeted")
    assert table.cells["costly"][0].mean == "–" and table.cells["joint"][0].best
    assert "among" not in table.caption and table.seeds == {"joint": 2, "costly": 2}


def test_a_static_network_with_fewer_seeds_has_no_row_in_the_wide_tables():
    one = json.dumps([1.0, 0.0, 0.0, 0.0])
    members = [*(FakeRun(name, seed) for name in ("joint", "ge") for seed in range(3))]
    found = collect([*members, FakeRun("alone", 0, **{"method.weights": one})])
    (table,) = wide_tables(found, "anytime")
    assert list(table.cells) == ["joint", "ge"] and found.missing.empty


def test_static_networks_stand_beside_the_best_method_at_their_exit(tmp_path):
    alone = {k: json.dumps([float(k == one) for one in range(4)]) for k in (0, 2)}
    given = [*runs(), *(FakeRun("alone", seed, **{"method.weights": alone[k]}) for seed in (0, 1) for k in alone)]
    found = collect(given)
    assert "alone" not in set(found.anytime["method"]) and found.static["exit"].tolist() == [1, 3]
    (sheet,) = [sheet for sheet in sheets(found) if sheet.kind == "static"]
    for row, exit in zip(sheet.rows, (1, 3), strict=True):
        rows = found.anytime[found.anytime["exit"] == exit].sort_values("accuracy_mean")
        mine = np.mean([accuracy(run)[exit - 1] for run in given if run.label == "alone"])
        best = rows.iloc[-1]
        assert row[0].mean == f"exit {exit}" and row[2].mean == f"{mine:.2f}"
        assert [row[3].mean, row[4].mean, row[5].mean] == [best["method"], f"{best['accuracy_mean']:.2f}", "2"]
    write_report(found, tmp_path, formats=["md", "csv", "latex"])
    assert "trained with this exit only" in (tmp_path / "report.md").read_text() and (tmp_path / "static.csv").exists()


def test_static_networks_alone_have_a_row_each(tmp_path):
    alone = {k: json.dumps([float(k == one) for one in range(4)]) for k in (0, 2)}
    given = [FakeRun(f"alone{k}", seed, **{"method.weights": alone[k]}) for seed in (0, 1) for k in alone]
    for run in given:
        run.identity["method"] = json.dumps("joint")
    found = collect(given)
    assert list(dict.fromkeys(found.anytime["method"])) == ["static, exit 1", "static, exit 3"]
    assert set(found.anytime["n"]) == {2} and len(found.static) == 2
    write_report(found, tmp_path, formats=["md", "html"])


def test_static_networks_have_no_row_in_the_document_of_all_runs():
    one = json.dumps([1.0, 0.0, 0.0, 0.0])
    members = [*runs(("joint", "ge")), *(FakeRun("alone", seed, **{"method.weights": one}) for seed in (0, 1))]
    text = table_of_runs(collect(members), members)
    assert "| joint" in text and "| ge" in text and "static" not in text and "alone" not in text


def test_an_unfinished_static_network_changes_no_name_and_has_no_row():
    one = json.dumps([1.0, 0.0, 0.0, 0.0])
    members = [*runs(("joint",), **{"method.weights": "null"}), *runs(("ge",))]
    identity = {**members[0].identity, "method.weights": one, "seed": "7"}
    missing = [Missing(identity, "failed: the disk is full"), Missing(identity | {"seed": "8"}, NOT_TRAINED)]
    found = collect(members, context=Context(missing=missing))
    (table,) = wide_tables(found, "anytime")
    assert list(table.cells) == ["joint", "ge"] and table.missing == {} and "Missing" not in table.caption
    assert set(found.missing["method"]) == {"static"}


def test_networks_that_are_not_combined_do_not_shorten_the_curves_of_others():
    small, large = (1_000, 2_000, 3_000, 4_000), (2_000, 4_000, 6_000, 8_000)
    both = [FakeRun("ge", 0, backbone=f"msdnet-{size}", macs=m) for size, m in (("a", small), ("b", large))]
    alone = FakeRun("joint", 0, backbone="msdnet-b", macs=large)
    found, other = collect([*both, alone]).stitched, collect(both).stitched
    assert set(found["method"]) == {"ge"} and len(other) > 0
    pd.testing.assert_frame_equal(found.reset_index(drop=True), other.reset_index(drop=True))


def test_cells_with_units_are_sorted_as_numbers():
    texts = {"1,000": 1000, "200": 200, "12.3 M": 12.3e6, "1.2 G": 1.2e9, "+0.42*": 0.42, "1.52 ms": 1.52, "–": None}
    assert {text: sort_key(text) for text in texts} == pytest.approx(texts)


def test_a_budget_below_a_first_exit_is_missing_there(tmp_path):
    small = [FakeRun("ge", seed, backbone="small_net", macs=(1_000, 2_000, 3_000, 4_000)) for seed in (0, 1)]
    nowhere = collect(runs(), options=ReportOptions(budgets=("1K",)))
    assert nowhere.budgeted["accuracy_mean"].isna().all() and len(nowhere.budgeted) == len(runs()) / 2
    found = collect([*runs(), *small], options=ReportOptions(budgets=("2K",)))
    assert set(found.budgeted.dropna()["backbone"]) == {"small_net"}
    write_report(found, tmp_path, formats=["md"])
    rows = [line for line in (tmp_path / "budgeted.md").read_text().splitlines() if line.startswith("| joint ")]
    assert rows and all("–" in row and "**" not in row for row in rows)


@pytest.mark.parametrize(
    ("costs", "unit", "texts"),
    [
        ([40e3, 20e6], "M", ["0.04", "20.00"]),
        ([1e3, 20e6], "M", ["0.001", "20.000"]),
        ([123_456, 401_777], "M", ["0.12", "0.40"]),
        ([28e3, 900e3], "K", ["28.0", "900.0"]),
        ([1e3, 9.5e6], "K", ["1.00", "9500.00"]),
        ([], "", []),
    ],
)
def test_costs_are_written_in_the_unit_that_suits_least_and_greatest(costs, unit, texts):
    assert unit_for(costs)[0] == unit and write_costs(costs) == texts


def test_milliseconds_are_written_with_enough_digits_to_differ_and_without_exponents():
    assert write_costs([10.12, 10.14, 10.3], in_time=True) == ["10.12", "10.14", "10.30"]
    assert write_costs([1.234, 15.6], in_time=True) == ["1.23", "15.60"]
    assert write_costs([0.0123, 0.5], in_time=True) == ["0.0123", "0.5000"]
    assert write_costs([1234.0, 2345.0], in_time=True) == ["1234", "2345"]


def test_a_baseline_that_is_asked_for_has_to_be_there(cli, monkeypatch):
    written = []
    monkeypatch.setattr("exitkit.runs.table.find_runs", lambda folder: runs(("joint", "ge"), seeds=1))
    monkeypatch.setattr("exitkit.benchmarks.report.write_report", lambda *_, **__: written.append(1) or [])
    cli("report", "--baseline", "gee").refused("unknown baseline 'gee'; did you mean ge?")
    assert not written
    assert "Difference to ge" in cli("report", "--baseline", "ge").out and written


def level(method, seed, less=0):
    """A run that answers as joint does, but for so many test images that it gets wrong besides, at every exit."""
    run, joint = FakeRun(method, seed), FakeRun("joint", seed)
    run.parts = {part: {name: array.copy() for name, array in arrays.items()} for part, arrays in joint.parts.items()}
    test = run.parts["test"]
    right = np.flatnonzero((test["logits"].argmax(2) == test["labels"][:, None]).all(1))[:less]
    test["logits"][right] *= -1
    return run


def verdicts_of(given):
    (sheet,) = [sheet for sheet in sheets(collect(given)) if sheet.kind == "verdicts"]
    return sheet


def test_a_tie_is_nobodys_win_and_what_is_not_known_is_explained():
    pairs = [runs(("joint",)), [level("ge", seed) for seed in (0, 1)]]
    sheet = verdicts_of([run for each in pairs for run in each])
    assert {(row[1].mean, row[3].mean, row[4].mean) for row in sheet.rows} == {("joint, ge (tie)", "–", "0.00")}
    assert "not known" not in sheet.caption and {row[5].mean for row in sheet.rows} == {"no"}
    whole = [*pairs[0], *(level(name, seed) for name in ("one", "two", "three") for seed in (0, 1))]
    assert verdicts_of(whole).rows[0][1].mean == "4 methods (tie)"
    same = [level("joint", 0), *(level(name, 0) for name in ("ge", "few"))]
    for run, seed in ((level("joint", 0), 1), (level("ge", 0), 1)):
        run.recipe.seed, run.identity = seed, {**run.identity, "seed": str(seed)}
        same.append(run)
    assert verdicts_of(same).rows[0][1].mean == "joint, ge (tie)"  # few has one seed

    sheet = verdicts_of([*runs(("joint",)), *(level("ge", seed, less=3) for seed in (0, 1))])  # always by one point
    row = sheet.rows[0]
    assert [row[1].mean, row[3].mean, row[4].mean, row[5].mean] == ["joint", "ge", "1.00", "not known"]
    assert (
        "not known: no interval can be computed, because there is one seed or the difference is the same"
        in sheet.caption
    )
    assert "not known: " in verdicts_of(runs(seeds=1)).caption


def test_the_lead_says_of_how_many_images_and_crosses_are_told_where_they_are(tmp_path):
    given = [*runs(), *runs(("ge",), dataset="other", macs=(2_000_000, 15_000_000), n=299)]
    write_report(collect(given), tmp_path, formats=["md", "latex", "html", "png", "pdf"])
    for kind in ("md", "tex", "html"):
        text = (tmp_path / f"report.{kind}").read_text()
        assert "digits: 1,234 training, 200 validation and 300 test images of 10 classes." in text
        assert "other: 1,234 training, 200 validation and 299 test images of 10 classes." in text
        assert "one sd over seeds." in text and "crosses" not in text
    alone = json.dumps([0.0, 0.0, 1.0, 0.0])
    given += [FakeRun("alone", seed, **{"method.weights": alone}) for seed in (0, 1)]
    write_report(collect(given), tmp_path, formats=["md", "html", "png"])
    assert (tmp_path / "report.md").read_text().count("; crosses: static networks.") == 2
    page = (tmp_path / "report.html").read_text()
    assert page.count("; crosses: static networks.") == 2 and page.count("one sd over seeds.") == 1
    for run in given:
        run.training_images = lambda: 0  # of runs whose split is not there
    write_report(collect(given[:6]), tmp_path, formats=["md"])
    assert "digits: 200 validation and 300 test images of 10 classes." in (tmp_path / "report.md").read_text()


def test_the_legend_of_many_methods_is_beside_the_panel():
    figure = anytime_figure(collect([FakeRun(f"a method with a long name {n}", 0) for n in range(8)]))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, panel = legend.get_window_extent(), figure.axes[0].get_window_extent()
    assert panel.x1 < box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0 < box.y1 <= figure.bbox.y1
    assert panel.width > 0.4 * figure.bbox.width and figure.get_figheight() < 3


def many_runs(bad=43.5):
    """Return runs of the baseline and nine other methods, of which `cgt` has a bad second exit."""
    found = [FakeRun(name, 0) for name in ("joint", *(f"method {n}" for n in range(8)), "cgt")]
    for run in found:
        for out in run.parts.values():
            wrong = 9 - out["labels"]
            share = np.linspace(0, 1, len(wrong))
            for k, accuracy in enumerate((0.5, 0.6, 0.7, 0.8) if run.label != "cgt" else (0.5, 0.02, 0.1, 0.2)):
                answer = np.where(share < accuracy, out["labels"], wrong)
                out["logits"][:, k] = 5 * np.eye(10, dtype=np.float32)[answer]
    return found


def test_many_methods_have_a_small_panel_each_beside_the_baseline():
    found = collect(many_runs())
    curve = found.curve.sort_values("cost_mean", kind="stable")
    for figure, rows in ((anytime_figure(found), found.anytime), (budgeted_figure(found), curve)):
        figure.draw_without_rendering()
        panels = [axes for axes in figure.axes if axes.axison]
        methods = [method for method in found.anytime["method"].unique() if method != "joint"]
        assert [axes.get_title() for axes in panels] == methods
        for axes, method in zip(panels, methods, strict=True):
            labels = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
            assert list(labels) == ["joint", method]
            for name, line in labels.items():
                np.testing.assert_allclose(line.get_ydata(), rows[rows["method"] == name]["accuracy_mean"])
            assert sum(line.get_label().startswith("_") for line in axes.lines) == len(methods) + 1  # all, in grey
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["joint", "the method of the panel", "other methods"]
        titles = [axes.title.get_window_extent() for axes in panels]
        assert all(left.x1 < right.x0 for left, right in pairwise(titles[:5]))


def test_small_panels_of_several_data_sets_are_below_each_other_even_of_one_method(tmp_path):
    others = [FakeRun(name, 0, dataset="other") for name in ("joint", "ge")]
    found = collect([*others, *many_runs(), FakeRun("ge", 0, dataset="third")])
    figure = anytime_figure(found)
    figure.draw_without_rendering()
    titles = [axes.get_title() for axes in figure.axes if axes.axison]
    assert titles == [
        "ge",
        *(method for method in found.anytime["method"].unique() if method not in ("joint", "ge")),
        "ge",
    ]
    parts = [part.get_suptitle() for part in figure.subfigs]
    assert parts == [
        "tiny_net on other; dashed: joint",
        "tiny_net on digits; dashed: joint",
        "tiny_net on third; dashed: ge",
    ]
    write_report(found, tmp_path, formats=["png"])


def test_a_method_far_below_the_others_leaves_the_panel_where_its_lowest_value_is_written():
    figure = anytime_figure(collect(many_runs()))
    panels = {axes.get_title(): axes for axes in figure.axes if axes.axison}
    assert [text.get_text() for text in panels["cgt"].texts] == ["↓ 2.0"]
    assert not [axes for name, axes in panels.items() if name != "cgt" and axes.texts]
    low, high = panels["method 0"].get_ylim()
    assert 45 < low < 50 and 80 < high < 85
    few = anytime_figure(collect([run for run in many_runs() if run.label in ("joint", "method 0", "cgt")]))
    assert few.axes[0].get_ylim()[0] < 2 and not few.axes[0].texts  # of three methods, none is an outlier


def test_learning_curves_of_many_methods_have_a_small_panel_each():
    methods = ["joint", *(f"method {n}" for n in range(8)), "separate"]
    rows = [
        (method, "net", "digits", number, epoch, 10.0 if method == "separate" and epoch < 3 else 80.0 + epoch + number)
        for method in methods
        for number in (1, 2, 3, 4, 5)
        for epoch in (1, 2, 3)
    ]
    columns = ["method", "backbone", "dataset", "exit", "epoch", "validation_accuracy_mean"]
    figure = learning_figure(pd.DataFrame(rows, columns=columns))
    panels = {axes.get_title(): axes for axes in figure.axes if axes.axison}
    assert list(panels) == methods
    exits = ["exit 1", "exit 2", "exit 4", "exit 5"]
    assert all([line.get_label() for line in axes.lines] == exits for axes in panels.values())
    assert panels["joint"].get_ylim()[0] > 70  # the epochs at chance are cut off
    assert not [axes for axes in panels.values() if axes.texts]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == exits


def test_an_exit_has_one_colour_in_all_learning_curves_and_a_line_below_them_is_named():
    def rows(network, exits):
        return [
            (f"method {n}", network, "digits", k, epoch, 20.0 if n == 8 and k == 1 else 80.0 + epoch + k)
            for n in range(9)
            for k in exits
            for epoch in (1, 2)
        ]

    columns = ["method", "backbone", "dataset", "exit", "epoch", "validation_accuracy_mean"]
    figure = learning_figure(pd.DataFrame(rows("a", range(1, 6)) + rows("b", range(1, 8)), columns=columns))
    colours = {}
    for axes in figure.axes:
        for line in axes.lines:
            colours.setdefault(line.get_label(), set()).add(line.get_color())
    (legend,) = figure.legends
    shown = dict(zip([text.get_text() for text in legend.get_texts()], legend.get_lines(), strict=True))
    assert list(shown) == [f"exit {k}" for k in (1, 2, 3, 4, 5, 7)]
    assert colours == {label: {line.get_color()} for label, line in shown.items()}
    written = {axes.get_title(): [text.get_text() for text in axes.texts] for axes in figure.axes if axes.texts}
    assert written == {"method 8": ["↓ exit 1"]}


def test_long_names_leave_the_small_panels_their_height():
    names = ["joint", *(f"a method with a name of sixty letters and more of them, number {n}" for n in range(9))]
    figure = oracle_figure(collect([FakeRun(name, 0) for name in names], options=ReportOptions(baseline=names[1])))
    figure.draw_without_rendering()
    panels = [axes for axes in figure.axes if axes.axison]
    assert min(axes.get_window_extent().height / figure.dpi for axes in panels) > 0.5
    (legend,) = figure.legends
    assert legend.get_window_extent().x0 >= 0 and legend.get_window_extent().x1 <= figure.bbox.x1


def test_the_baselines_of_several_networks_are_named_and_crosses_of_any_are_in_the_legend():
    alone = json.dumps([0.0, 0.0, 1.0, 0.0])
    others = [FakeRun(name, 0, dataset="other") for name in ("ge", "kd")]
    static = FakeRun("alone", 0, dataset="other", **{"method.weights": alone})
    figure = anytime_figure(collect([*many_runs(), *others, static]))
    assert [part.get_suptitle() for part in figure.subfigs] == [
        "tiny_net on digits; dashed: joint",
        "tiny_net on other; dashed: ge",
    ]
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["the baseline", "the method of the panel", "other methods", "static networks"]


def differences_of(changes):
    """Return differences: {method: (mean, half width, p)}, the same at two exits and in area."""
    columns = ["method", "backbone", "dataset", "baseline", "measure", "mean", "low", "high", "p", "p_holm", "n"]
    rows = [
        (method, "net", "digits", "joint", measure, mean, mean - width, mean + width, p, p, 3)
        for method, (mean, width, p) in changes.items()
        for measure in ("exit 1", "exit 2", "area")
    ]
    return pd.DataFrame(rows, columns=columns)


def test_the_figure_of_differences_has_the_intervals_of_the_table_and_fills_what_is_significant():
    changes = {"ge": (1.0, 0.5, 0.01), "dfs": (-2.0, 3.0, 0.3), "bdl": (0.5, np.nan, np.nan)}
    figure = differences_figure(differences_of(changes))
    assert [axes.get_title() for axes in figure.axes] == ["exit 1", "net on digits\nexit 2", "area"]
    for axes in figure.axes:
        points = [line for line in axes.lines if len(line.get_xdata()) == 1]
        assert [(point.get_xdata()[0], point.get_ydata()[0]) for point in points] == [(1, 0), (-2, 1), (0.5, 2)]
        assert [point.get_markerfacecolor() != "white" for point in points] == [True, False, False]
        bars = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2][:3]
        np.testing.assert_allclose(bars, [[0.5, 1.5], [-5, 1], [np.nan, np.nan]])
        assert axes.get_ylim()[0] > 2 and axes.get_ylim()[1] < 0  # all are visible, with the first at the top
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(changes)


def test_a_difference_far_from_the_others_is_a_triangle_at_the_edge():
    changes = {f"m{n}": (0.1 * n, 0.4, 0.3) for n in range(6)} | {"cgt": (-28.4, 2.6, 0.01)}
    for axes in differences_figure(differences_of(changes)).axes:
        low, high = axes.get_xlim()
        assert -1 < low < -0.4 and 0.9 < high < 1.5
        assert [text.get_text() for text in axes.texts] == ["−28.4"]
        (triangle,) = [line for line in axes.lines if line.get_marker() == "<"]
        assert low < triangle.get_xdata()[0] < -0.3 and triangle.get_ydata()[0] == 6
        assert triangle.get_markerfacecolor() != "white"  # significant


def test_a_difference_at_the_edge_is_drawn_once_and_equal_ones_leave_the_axis_alone():
    near = {f"m{n}": (0.1 * n, 0.4, 0.3) for n in range(6)} | {"far": (-28.0, 1.0, 0.3)}
    for axes in differences_figure(differences_of(near | {"edge": (-0.41, 0.0, 0.3)})).axes:
        assert [text.get_text() for text in axes.texts] == ["−28.0"]
    equal = {f"m{n}": (0.0, 0.0, 1.0) for n in range(6)} | {"one": (5.0, 0.0, 0.0)}
    for axes in differences_figure(differences_of(equal)).axes:
        assert not axes.texts and axes.get_xlim()[1] > 5


@pytest.mark.parametrize("rows", ["no area", "area of one method", "long names"])
def test_the_figure_of_differences_shows_every_method(rows):
    name = "imta first=joint second=isc " * 4
    frame = differences_of({"ge": (1.0, 0.5, 0.01), name if rows == "long names" else "dfs": (2.0, 0.5, 0.01)})
    if rows != "long names":
        frame = frame[(frame["measure"] != "area") | (frame["method"] == "ge") & (rows != "no area")]
    else:
        frame["baseline"] = name
    figure = differences_figure(frame)
    figure.draw_without_rendering()
    assert figure.axes[0].get_ylim() == figure.axes[2].get_ylim() == (1.6, -0.6)
    assert all(axes.get_window_extent().width > 0.15 * figure.bbox.width for axes in figure.axes)
    texts = [figure.axes[1].xaxis.label, *figure.axes[0].get_yticklabels()]
    extents = [text.get_window_extent() for text in texts]
    assert all(extent.x0 >= 0 and extent.x1 <= figure.bbox.x1 for extent in extents)


def test_methods_without_a_run_have_a_row_if_a_run_failed_and_are_else_listed_once():
    members = runs(("joint", "ge"))
    planned = [("dfs", 1, NOT_TRAINED), ("bdl", 1, "failed: the disk is full"), ("dfs", 2, NOT_TRAINED)]
    missing = [
        Missing({**members[0].identity, "method": json.dumps(name), "seed": json.dumps(seed)}, reason)
        for name, seed, reason in planned
    ]
    found = collect(members, context=Context(missing=missing))
    (table,) = wide_tables(found, "anytime")
    assert list(table.cells) == ["joint", "ge", "bdl"] and table.missing == {"bdl": 1}
    assert table.caption.endswith("Missing: bdl (1 of 1). 1 further method is not trained yet (table Missing).")
    (sheet,) = [sheet for sheet in sheets(found) if sheet.kind == "missing"]
    assert [[cell.mean for cell in row] for row in sheet.rows] == [
        ["dfs", NOT_TRAINED, "1, 2"],
        ["bdl", "failed: the disk is full", "1"],
    ]


def test_a_page_tells_what_made_it_and_shows_runs_of_networks_without_any(tmp_path):
    members = runs(("joint", "ge"))
    for run in members:
        run.recipe.threads = 2
    identity = {**members[0].identity, "backbone": json.dumps("other-net"), "seed": "0"}
    planned = {run.path.name: {} for run in members}
    missing = [Missing(identity, "failed: the disk is full")]
    context = Context(stands_for=planned, missing=missing, commands=["exitkit compare --methods ge"])
    found = collect(members, context=context)
    facts = dict(provenance(found, members))
    assert facts["command"] == "exitkit compare --methods ge" and facts["hardware"] == "cpu (2 threads per run)"
    assert (
        facts["versions"] == "exitkit 0.1, PyTorch 2.13" and facts["runs"] == "4 runs, begun 2026-01-01 to 2026-02-01"
    )
    html = html_report(found, pd.DataFrame(columns=learning_columns()), pd.DataFrame(), made_by=list(facts.items()))
    sections = re.findall(r"<h2 id=[^>]*>([^<]*)<", html)
    assert sections == ["Contents", "tiny_net on digits", "other-net on digits", "How this report was made"]
    assert "failed: the disk is full" in html and "exitkit compare --methods ge" in html


@pytest.mark.parametrize(
    "words",
    [
        "--method boostnet --seed 3",
        "--method boostnet --epochs 2 --set schedule=step --set milestones=0.4,0.8 --set warmup=1",
        "--method boostnet --set variant=released --set schedule=cosine --dataset cifar100",
        "--method joint --set weights=1,0,0 --batch-size 32 --lr 0.05 --probe-every 1 --precision bf16",
        "--method ge+kd --set kd.temperature=2 --set optimizer=adamw --set schedule=constant",
        "--dataset cifar10 --set per_class=50 --backbone msdnet-tiny --set backbone.channels=4",
    ],
)
def test_the_command_of_a_run_without_a_comparison_makes_the_same_run(words, tmp_path):
    recipe = resolve(recipe_of(["exitkit", "train", *words.split()]))
    run = FakeRun(recipe.method, recipe.seed)
    run.identity, run.recipe = flat_identity(recipe), recipe
    [(name, line)] = commands(Context(), [run])
    assert name == "command" and resolve(recipe_of(shlex.split(line))).id == recipe.id


def recipe_of(words):
    """Return the recipe of a command line of `exitkit train`."""
    given = train.make_context("train", words[2:]).params
    sets = parse_sets(given.pop("sets"))
    values = {key: value for key, value in given.items() if key in Recipe.model_fields}
    return make_recipe({}, values).with_settings(sets)


def one_epoch():
    """Return the metrics of a run of one epoch, with one exit."""
    measured = {f"{part}_{what}_1": [1.0] for part in ("train", "validation") for what in ("loss", "accuracy")}
    return pd.DataFrame({"phase": ["joint"], "epoch": [1], "lr": [0.1], **measured})


def test_seeds_share_a_command_and_every_format_shows_it(tmp_path):
    members = runs(("joint", "ge"))
    for run in members:
        run.recipe.threads, run.metrics = 1, one_epoch
    write_report(collect(members), tmp_path, runs=members, formats=("md", "latex", "html"))
    line = "exitkit train --method ge --backbone tiny_net --dataset digits --epochs 3"
    for name in ("report.md", "report.tex", "report.html"):
        text = (tmp_path / name).read_text(encoding="utf-8").replace(r"\_", "_")
        assert "command (SEED is 0, 1)" in text and line in text and text.count("--seed SEED") == 2, name
    [summary] = [
        text for name, text in commands(Context(stands_for={run.path.name: {} for run in members[1:]}), members)
    ]
    assert "--method joint" in summary and summary.endswith("--seed 0")


def test_a_budget_outside_the_curves_is_refused_or_told():
    options = ReportOptions(budgets=("100K", "400K"))
    options.check_reach(1e5, 4e5)
    with pytest.raises(UserError, match="budget 100K is below the lowest cost of a first exit; expected at least 1000"):
        options.check_reach(100_001, 4e5)
    with pytest.warns(Note, match="budget 400K is above the cost of every last exit, which is at most 399999: every"):
        options.check_reach(1e5, 399_999)
    with pytest.warns(Note, match="budget 2ms is above .* at most 1.5ms: every run is its full network there"):
        ReportOptions(budgets=("2ms",), cost="latency").check_reach(0.5, 1.5)


def learning_columns():
    return ["method", "backbone", "dataset", "phase", "epoch", "exit"]


def test_the_bound_of_the_oracle_covers_the_whole_range_of_costs():
    found = collect(runs(("joint", "ge")))
    lines = [
        line for line in oracle_figure(found).axes[0].lines if line.get_linestyle() == ":" and len(line.get_xdata())
    ]
    assert len(lines) == 2
    for line, (_, bound) in zip(lines, found.oracle.groupby("method", sort=False), strict=True):
        x, y = np.array(line.get_xdata(), float) * 1e6, np.array(line.get_ydata(), float)
        assert x[0] <= MACS[0] + 1 and x[-1] == pytest.approx(MACS[-1])
        assert y[-1] == y[-2] == bound.accuracy_mean.max()


def test_every_exit_has_learning_curves_in_the_page():
    found = collect(runs(("joint",)))
    rows = [
        {"method": "joint", "backbone": "tiny_net", "dataset": "digits", "phase": "train", "epoch": epoch, "exit": exit}
        | {
            f"{part}_{what}_mean": 10.0 * exit + epoch
            for part in ("train", "validation")
            for what in ("loss", "accuracy")
        }
        for epoch in (1, 2)
        for exit in (1, 2, 3, 4)
    ]
    html = html_report(found, pd.DataFrame(rows), pd.DataFrame())
    assert re.findall(r"Learning, (exit \d)</strong>", html) == ["exit 1", "exit 2", "exit 3", "exit 4"]


def test_the_page_begins_with_a_table_of_one_row_per_method():
    found = collect(runs(("joint", "boost_net", "ge")))
    html = html_report(found, pd.DataFrame(columns=learning_columns()), pd.DataFrame())
    assert re.findall(r"Differences, ([\w ]+)</strong>", html) == ["exit 1", "exit 4", "area"]
    table = html[html.index("<table") : html.index("</table>")]
    texts = [
        [re.sub("<.*?>", "", cell) for cell in re.findall("<t[hd].*?</t[hd]>", row)] for row in table.split("<tr>")
    ]
    frame = pd.DataFrame(texts[2:], columns=texts[1])
    assert list(frame["method"]) == ["joint", "boost_net", "ge"]
    assert list(frame["changes"]) == ["weights", "–", "gradients"]  # of boost_net, no method of that name is known
    area = found.differences[found.differences["measure"] == "area"].set_index("method")
    budgeted = found.budgeted.pivot(index="method", columns="budget", values="accuracy_mean")
    last = found.anytime.groupby("method")["accuracy_mean"].last()
    for row in frame.to_dict("records"):
        method, values = row["method"], list(row.values())
        expected = [f"{value:.2f}" for value in [*budgeted.loc[method].iloc[[0, 4, -1]], last[method]]]
        assert [f"{float(value):.2f}" for value in values[-4:]] == expected
        if method != "joint":
            written = [f"{area.loc[method, name]:+.2f}" for name in ("mean", "low", "high")]
            assert [f"{float(row[name]):+.2f}" for name in ("area", "from", "to")] == written
            assert float(row["p"]) == pytest.approx(area.loc[method, "p_holm"], abs=6e-4)


def test_the_budgeted_table_comes_with_realised_costs():
    found = collect(runs(("joint",)))
    spent = found.spent.merge(found.budgeted, on=["method", "backbone", "dataset", "budget"])
    np.testing.assert_allclose(spent["test"], spent["cost_mean"])
    np.testing.assert_allclose(spent["validation"], spent["budget"], rtol=0.03)  # 200 images, rounded shares
    (sheet,) = (sheet for sheet in sheets(found) if sheet.kind == "spent")
    assert [row[1].mean for row in sheet.rows] == ["validation", "test"] and len(sheet.heads) == 2 + 9 + 1


def test_targets_in_words_give_planned_and_realised_costs():
    words = ("budget 60%", "budget 300K at-most", "lose 1", "budget 100K")
    found = collect(runs(("joint", "ge")), options=ReportOptions(targets=words))
    table = found.targets.set_index(["method", "target"])
    for method in ("joint", "ge"):
        rows = table.loc[method]
        assert rows.loc["budget 60%", "planned"] == pytest.approx(0.6 * MACS[-1])
        assert rows.loc["budget 60%", "validation_cost"] == pytest.approx(0.6 * MACS[-1], rel=0.02)  # 200 images
        assert rows.loc["budget 300K at-most", "validation_cost"] < 300_000
        assert rows.loc["lose 1", "planned"] == rows.loc["lose 1", "validation_cost"]
        shares = rows.loc["lose 1", [f"share_{k}" for k in range(1, 5)]].astype(float)
        assert shares.sum() == pytest.approx(1) and shares @ np.array(MACS) == pytest.approx(rows.loc["lose 1", "cost"])
        assert rows.loc["budget 100K", "n"] == 0 and np.isnan(rows.loc["budget 100K", "cost"])
    text = printed(found, 100)
    assert "Operating points" in text and "Not reached: budget 100K is below the first exit's cost" in " ".join(
        text.split()
    )


def test_targets_follow_the_exit_rule_of_the_report():
    run, *_ = runs(("joint",))
    for options in ({}, {"rule": "margin"}, {"rule": "entropy", "calibrated": True}):
        found = collect([run], options=ReportOptions(targets=("lose 1",), **options))
        chosen = {"score": options.get("rule", "confidence"), "calibrated": options.get("calibrated", False)}
        logits, labels = (run.outputs("validation")[name] for name in ("logits", "labels"))
        rule = ExitPolicy(ExitRule.from_outputs(logits, labels, MACS, lose=1, **chosen))
        _, exits = rule.on_outputs(torch.from_numpy(run.outputs("test")["logits"]))
        assert found.targets["cost"].tolist() == pytest.approx([np.array(MACS)[exits.numpy()].mean()])
        words = f"{'calibrated ' * chosen['calibrated']}{chosen['score']}"
        assert f"on validation, by {words}: planned" in " ".join(printed(found, 100).split())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"budgets": ("2K", "3K", "2K")}, "budget 2K is given twice"),
        ({"budgets": ("2K", "2000")}, "budget 2K and 2000 is given twice"),
        ({"targets": ("lose 1", "budget 60%", "lose 1.0")}, "target lose 1 and lose 1.0 is given twice"),
    ],
)
def test_a_budget_or_target_is_given_once(given, says):
    with pytest.raises(UserError, match=says):
        ReportOptions(**given)


@pytest.mark.parametrize("text", ["", "budget", "lose much", "cost 5", "budget 60% maybe", "lose 1 certainty 2"])
def test_targets_that_are_none_are_refused(text):
    with pytest.raises(UserError, match=r"expected|not a number"):
        ReportOptions(targets=(text,))
