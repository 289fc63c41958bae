"""A worker process of a campaign: it reads runs as JSON lines from standard input and writes events to standard output.

When standard input closes, the parent process has ended, and the worker exits immediately; its run can be resumed from
the last checkpoint. A killed campaign therefore leaves no worker running.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import IO, Any

from exitkit.entry_points import reason
from exitkit.errors import print_warnings
from exitkit.plugins import registered


def outcome(request: Mapping[str, Any], report: Callable[..., None]) -> None:
    """Train the run of a request and report its events: "progress" repeatedly, then "done", "failed" or "held".

    Every exception is reported as "failed", so that one run does not stop the others.
    """
    # Imported when used: the command line's help must not load torch.
    from exitkit.errors import HeldError, UserError
    from exitkit.runs.recipe import Recipe
    from exitkit.training.loop import train

    try:
        recipe = Recipe.make(**request["recipe"])
        run = train(recipe, request["out"], report=lambda progress: report("progress", **dataclasses.asdict(progress)))
        report("done", path=str(run.path))
    except HeldError:
        report("held")
    except UserError as error:
        report("failed", message=str(error))
    except (Exception, SystemExit) as error:
        traceback.print_exception(error)
        report("failed", message=reason(error))


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Train the requested runs one after the other until the requests end."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in requests:
            waiting.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()

    def report(event: str, **facts: Any) -> None:
        answers.write(json.dumps({"event": event, **facts}) + "\n")
        answers.flush()

    while True:
        outcome(json.loads(waiting.get()), report)


def main() -> None:
    """Serve on this process's standard streams; other output is redirected to standard error."""
    requests, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # Data-loading processes close standard input as they start, and would deadlock with a thread that reads from it.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    print_warnings()
    registered("method")  # first: leaves out the packages on whose metadata the imports of libraries would fail
    serve(requests, answers)


if __name__ == "__main__":
    main()
