"""Several comparisons in one folder of runs: each has a plan of its own."""

import json
import re

import pytest

import exitkit
from exitkit.benchmarks.campaign.plan import Plan
from exitkit.benchmarks.campaign.record import plans, read_plan, write_plan
from exitkit.files import write_json

from toy import FEW

RECIPE = {"backbone": "msdnet-tiny", "dataset": "digits", "epochs": 1, "seeds": 1, "set": FEW["dataset_settings"]}


def plan(**values):
    return Plan.make(RECIPE | values)


FIRST = {"methods": "ge", "title": "First", "note": "A note.", "report": {"points": 5}}
SECOND = {"methods": "boostnet", "title": "Second", "report": {"hold": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two comparisons: joint and ge are trained, and boostnet failed."""
    out = tmp_path_factory.mktemp("comparisons")
    first, second = plan(**FIRST), plan(**SECOND)
    for planned in first.runs():
        exitkit.train(planned.recipe, out)
    write_plan(out, first, first.runs(), "exitkit compare --methods ge")
    write_plan(out, second, second.runs(), "exitkit compare --methods boostnet")
    return out


def named(folder, title):
    return next(path for path in plans(folder) if json.loads(path.read_text())["title"] == title)


def test_each_plan_is_a_file_and_the_same_plan_is_the_same_file(folder, tmp_path):
    assert [read_plan(path).context.title for path in plans(folder)] == ["First", "Second"]
    again = plan(**FIRST)
    assert write_plan(tmp_path, again, again.runs(), "another line").name == named(folder, "First").name
    moved = plan(**FIRST, data_dir=str(tmp_path))  # the same images elsewhere, as on another machine
    assert write_plan(tmp_path, moved, moved.runs(), "a line").name == named(folder, "First").name
    elsewhere = plan(**FIRST, device="cpu", threads=1, tensorboard=True)
    assert write_plan(tmp_path, elsewhere, elsewhere.runs(), "a line").name == named(folder, "First").name
    named(tmp_path, "First").rename(tmp_path / "comparison-00000000.json")  # the name in another version
    assert write_plan(tmp_path, again, again.runs(), "a line").name == "comparison-00000000.json"
    other = plan(**FIRST | {"note": "Another note."})
    write_plan(tmp_path, other, other.runs(), "a line")
    assert len(plans(tmp_path)) == 2


@pytest.mark.parametrize(("title", "shown", "hidden"), [("First", "ge", "boostnet"), ("Second", "boostnet", "ge")])
def test_the_report_of_one_comparison_has_only_its_own(title, shown, hidden, folder, cli, tmp_path):
    path = named(folder, title)
    comparisons = read_plan(path)
    assert comparisons.report["baseline"] == "joint" and ("points" in comparisons.report) == (title == "First")
    result = cli("report", path, "--out", tmp_path / "out", "--format", "md,csv")
    assert result.code == 0 and not result.errors, result.errors
    report = (tmp_path / "out/report.md").read_text()
    assert report.startswith(f"# {title}\n") and f"`exitkit compare --methods {shown}`" in report
    assert ("A note." in report) == (title == "First") and ("not trained yet" in report) == (title == "Second")
    assert re.search(rf"\b{shown}\b", report) and not re.search(rf"\b{hidden}\b", report)
    points = (tmp_path / "out/curve.csv").read_text().splitlines()[1:]
    assert len(points) == (5 * 2 if title == "First" else 39)


def test_the_report_of_the_folder_is_of_all_runs_under_no_title(folder, cli, tmp_path):
    result = cli("report", folder, "--out", tmp_path / "out", "--format", "md")
    report = (tmp_path / "out/report.md").read_text()
    assert result.code == 0 and "holds 2 comparisons" in result.errors and str(named(folder, "First")) in result.errors
    assert report.startswith("# Comparison of training methods\n") and "A note." not in report
    assert re.search(r"\bge\b", report) and "boostnet" in report


def test_the_document_has_one_section_per_comparison(folder, cli, tmp_path):
    assert cli("reproducibility", folder, "--out", "made.md").code == 0
    text = (tmp_path / "made.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.M) == ["First", "Second"]
    assert text.count("missing: boostnet") == 1


def test_the_plan_of_an_earlier_release_is_read_and_replaced_by_the_same_one(tmp_path):
    first, second = plan(**FIRST), plan(**SECOND)
    path = write_plan(tmp_path, first, first.runs(), "exitkit compare")
    path.rename(tmp_path / "comparison.json")
    assert read_plan(tmp_path).context.title == "First" and plans(tmp_path) == [tmp_path / "comparison.json"]
    write_plan(tmp_path, second, second.runs(), "exitkit compare")
    assert {read_plan(one).context.title for one in plans(tmp_path)} == {"First", "Second"}
    write_plan(tmp_path, first, first.runs(), "exitkit compare")
    assert not (tmp_path / "comparison.json").exists() and len(plans(tmp_path)) == 2


def test_a_folder_without_a_plan_has_no_context(tmp_path):
    write_json(tmp_path / "comparison-of-mine.json", {})
    assert read_plan(tmp_path).order == [] and not read_plan(tmp_path).files
