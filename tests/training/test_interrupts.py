"""Ctrl-C at any time: an end within moments, one line that says how to go on, and nothing left running or broken."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

import exitkit

from toy import FEW, FEW_OPTIONS

TRAIN = [sys.executable, "-m", "exitkit", "train", "--method", "boostnet", "--epochs", "2", *FEW_OPTIONS]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
BITS = ("weights.safetensors", "outputs-validation.safetensors", "outputs-test.safetensors", "metrics.csv")
BITS += ("results.json",)


def bits(out):
    (folder,) = (path for path in out.iterdir() if not path.name.startswith("."))
    return {name: (folder / name).read_bytes() for name in BITS}


def start(*command):
    """Start in a process group of its own, as a shell does with what stands in front."""
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_until(true):
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for(out, pattern):
    wait_until(lambda: any(out.glob(pattern)))


def ctrl_c(process):
    """Press Ctrl-C: every process of the group gets SIGINT. Returns (seconds until the end, lines of stderr)."""
    os.killpg(process.pid, signal.SIGINT)
    asked = time.monotonic()
    _, errors = process.communicate(timeout=30)
    return time.monotonic() - asked, errors.strip().splitlines()


def group_is_gone(process):
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture
def reference(tmp_path):
    exitkit.train({"method": "boostnet", "epochs": 2, **FEW}, tmp_path / "reference")
    return bits(tmp_path / "reference")


@pytest.mark.parametrize("moment", ["*", "*/checkpoint.pt"])
def test_the_line_that_it_leaves_goes_on_to_the_same_bits(moment, reference, tmp_path):
    out = tmp_path / "with a space"
    process = start(*TRAIN, "--out", str(out))
    wait_for(out, moment)
    seconds, errors = ctrl_c(process)
    assert process.returncode == 130 and seconds < 15
    assert not any("Traceback" in line for line in errors)
    before, _, command = errors[-1].partition("resume with: ")
    assert before == "exitkit: stopped; " and command.startswith("exitkit train ")
    again = subprocess.run(f"{sys.executable} -m {command}", shell=True, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert bits(out) == reference
    assert not list(out.rglob("*.part"))


def test_at_any_time_from_the_first_on_there_is_one_line(tmp_path):
    for number, seconds in enumerate((0.6, 1.2, 2.0, 2.8)):
        process = start(*TRAIN, "--epochs", "50", "--out", str(tmp_path / str(number)))
        time.sleep(seconds)
        _, errors = ctrl_c(process)
        assert process.returncode == 130, errors
        assert [line for line in errors if line.startswith("exitkit: ")][-1].startswith("exitkit: stopped"), errors
        assert not any("Traceback" in line for line in errors), (seconds, errors)


def test_in_a_terminal_the_cursor_is_given_back(tmp_path):
    import pty

    keeper, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "300"}
    command = [*TRAIN, "--epochs", "50", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, env=environment
    )
    os.close(terminal)
    shown, pressed = b"", False
    with contextlib.suppress(OSError), os.fdopen(keeper, "rb", buffering=0) as screen:  # ends when the process has
        while piece := screen.read(65536):
            shown += piece
            if b"steps/s" in shown and not pressed:
                os.killpg(process.pid, signal.SIGINT)
                pressed = True
    assert process.wait(timeout=30) == 130
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l") >= 0
    last = shown.decode().strip().splitlines()[-1].rpartition("\x1b[2K")[2]
    assert last.startswith("exitkit: stopped; resume with: exitkit train") and last.endswith("--resume")


# At so low a rate that one process and two differ by no more than what their sums' order makes of it.
# The full run takes Meta-GF, too, which writes a checkpoint a branch.
RECIPES = [{"method": "ge", "epochs": 4, "lr": 0.001}]
RECIPES += [pytest.param({**RECIPES[0], "method": "metagf", "epochs": 1}, marks=pytest.mark.full)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_under_torchrun_is_that_of_one_process_and_goes_on_to_the_same_bits(recipe, tmp_path, monkeypatch):
    options = [word for name, value in recipe.items() for word in (f"--{name}", str(value))]
    command = ["-m", "exitkit", "train", *options, *FEW_OPTIONS]
    whole, out = tmp_path / "whole", tmp_path / "interrupted"
    done = subprocess.run([*TORCHRUN, *command, "--out", str(whole)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder:") == 1  # the first rank alone speaks
    (together,) = whole.iterdir()
    alone = exitkit.train(recipe | FEW, tmp_path / "alone").path
    assert alone.name == together.name and not list(together.glob(".*"))
    one, two = (pd.read_csv(run / "metrics.csv") for run in (alone, together))
    losses = [name for name in one if "loss" in name]
    assert two[losses].to_numpy() == pytest.approx(one[losses].to_numpy(), rel=1e-3)

    process = start(*TORCHRUN, *command, "--out", str(out))
    wait_for(out, "*/checkpoint.pt")
    seconds, errors = ctrl_c(process)
    assert process.returncode != 0 and seconds < 20
    (line,) = (line for line in errors if line.startswith("exitkit: stopped"))
    before, _, told = line.partition("torchrun ... ")
    assert before == "exitkit: stopped; resume with: "
    wait_until(lambda: group_is_gone(process))

    (checkpoint,) = out.glob("*/checkpoint.pt")
    stopped_at = checkpoint.stat().st_mtime_ns
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")  # how long a rank that waits for a dead one is left
    process = start(*TORCHRUN, *shlex.split(told))
    wait_until(lambda: checkpoint.stat().st_mtime_ns > stopped_at)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    process.communicate(timeout=180)
    assert process.returncode != 0
    wait_until(lambda: group_is_gone(process))
    again = [*TORCHRUN, *command, "--resume", "--out", str(out)]
    done = subprocess.run(again, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert bits(out) == bits(whole)
