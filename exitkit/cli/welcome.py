"""What `exitkit` alone says: what to do next, as things stand in this folder."""

from __future__ import annotations

from pathlib import Path

_NEW = """\
exitkit trains multi-exit networks with every published method, and compares
them.

There are no runs in this folder yet. To begin:
  exitkit compare --methods ge,boostnet,metagf   a table of four methods
  exitkit train --method boostnet                one run
  exitkit list methods                           what there is
  exitkit doctor                                 is everything in place?
"""

_BEGUN = """\
{folder} holds {runs}: {states}. What next:
{steps}
"""

_MORE = """\
`exitkit --help` names all commands, `exitkit COMMAND --help` shows examples;
`exitkit completion` completes them with the tab key."""


def welcome(folder: Path = Path("runs")) -> str:
    """Return what to do next, from what lies in the folder where runs go by default."""
    begun = sorted(path.parent for path in folder.glob("[!.]*/recipe.json"))
    if not begun:
        return f"{_NEW}\n{_MORE}"
    finished = [path for path in begun if (path / "results.json").exists()]
    left = len(begun) - len(finished)
    states = f"{len(finished)} finished" + (f", {left} not" if left else "")
    steps = []
    if finished:
        steps += [("exitkit report", "tables and curves of all finished runs")]
        steps += [(f"exitkit show {finished[-1]}", "one of them")]
    if left:
        steps += [("exitkit watch", "how those under way are doing")]
    steps += [("exitkit compare --methods ge,boostnet,metagf", "go on with a comparison, or begin one")]
    told = "\n".join(f"  {command}\n      {meaning}" for command, meaning in steps)
    runs = f"{len(begun)} run{'s' if len(begun) > 1 else ''}"
    return f"{_BEGUN.format(folder=folder, runs=runs, states=states, steps=told)}\n{_MORE}"
