"""The first hour: what to do next, examples everywhere, completion, doctor, JSON, colours, narrow terminals."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest

from exitkit.cli import cli as root
from exitkit.cli import doctor_checks
from exitkit.cli.catalogue import entries, outline
from exitkit.cli.completion import SHELLS, names
from exitkit.cli.completion import runs as complete_runs

HEAVY = {"torch", "torchvision", "numpy", "pandas", "scipy", "sklearn", "matplotlib", "pydantic", "torchjd", "rich"}
HEAVY |= {"tensorboard", "safetensors", "jinja2", "PIL", "asyncio", "multiprocessing"}
"""What takes its time to import, and is of no use to a help page."""


@pytest.fixture
def cli(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    return cli


def commands(group=root, path=()):
    """Every command that the entry points lead to, subcommands too: (words, command)."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


COMMANDS = dict(commands())


def imported(code):
    """Those of the heavy modules that a fresh process has after running some code."""
    probe = f"{code}\nprint(sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_help_and_the_package_itself_import_nothing_that_is_heavy():
    assert imported("import sys, exitkit") == "[]"
    assert imported("import sys, exitkit.cli\ntry: exitkit.cli.main(['--help'])\nexcept SystemExit: pass") == "[]"
    assert imported("import sys, exitkit.cli\ntry: exitkit.cli.main([])\nexcept SystemExit: pass") == "[]"


def test_every_entry_point_is_walked():
    assert {words[0] for words in COMMANDS} == {point.name for point in entry_points(group="exitkit.commands")}
    assert ("recipes", "copy") in COMMANDS


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_an_example_in_its_help_and_says_in_a_line_what_it_does(words, cli):
    code, out, _ = cli(*words, "--help")
    assert code == 0 and f"  exitkit {' '.join(words)}" in out.partition("Example")[2], out
    assert max(map(len, out.splitlines())) <= 80
    summary = COMMANDS[words].get_short_help_str(80)
    assert summary and "..." not in summary


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_option_that_takes_the_name_of_a_thing_completes_it(words):
    kinds = {"method", "methods", "backbone", "dataset", "device", "recipe_file", "run", "launcher", "precision"}
    for parameter in COMMANDS[words].params:
        if parameter.name in kinds:
            found = parameter.shell_complete(click.Context(COMMANDS[words]), "")
            assert found, parameter.name


def test_alone_it_says_what_to_do_next_as_things_stand(cli, tmp_path):
    code, out, errors = cli()
    assert code == 0 and not errors and "no runs in this folder yet" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "exitkit compare --methods" in out and "exitkit doctor" in out
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "recipe.json").write_text("{}")
    code, out, _ = cli()
    assert "runs contains 2 runs: 0 finished, 2 unfinished" in out
    assert "exitkit watch" in out and "exitkit report" not in out
    (tmp_path / "runs/one/results.json").write_text("{}")
    code, out, _ = cli()
    assert max(map(len, out.splitlines())) <= 80
    assert "2 runs: 1 finished, 1 unfinished" in out and "exitkit show runs/one" in out and "exitkit report" in out
    (tmp_path / "runs/two/results.json").write_text("{}")
    assert "exitkit watch" not in cli()[1]


def package(place, point, module):
    """What pip leaves of a package with one command."""
    (place / "ours-1.0.dist-info").mkdir(parents=True)
    (place / "ours-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: ours\nVersion: 1.0\n")
    (place / "ours-1.0.dist-info/entry_points.txt").write_text(f"[exitkit.commands]\n{point}\n")
    (place / "ours.py").write_text(module)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("verb = 1", "it is not a click command"),
    ],
)
def test_a_command_of_a_broken_package_says_so_and_breaks_no_other(module, reason, cli, tmp_path, monkeypatch):
    package(tmp_path / "place", "verb = ours:verb", module)
    monkeypatch.syspath_prepend(str(tmp_path / "place"))
    sys.modules.pop("ours", None)
    code, out, _ = cli("--help")
    assert code == 0 and "train" in out and "Not usable" in out
    code, _, errors = cli("verb", "--anything", "else")
    (line,) = errors.splitlines()
    assert code == 2 and "command 'verb' (ours:verb) does not load" in line and reason in line
    code, out, _ = cli("doctor", "--json")
    wrong = [finding for finding in json.loads(out) if finding["state"] == "wrong"]
    assert code == 1 and [finding["check"] for finding in wrong] == ["command verb"]


