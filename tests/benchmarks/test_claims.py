"""Claims of papers: their tests on runs with known measures."""

import tomllib

import numpy as np
import pandas as pd
import pytest
from fake_runs import FakeRun
from scipy import stats

from exitkit import plugins
from exitkit.benchmarks.report import ReportOptions
from exitkit.benchmarks.report.claims import VERDICTS, Claim, Term, judge, load_claims, load_experiments, measure_of
from exitkit.cli.catalogue import recipe_files
from exitkit.errors import UserError


def claim(more, less, above=0.0):
    sides = [[Term({"method": f'"{name}"'}, what) for name, what in side] for side in (more, less)]
    return Claim("", "", "study", "", "", *sides, above)


def last(run):
    test = run.outputs("test")
    return 100 * np.mean(test["logits"][:, -1].argmax(-1) == test["labels"])


def test_a_difference_is_the_paired_t_interval_of_the_measures():
    runs = [FakeRun(name, seed) for name in ("joint", "boost_net") for seed in range(4)]
    verdict = judge(claim([("boost_net", "exit last")], [("joint", "exit last")]), runs, ReportOptions())
    change = np.array([last(runs[4 + seed]) - last(runs[seed]) for seed in range(4)])
    interval = stats.t.interval(0.95, 3, change.mean(), stats.sem(change))
    assert (verdict.mean, verdict.low, verdict.high) == pytest.approx((change.mean(), *interval))
    assert verdict.visible == pytest.approx((interval[1] - interval[0]) / 2)
    assert verdict.p == pytest.approx(stats.ttest_1samp(change, 0).pvalue)
    assert verdict.n == 4


@pytest.mark.parametrize(("shift", "expected"), [(5.0, VERDICTS[0]), (-5.0, VERDICTS[1]), (0.0, VERDICTS[2])])
def test_the_verdict_is_the_side_of_the_interval(shift, expected):
    runs = [FakeRun(name, seed) for name in ("joint", "ge") for seed in range(3)]
    seeds = [last(run) for run in runs]
    above = np.mean(np.subtract(seeds[3:], seeds[:3])) - shift * max(np.std(np.subtract(seeds[3:], seeds[:3])), 0.1)
    verdict = judge(claim([("ge", "exit last")], [("joint", "exit last")], float(above)), runs, ReportOptions())
    assert verdict.verdict == expected


def test_the_interval_of_equal_differences_is_their_value():
    runs = [FakeRun("joint", seed) for seed in range(3)]
    same = [("joint", "exit last")]
    verdict = judge(claim(same, same, above=1.0), runs, ReportOptions())
    assert (verdict.mean, verdict.low, verdict.high) == (-1.0, -1.0, -1.0)
    assert np.isnan([verdict.visible, verdict.p]).all() and verdict.verdict == "contradicted"


def test_only_seeds_that_all_terms_have_count():
    runs = [FakeRun("joint", seed) for seed in range(3)] + [FakeRun("ge", seed) for seed in (1, 2, 3)]
    assert judge(claim([("ge", "exit last")], [("joint", "exit last")]), runs, ReportOptions()).n == 2
    verdict = judge(claim([("ge", "exit last")], [("joint", "exit last")]), runs[:4], ReportOptions())
    assert verdict.n == 1 and verdict.verdict == VERDICTS[3]
    assert judge(claim([("ge", "exit last")], []), [], ReportOptions()).verdict == VERDICTS[3]


def test_two_runs_of_a_seed_are_named():
    with pytest.raises(UserError, match="second run of seed 0"):
        judge(claim([("ge", "exit last")], []), [FakeRun("ge", 0), FakeRun("ge", 0, extra="1")], ReportOptions())


def test_measures_of_probes_are_means_over_the_probes():
    probes = pd.DataFrame({"valid_1": [80.0, 60.0], "valid_2": [50.0, 40.0], "conflict": [10.0, 30.0]})
    budgets = np.array([1.0, 2.0])
    values = [measure_of({"probes": probes}, name, budgets) for name in ("valid 1", "valid last", "conflict")]
    assert values == [70.0, 45.0, 20.0]
    with pytest.raises(UserError, match="needs probes"):
        measure_of({}, "valid 1", budgets)


