"""The command line: what it shows, to people and to scripts, and that it answers at once."""

import json
import os
import subprocess
import sys

import click
import pytest

import exitkit
from exitkit import plugins
from exitkit.cli import catalogue, main
from exitkit.cli.catalogue import GROUPS


@pytest.fixture
def cli(cli, monkeypatch):
    """A command line that has to work; gives what it printed."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments):
        code, printed, errors = cli(*arguments)
        assert code == 0, errors
        return printed

    return run


@pytest.mark.parametrize("kind", ["methods", "backbones", "datasets", "recipes"])
def test_lists_are_arrays_of_objects_with_a_name(cli, kind):
    entries = json.loads(cli("list", kind, "--json"))
    assert entries and all(entry["name"] and entry["summary"] for entry in entries)
    shown = cli("list", kind)
    assert all(entry["name"] in shown for entry in entries)


def test_all_lists_at_once(cli):
    entries = json.loads(cli("list", "--json"))
    assert {entry["kind"] for entry in entries} == {"method", "backbone", "dataset", "recipe"}
    assert {"joint", "ge", "boostnet", "metagf", "msdnet-tiny", "digits"} <= {entry["name"] for entry in entries}
    assert "msdnet-cifar-k10" in cli("list")


def test_a_method_is_listed_with_paper_slots_and_fields(cli):
    (boostnet,) = (entry for entry in json.loads(cli("list", "methods", "--json")) if entry["name"] == "boostnet")
    assert "AAAI 2023" in boostnet["paper"] and boostnet["slots"] == ["gradient tap", "logit link"]
    fields = {field["name"]: field for field in boostnet["fields"]}
    assert fields["temperature"]["default"] == 0.5 and fields["temperature"]["meaning"]
    assert fields["ge_scope"]["variant"] == {"paper": "all", "released": "coarsest"}
    assert boostnet["group"] == "heads"
    shown = cli("list", "methods")
    assert "temperature = 0.5" in shown and "Boosted Dynamic Neural Networks" in shown


def test_methods_are_listed_in_groups_with_venue_and_year(cli):
    lines = [line.split() for line in cli("list").splitlines()]
    groups = [line[0] for line in lines if len(line) == 1 and line[0] in GROUPS.values()]
    assert groups == list(GROUPS.values())
    (metagf,) = (line for line in lines if line[:1] == ["metagf"])
    assert metagf[1:3] == ["ECCV", "2022"]
    known = {entry["name"]: entry for entry in json.loads(cli("list", "methods", "--json"))}
    chosen = ("imta", "isc", "kd", "joint", "ge", "pcgrad")
    assert [known[name]["group"] for name in chosen] == list(GROUPS.values())


@pytest.mark.parametrize("kind", ["methods", "backbones", "datasets"])
def test_an_entry_that_does_not_load_does_not_hide_the_others(kind, cli, monkeypatch):
    usable = json.loads(cli("list", kind, "--json"))
    monkeypatch.setattr(plugins, "load", lambda *_: 1 / 0)
    broken = catalogue._entry(kind.removesuffix("s"), "broken")
    monkeypatch.setattr(catalogue, "entries", lambda _: [broken, *usable])
    shown = cli("list", kind)
    assert "not usable: division by zero" in shown and all(entry["name"] in shown for entry in usable)


def test_cost_as_json_and_as_a_table(cli):
    found = json.loads(cli("cost", "--backbone", "msdnet-cifar-k7", "--num-classes", "10", "--json"))
    assert found["backbone"] == "msdnet-cifar-k7" and found["num_classes"] == 10 and found["input_shape"] == [3, 32, 32]
    assert [list(row) for row in found["exits"]] == [["exit", "papers", "macs", "pruned", "params"]] * 7
    tiny = cli("cost", "--method", "boostnet", "--set", "growth=6", "--input-shape", "1x28x28")
    assert "input 1×28×28" in tiny
    assert "15,140,452" in cli("cost", "--backbone", "msdnet-cifar-k7")


def test_a_run_is_trained_shown_and_reported(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("method = 'boostnet'\nepochs = 9\n[method_settings]\ntemperature = 0.3\n")
    out = cli("train", "--recipe", "mine.toml", "--epochs", "1", "--batch-size", "512", "--set", "growth=6")
    folder = out.strip().splitlines()[-1].removeprefix("run folder: ")
    facts = json.loads(cli("show", folder, "--json"))
    assert facts["finished"] and facts["epochs_done"] == 1
    assert facts["recipe"]["method_settings"]["temperature"] == 0.3
    assert facts["recipe"]["backbone_settings"]["growth"] == 6
    assert [row["exit"] for row in facts["exits"]] == [1, 2, 3, 4]
    text = cli("show", folder)
    assert "temperature=0.3" in text and " 1 epoch, batch 512" in text
    assert "finished" in cli("evaluate", folder)
    again = cli("train", "--recipe", folder)  # a run folder is a recipe: the very same run
    assert again.strip().splitlines()[-1] == f"run folder: {folder}"
    assert "boostnet" in cli("report") and (tmp_path / "runs/report/anytime.tex").exists()


@pytest.mark.parametrize("verb", ["compare", "cost", "evaluate", "list", "report", "show", "train"])
def test_every_verb_has_examples_in_its_help(cli, verb):
    assert f"  exitkit {verb}" in cli(verb, "--help")


def test_nothing_and_help_and_version(cli):
    assert "First steps" in cli("--help") and "exitkit compare" in cli()
    assert exitkit.__version__ in cli("--version")


def in_a_process(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_help_and_lists_do_not_load_torch_once_they_know(tmp_path):
    place = {"XDG_CACHE_HOME": str(tmp_path)}
    assert in_a_process("-m", "exitkit", "list", **place).returncode == 0
    probe = """
import sys, exitkit.cli
for line in ("--help", "list", "list methods --json", "train --help"):
    try:
        exitkit.cli.main(line.split())
    except SystemExit:
        print("torch" in sys.modules)
"""
    done = in_a_process("-c", probe, **place)
    said = [line for line in done.stdout.splitlines() if line in ("True", "False")]
    assert said == ["False"] * 4, done.stderr


def test_a_catalogue_that_is_damaged_or_can_not_be_kept_is_asked_for_again(tmp_path):
    (tmp_path / "exitkit").mkdir()
    (tmp_path / "exitkit" / "catalogue.json").write_text("{'")
    done = in_a_process("-m", "exitkit", "list", "methods", "--json", XDG_CACHE_HOME=str(tmp_path))
    assert len(json.loads(done.stdout)) >= 4
    done = in_a_process("-m", "exitkit", "list", "methods", "--json", XDG_CACHE_HOME="/dev/null")
    assert len(json.loads(done.stdout)) >= 4 and not done.stderr


def test_output_that_nobody_reads_any_more_is_no_error():
    command = f"{sys.executable} -m exitkit list | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr


def test_colours_are_for_terminals_that_want_them():
    done = in_a_process("-m", "exitkit", "list", FORCE_COLOR="1")
    assert "\x1b[" in done.stdout
    assert "\x1b[" not in in_a_process("-m", "exitkit", "list").stdout


def test_an_incomplete_file_is_not_reported_as_an_interrupt():
    def read():
        raise EOFError("marshal data too short")

    with pytest.raises(EOFError, match="too short"):
        main([], click.Command("read", callback=read))