def ask(shell, *words):
    """What the shell is told that could stand at the end of a line."""
    line = " ".join(["exitkit", *words])
    place = str(len(words)) if shell != "fish" else words[-1]
    variables = {"_EXITKIT_COMPLETE": f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": place}
    done = subprocess.run(
        [sys.executable, "-m", "exitkit"], env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_gets_its_script_and_its_answers(shell, cli):
    code, script, _ = cli("completion", shell)
    assert code == 0 and f"_EXITKIT_COMPLETE={shell}_complete" in script
    assert "boostnet" in ask(shell, "train", "--method", "boo")
    assert not ask(shell, "trian", "--method", "boo").strip()


def test_completion_says_how_to_use_it_and_refuses_what_it_does_not_know(cli, monkeypatch):
    monkeypatch.setenv("SHELL", "/usr/bin/zsh")
    assert 'eval "$(exitkit completion zsh)"' in cli("completion")[1]
    monkeypatch.delenv("SHELL")
    assert all(shell in cli("completion")[1] for shell in SHELLS)
    code, _, errors = cli("completion", "bsh")
    assert code == 2 and "unknown shell 'bsh'; did you mean bash" in errors


def values(completer, incomplete):
    return [item.value for item in completer(None, None, incomplete)]


def test_names_complete_behind_commas_and_pluses_and_runs_by_their_folders(tmp_path, monkeypatch):
    assert values(names("methods"), "ge,boo") == ["ge,boostnet"]
    assert values(names("methods"), "ge+of") == ["ge+ofa"]
    assert "digits-quick" in values(names("recipes"), "") or "digits" in values(names("recipes"), "")
    monkeypatch.chdir(tmp_path)
    for name in ("runs/ge-1", "runs/ge-2", "runs/report", "study/kd-1"):
        Path(name).mkdir(parents=True)
        if "report" not in name:
            (Path(name) / "recipe.json").write_text("{}")
    assert values(complete_runs, "") == ["runs/ge-1", "runs/ge-2"]
    assert values(complete_runs, "runs/ge-2") == ["runs/ge-2"] and values(complete_runs, "study/") == ["study/kd-1"]
    assert values(complete_runs, "nowhere/x") == ["nowhere/x"]


def test_what_completes_is_known_without_asking_a_plugin(monkeypatch):
    monkeypatch.setattr("exitkit.plugins.load", None)
    before = outline("methods")
    assert "ge" in before
    monkeypatch.undo()
    entries("methods")
    assert outline("methods")["ge"].startswith("Gradient Equilibrium")


def test_doctor_finds_everything_in_place_and_says_what_is_not(cli, tmp_path, monkeypatch):
    code, out, errors = cli("doctor", "--json")
    found = {finding["check"]: finding for finding in json.loads(out)}
    assert (
        code == 0 and not errors and all(list(each) == ["check", "state", "detail", "hint"] for each in found.values())
    )
    assert found["data digits"]["detail"] == "1,097 + 200 + 500 images of 1x16x16"
    assert found["data cifar10"]["state"] == "note" and "cifar-10-batches-bin" in found["data cifar10"]["detail"]
    assert {"torch", "torchvision", "CPU", "output", "cache", "plugins", "[slurm]"} <= found.keys()

    monkeypatch.setattr(doctor_checks, "_is_installed", lambda name: name != "submitit")
    (tmp_path / "a file").write_text("")
    code, out, _ = cli("doctor", "--out", "a file")
    assert code == 1 and "wrong: output" in out and "pip install 'exitkit[slurm]'" in out
    assert not (tmp_path / "runs").exists()


def test_names_in_brackets_are_shown_and_an_extra_is_there_only_if_its_method_is(cli, monkeypatch):
    class Absent:
        def __init__(self, *_):
            raise ImportError("no solver")

    monkeypatch.setattr("torchjd.aggregation.NashMTL", Absent)
    cli("train", "--method", "nashmtl").refused("needs a solver that is not", "pip install 'exitkit[nashmtl]'")
    out = cli("doctor").out
    lines = out.splitlines()
    (here,) = (number for number, line in enumerate(lines) if line.startswith("ok     [nashmtl]  "))
    assert "optional, nashmtl needs a solver that is not" in " ".join(lines[here : here + 3])
    assert "pip install 'exitkit[nashmtl]'" in " ".join(lines[here : here + 3])
    assert "ok     [slurm]  " in out and "ok     [onnx]  " in out
    monkeypatch.setattr("exitkit.cli.catalogue._stored", lambda: None)
    monkeypatch.setattr("exitkit.cli.catalogue._store", lambda whole: None)
    shown = " ".join(cli("list").out.split())
    assert "nashmtl not usable: nashmtl needs a solver that is not installed; pip install 'exitkit[nashmtl]'" in shown


def test_what_breaks_while_it_is_looked_at_is_a_finding_and_stops_no_other_check(cli, monkeypatch):
    def broken():
        raise OSError("libcudart.so.13: cannot open")
        yield

    monkeypatch.setattr(doctor_checks, "_torch", broken)
    code, out, _ = cli("doctor", "--json")
    found = {finding["check"]: finding for finding in json.loads(out)}
    assert code == 1 and found["torch"]["detail"] == "OSError: libcudart.so.13: cannot open"
    assert found["plugins"]["state"] == "ok"


JSON = [("list",), ("list", "recipes"), ("cost",), ("recipes", "list"), ("doctor",)]
JSON += [("compare", "--methods", "ge", "--epochs", "1", "--plan")]


@pytest.mark.parametrize("words", JSON, ids=" ".join)
def test_with_json_standard_output_is_json_and_nothing_else(words, cli):
    code, out, _ = cli(*words, "--json")
    assert code == 0 and json.loads(out)


@pytest.mark.parametrize("words", [("list",), ("list", "methods"), ("recipes", "list"), ("cost",)], ids=" ".join)
def test_a_narrow_terminal_breaks_no_table(words, cli):
    code, out, _ = cli(*words)
    assert code == 0 and max(map(len, out.splitlines())) <= 80 and "…" not in out


def test_colours_are_off_where_they_are_not_wanted():
    def shown(**more):
        environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
        command = [sys.executable, "-m", "exitkit", "recipes", "list"]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True, check=True).stdout

    assert "\x1b[" not in shown() and "\x1b[" in shown(FORCE_COLOR="1")
    assert "\x1b[3" not in shown(FORCE_COLOR="1", NO_COLOR="1").replace("\x1b[3m", "")


@pytest.mark.parametrize(
    ("kind", "name", "holds"),
    [
        ("methods", "boostnet", ("temperature = 0.5", "Boosted Dynamic Neural Networks")),
        ("backbones", "msdnet-tiny", ("growth_factors = 1,1,2",)),
        ("datasets", "digits", ("per_class = ",)),
        ("recipes", "imta-table2", ("IMTA, table 2",)),
    ],
)
def test_one_entry_is_listed_alone_and_completes(kind, name, holds, cli):
    out = cli("list", kind, name).out
    assert out.startswith(f"{name}  ") and all(words in out for words in holds)
    assert not any(line.startswith(f"{other['name']}  ") for line in out.splitlines()[1:] for other in entries(kind))
    (entry,) = json.loads(cli("list", kind, name, "--json").out)
    assert entry == next(each for each in entries(kind) if each["name"] == name)
    cli("list", kind, name[:-1]).refused("unknown", "did you mean", name)
    if kind == "methods":
        assert out.strip() in cli("list", kind, f"ge+{name}").out
    if kind == "backbones":
        assert cli("list", kind, "torchvision:resnet18").out == cli("list", kind, "torchvision").out
    context = click.Context(COMMANDS[("list",)])
    context.params["what"] = kind
    (parameter,) = (each for each in COMMANDS[("list",)].params if each.name == "name")
    assert name in [item.value for item in parameter.shell_complete(context, name[:3])]


def test_a_name_that_is_no_run_and_no_kind_is_told_where_it_is_listed(cli, tmp_path):
    cli("show", "boostnet").refused("run folder boostnet does not exist", "exitkit list methods boostnet")
    cli("list", "msdnet-tiny").refused("exitkit list backbones msdnet-tiny")
    cli("list", "metods").refused("did you mean methods")
    (tmp_path / "boostnet").mkdir()
    cli("show", "boostnet").refused("holds no run")
    cli("show", "bostnet").refused("run folder bostnet does not exist")
