"""SIGKILL at random moments, of every method: nothing is lost, the bits are the same."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest

import exitkit
from exitkit import plugins

METHODS = sorted(plugins.registered("method"))
SETTINGS = {"per_class": 12, "validation": 40}
RECIPE = {"epochs": 3, "batch_size": 32, "dataset_settings": SETTINGS}
OPTIONS = ["--epochs", "3", "--batch-size", "32", "--set", "per_class=12", "--set", "validation=40"]
SAME = ("weights.safetensors", "outputs-validation.safetensors", "outputs-test.safetensors", "metrics.csv")
SAME += ("results.json", "cost.json", "recipe.json", "split.safetensors")
MOMENTS = 30


def bits(out):
    folders = sorted(path.parent for path in out.glob("[!.]*/recipe.json"))
    return {(folder.name, name): (folder / name).read_bytes() for folder in folders for name in SAME}


def killed_after(seconds, *arguments):
    """Run `exitkit` on the arguments and kill it and what it started, if it is not at its end by then."""
    process = subprocess.Popen(
        [sys.executable, "-m", "exitkit", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def to_the_end(*arguments):
    done = subprocess.run([sys.executable, "-m", "exitkit", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def survives(moments, seed, tmp_path, *command):
    """Run a command to its end at once, and again with that many kills between: the same bits, and nothing else."""
    clock, reference, out = random.Random(seed), tmp_path / "reference", tmp_path / "killed"
    began = time.monotonic()
    to_the_end(*command, "--out", str(reference))
    takes = time.monotonic() - began
    for _ in range(moments):
        killed_after(clock.uniform(0.2 * takes, takes), *command, "--resume", "--out", str(out))
    to_the_end(*command, "--resume", "--out", str(out))
    assert bits(out) == bits(reference)
    assert not list(out.rglob("*.part"))
    return reference, out


def one_run(method, moments, seed, tmp_path):
    reference, _ = survives(moments, seed, tmp_path, "train", "--method", method, *OPTIONS)
    exitkit.train(RECIPE | {"method": method}, tmp_path / "called")
    assert bits(tmp_path / "called") == bits(reference)  # the command line is the function


def test_a_few_random_moments_of_one_method(tmp_path):
    one_run("boostnet", 2, 11, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(MOMENTS))
def test_thirty_random_moments_over_all_methods(number, tmp_path):
    one_run(METHODS[number % len(METHODS)], 1, number, tmp_path)


COMPARE = ["compare", "--methods", "ge,metagf", "--seeds", "1", *OPTIONS]


def tables(out):
    return {path.name: path.read_bytes() for path in (out / "report").glob("*.csv")}


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(10))
def test_random_moments_of_a_comparison(number, tmp_path):
    """The whole process group dies, and three times in a row, so that also what resumes is killed."""
    reference, out = survives(3, number, tmp_path, *COMPARE, "--jobs", str(1 + number % 2))
    theirs, ours = tables(reference), tables(out)
    assert len(ours) > 10 and ours.keys() == theirs.keys()
    for name in ours.keys() - {"training.csv"}:  # this one has seconds in it
        assert ours[name] == theirs[name], name


@pytest.mark.full
def test_two_comparisons_share_a_folder_and_one_is_killed(tmp_path):
    to_the_end(*COMPARE, "--out", str(tmp_path / "reference"))
    out = tmp_path / "shared"
    with subprocess.Popen(
        [sys.executable, "-m", "exitkit", *COMPARE, "--jobs", "1", "--out", str(out)], stderr=subprocess.PIPE
    ) as lasting:
        killed_after(9.0, *COMPARE, "--jobs", "1", "--out", str(out))
        _, said = lasting.communicate(timeout=300)
    assert lasting.returncode == 0, said
    assert b"Traceback" not in said
    assert bits(out) == bits(tmp_path / "reference")
    assert not list(out.rglob("*.part")) and not list(out.glob("failures/*"))
