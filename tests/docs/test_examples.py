"""The code of every page runs, in the order of the page and in one folder, cut short: one epoch, few images."""

import importlib
import shlex
import warnings
from pathlib import Path

import pytest

from exitkit import registration
from exitkit.benchmarks.campaign import estimate
from exitkit.benchmarks.report import drawing
from exitkit.cli import main
from exitkit.data import digits
from exitkit.networks.costs import cost
from exitkit.plugins import load, registered
from exitkit.runs import evaluate as exit_outputs

from doc_pages import PACKAGES, ROOT, blocks, installed, pages

RUN = [page for page in pages() if any(not block.skipped for block in blocks(page))]
MOST_SKIPPED = 14  # two of them are run by test_deployment.py


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    place = tmp_path_factory.mktemp("packages")
    for package in PACKAGES:
        installed(package, place)
    return place


@pytest.fixture
def at_home(packages, tmp_path, monkeypatch):
    """An empty folder to be in, the example packages installed, and training that is over at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.setitem(digits.Digits.house, "epochs", 1)
    monkeypatch.setattr(digits, "_TEST", 1450)
    monkeypatch.setattr(drawing, "save_figure", lambda figure, path, kind: path.touch())  # drawn in test_report.py
    monkeypatch.setattr(exit_outputs, "cost", counted_once)
    timing = estimate.Timing(images=1, exits=4, phases=[estimate.Step(1.0)], peak_mib=1.0)
    monkeypatch.setattr(estimate, "_timed", lambda recipe, data: timing)  # timed in test_plan.py
    monkeypatch.setattr(registration, "_registrations", {})
    _forget()
    yield tmp_path
    _forget()


COUNTED = {}


def counted_once(network):
    """Count what a network costs, once for all pages."""
    key = str(network), str(network.input_shape)
    if key not in COUNTED:
        COUNTED[key] = cost(network)
    return COUNTED[key]


def _forget():
    importlib.invalidate_caches()
    registered.cache_clear()
    load.cache_clear()


def run_line(line):
    """Run a command line in this process."""
    words = shlex.split(line, comments=True)
    if any("RUN" in word for word in words):
        newest = max(Path("runs").glob("*/results.json"), key=lambda path: path.stat().st_mtime).parent.name
        words = [word.replace("RUN", newest) for word in words]
    if words[1] == "compare" and "--plan" not in words:
        words += ["--launcher", "here", *([] if "--seeds" in words else ["--seeds", "1"])]
        words += [] if "--epochs" in words else ["--epochs", "2"]  # enough for methods of two phases
    assert words[0] == "exitkit", line
    with pytest.raises(SystemExit) as end:
        main(words[1:])
    return end.value.code


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.relative_to(ROOT).with_suffix("").as_posix())
def test_the_code_of_a_page_runs(page, at_home, capsys):
    space = {}
    for block in blocks(page):
        if block.skipped:
            continue
        if block.language == "python":
            exec(compile(block.text, page.name, "exec"), space)
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                code = run_line(line)
            assert code == 0, f"{line}\n{capsys.readouterr().err}"


def test_few_blocks_are_not_run_and_each_says_why():
    skipped = [block.skipped for page in pages() for block in blocks(page) if block.skipped]
    everything = sum(len(blocks(page)) for page in pages())
    assert len(skipped) <= MOST_SKIPPED and 4 * len(skipped) < everything
    assert all(len(why) > 20 for why in skipped), skipped
