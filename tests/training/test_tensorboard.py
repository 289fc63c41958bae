"""TensorBoard logs: what the metrics say, each epoch once however often training was stopped; nothing unless asked."""

import shutil
import subprocess
import sys
from importlib.util import find_spec

import pandas as pd
import pytest

import exitkit
from exitkit.errors import Note, UserError
from exitkit.training.checkpoint import Checkpoints

from toy import FEW

RECIPE = {"epochs": 3, "tensorboard": True, **FEW}


def scalars(run):
    """{tag: [(step, value)]} of all that lies in a run's log, as TensorBoard itself reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def test_a_log_says_what_the_metrics_say_and_has_no_epoch_twice_after_a_stop(tmp_path, monkeypatch):
    save, saved = Checkpoints.save, []

    def stop_after_two(self, run, history, **options):
        save(self, run, history, **options)
        saved.append(run)
        if len(saved) == 3:  # the second epoch's checkpoint, and the third's, are there; its log is not
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        exitkit.train(RECIPE | {"epochs": 4}, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert [step for step, _ in scalars(folder)["lr"]] == [1, 2]
    monkeypatch.undo()

    run = exitkit.train(RECIPE | {"epochs": 4}, tmp_path)
    metrics, found = pd.read_csv(run.path / "metrics.csv"), scalars(run.path)
    assert len(found) == 1 + 4 * 4  # the learning rate, and loss and accuracy in training and validation at four exits
    for tag, values in found.items():
        column = metrics[tag.replace("/exit ", "_")]
        assert [step for step, _ in values] == [1, 2, 3, 4]
        assert [value for _, value in values] == pytest.approx(column, rel=1e-6)


def test_it_is_no_part_of_what_a_run_is_and_not_imported_unless_asked_for(tmp_path):
    probe = f"import sys, exitkit; exitkit.train({FEW | {'epochs': 1}}, sys.argv[1])\n"
    probe += "print([name for name in sys.modules if 'tensorboard' in name and name != 'exitkit.training.tensorboard'])"
    done = subprocess.run([sys.executable, "-c", probe, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    (run,) = tmp_path.iterdir()
    assert not (run / "tensorboard").exists() and not (run / "progress.json").exists()
    asked = exitkit.Recipe.make(**RECIPE | {"epochs": 1}).resolve()
    assert asked.id == run.name


def test_where_the_package_is_missing_the_line_says_how_to_get_it_and_nothing_is_made(tmp_path, monkeypatch):
    found = {"tensorboard": None}
    monkeypatch.setattr(
        "exitkit.training.tensorboard.find_spec", lambda name: found[name] if name in found else find_spec(name)
    )
    with pytest.raises(UserError, match=r"pip install 'exitkit\[tensorboard\]'"):
        exitkit.train(RECIPE, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_log_that_is_deleted_while_a_run_trains_is_written_again(tmp_path, capsys):
    def report(progress):
        if progress.epoch_done and progress.epoch == 2:
            (folder,) = tmp_path.iterdir()
            shutil.rmtree(folder / "tensorboard")

    with pytest.warns(Note, match="was deleted; all epochs are written again"):
        run = exitkit.train(RECIPE, tmp_path, report=report)
    assert [step for step, _ in scalars(run.path)["lr"]] == [1, 2, 3] and "Traceback" not in capsys.readouterr().err
