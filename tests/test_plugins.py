"""Anyone's package comes in by the same door as ours: installed, listed, trained with by name."""

import dataclasses
import functools
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from typing import Literal

import pytest

from exitkit.cli.catalogue import entries
from exitkit.errors import UserError
from exitkit.plugins import (
    check_value,
    defaults,
    describe,
    instantiate,
    load,
    registered,
    resolve_variant,
    setting,
    summary,
    type_name,
    underlying,
)

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "someones-exits"
version = "1.0"

[project.entry-points."exitkit.methods"]
late = "someones_exits:Late"
stranger = "someones_exits:Stranger"

[project.entry-points."exitkit.backbones"]
two-lines = "someones_exits:TwoLines"
one-line = "someones_exits:one_line"

[project.entry-points."exitkit.datasets"]
stripes = "someones_exits:Stripes"

[project.entry-points."exitkit.commands"]
greet = "someones_exits:greet"

[tool.setuptools]
py-modules = ["someones_exits"]
"""

MODULE = '''
from dataclasses import dataclass
from typing import ClassVar

import click
import torch
from torch import nn

from exitkit import TrainingStrategy
from exitkit.backbones.base import Backbone, preset
from exitkit.data.base import DataSet, TensorData
from exitkit.data.split import Split, hold_out
from exitkit.network import Head, MultiExitNetwork
from exitkit.plugins import setting
from exitkit.strategy import EXIT_WEIGHTS


@dataclass(eq=False)
class Late(TrainingStrategy):
    """Later exits count more."""

    slots: ClassVar[frozenset[str]] = frozenset({EXIT_WEIGHTS})
    paper: ClassVar[str] = "Someone, Late exits, 2031"

    ramp: float = setting(2.0, "how much more each exit counts than the one before it")

    def __post_init__(self):
        if self.ramp <= 0:
            raise ValueError(f"ramp is {self.ramp}; expected above 0")

    def exit_weights(self, run):
        return [self.ramp**index for index in range(run.network.num_exits)]


@dataclass
class Stranger:
    """No strategy at all."""


@dataclass(frozen=True)
class TwoLines(Backbone):
    """Linear layers, an exit after each."""

    width: int = setting(8, "features a layer")
    exits: int = setting(2, "exits")

    def build(self, input_shape, num_classes):
        torch_size = input_shape[0] * input_shape[1] * input_shape[2]
        sizes = [torch_size] + [self.width] * self.exits
        stages = [
            nn.Sequential(nn.Flatten(), nn.Linear(a, b), nn.ReLU()) for a, b in zip(sizes, sizes[1:])
        ]
        heads = [Head(nn.Identity(), nn.Linear(self.width, num_classes)) for _ in stages]
        return MultiExitNetwork(stages, heads, input_shape, num_classes)


one_line = preset(TwoLines, "A single exit.", exits=1)


@dataclass(frozen=True)
class Stripes(DataSet):
    """Stripes that lie or stand."""

    house: ClassVar[dict] = DataSet.house | {"backbone": "two-lines", "epochs": 2, "batch_size": 16}
    validation: int = setting(20, "images held out of the training images, stratified")

    def load(self, data_dir, download=True):
        labels = torch.arange(120) % 2
        lying = torch.tensor([0, 255]).repeat(3).view(6, 1).expand(6, 6)
        images = torch.stack([lying if label else lying.t() for label in labels]).to(torch.uint8).unsqueeze(1)
        rest, test = hold_out(labels, torch.arange(120), 40, 0, "a test set")
        train, validation = hold_out(labels, rest, self.validation, 0, "a validation set")
        split = Split(train, validation, test)
        return TensorData(["standing", "lying"], (1, 6, 6), labels, labels, split, images, images, (0.5,), (0.5,))


@click.command(short_help="Say good day.")
def greet():
    """Say good day."""
    click.echo("good day")
'''


@pytest.fixture(scope="module")
def someones(tmp_path_factory):
    """Someone's package, installed by pip into a folder of its own."""
    source = tmp_path_factory.mktemp("source")
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "someones_exits.py").write_text(MODULE)
    place = tmp_path_factory.mktemp("installed")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", *offline, "--target", place, source], check=True, timeout=120
    )
    return place


@pytest.fixture
def visible(monkeypatch, tmp_path):
    """Make what lies in a folder visible to this process, as PYTHONPATH would from its start."""
    monkeypatch.chdir(tmp_path)

    def look(place=None):
        if place is not None:
            monkeypatch.syspath_prepend(str(place))
        importlib.invalidate_caches()
        registered.cache_clear()
        load.cache_clear()

    yield look
    look()


