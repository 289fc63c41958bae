"""A worker of a campaign: takes runs as JSON lines on standard input, tells how they go on standard output.

When standard input closes, whoever started it is gone or wants no more, and the process ends at once: whatever it was
training goes on from its checkpoint next time. So a campaign that was killed leaves nothing running.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import IO, Any

from exitkit.errors import format_warning


def outcome(request: Mapping[str, Any], tell: Callable[..., None]) -> None:
    """Train the run of a request and tell what becomes of it: "progress" often, then "done", "failed" or "held".

    Whatever goes wrong is told: one run must not end the others.
    """
    # Imported when used: the command line's help must not load torch.
    from exitkit.errors import HeldError, UserError
    from exitkit.runs.recipe import Recipe
    from exitkit.training.loop import train

    try:
        recipe = Recipe.make(**request["recipe"])
        run = train(recipe, request["out"], report=lambda progress: tell("progress", **dataclasses.asdict(progress)))
        tell("done", path=str(run.path))
    except HeldError:
        tell("held")
    except UserError as error:
        tell("failed", message=str(error))
    except Exception as error:
        traceback.print_exception(error)
        tell("failed", message=f"{type(error).__name__}: {error}")


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Train the requested runs one after the other until the requests end."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in requests:
            waiting.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()

    def tell(event: str, **facts: Any) -> None:
        answers.write(json.dumps({"event": event, **facts}) + "\n")
        answers.flush()

    while True:
        outcome(json.loads(waiting.get()), tell)


def main() -> None:
    """Serve on this process's standard streams; whatever else prints goes to standard error."""
    requests, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # The processes that read images close standard input as they start, and would wait for ever for a thread that
    # reads there.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    warnings.formatwarning = format_warning
    serve(requests, answers)


if __name__ == "__main__":
    main()
