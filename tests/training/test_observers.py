"""What listens to the loop: records, the time that a killed process had trained, tables that are checked."""

import time
import warnings
from dataclasses import dataclass

import pandas as pd
import pytest
import torch

import exitkit
from exitkit import plugins
from exitkit.errors import Note, UserError
from exitkit.strategy import LearnedTable, Phase, TrainingStrategy
from exitkit.training.checkpoint import Checkpoints
from exitkit.training.history import History, read_timing

from toy import FEW

SHORT = {"epochs": 1, **FEW}


class Stop(Exception):
    pass


def stopped_after(saves, monkeypatch, recipe, out, wait=0.0):
    """Train until a checkpoint has been written `saves` times, waiting before each."""
    save, count = Checkpoints.save, []

    def stop(self, run, history, **options):
        time.sleep(wait)
        seconds = history.seconds
        save(self, run, history, **options)
        count.append(seconds)
        if len(count) == saves:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        with pytest.raises(Stop):
            exitkit.train(recipe, out)


def test_the_time_of_an_epoch_counts_what_a_killed_process_had_trained_of_it(tmp_path, monkeypatch):
    recipe = {"method": "metagf", **SHORT}
    stopped_after(3, monkeypatch, recipe, tmp_path, wait=0.5)  # before the second and third: the first counts nothing
    run = exitkit.train(recipe, tmp_path)
    (seconds,) = pd.read_csv(run.path / "timing.csv").seconds
    assert seconds > 0.95
    assert run.training_cost()["seconds"] == pytest.approx(seconds)


def test_a_checkpoint_of_the_release_before_is_resumed_with_its_timing(tmp_path, monkeypatch):
    recipe = {"method": "joint", "epochs": 2, **FEW}
    stopped_after(1, monkeypatch, recipe, tmp_path)
    (folder,) = tmp_path.iterdir()
    state = torch.load(folder / "checkpoint.pt")
    timing = state.pop("timing")
    del state["seconds"]
    torch.save(state, folder / "checkpoint.pt")
    run = exitkit.train(recipe, tmp_path)
    assert read_timing(run.path / "timing.csv")[0] == timing[0] and len(read_timing(run.path / "timing.csv")) == 2


def test_records_that_are_damaged_are_none(tmp_path):
    (tmp_path / "timing.csv").write_text("phase,epoch,seconds\ntrain,one,2\n")
    assert History.load({"metrics": [], "probes": []}, tmp_path).timing == []


@dataclass(eq=False)
class Learns(TrainingStrategy):
    """A method whose `learned` returns whatever the test wants."""

    tables = None
    prepared = 0

    def prepare(self, run):
        type(self).prepared += 1
        assert run.teachers == {}

    def learned(self, run):
        return self.tables


@pytest.fixture
def method(monkeypatch):
    loaded, points = plugins.load, plugins.registered
    monkeypatch.setattr(plugins, "load", lambda kind, name: Learns if name == "learns" else loaded(kind, name))
    known = lambda kind: {**points(kind), **({"learns": None} if kind == "method" else {})}  # noqa: E731
    monkeypatch.setattr(plugins, "registered", known)
    monkeypatch.setattr(Learns, "prepared", 0)
    return Learns


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ("weights", "returned str; expected a list of LearnedTable"),
        ([{"title": "weights"}], r"returned \['dict'\]; expected a list of LearnedTable"),
        ([LearnedTable("w", ["a"], ["b", "c"], [[1.0]])], r"rows of \[1\] values; expected 1 rows of 2 values"),
        ([LearnedTable("w", ["a"], ["b"], [["x"]])], "neither numbers nor None"),
    ],
)
def test_tables_that_are_none_are_refused_before_anything_is_trained(tables, reason, method, monkeypatch, tmp_path):
    monkeypatch.setattr(method, "tables", tables)
    with pytest.raises(UserError, match=f"learned of Learns.*{reason}"):
        exitkit.train({"method": "learns", **SHORT}, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_table_that_goes_wrong_after_training_costs_the_table_alone(method, monkeypatch, tmp_path):
    def late(self, run):
        return [] if run.position.epoch == 0 else "weights"

    monkeypatch.setattr(method, "learned", late)
    with pytest.warns(Note, match="learned of Learns"):
        run = exitkit.train({"method": "learns", **SHORT}, tmp_path)
    assert run.finished and run.learned() == []


def test_a_strategy_is_prepared_once_per_phase(method, monkeypatch, tmp_path):
    monkeypatch.setattr(method, "tables", [])
    exitkit.train({"method": "learns", **SHORT}, tmp_path)
    assert method.prepared == 1


def test_a_strategy_is_prepared_with_its_teachers(monkeypatch, tmp_path):
    prepared = []
    kind = type(exitkit.build_strategy("kd"))
    monkeypatch.setattr(kind, "prepare", lambda self, run: prepared.append(list(run.teachers)))
    exitkit.train({"method": "kd", "method_settings": {"teacher": "joint"}, **SHORT}, tmp_path)
    assert prepared == [["joint"]]


def test_phases_that_are_none_are_refused(method, monkeypatch, tmp_path):
    for phases in ([], None, ["train"], [Phase("a", Learns(), 1), 3]):
        monkeypatch.setattr(method, "phases", lambda self, epochs, exits, phases=phases: phases)
        with pytest.raises(UserError, match="phases of Learns returned"), warnings.catch_warnings():
            exitkit.train({"method": "learns", **SHORT}, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
