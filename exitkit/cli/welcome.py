"""The message of `exitkit` without a command: next steps, according to the runs in this folder."""

from __future__ import annotations

from pathlib import Path

from exitkit.escaping import counted

_NEW = """\
exitkit trains multi-exit networks with the published methods, and compares
them.

There are no runs in this folder yet. First steps:
  exitkit compare --methods ge,boostnet,metagf   compare with joint training
  exitkit train --method boostnet                train one run
  exitkit list methods                           list all methods
  exitkit doctor                                 check the installation
"""

_NEXT = """\
The folder {folder} contains {runs}: {states}. Next steps:
{steps}
"""

_MORE = """\
`exitkit --help` lists all commands, `exitkit COMMAND --help` shows examples,
and `exitkit completion` sets up tab completion."""


def welcome(folder: Path = Path("runs")) -> str:
    """Return the next steps, according to the runs in `folder`."""
    runs = sorted(path.parent for path in folder.glob("[!.]*/recipe.json"))
    if not runs:
        return f"{_NEW}\n{_MORE}"
    finished = [path for path in runs if (path / "results.json").exists()]
    unfinished = len(runs) - len(finished)
    states = f"{len(finished)} finished" + (f", {unfinished} unfinished" if unfinished else "")
    steps = []
    if finished:
        steps += [("exitkit report", "write tables and figures of all finished runs")]
        steps += [(f"exitkit show {finished[-1]}", "show one of them")]
    if unfinished:
        steps += [("exitkit watch", "show the progress of unfinished runs")]
    steps += [("exitkit compare --methods ge,boostnet,metagf", "start a comparison, or resume it")]
    lines = "\n".join(f"  {command}\n      {meaning}" for command, meaning in steps)
    count = counted(len(runs), "run")
    return f"{_NEXT.format(folder=folder, runs=count, states=states, steps=lines)}\n{_MORE}"
