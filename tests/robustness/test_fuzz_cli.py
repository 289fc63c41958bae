"""Whatever a command line says, it works or is refused in one line, and a refusal leaves everything as it was.

The commands and their options are asked of the program itself. Training, timing and exporting end where they would
begin: by then all that can be refused has been.
"""

import urllib.error
import warnings

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import exitkit
from exitkit.benchmarks.campaign.estimate import Step
from exitkit.cli import cli, main

CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
QUICK = settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=CHECKS, database=None)
LONG = settings(QUICK, max_examples=150, derandomize=False)
RECIPE = {"epochs": 1, "batch_size": 32, "dataset_settings": {"per_class": 4, "validation": 40}}
LEFT_OUT = {"toy"}  # draws for a minute, and has nothing to read

JUNK = ["", " ", "-", "--", "=", "x=", "=x", ",", "a,,b", "nan", "inf", "-1", "0", "1e999", "1.5", "é" * 300, "\udcff"]
JUNK += ["[" * 2000, "9" * 5000, "none", "true", "..", "/dev/null", "/proc/1/mem", "a+b", "+", "@file", "%s", "{}", "~"]
INTEGERS = ["1", "2", "0", "-1", "7", "100000", str(10**30), "1e3", "1_0", "0x10", "2.0"]
NUMBERS = ["0.5", "1", "0", "-0.1", "1e-320", "1e308", "nan", "inf", "-inf", "1e999", "0,5"]
PLACES = ["runs", "RUN", "nowhere", "file.txt", "RUN/recipe.json", "RUN/weights.safetensors", ".", "/dev/full/x"]
SENSIBLE = {
    "method": ["joint", "boostnet", "ge+boostnet", "metagf", "l2w", "bostnet", "separate", "kd"],
    "methods": ["joint", "ge,boostnet", "all", "ge,ge", "ge,bostnet", "ge+boostnet,kd"],
    "baseline": ["joint", "ge", "gee"],
    "backbone": ["msdnet-tiny", "sdn-tiny", "ranet-tiny", "msdnet-tny", "msdnet-tiny,sdn-tiny", "torchvision"],
    "dataset": ["digits", "digitz", "folder", "fashion-mnist", "imagenet"],
    "device": ["cpu", "auto", "cuda", "cuda:99", "mps", "gpu"],
    "precision": ["fp32", "bf16", "fp8"],
    "sets": ["temperature=0.5", "per_class=4", "growth=2", "tempereture=1", "temperature=hot", "per_class=0"],
    "sweeps": ["temperature=0,0.5", "epochs=1,2", "boostnet.temperature=0.1,1", "seed=1,2", "lr=", "x=1"],
    "slurm": ["timeout_min=5", "x=y", "timeout_min=soon"],
    "launcher": ["processes", "here", "slurm", "submitit-local", "hear"],
    "recipe_file": ["digits", "imta-table2-quick", "imta-tabel2", "recipe.toml", "RUN", "comparison.toml"],
    "name": ["digits", "imta-table2-quick", "imta-tabel2", "recipe.toml"],
    "file": ["recipe.toml", "RUN/weights.safetensors", "digits", "comparison.toml", "file.txt"],
    "formats": ["csv", "csv,md", "latex", "cvs"],
    "input_shape": ["1,8,8", "3,32,32", "3,32", "0,8,8", "1,8,8,8", "1,99999999,99999999"],
    "budget": ["40k", "1.5ms", "40", "-1M", "40Q", "0"],
    "budgets": ["40k,60k", "1.5ms", "40k,1ms", "40Q"],
    "score": ["confidence", "margin", "patience", "confidense"],
    "rule": ["confidence", "patience", "entropi"],
    "cost": ["macs", "papers", "latency", "flops"],
    "mode": ["latency", "throughput", "speed"],
    "boundary": ["model", "end-to-end", "end"],
    "form": ["onnx", "torch-export", "onx"],
    "what": ["methods", "recipes", "metods"],
    "shell": ["bash", "zsh", "fish", "sh"],
}
PLACED = ("run", "runs", "folder", "folders", "out", "target", "init_from", "data_dir")


class Began(BaseException):
    """All was in order, and the long work would begin."""


def begin(*arguments, **options):
    raise Began