def test_an_installed_package_is_listed_and_trains_by_name(someones, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(someones), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def exitkit(*arguments):
        command = [sys.executable, "-m", "exitkit", *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = exitkit("train", "--method", "late", "--dataset", "stripes", "--set", "ramp=3")
    (run,) = (tmp_path / "runs").iterdir()
    assert shown.strip().splitlines()[-1].endswith(run.name) and run.name.startswith("late-two-lines-stripes-s0-")
    recipe = json.loads((run / "recipe.json").read_text())
    assert recipe["method_settings"] == {"ramp": 3.0, "label_smoothing": 0.0} and recipe["backbone_settings"] == {
        "width": 8,
        "exits": 2,
    }
    assert recipe["epochs"] == 2 and recipe["dataset_settings"]["validation"] == 20
    assert json.loads((run / "results.json").read_text())["test"] == [100.0, 100.0]

    found = {entry["name"]: entry for entry in json.loads(exitkit("list", "--json"))}
    late = found["late"]
    assert (late["kind"], late["paper"], late["slots"]) == ("method", "Someone, Late exits, 2031", ["exit weights"])
    assert [(field["name"], field["default"]) for field in late["fields"]] == [("ramp", 2.0), ("label_smoothing", 0.0)]
    assert found["one-line"]["summary"] == "A single exit." and found["stripes"]["house"]["epochs"] == 2
    assert {"joint", "msdnet-tiny", "digits"} <= found.keys()


def test_it_composes_with_ours_and_adds_verbs(someones, visible, cli, tmp_path):
    visible(someones)
    code, _, errors = cli("train", "--method", "late+metagf", "--dataset", "stripes", "--backbone", "one-line")
    assert code == 0, errors
    (run,) = (tmp_path / "runs").iterdir()
    assert len(json.loads((run / "cost.json").read_text())) == 1
    assert cli("greet") == (0, "good day\n", "")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("--method laet", "unknown method 'laet'; did you mean late"),
        ("--method late --set ramp=0", "method late: ramp is 0.0; expected above 0"),
        ("--method late --set rmap=1", "did you mean ramp"),
        ("--method stranger", "method 'stranger' is a Stranger; expected a TrainingStrategy"),
        ("--method late+joint --set weights=1,2", "both claim the slot 'exit weights'"),
    ],
)
def test_its_mistakes_are_one_line_too(command, says, someones, visible, cli, tmp_path):
    visible(someones)
    code, _, errors = cli("train", "--dataset", "stripes", *command.split())
    (line,) = errors.splitlines()
    assert code == 2 and line.startswith("exitkit: ") and says in line, line
    assert not (tmp_path / "runs").exists()


