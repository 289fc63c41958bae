"""Summaries of comparisons: the same tables without weights and outputs."""

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_runs import FakeRun, runs

from exitkit.benchmarks.report import ReportOptions, collect, write_summary
from exitkit.benchmarks.report.narrow_tables import sheets
from exitkit.errors import UserError


class Summarised(FakeRun):
    """A run whose summary alone exists."""

    def __init__(self, run, folder):
        vars(self).update(vars(run))
        self.path = folder / Path(run.path).name

    def outputs(self, part):
        raise AssertionError("a summary has no outputs")


@pytest.mark.parametrize("options", [{}, {"rule": "margin", "calibrated": True}, {"rule": "patience"}])
def test_a_summary_gives_the_same_tables_to_the_bit(tmp_path, options):
    finished, chosen = runs(), ReportOptions(**options)
    comparison = collect(finished, options=chosen)
    write_summary(comparison, finished, tmp_path / "summary")
    again = collect([Summarised(run, tmp_path / "summary") for run in finished], options=chosen)
    for name, table in comparison.frames().items():
        pd.testing.assert_frame_equal(again.frames()[name], table, check_exact=True)
    assert not list((tmp_path / "summary").glob(".*"))


def test_a_summary_of_a_summary_is_the_same_file(tmp_path):
    finished = runs()
    write_summary(collect(finished), finished, tmp_path / "first")
    copies = [Summarised(run, tmp_path / "first") for run in finished]
    write_summary(collect(copies), copies, tmp_path / "second")
    for path in (tmp_path / "first").rglob("*.json"):
        assert path.read_bytes() == (tmp_path / "second" / path.relative_to(tmp_path / "first")).read_bytes()


def test_a_run_is_not_replaced_by_a_summary(tmp_path):
    finished = runs()
    (tmp_path / Path(finished[-1].path).name).mkdir()
    (tmp_path / Path(finished[-1].path).name / "weights.safetensors").touch()
    with pytest.raises(UserError, match="is no summary, and would be replaced; expected another folder"):
        write_summary(collect(finished), finished, tmp_path)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["weights.safetensors"]


def test_infinite_thresholds_and_missing_points_are_kept(tmp_path):
    finished = runs(seeds=1)
    comparison = collect(finished)
    write_summary(comparison, finished, tmp_path)
    stored = json.loads((tmp_path / Path(finished[0].path).name / "measures.json").read_text())
    values = [v for table in stored["tables"].values() for column in table.values() for v in column]
    assert not any(isinstance(v, float) and not np.isfinite(v) for v in values)


def test_other_options_than_those_of_the_summary_are_refused_by_name(tmp_path):
    finished = runs()
    write_summary(collect(finished), finished, tmp_path)
    copies = [Summarised(run, tmp_path) for run in finished]
    with pytest.raises(UserError, match=r"is a summary made with rule confidence.*not margin"):
        collect(copies, options=ReportOptions(rule="margin"))
    with pytest.raises(UserError, match="is a summary made with budgets"):
        collect(copies, options=ReportOptions(budgets=("100",)))


@pytest.mark.parametrize("content", ["{}", "[]", '{"options": 3}', '{"options": {}, "samples": "", "tables": {}}'])
def test_a_damaged_summary_is_named(tmp_path, content):
    finished = runs(seeds=1)
    write_summary(collect(finished), finished, tmp_path)
    copies = [Summarised(run, tmp_path) for run in finished]
    damaged = copies[0].path / "measures.json"
    damaged.write_text(content)
    with pytest.raises(UserError, match=r"measures\.json is damaged"):
        collect(copies)


def test_probes_of_a_frozen_trunk_are_summarised_without_a_warning(tmp_path):
    (run,) = runs(("joint",), seeds=1)
    probes = {
        "epoch": np.arange(1, 3),
        "cosine": np.full((2, 3, 3, 3), np.nan),
        "total_variance": np.array([[0.0, 0.5, 1.0], [0.3, 0.5, 1.0]]),
        "valid": np.ones((2, 3)),
    }
    run.probes = lambda: probes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        comparison = collect([run])
        write_summary(comparison, [run], tmp_path)
    table = pd.DataFrame(json.loads((tmp_path / run.path.name / "measures.json").read_text())["tables"]["probes"])
    assert table["conflict"].astype(float).isna().all()
    assert table["variance"].astype(float).tolist() == pytest.approx([np.nan, np.log(0.15) / 2], nan_ok=True)


def test_probes_are_summarised_over_pairs_stages_and_images(tmp_path):
    generator = np.random.default_rng(0)
    probes = {
        "epoch": np.array([1, 2]),
        "cosine": generator.normal(size=(2, 3, 3, 3)),
        "total_variance": generator.uniform(0.1, 1, (2, 3)),
        "valid": generator.uniform(size=(2, 3)),
        "losses": generator.uniform(size=(2, 8, 3)),
        "weights": generator.uniform(size=(2, 8, 3)),
    }
    probes["cosine"][:, 1, 0] = probes["cosine"][:, 1, :, 0] = np.nan  # the first exit does not read the second stage
    run = FakeRun("l2w", 0)
    run.probes = lambda: probes
    comparison = collect([run])
    write_summary(comparison, [run], tmp_path)
    table = pd.DataFrame(json.loads((tmp_path / run.path.name / "measures.json").read_text())["tables"]["probes"])
    for t in range(2):
        pairs = [probes["cosine"][t, s, i, j] for s in range(2) for i in range(3) for j in range(i + 1, 3)]
        known = [cosine for cosine in pairs if not np.isnan(cosine)]
        assert len(known) == 4
        assert table["conflict"][t] == pytest.approx(100 * np.mean([cosine < 0 for cosine in known]))
        assert table["variance"][t] == pytest.approx(
            np.mean([np.log(probes["total_variance"][t, s]) for s in range(2)])
        )
        assert table["valid_3"][t] == pytest.approx(100 * probes["valid"][t, 2])
        order = np.argsort(probes["losses"][t, :, -1])
        for k in range(3):
            weights = probes["weights"][t, order, k]
            assert table[f"easy_{k + 1}"][t] == pytest.approx(weights[:4].mean() - weights[4:].mean())


def test_times_can_be_excluded_where_runs_shared_their_cores():
    finished = [FakeRun("joint", 0), FakeRun("ge", 0)]
    with_times, without = (collect(finished, options=ReportOptions(times=times)) for times in (True, False))
    assert "training" in {sheet.kind for sheet in sheets(with_times)}
    assert "training" not in {sheet.kind for sheet in sheets(without)}
