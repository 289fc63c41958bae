"""A run killed with SIGKILL at any moment and started again ends in the same bits as one that never was."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import exitkit
from exitkit import plugins

from toy import FEW, FEW_OPTIONS

HERE = Path(__file__).parents[1]
METHODS = list(plugins.registered("method"))
SAME = ("weights.safetensors", "outputs-validation.safetensors", "outputs-test.safetensors", "metrics.csv")
SAME += ("results.json", "cost.json", "recipe.json", "split.safetensors")
SMALL = {"epochs": 2, **FEW}

# Imports once, then forks a process for every command line that it is given and tells how that one ended.
FORKS = """
import gc, json, os, runpy, sys
import exitkit.cli.show, exitkit.cli.train, exitkit.training.loop, sklearn.datasets, torch._dynamo  # what a run imports
gc.freeze()  # a collection would copy the imported modules into every process
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        sys.argv = json.loads(line)
        runpy.run_path("deadly.py", run_name="__main__")
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def arguments(method, out):
    return ["train", "--method", method, "--epochs", "2", *FEW_OPTIONS, "--out", str(out), "--resume"]


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
            [sys.executable, "-c", FORKS],
            cwd=HERE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
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


@pytest.fixture(scope="module")
def trained_before(tmp_path_factory):
    exitkit.train({"method": "joint", "epochs": 1, **FEW}, tmp_path_factory.mktemp("before"))


@pytest.fixture
def reference(trained_before, tmp_path):
    """The bits of a run of each method that was never killed, trained in this process after others."""

    def make(method):
        exitkit.train({"method": method, **SMALL}, tmp_path / "reference")
        return bits(tmp_path / "reference")

    return make


# Those that differ from another in nothing but a pure function of gradients or outputs are left to the full run.
ALIKE = {
    "aligned",
    "bdl",
    "beed",
    "cagrad",
    "config",
    "dualproj",
    "ge",
    "graddrop",
    "imtlg",
    "isc",
    "mgda",
    "nashmtl",
    "ofa",
}
ALIKE |= {"pcgrad", "upgrad"}


@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.full] * (m in ALIKE)) for m in METHODS])
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


def test_killed_after_each_file_that_a_run_writes(reference, die, tmp_path):
    # The folder's own, whole only with the fifth; per process the progress, per epoch metrics, timing and checkpoint;
    # then the weights; then the five files of the evaluation, written beside the run, and moved into it one by one.
    out = tmp_path / "killed"
    for count in (2, 5, 1, 2, 3, 4, 2, 3, 4, 1, 4, 7, 8, 9, 10):
        die("renamed", count, *arguments("joint", out))
    die("never", 0, *arguments("joint", out), code=0)
    assert bits(out) == reference("joint")
    assert not list(out.rglob("*.part"))


def test_killed_between_and_within_the_passes_of_metagf(reference, die, tmp_path):
    # A branch's end is one rename, the checkpoint's, after five that make the folder and the progress; a pass is three
    # steps. After the first branch; after the third; at the epoch's end; in a branch; in a fusion; evaluated by half.
    out = tmp_path / "killed"
    for event, count in [("renamed", 7), ("renamed", 3), ("renamed", 3), ("step", 5), ("step", 14), ("renamed", 8)]:
        die(event, count, *arguments("metagf", out))
    die("never", 0, *arguments("metagf", out), code=0)
    assert bits(out) == reference("metagf")


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
    monkeypatch.setattr("exitkit.runs.folder._LOCK_PATIENCE", 0.2)
    assert run("deadly.py", "step", "4", *arguments("joint", tmp_path), check=False).returncode == -signal.SIGKILL
    (folder,) = tmp_path.iterdir()
    hold = f"hold = exitkit.RunFolder({str(folder)!r}).held(); hold.__enter__()"
    script = f"import exitkit; {hold}; print(1, flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"1\n"
    with pytest.raises(exitkit.UserError, match="is in use by another process"):
        exitkit.train({"method": "joint", **SMALL}, tmp_path)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert exitkit.train({"method": "joint", **SMALL}, tmp_path).finished  # the hold went with its process
