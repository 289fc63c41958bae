"""Runs `exitkit` with a SIGKILL to itself at a chosen moment.

python deadly.py EVENT N ARGUMENT...: dies at the N-th EVENT, which is `step` (an optimiser's), `write` (half of a file
is written), `rename` (a file is about to take its place) or `renamed` (it just has).
"""

import os
import signal
import sys
from pathlib import Path

event, count, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
seen = 0


def happens(what):
    global seen
    seen += what == event
    if seen == count and what == event:
        os.kill(os.getpid(), signal.SIGKILL)


from torch.optim.optimizer import register_optimizer_step_pre_hook  # noqa: E402

register_optimizer_step_pre_hook(lambda *_: happens("step"))

os.fsync = lambda descriptor: None  # it dies by signals alone, which what is written survives without a flush
write_bytes, replace, rename = Path.write_bytes, Path.replace, Path.rename


def half_written(path, content):
    write_bytes(path, bytes(content)[: len(content) // 2])
    happens("write")
    return write_bytes(path, content)


def moved(move):
    def wrapped(path, target):
        happens("rename")
        moved_to = move(path, target)
        happens("renamed")
        return moved_to

    return wrapped


Path.write_bytes, Path.replace, Path.rename = half_written, moved(replace), moved(rename)

from exitkit.cli import main  # noqa: E402

main(arguments)
