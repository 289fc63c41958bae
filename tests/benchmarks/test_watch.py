"""`exitkit watch` from files alone: states, numbers, time left; half-made folders; a screen, a pipe, a script."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock

import exitkit
from exitkit.benchmarks.campaign.watching import Watched, labels, look, seconds_left
from exitkit.benchmarks.commands import watch as watch_command
from exitkit.training.progress import Progress, ProgressFile

from toy import FEW

RECIPE = {"method": "ge", "backbone": "msdnet-tiny", "dataset": "digits", "seed": 0, "epochs": 4}
METRICS = "phase,epoch,lr,train_loss_1,train_loss_2,validation_accuracy_1,validation_accuracy_2\n"


class Campaign:
    """A folder of runs, made file by file."""

    def __init__(self, folder):
        self.folder = folder

    def plan(self, *runs):
        planned = [{"run": name, "recipe": RECIPE | more} for name, more in runs]
        self.folder.joinpath("comparison-0123abcd.json").write_text(json.dumps({"runs": planned}))

    def begun(self, name, epochs=0, age=0.0, host=None, **more):
        path = self.folder / name
        path.mkdir()
        (path / "recipe.json").write_text(json.dumps(RECIPE | more))
        rows = [f"train,{epoch},0.1,2.5,1.5,{40 + epoch},{60 + epoch}\n" for epoch in range(1, epochs + 1)]
        (path / "metrics.csv").write_text(METRICS + "".join(rows))
        (path / "timing.csv").write_text("phase,epoch,seconds,peak_mib\n" + f"train,1,{10.0},100\n" * epochs)
        if host:
            beat = {"phase": "train", "epoch": epochs + 1, "epochs": 4, "fraction": 0.4, "losses": [2.25, 1.25]}
            beat |= {"seconds_left": 90.0, "host": host, "when": time.time() - age}
            (path / "progress.json").write_text(json.dumps(beat))
        for file in (path, *path.iterdir()):
            os.utime(file, (time.time() - age,) * 2)
        return path

    def finished(self, name, **more):
        path = self.begun(name, 4, **more)
        (path / "results.json").write_text('{"validation": [44, 64], "test": [45.5, 65.5]}')

    def failed(self, name, reason):
        (self.folder / "failures").mkdir(exist_ok=True)
        (self.folder / "failures" / f"{name}.json").write_text(json.dumps({"reason": reason}))


@pytest.fixture
def campaign(tmp_path):
    return Campaign(tmp_path)


def states(folder):
    return {run.run: (run.state, run.note) for run in look(folder)}


def test_every_state_is_told_from_the_files_alone(campaign, tmp_path):
    here = os.uname().nodename
    campaign.plan(*((name, {"seed": seed}) for seed, name in enumerate(("later", "done", "now", "broke", "again"))))
    campaign.finished("done", seed=1)
    campaign.begun("now", 1, host=here, seed=2)
    campaign.failed("broke", "the loss of exit 3 is not finite")
    campaign.failed("again", "the disk is full")
    again = campaign.begun("again", 1, host=here, seed=4)
    os.utime(tmp_path / "failures/again.json", (time.time() - 60,) * 2)
    campaign.begun("left", 1, age=300, host=here, seed=5)
    campaign.begun("far", 1, age=60, host="another machine", seed=6)
    campaign.begun("lost", 1, age=600, host="another machine", seed=7)
    (tmp_path / ".draft.part").mkdir()
    (tmp_path / ".draft.part/recipe.json").write_text("{}")
    with FileLock(tmp_path / "now/run.lock"), FileLock(tmp_path / "again/run.lock"):
        found = states(tmp_path)
    assert found == {
        "later": ("waiting", ""),
        "done": ("finished", ""),
        "now": ("running", ""),
        "broke": ("failed", "the loss of exit 3 is not finite"),
        "again": ("running", ""),
        "far": ("running", ""),
        "left": ("stalled", "no process trains it; run the same command again"),
        "lost": ("stalled", "no progress for 10 min"),
    }
    stalled = ("stalled", "no process trains it; run the same command again")
    assert states(tmp_path)["now"] == stalled  # stopped just now
    (again / "progress.json").unlink()
    os.utime(again, (0, 0))
    assert states(tmp_path)["again"] == ("failed", "the disk is full")
    with FileLock(tmp_path / "left/run.lock"):
        os.utime(tmp_path / "left", (0, 0))
        assert states(tmp_path)["left"] == ("stalled", "no progress for 5 min")
    with FileLock(tmp_path / "now/run.lock"):
        now = next(run for run in look(tmp_path) if run.run == "now")
    assert (now.phase, now.epoch, now.epochs, now.fraction, now.seconds_left) == ("train", 2, 4, 0.4, 90.0)
    assert now.train_losses == [2.25, 1.25] and now.validation_accuracies == [41, 61] and now.seconds == 10


@pytest.mark.parametrize("name", ["recipe.json", "metrics.csv", "timing.csv", "progress.json", "results.json"])
@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b'{"epochs": null}', b"a,b\n1\n2,3,4\n"])
def test_a_file_that_is_half_there_or_no_such_thing_stops_nothing(name, content, campaign, tmp_path):
    path = campaign.begun("run", 1, host="another machine")
    campaign.finished("other")
    (path / name).write_bytes(content)
    (tmp_path / "comparison.json").write_bytes(content)
    (tmp_path / "comparison-89abcdef.json").write_bytes(content)
    (tmp_path / "a file").write_text("")
    found = states(tmp_path)
    assert found["other"][0] == "finished" and "run" in found
    assert watch_command._view(tmp_path, look(tmp_path), 10)


LINE = "train,1,0.1,2.5,1.5,40,60\n"
DAMAGED = {
    "metrics.csv": ["", "nonsense", METRICS.replace("epoch", "x") + LINE, METRICS + "train,two,0.1,2.5,1.5,40,60\n"]
    + [METRICS + line for line in ("train,1\n", LINE.replace("\n", ",7\n"), LINE.replace("2.5", "inf"))],
    "timing.csv": ["", "phase,epoch,seconds,peak_mib\ntrain,1,x,100\n"],
    "recipe.json": [
        "{}",
        '{"method": "ge", "dataset": "digits", "seed": 0}',
        '{"method": 3}',
        '{"epochs": -1}',
        '{"seed": 1e400}',
        '{"method_settings": 5}',
        "[" * 900,
    ],
    "progress.json": ['{"epoch": "two"}', '{"fraction": 7}', '{"losses": ["a"]}', '{"epochs": 1e30}', '{"when": NaN}'],
    "results.json": ['{"test": ["a"]}', '{"test": [1e9]}', '{"test": {}}', '{"test": [NaN]}'],
}


@pytest.mark.parametrize(("name", "content"), [(name, text) for name, texts in DAMAGED.items() for text in texts])
def test_a_run_with_wrong_values_is_shown_as_damaged_and_hides_no_other(name, content, campaign, cli, tmp_path):
    path = campaign.begun("run", 1, host="another machine")
    campaign.finished("other")
    (path / name).write_text(content)
    found = states(tmp_path)
    assert found["other"] == ("finished", "") and found["run"][0] == "failed" and name in found["run"][1]
    code, shown, errors = cli("watch", tmp_path, "--once")
    assert code == 0 and not errors and "2 runs: 1 finished, 1 failed" in shown
    (path / "results.json").write_text('{"validation": [44, 64], "test": [45.5, 65.5]}')
    campaign.plan(("run", {}))
    if name != "results.json":
        assert states(tmp_path)["run"][0] == "failed"


def test_a_finished_run_without_epochs_is_damaged(campaign, tmp_path):
    campaign.finished("run")
    (tmp_path / "run/metrics.csv").write_text(METRICS)
    assert states(tmp_path)["run"] == ("failed", f"{tmp_path / 'run/metrics.csv'} is damaged (it has no epoch)")


def test_time_left_is_of_what_is_left_at_as_many_runs_at_once_as_now():
    done = Watched("a", {"method": "ge"}, "finished", seconds=100.0)
    other = Watched("b", {"method": "l2w"}, "finished", seconds=400.0)
    now = Watched("c", {"method": "ge"}, "running", seconds_left=60.0)
    waits = [Watched(name, {"method": method}) for name, method in (("d", "ge"), ("e", "imta"))]
    assert seconds_left([done, other, now, *waits]) == 60 + 100 + 250
    assert seconds_left([done, other, now, now, waits[0]]) == (60 + 60 + 100) / 2
    assert seconds_left([now, waits[0]]) is None and seconds_left([done, waits[0]]) is None


def test_runs_are_named_by_what_tells_them_apart():
    def named(*recipes):
        return labels([Watched("x", {"dataset": "digits", **recipe}) for recipe in recipes])

    assert named({"method": "ge", "seed": 0}, {"method": "joint", "seed": 0}) == ["ge s0", "joint s0"]
    swept = [{"method": "kd", "seed": 1, "method_settings": {"temperature": [t]}} for t in (1, 2)]
    assert named(*swept) == ["kd temperature=1 s1", "kd temperature=2 s1"]
    two = [{"method": "ge", "seed": 0, "backbone": name} for name in ("b7", "b10")]
    assert named(*two) == ["ge b7 s0", "ge b10 s0"] and named({}) == ["? s?"]


@pytest.fixture
def cli(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    return cli


def test_it_is_printed_once_for_people_and_for_scripts(cli, campaign, tmp_path):
    campaign.plan(("waits", {"seed": 3}))
    campaign.finished("done")
    campaign.begun("now", 1, host="another machine", seed=1)
    campaign.failed("waits", "no images")
    code, out, _ = cli("watch", tmp_path, "--once")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    for words in (
        "ge s0",
        "finished",
        "45.5 65.5",
        "2/4",
        "2.25 1.25",
        "2 min",
        "ge s3: no images",
        "3 runs: 1 finished",
    ):
        assert words in out, (words, out)
    code, out, errors = cli("watch", tmp_path, "--json")
    facts = json.loads(out)
    assert code == 0 and not errors and list(facts) == ["folder", "states", "seconds_left", "runs"]
    assert facts["states"] == {"running": 1, "stalled": 0, "failed": 1, "waiting": 0, "finished": 1}
    assert [run["label"] for run in facts["runs"]] == ["ge s3", "ge s0", "ge s1"]


def test_where_there_is_no_terminal_each_change_is_a_line_and_the_end_is_the_end(cli, campaign, tmp_path, monkeypatch):
    campaign.begun("now", 1, host="another machine")

    def time_passes(seconds):
        (tmp_path / "now/results.json").write_text('{"test": [50, 70]}')

    monkeypatch.setattr(watch_command.time, "sleep", time_passes)
    code, out, _ = cli("watch", tmp_path)
    lines = [line.partition("  ")[2] for line in out.splitlines()]
    assert code == 0 and lines == [
        "ge s0: running, epoch 2/4, loss 2.25 1.25, accuracy 41.0 61.0 %",
        "ge s0: finished, loss 2.25 1.25, accuracy 50.0 70.0 %",
        "",
    ]
    assert out.splitlines()[-1] == "1 run: 1 finished"


def test_states_are_selected_and_all_runs_are_summed_up(cli, campaign, tmp_path):
    campaign.plan(("waits", {"seed": 3}), ("lost", {"seed": 4}))
    campaign.finished("done")
    campaign.begun("now", 1, host="another machine", seed=1)
    campaign.failed("lost", "no images")
    code, out, _ = cli("watch", tmp_path, "--once", "--state", "failed,running")
    shown = [line.split()[1] for line in out.splitlines() if line.split()[:1] == ["ge"]]
    assert code == 0 and sorted(shown) == ["s1", "s4", "s4:"], out
    assert "4 runs: 1 finished, 1 waiting, 1 failed, 1 running" in out
    facts = json.loads(cli("watch", tmp_path, "--json", "--state", "waiting").out)
    assert [run["run"] for run in facts["runs"]] == ["waits"] and sum(facts["states"].values()) == 4
    cli("watch", tmp_path, "--state", "faild").refused("unknown state 'faild'; did you mean failed or stalled?")


def test_a_folder_that_is_none_is_said_and_an_empty_one_may_fill_up(cli, tmp_path):
    code, _, errors = cli("watch", "nowhere")
    assert code == 2 and errors == "exitkit: nowhere does not exist; expected a folder of runs\n"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").touch()
    cli("watch", "run").refused(f"run is a run; expected the folder that it is in: exitkit watch {tmp_path}")
    (tmp_path / "run" / "recipe.json").unlink()
    (tmp_path / "run").rmdir()
    assert "".join(cli("watch", tmp_path, "--once")[1].split()) == f"norunsin{tmp_path}yet"  # long paths are wrapped


def test_ctrl_c_ends_it_with_one_line_and_torch_is_never_loaded(campaign, tmp_path):
    campaign.begun("now", 1, host="another machine")
    probe = "import sys, exitkit.cli\ntry: exitkit.cli.main(['watch', '.'])\nfinally: print('torch' in sys.modules)"
    process = subprocess.Popen(
        [sys.executable, "-c", probe], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert "running" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and errors == "exitkit: stopped watching; training continues\n"
    assert out == "False\n"


def test_a_training_tells_where_it_is_and_takes_the_file_away_at_its_end(tmp_path, monkeypatch):
    seen = []

    def report(progress):
        seen.extend(look(tmp_path))

    monkeypatch.setattr("exitkit.training.progress.INTERVAL", 0.0)
    run = exitkit.train({"epochs": 2, **FEW}, tmp_path, report=report)
    assert {each.state for each in seen} == {"running"} and all(len(each.train_losses) == 4 for each in seen)
    assert [each.epoch for each in seen] == sorted(each.epoch for each in seen) and seen[-1].fraction == 1
    assert not (run.path / "progress.json").exists() and look(tmp_path)[0].state == "finished"
    blocked = ProgressFile(tmp_path / "not there", seen.append)
    blocked(Progress("train", 1, 2, 0.5, 1.0, [1.0], [0.5]))
    assert len(seen) and not (tmp_path / "not there").exists()
