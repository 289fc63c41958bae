import os

# One thread a process: the tests run in parallel, and more threads would only be slower and noisier.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import signal
import warnings
from typing import NamedTuple

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


class Result(NamedTuple):
    """What a command line ended with."""

    code: int
    out: str
    errors: str

    def refused(self, *says):
        """Check that it was refused in one line that has these words."""
        lines = self.errors.strip().splitlines()
        assert self.code == 2 and not self.out, (self.code, self.out, self.errors)
        assert len(lines) == 1 and lines[0].startswith("exitkit: "), self.errors
        for words in says:
            assert words in lines[0], lines[0]


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    """A command line in an empty folder, in this process; gives a `Result`. Only an orderly end will do."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        with pytest.raises(SystemExit) as end, warnings.catch_warnings():
            main([str(word) for word in words])
        printed = capsys.readouterr()
        return Result(end.value.code, printed.out, printed.err)

    return call
