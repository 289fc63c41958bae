"""matplotlib under exitkit's own settings: no backend, settings file or font of the user breaks or changes a figure.

The other modules of `exitkit.benchmarks` import matplotlib's objects from here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _import_matplotlib() -> None:
    """Import matplotlib, which fails for a backend that does not exist, or a settings file that is not text."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it would report wrong settings in the user's file, which are not used here
    try:
        importlib.import_module("matplotlib")
    except Exception:  # its settings may raise any error
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]
        with _without_user_settings():
            importlib.import_module("matplotlib")
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _without_user_settings() -> Iterator[None]:
    """Hide the user's settings from an import of matplotlib, which reads a file in the current folder first."""
    found = importlib.util.find_spec("matplotlib")
    own = Path(str(found and found.origin)).parent / "mpl-data"  # where its default settings are
    before = os.environ.get("MPLBACKEND")
    os.environ["MPLBACKEND"] = "agg"
    try:
        with contextlib.chdir(own):
            yield
    finally:
        del os.environ["MPLBACKEND"]
        if before is not None:
            os.environ["MPLBACKEND"] = before


_import_matplotlib()

import matplotlib  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import Normalize, SymLogNorm  # noqa: E402
from matplotlib.figure import Figure, SubFigure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.markers import MarkerStyle  # noqa: E402
from matplotlib.path import Path as Outline  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

__all__ = [
    "STYLE",
    "Axes",
    "Figure",
    "Line2D",
    "MarkerStyle",
    "MaxNLocator",
    "Normalize",
    "Outline",
    "SubFigure",
    "SymLogNorm",
    "own_style",
    "save_figure",
]

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.labelsize": 8.5,
    "axes.titlesize": 8.5,
    "legend.fontsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "grid.linewidth": 0.4,
    "grid.color": "#DDDDDD",
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
    "text.parse_math": False,  # a dollar sign in a name is no formula
}
_NOT_OF_FIGURES = ("backend", "interactive", "toolbar", "timezone", "webagg", "tk", "macosx", "keymap", "docstring")


@contextlib.contextmanager
def own_style() -> Iterator[None]:
    """Use matplotlib's default settings and `STYLE` in this block, whatever the user's settings are."""
    defaults = dict.items(matplotlib.rcParamsDefault)  # without the warnings about settings that will be removed
    settings: dict[Any, Any] = {name: value for name, value in defaults if not name.startswith(_NOT_OF_FIGURES)}
    with matplotlib.rc_context(settings | STYLE):
        yield


def save_figure(figure: Figure, path: Path, kind: str) -> None:
    """Save as "png" (300 dpi) or "pdf" (embedded fonts); the bytes are deterministic."""
    with own_style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a name with letters that the font does not have
        figure.savefig(path, format=kind, metadata={"CreationDate" if kind == "pdf" else "Software": None})
