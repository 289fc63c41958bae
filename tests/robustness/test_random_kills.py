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


def one_run(method, moments, seed, tmp_path):
    clock, out = random.Random(seed), tmp_path / "killed"
    reference = tmp_path / "reference"
    exitkit.train(RECIPE | {"method": method}, reference)
    command = ["train", "--method", method, *OPTIONS, "--out", str(out), "--resume"]
    began = time.monotonic()
    to_the_end(*command[:-3], "--out", str(tmp_path / "timed"))
    takes = time.monotonic() - began
    for _ in range(moments):
        killed_after(clock.uniform(0.2 * takes, takes), *command)
    to_the_end(*command)
    assert bits(out) == bits(reference)
    assert not list(out.rglob("*.part"))


def test_a_few_random_moments_of_one_method(tmp_path):
    one_run("boostnet", 2, 11, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(MOMENTS))
def test_thirty_random_moments_over_all_methods(number, tmp_path):
    one_run(METHODS[number % len(METHODS)], 1, number, tmp_path)