def package(place, name, points, module="", group="methods"):
    """What pip leaves of a package: its module, and which plugins it has."""
    info = place / f"{name}-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    text = f"[exitkit.{group}]\n{points}\n" if group else points
    (info / "entry_points.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    (place / f"{name}.py").write_text(module)


BROKEN = {
    "needs": ("import no_such_package_anywhere", "No module named 'no_such_package_anywhere'"),
    "raises": ("raise RuntimeError('one line\\nand another')", "RuntimeError: one line and another"),
    "lacks": ("", "has no attribute 'Broken'"),
    "plain": ("class Broken: pass", "is not a dataclass"),
    "garbled": ("def (", "SyntaxError"),
    "bare": (
        "import exitkit\nclass Broken(exitkit.TrainingStrategy):\n    start: float = exitkit.setting(0.5, 'first')",
        "is not a dataclass: its settings (start) would be ignored; decorate it with @dataclass(eq=False)",
    ),
}


def test_a_broken_package_hides_no_other_and_says_what_is_wrong(visible, cli, tmp_path):
    for name, (module, _) in BROKEN.items():
        package(tmp_path / "place", f"{name}_exits", f"{name} = {name}_exits:Broken", module)
    visible(tmp_path / "place")
    code, listed, errors = cli("list", "methods", "--json")
    assert code == 0 and not errors
    found = {entry["name"]: entry for entry in json.loads(listed)}
    assert found["boostnet"]["fields"] and cli("list", "methods")[0] == 0
    for name, (_, says) in BROKEN.items():
        assert found[name]["summary"].startswith("not usable: ") and found[name]["fields"] == []
        code, _, errors = cli("train", "--method", name)
        (line,) = errors.splitlines()
        assert code == 2 and f"method '{name}'" in line and says in line, line
    assert not (tmp_path / "runs").exists()


DATACLASS = """
import dataclasses, exitkit
from exitkit.data.base import DataSet
from exitkit.networks.families.base import Backbone
@dataclasses.dataclass(eq=False, kw_only=True)
class X({base}):
    "A summary."
    {body}
"""


def dataclass_of(base, body):
    return DATACLASS.format(base=base, body=body)


STRANGE = {  # what an entry point may be: [groups that it may be in, module]
    "number": [("methods", "backbones", "datasets", "commands"), "X = 42"],
    "leaves": [("methods", "backbones", "datasets", "commands"), "import sys\nprint('a word')\nsys.exit('bye')"],
    "odd": [("methods", "backbones", "datasets", "commands"), "class E(BaseException): pass\nraise E('odd')"],
    "plain": [("methods", "backbones", "datasets"), dataclass_of("object", "")],
    "leaves-late": [
        ("methods", "backbones", "datasets"),
        dataclass_of("exitkit.TrainingStrategy", "def __post_init__(self): raise SystemExit(3)"),
    ],
    "untyped": [("methods",), dataclass_of("exitkit.TrainingStrategy", "a: 'Nothing' = 3")],
    "numbers": [("methods",), dataclass_of("exitkit.TrainingStrategy", "paper = 5")],
    "slots": [("methods",), dataclass_of("exitkit.TrainingStrategy", "slots = 7")],
    "required": [("methods",), dataclass_of("exitkit.TrainingStrategy", "a: int")],
    "unbuilt": [("backbones",), dataclass_of("Backbone", "").replace("eq=False", "frozen=True")],
    "unloaded": [("datasets",), dataclass_of("DataSet", "").replace("eq=False", "frozen=True")],
    "homeless": [
        ("datasets",),
        dataclass_of("DataSet", "house = 5\n    def load(self, *_): pass").replace("eq=False", "frozen=True"),
    ],
    "helpless": [("commands",), "import click\nX = click.Command('helpless', help=42)"],
}
LISTS = {
    "no-sign": "[exitkit.methods]\nthis line has no equals sign\n",
    "no-text": b"[exitkit.methods]\nx = \xff\xfe\n",
    "elsewhere": "[console_scripts]\nnor does this\n",
}


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """Packages with every strange entry point, and with lists of them that can't be read; [(group, name, package)]."""
    place, found = tmp_path_factory.mktemp("strange"), []
    for kind, (groups, module) in STRANGE.items():
        for group in groups:
            name = f"{kind}-{group}".replace("-", "_")
            package(place, name, f"{name} = {name}:X", module, group)
            found.append((group, name, name))
    for group in ("methods", "backbones", "datasets", "commands", "recipes"):
        package(place, f"gone_{group}", f"gone_{group} = no_such_module:X", "", group)
        package(place, f"value_{group}", f"value_{group} = no value at all!", "", group)
        found += [(group, f"{word}_{group}", f"{word}_{group}") for word in ("gone", "value")]
    (place / "recipes_folder").mkdir()
    (place / "recipes_folder" / "__init__.py").write_text("")
    for name, text in (("no_toml", b"= = ="), ("no_text", b"\xff\xfe"), ("dated", b"when = 2031-01-01")):
        (place / "recipes_folder" / f"{name}.toml").write_bytes(text)
        found.append(("recipes", name, "recipes_folder"))
    package(place, "someones_recipes", "someones = recipes_folder", "", "recipes")
    for name, text in LISTS.items():
        package(place, name, text, "", None)
    return place, found


def test_no_package_can_stop_or_hide_another_and_each_is_named(strange, visible, cli, monkeypatch, tmp_path):
    """As `help`, `list`, `doctor` and a run print it; an interpreter of its own, since torch reads all lists, too."""
    place, found = strange
    environment = os.environ | {"PYTHONPATH": str(place), "XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "999"}

    def exitkit(*words):
        command = [sys.executable, "-m", "exitkit", *words]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        for name in LISTS:
            assert f"package {name} is left out" in done.stderr
        return done.returncode, done.stdout

    code, shown = exitkit("--help")
    assert code == 0 and "Train and evaluate one run." in shown
    for _, name, of in (entry for entry in found if entry[0] == "commands"):
        assert f"{name}  Not usable (package {of})" in " ".join(shown.split()).replace(f"{name} Not", f"{name}  Not")
    code, shown = exitkit("list", "--json")
    entries = {(f"{entry['kind']}s", entry["name"]): entry["summary"] for entry in json.loads(shown)}
    for group, name, of in (entry for entry in found if entry[0] != "commands"):
        summary = entries[group, name]
        assert summary.startswith("not usable: ") and of in summary and "\n" not in summary, summary
    usable = [name for (_, name), summary in entries.items() if not summary.startswith("not usable: ")]
    assert len(usable) == len(entries) - len([entry for entry in found if entry[0] != "commands"])
    code, shown = exitkit("doctor", "--json")
    wrong = {finding["check"]: finding["detail"] for finding in json.loads(shown) if finding["state"] == "wrong"}
    checks = {f"{group.removesuffix('s')} {name}": of for group, name, of in found}
    assert code == 1 and wrong.keys() == checks.keys() | {f"package {name}" for name in LISTS}
    assert all(of in wrong[check] for check, of in checks.items())
    few = ["--epochs", "1", "--batch-size", "32", "--set", "per_class=4", "--set", "validation=40"]
    assert exitkit("train", *few)[0] == 0


def test_a_command_of_ours_is_kept_and_names_that_two_others_share_are_refused(visible, cli, tmp_path):
    verb = "import click\nX = click.Command('x', help='Of another package.')\n"
    for name in ("first", "second"):
        package(tmp_path / "place", name, f"doctor = {name}:X\nshared = {name}:X", verb, "commands")
    visible(tmp_path / "place")
    code, shown, errors = cli("--help")
    assert code == 0 and "Check the installation" in shown and "Not usable (package first, second)" in shown
    assert errors.count("command 'doctor' comes from several packages") == 1 and "that of exitkit is used" in errors
    assert "shared' comes from several packages (first:X of first, second:X of second)" in cli("shared").errors


def test_runs_of_a_method_that_two_packages_have_are_reported_and_the_clash_is_named(visible, cli, tmp_path):
    recipe = {"method": "ge", "epochs": 1, "batch_size": 32, "dataset_settings": {"per_class": 4, "validation": 40}}
    importlib.import_module("exitkit").train(recipe, tmp_path / "runs")
    package(tmp_path / "place", "other_ge", "ge = other_ge:Mine", "Mine = 1")
    visible(tmp_path / "place")
    code, shown, errors = cli("report", tmp_path / "runs", "--format", "csv")
    assert code == 0 and "Anytime accuracy" in shown
    assert errors.count("method 'ge' comes from several packages") == 1 and "other_ge:Mine of other_ge" in errors
    for command in ("show", "watch"):
        (run,) = (path.parent for path in (tmp_path / "runs").glob("*/recipe.json"))
        assert cli(command, *([run] if command == "show" else [tmp_path / "runs", "--once"])).code == 0


def test_one_name_from_two_packages_is_refused_and_the_same_package_seen_twice_is_not(visible, tmp_path):
    mine = "import exitkit, dataclasses\n@dataclasses.dataclass(eq=False)\nclass Mine(exitkit.TrainingStrategy): pass\n"
    for place in ("place", "again"):
        package(tmp_path / place, "other_exits", "ge = other_exits:Mine\nfree = other_exits:Mine", mine)
        visible(tmp_path / place)
    with pytest.raises(
        UserError, match=r"method 'ge' comes from several packages \(exitkit.methods.ge:Grad.*other_exits"
    ):
        load("method", "ge")
    assert load("method", "free").__name__ == "Mine"


def test_a_list_knows_at_once_what_was_installed_changed_or_removed(visible, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / "place"
    source = "import exitkit, dataclasses\n@dataclasses.dataclass(eq=False)\nclass Mine(exitkit.TrainingStrategy):\n"

    def summaries():
        sys.modules.pop("my_exits", None)
        visible()
        return {entry["name"]: entry["summary"] for entry in entries("methods")}

    visible(place)
    assert "mine" not in summaries()
    package(place, "my_exits", "mine = my_exits:Mine", f"{source}    'First.'\n    paper = 'none'\n")
    assert summaries()["mine"] == "First."
    (place / "my_exits.py").write_text(f"{source}    'Second thoughts.'\n    paper = 'none'\n")
    assert summaries()["mine"] == "Second thoughts."
    assert "Second thoughts." in (tmp_path / "cache/exitkit/catalogue.json").read_text()
    shutil.rmtree(place / "my_exits-1.0.dist-info")
    assert "mine" not in summaries()


@dataclasses.dataclass
class Plugin:
    """Something with fields.

    And more to say.
    """

    sizes: tuple[int, ...] = setting((1, 2), "sizes of it")
    mode: Literal["fast", "slow"] | None = setting(None, "how", variant={"paper": "slow", "released": "fast"})
    variant: Literal["paper", "released"] = setting("paper", "whose")
    hidden: int = dataclasses.field(init=False, default=0)

    def __post_init__(self):
        resolve_variant(self)
        if len(self.sizes) > 3:
            raise ValueError("sizes are too many")


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (tuple[int, ...], "7", (7,)),
        (tuple[int, ...], " 1, 2 ,4", (1, 2, 4)),
        (tuple[float, ...], "-1,2e-1", (-1.0, 0.2)),
        (tuple[str, ...], "a-b,c", ("a-b", "c")),
        (tuple[int, ...] | None, "NONE", None),
        (Literal["a", "b"] | None, "null", None),
        (Literal["a", "b"], "b", "b"),
        (str, "none", "none"),
        (str, "a,b", "a,b"),
        (bool, "yes", True),
        (bool, "off", False),
        (bool, "False", False),
        (int, "-3", -3),
        (float, "1e-4", 1e-4),
        (float, 2, 2.0),
    ],
)
def test_text_becomes_what_the_field_is(kind, text, value):
    found = check_value("x", kind, text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, "1.5", "integer"),
        (int, "none", "integer"),
        (int, True, "integer"),
        (bool, "maybe", "true | false"),
        (float, "", "number"),
        (float, "nan", "number"),
        (float, math.inf, "number"),
        (float | tuple[float, ...], "1,nan", "number | number, ..."),
        (tuple[int, ...], "1,two", "integer, ..."),
        (tuple[int, ...], "1,", "integer, ..."),
        (Literal["a", "b"] | None, "c", "a | b"),
        (str, 5, "text"),
    ],
)
def test_what_is_no_such_thing_is_refused_in_the_fields_words(kind, value, expected):
    with pytest.raises(UserError) as error:
        check_value("thing", kind, value)
    assert str(error.value) == f"thing is {value!r}; expected {expected}"
    assert type_name(kind) == expected


