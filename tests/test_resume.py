"""A run killed with SIGKILL at any moment and started again ends in the same bits as one that never was."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import exitkit
from exitkit import plugins

HERE = Path(__file__).parent
METHODS = list(plugins.registered("method"))
SAME = ("weights.safetensors", "outputs-validation.safetensors", "outputs-test.safetensors", "metrics.csv")
SAME += ("results.json", "cost.json", "recipe.json", "split.safetensors")
SMALL = {"epochs": 2, "batch_size": 256}

# Imports once, then forks a process for every command line that it is given and tells how that one ended.
FORKS = """
import json, os, runpy, sys
import exitkit.cli.show, exitkit.cli.train, exitkit.training, sklearn.datasets
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        sys.argv = json.loads(line)
        runpy.run_path("deadly.py", run_name="__main__")
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def arguments(method, out):
    return ["train", "--method", method, "--epochs", "2", "--batch-size", "256", "--out", str(out), "--resume"]


def run(*command, check=True):
    done = subprocess.run([sys.executable, *command], cwd=HERE, capture_output=True, text=True, check=False)
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def die(tmp_path_factory):
    """die(event, count, *arguments): run `exitkit` on the arguments, and see it killed at the count-th event."""
    errors = tmp_path_factory.mktemp("forks") / "stderr"
    with errors.open("w") as log:
        forks = subprocess.Popen(
            [sys.executable, "-c", FORKS], cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )

    def ends(event, count, *arguments, code=-signal.SIGKILL):
        forks.stdin.write(json.dumps(["deadly.py", event, str(count), *arguments]) + "\n")
        forks.stdin.flush()
        assert int(forks.stdout.readline()) == code, (event, count, errors.read_text()[-2000:])

    yield ends
    forks.stdin.close()
    forks.wait()


def bits(out):
    (folder,) = (path for path in out.iterdir() if not path.name.startswith("."))
    return {name: (folder / name).read_bytes() for name in SAME}


@pytest.fixture
def reference(tmp_path):
    """The bits of a run of each method that was never killed, trained in this process after others."""

    def make(method):
        exitkit.train({"method": "joint", "epochs": 1, "batch_size": 512}, tmp_path / "before")
        exitkit.train({"method": method, **SMALL}, tmp_path / "reference")
        return bits(tmp_path / "reference")

    return make


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_every_kind_of_moment(method, reference, die, tmp_path):
    # While the folder is made; in the first epoch; with half a checkpoint written; with it written but not in place;
    # in place, its metrics not; in the second epoch; trained (metagf: between passes); evaluated by half.
    moments = [("renamed", 3), ("step", 2), ("write", 1), ("rename", 1), ("renamed", 1), ("step", 3), ("renamed", 3)]
    moments += [("rename", 3)]
    out = tmp_path / "killed"
    for event, count in moments:
        die(event, count, *arguments(method, out))
    die("never", 0, *arguments(method, out), code=0)
    assert bits(out) == reference(method)
    assert not list(out.rglob("*.part"))


def test_killed_between_and_within_the_passes_of_metagf(reference, die, tmp_path):
    # Each checkpoint of a branch is a `renamed`: the folder and four first files, then checkpoint and metrics a pass.
    # The last two die at a step of a branch and, five steps a pass, at the third one of a fusion.
    out = tmp_path / "killed"
    for event, count in [("renamed", 7), ("renamed", 3), ("renamed", 3), ("step", 3), ("step", 13), ("renamed", 5)]:
        die(event, count, *arguments("metagf", out))
    die("never", 0, *arguments("metagf", out), code=0)
    assert bits(out) == reference("metagf")


@pytest.mark.parametrize("first", [1, 2, 5, 7, 9])
def test_killed_again_and_again_ever_later(first, reference, die, tmp_path):
    # From `first` on, each attempt gets one rename further than the one before, until one gets through.
    out, count = tmp_path / "killed", first
    while not list(out.glob("*/results.json")):
        die("renamed", count, *arguments("joint", out))
        count += 1
    die("never", 0, *arguments("joint", out), code=0)
    assert bits(out) == reference("joint")
    assert not list(out.rglob("*.part")) and not list(out.glob(".*"))


def test_killed_at_random_times(reference, tmp_path):
    out, clock = tmp_path / "killed", random.Random(7)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-m", "exitkit", *arguments("boostnet", out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(clock.uniform(1.5, 4.5))
        process.kill()
        process.wait()
    run("-m", "exitkit", *arguments("boostnet", out))
    assert bits(out) == reference("boostnet")


def test_sigint_stops_within_moments_and_says_how_to_go_on(reference, tmp_path):
    out = tmp_path / "stopped"
    command = [argument for argument in arguments("ge", out) if argument != "--resume"]
    process = subprocess.Popen(
        [sys.executable, "-m", "exitkit", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - asked < 5
    last = errors.strip().splitlines()[-1]
    assert last.startswith("exitkit: stopped; go on with: exitkit ") and last.endswith("--resume")
    run("-m", "exitkit", *last.partition("with: exitkit ")[2].split())
    assert bits(out) == reference("ge")


def test_a_finished_run_is_left_alone(tmp_path):
    first = exitkit.train({"method": "joint", **SMALL}, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in first.path.iterdir()}
    assert exitkit.train({"method": "joint", **SMALL}, tmp_path, resume=False).path == first.path
    assert {path.name: path.stat().st_mtime_ns for path in first.path.iterdir()} == before


def test_evaluating_again_gives_the_same_bits(tmp_path):
    run_folder = exitkit.train({"method": "boostnet", **SMALL}, tmp_path)
    before = bits(tmp_path)
    (run_folder.path / "outputs-test.safetensors").unlink()
    table = exitkit.evaluate(run_folder)
    assert bits(tmp_path) == before
    assert list(table.exit) == [1, 2, 3, 4] and list(table.accuracy) == run_folder.results()["test"]


def test_a_run_that_another_process_trains_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("exitkit.runs._LOCK_PATIENCE", 0.2)
    assert run("deadly.py", "step", "4", *arguments("joint", tmp_path), check=False).returncode == -signal.SIGKILL
    (folder,) = tmp_path.iterdir()
    hold = f"hold = exitkit.RunFolder({str(folder)!r}).held(); hold.__enter__()"
    script = f"import exitkit; {hold}; print(1, flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"1\n"
    with pytest.raises(exitkit.UserError, match="is being trained by another process"):
        exitkit.train({"method": "joint", **SMALL}, tmp_path)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert exitkit.train({"method": "joint", **SMALL}, tmp_path).finished  # the hold went with its process
