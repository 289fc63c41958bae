"""The pages of the studies are what the commands make of the committed summaries, byte for byte."""

import re
from pathlib import Path

import pytest

from exitkit.cli.catalogue import recipe_files

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results"
STUDIES = sorted(path for path in RESULTS.iterdir() if path.is_dir())
REPORTED = [path for path in STUDIES if (path / "report.md").exists()]
WRITTEN = (".md", ".csv", ".html")
"""Files of a report that are the same on every machine; figures depend on the installed fonts."""


def written(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in WRITTEN}


@pytest.mark.parametrize("study", REPORTED, ids=lambda path: path.name)
def test_the_tables_of_a_study_are_made_again_from_its_summary(study, cli, tmp_path):
    done = cli("report", study, "--out", tmp_path / "report", "--format", "md,csv,html,png")
    assert done.code == 0, done.errors
    made, committed = written(tmp_path / "report"), written(study)
    assert {"report.md", "report.html", "anytime.csv", "budgeted.csv", "differences.csv"} <= committed.keys()
    assert [name for name in committed if made.get(name) != committed[name]] == []


@pytest.mark.parametrize("command, page", [("claims", "docs/claims.md"), ("reproducibility", "REPRODUCIBILITY.md")])
def test_the_documents_about_all_studies_are_made_again(command, page, cli, tmp_path):
    done = cli(command, *(STUDIES if command == "claims" else REPORTED), "--out", tmp_path / "page.md")
    assert done.code == 0, done.errors
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == (ROOT / page).read_text(encoding="utf-8")


def test_every_study_has_a_recipe_a_row_and_its_figures_and_no_weights():
    overview = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert REPORTED
    for study in STUDIES:
        assert f"study-{study.name}" in recipe_files()
        assert not [path for path in study.rglob("*") if path.suffix in (".safetensors", ".pt", ".npz")]
    for study in REPORTED:
        assert f"({study.name}/report.md)" in overview and f"--recipe study-{study.name} " in overview
        report = (study / "report.md").read_text(encoding="utf-8")
        for figure in re.findall(r"!\[.*?\]\((.*?)\)", report):
            assert (study / figure).is_file(), figure
