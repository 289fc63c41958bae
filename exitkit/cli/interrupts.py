"""Ctrl-C on the command line: one line and exit code 130, at any time."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """End the process at Ctrl-C inside the block, except in blocks that are `interruptible`.

    During the import of libraries, a KeyboardInterrupt may be lost in C code or caught by import fallbacks.
    """
    # An ignored SIGINT stays ignored, as in background processes of a script; only the main thread can set handlers.
    replace = threading.current_thread() is threading.main_thread()
    replace = replace and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if replace:
        signal.signal(signal.SIGINT, _exit_at_once)
    try:
        yield
    finally:
        if replace:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt inside the block, so that the work can be stopped in order."""
    replace = signal.getsignal(signal.SIGINT) is _exit_at_once
    if replace:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if replace:
            signal.signal(signal.SIGINT, _exit_at_once)


def stopped_for_good() -> None:
    """Block further Ctrl-C until the process ends.

    A second one would print a traceback during shutdown. And if the first one was received in C code of a library,
    Python would end by the signal instead of with the exit code.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def speaks_for_all() -> bool:
    """Return whether this is the only process of the command, or the first of several ranks."""
    return os.environ.get("RANK", "0") == "0"


def _exit_at_once(*_: Any) -> None:
    if speaks_for_all():
        os.write(2, b"exitkit: stopped\n")
    os._exit(130)
