"""Fingerprints of a method's code."""

import warnings
from pathlib import Path

import pytest

import exitkit
from exitkit import Recipe
from exitkit.errors import Note
from exitkit.runs import fingerprints

from toy import FEW


def test_editing_a_file_that_a_method_imports_changes_its_digest(monkeypatch):
    before = {name: fingerprints.code_digest(name) for name in ("ge", "boostnet", "joint", "imta")}
    read = Path.read_bytes
    edited = lambda path: read(path) + b"#" * (path.name == "ge.py")  # noqa: E731
    monkeypatch.setattr(Path, "read_bytes", edited)
    after = {name: fingerprints.code_digest(name) for name in before}
    assert {name for name in before if before[name] != after[name]} == {"ge", "boostnet", "imta"}


def test_a_method_of_a_package_has_the_digest_of_the_package(tmp_path, monkeypatch):
    import sys

    package = tmp_path / "someones"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tools.py").write_text("FACTOR = 2\n")
    (package / "method.py").write_text("from . import tools\nfrom exitkit.strategy import TrainingStrategy\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import someones.method  # noqa: F401

    found = fingerprints._source_files("someones.method", "someones")
    assert {path.name for path in found} >= {"method.py", "tools.py"}
    assert all(path.is_relative_to(tmp_path) for path in found)
    for name in [name for name in sys.modules if name.startswith("someones")]:
        monkeypatch.delitem(sys.modules, name)


def test_what_a_finished_run_does_not_use_is_told(tmp_path):
    runs = [exitkit.train(FEW | {"epochs": 1, "seed": seed, "device": "cpu"}, tmp_path) for seed in (0, 1)]
    with warnings.catch_warnings(action="error"):
        exitkit.train(FEW | {"epochs": 1, "device": "cpu"}, tmp_path)
        exitkit.train(FEW | {"epochs": 1}, tmp_path)  # the default of an option is no wish
    given = {"data_dir": str(tmp_path / "elsewhere"), "threads": 2, "tensorboard": True}
    with pytest.warns(Note) as told:
        exitkit.train(FEW | {"epochs": 1} | given, tmp_path)
    unused = f"--data-dir {tmp_path / 'elsewhere'}, --tensorboard, --threads 2"
    assert [str(one.message) for one in told] == [f"run {runs[0].path} is finished, so {unused} are not used"]
    with pytest.warns(Note) as told:
        fingerprints.check_same([(run, run.recipe.with_values(threads=2)) for run in runs])
    line = f"2 runs such as {runs[0].path} are finished, so --threads 2 is not used"
    assert [str(one.message) for one in told] == [line]


def test_settings_of_execution_that_a_finished_run_does_not_use_are_told(tmp_path):
    stored, given = (
        Recipe.make(dataset="folder", dataset_settings={"workers": workers}).resolve() for workers in (0, 2)
    )
    assert fingerprints._unused(stored, given) == ["--set workers=2"]
    assert fingerprints._unused(stored, stored) == []
    here = stored.with_values(data_dir=str(tmp_path))
    assert fingerprints._unused(here, stored.with_values(data_dir=f"{tmp_path}/../{tmp_path.name}")) == []