def test_an_area_outside_the_curve_is_refused():
    curve = {"curve": pd.DataFrame({"cost": [1.0, 3.0], "accuracy": [80.0, 90.0]})}
    assert measure_of(curve, "area", np.array([1.0, 3.0])) == 85.0
    for budgets in ([0.9, 2.0], [2.0, 3.1]):
        with pytest.raises(UserError, match="covers mean costs from 1 to 3; expected budgets within it"):
            measure_of(curve, "area", np.array(budgets))


def test_the_measure_of_a_policy_is_its_mean_over_the_budgets():
    policies = pd.DataFrame({"policy": ["mie", "mie", "jei", "jei"], "accuracy": [80.0, 90.0, np.nan, 70.0]})
    assert measure_of({"policies": policies}, "policy mie", np.array([1.0, 2.0])) == 85.0
    assert measure_of({"policies": policies}, "policy jei from 2", np.array([1.0, 2.0])) == 70.0
    for tables, name in (({"policies": policies}, "jei"), ({"policies": policies}, "eenet"), ({}, "mie")):
        with pytest.raises(UserError, match=f"policy {name} was not measured at all budgets"):
            measure_of(tables, f"policy {name}", np.array([1.0, 2.0]))


def test_every_shipped_claim_has_known_methods_fields_and_measures():
    claims = load_claims()
    assert len(claims) >= 16 and len({(entry.claim, entry.study) for entry in claims}) == len(claims)
    assert {f"study-{entry.study}" for entry in claims} <= set(recipe_files())
    tables = {
        "anytime": pd.DataFrame({"accuracy": [1.0, 2.0]}),
        "curve": pd.DataFrame({"cost": [1.0, 3.0], "accuracy": [1.0, 2.0]}),
        "budgeted": pd.DataFrame({"accuracy": [1.0, 2.0]}),
        "probes": pd.DataFrame(
            [[1.0] * 6], columns=[*("valid_1", "valid_2", "easy_1", "easy_2"), "conflict", "variance"]
        ),
        "policies": pd.DataFrame(
            {"policy": 2 * list(map(str, ReportOptions(policy=("all",)).policies())), "accuracy": 1.0}
        ),
    }
    for entry in claims:
        for term in (*entry.more, *entry.less):
            assert np.isfinite(measure_of(tables, term.measure, np.array([1.5, 2.5])))
            for key, value in term.run.items():
                kind, _, name = key.partition(".")
                if kind == "method" and not name:
                    assert all(part in plugins.names("method") for part in value.strip('"').split("+")), value
                elif kind == "method":
                    method = plugins.load("method", term.run["method"].strip('"'))
                    assert name in plugins.fields(method), key


def test_the_document_lists_every_claim_and_replaces_only_its_own_files(cli, tmp_path):
    (tmp_path / "CLAIMS.md").write_text("mine")
    (tmp_path / "study").mkdir()
    cli("claims", "study").refused("was not written by this command")
    cli("claims", "study", "--out", "new.md").refused("holds no finished run")


def test_the_experiments_of_the_studies_are_those_of_their_recipes():
    experiments = load_experiments().set_index("name")
    studies = {entry.study for entry in load_claims()}
    assert {name for name in experiments.index if name.startswith("study ")} == {f"study {name}" for name in studies}
    for study in studies:
        recipe = tomllib.loads(recipe_files()[f"study-{study}"].read_text(encoding="utf-8"))
        expected = f"{recipe['epochs']} epochs of batches of {recipe['batch_size']}; three seeds"
        assert experiments.loc[f"study {study}", "training"] == expected
        assert f"{recipe['backbone']['blocks']} exits" in experiments.loc[f"study {study}", "network"]
