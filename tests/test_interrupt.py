"""Ctrl-C at any time: an end within moments, one line that says how to go on, and nothing left running or broken."""

import os
import signal
import subprocess
import sys
import time

import pytest

import exitkit

TRAIN = [sys.executable, "-m", "exitkit", "train", "--method", "boostnet", "--epochs", "2", "--batch-size", "256"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
BITS = ("weights.safetensors", "outputs-validation.safetensors", "outputs-test.safetensors", "metrics.csv")
BITS += ("results.json",)


def bits(out):
    (folder,) = (path for path in out.iterdir() if not path.name.startswith("."))
    return {name: (folder / name).read_bytes() for name in BITS}


def start(*command):
    """Start in a process group of its own, as a shell does with what stands in front."""
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(out, pattern):
    deadline = time.monotonic() + 60
    while not list(out.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.01)


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
    exitkit.train({"method": "boostnet", "epochs": 2, "batch_size": 256}, tmp_path / "reference")
    return bits(tmp_path / "reference")


@pytest.mark.parametrize("moment", ["*", "*/checkpoint.pt", "*/weights.safetensors"])
def test_the_line_that_it_leaves_goes_on_to_the_same_bits(moment, reference, tmp_path):
    out = tmp_path / "with a space"
    process = start(*TRAIN, "--out", str(out))
    wait_for(out, moment)
    seconds, errors = ctrl_c(process)
    assert process.returncode == 130 and seconds < 3
    assert not any("Traceback" in line for line in errors)
    before, _, command = errors[-1].partition("go on with: ")
    assert before == "exitkit: stopped; " and command.startswith("exitkit train ")
    again = subprocess.run(
        f"{sys.executable} -m {command}", shell=True, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert bits(out) == reference
    assert not list(out.rglob("*.part"))


def test_at_any_time_from_the_first_on_there_is_one_line(tmp_path):
    for number, seconds in enumerate((0.6, 1.2, 2.0)):
        process = start(*TRAIN, "--epochs", "50", "--out", str(tmp_path / str(number)))
        time.sleep(seconds)
        _, errors = ctrl_c(process)
        assert process.returncode == 130, errors
        assert not any("Traceback" in line for line in errors), (seconds, errors)


def test_in_a_terminal_the_cursor_is_given_back(tmp_path):
    import pty

    keeper, terminal = pty.openpty()
    out = tmp_path / "runs"
    process = subprocess.Popen(
        [*TRAIN, "--epochs", "50", "--out", str(out)], stdin=terminal, stdout=terminal, stderr=terminal,
        start_new_session=True, env=os.environ | {"TERM": "xterm", "COLUMNS": "300"},
    )  # fmt: skip
    os.close(terminal)
    os.set_blocking(keeper, False)
    shown = b""
    while process.poll() is None:
        try:
            shown += os.read(keeper, 65536)
        except (BlockingIOError, OSError):
            time.sleep(0.02)
        if b"steps/s" in shown and not list(out.glob("done")):
            os.killpg(process.pid, signal.SIGINT)
            (out / "done").touch()
    try:
        shown += os.read(keeper, 65536)
    except OSError:
        pass
    os.close(keeper)
    assert process.returncode == 130
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l") >= 0
    assert shown.decode().strip().splitlines()[-1].startswith("exitkit: stopped; go on with: exitkit train")