def offline(*arguments, **options):
    raise urllib.error.URLError("no network")


def commands(group=cli, path=()):
    """Every command with its place: {(words): command}."""
    found = {}
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        found |= commands(command, (*path, name)) if isinstance(command, click.Group) else {(*path, name): command}
    return found


COMMANDS = commands()


def values_of(parameter):
    """Words for one parameter: sensible ones, ones of the right kind that go too far, and nonsense."""
    pool = list(SENSIBLE.get(parameter.name, PLACES if parameter.name in PLACED else ["x"]))
    if isinstance(parameter.type, click.types.IntParamType):
        pool = INTEGERS
    elif isinstance(parameter.type, click.types.FloatParamType):
        pool = NUMBERS
    pool = st.sampled_from(pool)
    return pool | pool | pool | st.sampled_from(JUNK) | st.text(st.characters(exclude_characters="/\0"), max_size=6)


@st.composite
def command_lines(draw, path):
    """Draw the words after `exitkit`."""
    words = list(path)
    options = [each for each in COMMANDS[path].params if isinstance(each, click.Option) and each.name not in LEFT_OUT]
    forced = [each for each in options if each.name == "formats"]  # else figures are drawn, for seconds each time
    for option in forced + draw(st.lists(st.sampled_from(options), max_size=4)) if options else []:
        words.append(draw(st.sampled_from(option.opts)))
        if not option.is_flag:
            words.append(draw(values_of(option)))
    for argument in COMMANDS[path].params:
        if isinstance(argument, click.Argument):
            words += draw(st.lists(values_of(argument), min_size=1, max_size=1 + (argument.nargs < 0)))
    words += draw(st.lists(st.sampled_from(["--jsn", "extra", "-q", "--", "--json"]), max_size=1) | st.just([]))
    return [*words, "--once"] if path == ("watch",) else words


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished run, recipes, and a file that is none of all that."""
    place = tmp_path_factory.mktemp("fuzz")
    run = exitkit.train(RECIPE, place / "runs")
    (place / "RUN").symlink_to(run.path)
    (place / "file.txt").write_text("no recipe\n")
    (place / "recipe.toml").write_text('method = "ge"\nepochs = 1\n')
    (place / "comparison.toml").write_text('methods = ["ge", "boostnet"]\nseeds = 1\nepochs = 1\n')
    return place


def tree(place):
    return {path: path.read_bytes() if path.is_file() else None for path in place.rglob("*")}


def check(words, place, capsys):
    """Run it where the run is; code 0, or code 2 with one line and nothing touched, or `Began`."""
    before = tree(place)
    with warnings.catch_warnings():
        try:
            main(words)
        except Began:
            capsys.readouterr()
            return
        except SystemExit as end:
            code = end.code
    told = capsys.readouterr().err
    assert code in (0, 2) or (code, words[0]) == (1, "doctor"), (words, code, told)  # it found something
    assert "Traceback" not in told, (words, told)
    if code == 2:
        lines = told.strip().splitlines()
        assert lines and lines[-1].startswith("exitkit: ") and len(lines[-1]) > len("exitkit: ???"), (words, told)
        assert sum(line.startswith("exitkit: ") for line in lines) == len(lines) <= 2, (words, told)
        assert tree(place) == before, words


@pytest.fixture
def harmless(place, monkeypatch):
    """In that folder, with all that lasts or that touches the machine ending where it would begin."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("exitkit.training.setup._open_folder", begin)
    monkeypatch.setattr("exitkit.benchmarks.campaign.queue.Campaign.run", begin)
    monkeypatch.setattr("exitkit.benchmarks.campaign.estimate._step", lambda begun, batch: Step(1.0))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr("exitkit.inference.export.export.export", begin)
    monkeypatch.setattr("exitkit.benchmarks.timing.stopwatch.time_all", begin)
    monkeypatch.setattr("exitkit.benchmarks.diagnose.figures.ranks_figure", begin)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_command_line_works_or_is_refused(path, harmless, place, capsys):
    QUICK(given(command_lines(path))(lambda words: check(words, place, capsys)))()


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_many_command_lines_work_or_are_refused(path, harmless, place, capsys):
    LONG(given(command_lines(path))(lambda words: check(words, place, capsys)))()
