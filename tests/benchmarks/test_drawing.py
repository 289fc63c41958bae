"""Figures are the same bytes whatever matplotlib's settings, backend and fonts of the user are."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import exitkit.benchmarks

DRAW = """
import sys
from exitkit.benchmarks.report.drawing import Figure, own_style, save_figure
from exitkit.benchmarks.report import page
with own_style():
    figure = Figure(figsize=(2, 2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1, 2], [0, 1, 4], label="line")
    axes.set_title("a title, $x^2$")
    axes.legend()
for kind in ("png", "pdf"):
    save_figure(figure, f"{sys.argv[1]}.{kind}", kind)
"""
ODD = """
text.usetex: True
font.family: No Such Font
figure.facecolor: black
savefig.bbox: tight
savefig.transparent: True
lines.linewidth: 9
axes.prop_cycle: cycler('color', ['r'])
axes.autolimit_mode: round_numbers
no.such.key: 1
backend: no-such-backend
"""


def drawn(place, name, **environment):
    command = [sys.executable, "-c", DRAW, name]
    home = {"PATH": "", "HOME": str(place / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=home | environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return [(place / f"{name}.{kind}").read_bytes() for kind in ("png", "pdf")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    place = tmp_path_factory.mktemp("plain")
    (place / "home").mkdir()
    return drawn(place, "plain")


@pytest.mark.parametrize(
    ("where", "content", "environment"),
    [
        (".", None, {"MPLBACKEND": "module://no_such_module"}),
        (".", ODD.encode(), {"MPLBACKEND": "bogus"}),
        (".", b"\xff\xfe no text", {}),
        ("home/.config/matplotlib", ODD.encode(), {}),
    ],
    ids=["no-backend", "odd-settings-and-no-backend", "no-text", "odd-settings-at-home"],
)
def test_no_settings_of_the_user_break_or_change_a_figure(tmp_path, plain, where, content, environment):
    (tmp_path / "home" / ".config" / "matplotlib").mkdir(parents=True)
    if content is not None:
        (tmp_path / where / "matplotlibrc").write_bytes(content)
    assert drawn(tmp_path, "mine", **environment) == plain


def test_only_one_module_of_the_harness_imports_matplotlib():
    root = Path(exitkit.benchmarks.__path__[0])
    for path in root.rglob("*.py"):
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
        assert "matplotlib" not in imported or path.name == "drawing.py", path
