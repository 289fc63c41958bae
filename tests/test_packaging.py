"""What a wheel holds: every module of the three wings, the recipes, the door for plugins, and one version."""

import configparser
import email
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import exitkit

ROOT = Path(__file__).parent.parent
WINGS = {"exitkit": "exitkit", "methods": "exitkit/methods", "benchmarks": "exitkit/benchmarks"}
"""Each folder of the source, and where it lies in the wheel."""
SOURCE = ["exitkit", "methods", "benchmarks", "setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a clean copy of the source: a build folder left lying about must not add to it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCE:
        found = [ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*")
        for path in found:
            if path.is_file() and "__pycache__" not in path.parts:
                copy = source / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", "-q", *offline, "--wheel-dir", target, source]
    subprocess.run(command, check=True, timeout=120)
    (built,) = target.iterdir()
    with zipfile.ZipFile(built) as archive:
        yield archive


def described(wheel, name):
    (path,) = [path for path in wheel.namelist() if path.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def test_every_module_and_recipe_is_there_and_nothing_else(wheel):
    wanted = {
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, place in WINGS.items()
        for pattern in ("*.py", "*.toml", "*.csv", "*.html", "*.c", "py.typed")
        for path in (ROOT / folder).rglob(pattern)
    }
    assert "exitkit/benchmarks/recipes/digits.toml" in wanted and "exitkit/py.typed" in wanted
    assert {path for path in wheel.namelist() if ".dist-info/" not in path} == wanted


def test_the_version_is_the_librarys_own(wheel):
    assert email.message_from_string(described(wheel, "METADATA"))["Version"] == exitkit.__version__
    assert distribution("exitkit").version == exitkit.__version__


def test_every_entry_point_leads_to_something_that_loads(wheel):
    points = configparser.ConfigParser()
    points.optionxform = str
    points.read_string(described(wheel, "entry_points.txt"))
    assert {"console_scripts", "exitkit.methods", "exitkit.backbones", "exitkit.datasets"} <= set(points.sections())
    installed = {(point.group, point.name): point for point in distribution("exitkit").entry_points}
    for group in points.sections():
        for name, value in points[group].items():
            assert installed[group, name].value == value
            assert installed[group, name].load() is not None
    assert len(installed) == sum(len(points[group]) for group in points.sections())


def test_the_metadata_says_what_is_needed_and_under_which_licence(wheel):
    metadata = email.message_from_string(described(wheel, "METADATA"))
    assert metadata["License"] == "MIT" and metadata["Requires-Python"] == ">=3.11"
    assert "MIT License" in described(wheel, "licenses/LICENSE")
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() in metadata.get_payload().strip()
    needed = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    assert {"torch", "torchvision", "torchjd", "scikit-learn"} <= {requirement.name for requirement in needed}
    for requirement in needed:
        assert any(bound.operator == ">=" for bound in requirement.specifier), f"{requirement} has no lower bound"
    tests = {requirement.name for requirement in needed if "test" in str(requirement.marker)}
    assert {"pytest", "pytest-xdist", "ruff", "mypy"} <= tests
