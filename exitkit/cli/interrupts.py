"""Ctrl-C on the command line: one line and exit code 130, whatever was being done."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """Inside the block, end the process at Ctrl-C, except in parts that are `interruptible`.

    While libraries are imported, a KeyboardInterrupt is torn apart in their C code or swallowed by their fallbacks.
    """
    # Where SIGINT is ignored, as in a script's background processes, it stays so; other threads can't set handlers.
    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt inside the block, so that work is put away in order."""
    ours = signal.getsignal(signal.SIGINT) is _leave
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, _leave)


def stopped_for_good() -> None:
    """Take no further Ctrl-C until the process ends.

    A second one would only tear a traceback out of the way down. And where the first met a library's C code, Python
    would end by that signal instead of by the exit code.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def speaks_for_all() -> bool:
    """Tell whether this is the only process of its command, or the first of several ranks."""
    return os.environ.get("RANK", "0") == "0"


def _leave(*_: Any) -> None:
    if speaks_for_all():
        os.write(2, b"exitkit: stopped\n")
    os._exit(130)