def test_a_plugin_is_made_from_text_and_a_preset_has_its_own_defaults():
    made = instantiate(Plugin, "plugin", {"sizes": "3-4", "variant": "released"})
    assert (made.sizes, made.mode) == ((3, 4), "fast")
    assert instantiate(Plugin, "plugin", {"mode": "fast"}).mode == "fast"
    large = functools.partial(Plugin, sizes=(8, 9))
    assert underlying(large) is Plugin and defaults(large) == {"sizes": (8, 9), "mode": None, "variant": "paper"}
    assert instantiate(large, "plugin", {}).sizes == (8, 9)
    assert instantiate(large, "plugin", {"sizes": (1,)}).sizes == (1,)
    assert summary(large) == summary(Plugin) == "Something with fields."
    large.doc = "A large one."
    assert summary(large) == "A large one."
    assert describe(large)[0] == {
        "name": "sizes",
        "type": "integer, ...",
        "default": (8, 9),
        "meaning": "sizes of it",
    }
    assert describe(Plugin)[1]["variant"] == {"paper": "slow", "released": "fast"}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"size": 1}, "unknown field of plugin 'size'; did you mean sizes?"),
        ({"hidden": 1}, "unknown field of plugin 'hidden'; available: mode, sizes, variant"),
        ({"sizes": (1, 2, 3, 4)}, "plugin: sizes are too many"),
        ({"variant": "new"}, "plugin: variant is 'new'; expected paper | released"),
    ],
)
def test_a_plugins_fields_are_checked(values, says):
    with pytest.raises(UserError) as error:
        instantiate(Plugin, "plugin", values)
    assert str(error.value) == says


@pytest.mark.parametrize("kind", ["method", "backbone", "dataset"])
def test_all_of_ours_are_made_with_nothing_given_and_every_field_has_a_meaning(kind):
    for name in registered(kind):
        instantiate(load(kind, name), name, {})
        assert summary(load(kind, name))
        for field in describe(load(kind, name)):
            assert len(field["meaning"]) > 3 and "\n" not in field["meaning"], (name, field["name"])
