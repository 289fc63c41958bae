"""Reads the documents' pages: their blocks of code in order, and the example packages that they show."""

import re
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGES = sorted(path.parent for path in (DOCS / "examples").glob("*/pyproject.toml"))
COMMANDS = ("exitkit", "python")
_BLOCK = re.compile(r"(?:^<!-- not run: (.*?) -->\n+)?^```(\w+)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A block of code of a page; `skipped` says why it is not run, or is empty."""

    language: str
    text: str
    skipped: str


def pages():
    """Return the pages whose code is run (README has tests of its own; results are written by commands)."""
    ours = [page for page in DOCS.rglob("*.md") if not {"results", "default-comparison"} & set(page.parts)]
    return [ROOT / "CONTRIBUTING.md", *sorted(ours)]


def blocks(page):
    """Return a page's blocks that are code to run: Python, and shell that begins with `exitkit` or `python`."""
    found = [Block(kind, text, why) for why, kind, text in _BLOCK.findall(page.read_text(encoding="utf-8"))]
    return [
        b for b in found if b.language == "python" or (b.language == "sh" and b.text.startswith(("exitkit", "python")))
    ]


def installed(package, place):
    """Put an example package into a folder as pip does, and return the folder."""
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))
    for module in project["tool"]["setuptools"]["py-modules"]:
        (place / f"{module}.py").write_text((package / f"{module}.py").read_text(encoding="utf-8"), encoding="utf-8")
    about = project["project"]
    info = place / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n")
    lines = []
    for group, points in about["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return place
