"""Plugins of a script: registered by name, found by other processes, and every way to be wrong."""

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from typing import ClassVar

import pytest

import exitkit
from exitkit import plugins, registration
from exitkit.cli.catalogue import entries
from exitkit.data.digits import Digits
from exitkit.errors import UserError
from exitkit.strategy import EXIT_WEIGHTS

SCRIPT = '''
"""A script with a data set and a method of its own."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from neighbour import SIZE
from torch.utils.data import TensorDataset

import exitkit
from exitkit.strategy import EXIT_WEIGHTS, TrainingStrategy


@dataclass(eq=False)
class Late(TrainingStrategy):
    """Later exits count more."""

    slots: ClassVar[frozenset[str]] = frozenset({EXIT_WEIGHTS})
    ramp: float = exitkit.setting(2.0, "how much more each exit counts than the one before it")

    def exit_weights(self, run):
        return [self.ramp**index for index in range(run.network.num_exits)]


def part(count, seed):
    labels = torch.arange(count) % 3
    noise = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randint(256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=noise), labels)


exitkit.register("method", "late", Late)
exitkit.register("dataset", "noise", exitkit.data.from_datasets(part(60, 0), part(12, 1)))

if __name__ == "__main__":
    from exitkit.cli import main

    words = ["--dataset", "noise", "--set", "image_size=16", "--set", "workers=0", "--backbone", "msdnet-tiny"]
    main(["compare", "--methods", "late", "--seeds", "1", "--epochs", "1", "--batch-size", "16", "--jobs", "1", *words])
'''


@pytest.fixture(autouse=True)
def _own_scripts(tmp_path):
    """Scripts that a test imports are gone after it."""
    path = list(sys.path)
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
    sys.path[:] = path


@dataclass(frozen=True)
class Tens(Digits):
    """Digits, again."""

    house: ClassVar[dict] = Digits.house | {"epochs": 1}


@pytest.fixture
def script(tmp_path):
    (tmp_path / "neighbour.py").write_text("SIZE = 16\n")
    (tmp_path / "mine.py").write_text(SCRIPT)
    return tmp_path / "mine.py"


def test_a_registered_class_is_found_by_its_name(monkeypatch):
    exitkit.register("dataset", "tens", Tens)
    assert plugins.load("dataset", "tens") is Tens
    assert exitkit.Recipe.make(dataset="tens").resolve().epochs == 1
    assert "tens" in {entry["name"] for entry in entries("datasets")}
    assert os.environ[registration.VARIABLE] == __file__
    exitkit.register("network", "wide", __import__("functools").partial(plugins.load("backbone", "msdnet"), growth=8))
    assert exitkit.build_network("wide").num_exits > 1


def test_the_last_class_of_a_name_counts():
    exitkit.register("dataset", "tens", Digits)
    assert plugins.load("dataset", "tens") is Digits
    exitkit.register("dataset", "tens", Tens)
    assert plugins.load("dataset", "tens") is Tens


def test_the_workers_of_a_comparison_import_the_script(script, cli, monkeypatch):
    done = subprocess.run([sys.executable, "mine.py"], cwd=script.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs = exitkit.load_runs(script.parent / "runs")
    assert set(runs.method) == {"joint", "late"} and set(runs.dataset) == {"noise"}
    run = next((script.parent / "runs").glob("late-*"))
    cli("evaluate", run).refused("unknown data set 'noise'")
    monkeypatch.setenv(registration.VARIABLE, str(script))
    plugins.registered.cache_clear()
    plugins.load.cache_clear()
    assert cli("evaluate", run).code == 0


def test_a_module_of_a_package_imports_its_neighbours(script, monkeypatch):
    folder = script.parent / "pack"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "mine.py").write_text(SCRIPT.replace("from neighbour", "from .neighbour"))
    (folder / "neighbour.py").write_text("SIZE = 16\n")
    monkeypatch.setenv(registration.VARIABLE, str(folder / "mine.py"))
    assert plugins.load("method", "late").__module__ == "pack.mine"


def test_a_script_of_the_name_of_another_module_is_itself(script, monkeypatch):
    monkeypatch.setenv(registration.VARIABLE, str(script.rename(script.with_name("textwrap.py"))))
    plugins.load("method", "late")
    assert sys.modules["textwrap"] is textwrap


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import exitkit\nexitkit.train({})", "mine.py uses exitkit while its plugins are registered; put all but"),
        ("1 / 0", r"script .*mine.py does not load \(ZeroDivisionError: division by zero\)"),
        ("raise SystemExit(3)", r"does not load \(SystemExit: 3\)"),
        ("import exitkit\nexitkit.register('dataset', 'digits', int)", "data set 'digits' exists already"),
        (None, "EXITKIT_SCRIPTS names .*mine.py, which is not a Python file"),
    ],
)
def test_scripts_that_can_not_be_imported_are_refused_in_one_line(text, words, script, cli, monkeypatch):
    script.unlink() if text is None else script.write_text(text)
    monkeypatch.setenv(registration.VARIABLE, str(script))
    plugins.registered.cache_clear()
    with pytest.raises(UserError, match=words):
        plugins.registered("dataset")
    done = cli("train", "--epochs", "1")
    assert done.code == 2 and len(done.errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("data", "tens", Tens), "unknown kind of plugin 'data'; did you mean dataset"),
        (("dataset", "a+b", Tens), "name is 'a\\+b'; expected letters"),
        (("dataset", 3, Tens), "name is 3; expected letters"),
        (("dataset", "digits", Tens), r"data set 'digits' exists already \(exitkit.data.digits:Digits\)"),
        (("dataset", "tens", 42), "data set 'tens' is not a dataclass"),
        (("dataset", "tens", Tens()), "data set 'tens' is not a dataclass"),
        (("method", "late", type("Late", (), {})), "method 'late' is not a dataclass"),
    ],
)
def test_what_can_not_be_registered_is_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        exitkit.register(*arguments)


def test_workers_of_a_notebook_are_refused_in_one_line(cli):
    space = {"exitkit": exitkit, "Tens": Tens, "EXIT_WEIGHTS": EXIT_WEIGHTS}
    exec("exitkit.register('dataset', 'tens', Tens)", space)
    cli("compare", "--dataset", "tens").refused("data set 'tens' was registered outside a file", "--launcher here")
    words = (
        "--seeds",
        "1",
        "--launcher",
        "here",
        "--set",
        "per_class=8",
        "--set",
        "validation=40",
        "--batch-size",
        "32",
    )
    done = cli("compare", "--methods", "ge", "--dataset", "tens", *words)
    assert done.code == 0, done.errors
