import os

# One thread a process: the tests run in parallel, and more threads would only be slower and noisier.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import signal

import pytest
import torch

from exitkit.cli import main

torch.set_num_threads(1)

# A script's background processes are started with SIGINT ignored, and so would be all that the tests start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _stoppable():
    """What ends a command for good, ends no more than the test that called it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    """A command line in an empty folder; gives (exit code, what it printed, what it complained of)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        printed = capsys.readouterr()
        return end.value.code, printed.out, printed.err

    return call
