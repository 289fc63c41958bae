import gc
import os
import re

# One thread a process: the tests run in parallel, and more threads would only be slower and noisier.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import signal
import warnings
from collections import Counter
from typing import NamedTuple

import pytest
import torch

from exitkit import plugins, registration
from exitkit.cli import main

torch.set_num_threads(1)

# The tests kill processes and never the machine: what is written survives without being flushed to the disk.
os.fsync = lambda descriptor: None

# A script's background processes are started with SIGINT ignored, and so would be all that the tests start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)  # after those of the full run are left out
def pytest_collection_modifyitems(items):
    """Order files by their number of tests: those of few tests take longest, and no core is to wait for the last."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: tests[item.path])


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """Full garbage collections, of which every training makes one, skip what was imported before this module."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_registrations():
    """What a test registers is gone after it, also for the processes of later tests."""
    stores = registration._registrations, registration._imported
    before = [store.copy() for store in stores]
    yield
    os.environ.pop(registration.VARIABLE, None)
    if list(stores) == before:
        return
    for store, kept in zip(stores, before, strict=True):
        store.clear()
        store.update(kept)
    plugins.registered.cache_clear()
    plugins.load.cache_clear()


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


NOT_ERRORS = re.compile(r"[\d,]+ (classes: |training, )|exitkit: torchvision's compiled library does not fit")
"""What a training says of its data before it fails, and what is said of torchvision on this machine."""


class Result(NamedTuple):
    """What a command line ended with."""

    code: int
    out: str
    errors: str

    def refused(self, *says):
        """Check that it was refused in one line that has these words."""
        lines = [line for line in self.errors.strip().splitlines() if not NOT_ERRORS.match(line)]
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
