"""Every reader of a run folder, on every file of it, wrong in every way: one line that names the file, exit code 2."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from torch.nn.functional import one_hot

import exitkit
from exitkit.benchmarks.campaign.estimate import Estimate
from exitkit.errors import Note
from exitkit.files import write_json
from robustness import damage

RECIPE = {
    "method": "metagf",
    "epochs": 1,
    "batch_size": 32,
    "dataset_settings": {"per_class": 4, "validation": 40},
    "probe_every": 1,
}
KINDS = {".json": damage.JSON, ".safetensors": damage.TENSORS, ".csv": damage.CSV}
READERS = {
    "show": ("show RUN", "show RUN --json"),
    "evaluate": ("evaluate RUN",),
    "report": ("report RUNS --format csv",),
    "latency": ("report RUNS --format csv --cost latency",),
    "reproducibility": ("reproducibility RUNS",),
    "diagnose": ("diagnose RUN",),
    "bench": ("bench RUN --repeats 1",),
    "train": ("train --recipe RUN --out RUNS --resume",),
}
FILES = {  # whose readers have to notice, whatever is wrong with it
    "recipe.json": ("show", "evaluate", "report", "reproducibility", "diagnose", "bench"),
    "results.json": ("show", "report", "reproducibility"),
    "cost.json": ("show", "report", "reproducibility"),
    "environment.json": ("show", "reproducibility"),
    "metrics.csv": ("report", "reproducibility"),
    "timing.csv": ("report", "reproducibility"),
    "latency.json": ("latency",),
    "outputs-test.safetensors": ("report", "reproducibility", "diagnose"),
    "outputs-validation.safetensors": ("report", "reproducibility"),
    "split.safetensors": ("evaluate", "diagnose", "bench"),
    "weights.safetensors": ("evaluate", "diagnose", "bench"),
    "learned.json": ("show",),
    "probes.safetensors": ("diagnose",),
    "../comparison-00000000.json": ("report", "reproducibility"),
}
MAY_BE_GONE = ("results.json", "latency.json", "learned.json", "probes.safetensors", "../comparison-00000000.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a finished, measured run and a plan."""
    from exitkit.benchmarks.campaign.plan import Plan
    from exitkit.benchmarks.campaign.record import write_plan

    out = tmp_path_factory.mktemp("whole") / "runs"
    run = exitkit.train(RECIPE, out)
    write_json(run.path / "latency.json", {"milliseconds": [1.0, 2.0, 3.0, 4.0]})
    plan = {key: value for key, value in RECIPE.items() if key not in ("method", "dataset_settings")}
    plan = Plan.make(plan | {"methods": "metagf", "baseline": "metagf", "seeds": 1, "set": RECIPE["dataset_settings"]})
    write_plan(out, plan, plan.runs(), "exitkit compare").rename(out / "comparison-00000000.json")
    return out


@pytest.fixture(scope="module")
def sibling(tmp_path_factory):
    """A run that differs in its seed alone."""
    return exitkit.train(RECIPE | {"seed": 1}, tmp_path_factory.mktemp("sibling")).path


@pytest.fixture
def copied(whole, tmp_path):
    """Copy the runs; returns (the folder, the run)."""
    out = tmp_path / "runs"
    shutil.copytree(whole, out)
    (run,) = (path.parent for path in out.glob("*/recipe.json"))
    return out, run


def cases():
    for name, readers in FILES.items():
        kinds = KINDS["." + name.rpartition(".")[2]]
        for number, how in enumerate(kinds):
            if (name, how) == ("learned.json", "a list"):
                continue  # it learned nothing: that is no damage
            # Each way of being wrong with one of the readers, and all of them in the full run.
            for place, reader in enumerate(readers):
                marks = [pytest.mark.full] * (place != number % len(readers))
                yield pytest.param(name, kinds[how], reader, marks=marks, id=f"{reader}: {name} {how}")


@pytest.mark.parametrize(("name", "damaged", "reader"), list(cases()))
def test_a_damaged_file_is_named_in_one_line(name, damaged, reader, copied, cli, request):
    out, run = copied
    damaged(run / name)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for command in READERS[reader]:
        result = cli(*(str({"RUN": run, "RUNS": out}.get(word, word)) for word in command.split()))
        if name in MAY_BE_GONE and "gone" in request.node.name:
            assert result.code in (0, 2) and "Traceback" not in result.errors
            continue
        result.refused(name.removeprefix("../"))
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["recipe.json", "results.json", "cost.json", "timing.csv", "outputs-test.safetensors"])
def test_a_damaged_run_hides_no_other(name, copied, sibling, cli):
    out, run = copied
    (out / "comparison-00000000.json").unlink()
    shutil.copytree(sibling, out / sibling.name)
    (run / name).write_text('{"a": 1}')
    result = cli("report", out, "--format", "csv")
    assert result.code == 0 and "Anytime accuracy" in result.out
    (line,) = (line for line in result.errors.splitlines() if line.startswith("exitkit: a run is left out: "))
    assert str(run / name) in line
    if name != "outputs-test.safetensors":  # `compare` estimates times from the other runs
        with pytest.warns(Note, match="a run is left out"):
            Estimate(out)
    if name.endswith(".json"):
        with pytest.warns(Note, match="a run is left out"):
            assert set(exitkit.load_runs(out).run) == {sibling.name}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("results.json", {"validation": [50.0] * 4, "test": [50.0, 1e9, 50.0, 50.0]}, "test.1: "),
        ("results.json", {"validation": [], "test": []}, "validation: "),
        ("cost.json", [{"exit": 1, "papers": 1, "macs": 10**400, "params": 1}], "0.macs: "),
        ("cost.json", [{"exit": 1, "papers": -1, "macs": 1, "params": 1}], "0.papers: "),
        ("latency.json", {"milliseconds": [-1.0] * 4}, "milliseconds.0: "),
        ("recipe.json", {"method": "ge"}, "backbone is missing"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_field(name, content, says, copied, cli):
    out, run = copied
    write_json(run / name, content)
    command = ("report", out, "--format", "csv", "--cost", "latency") if name == "latency.json" else ("show", run)
    cli(*command).refused(name, says)


def test_files_that_are_nested_too_deeply_or_have_no_number_are_named(copied, cli):
    _, run = copied
    recipe = json.loads((run / "recipe.json").read_text())
    nested = []
    for _ in range(900):
        nested = [nested]
    write_json(run / "recipe.json", recipe | {"method_settings": {"deep": nested}})
    cli("show", run).refused("recipe.json", "method_settings is nested more than 20 levels deep")
    (run / "recipe.json").write_text(json.dumps(recipe | {"lr": float("nan")}))
    cli("show", run).refused("recipe.json", "NaN is not a number of JSON")


def test_outputs_of_another_network_are_not_taken_for_this_ones(copied, cli):
    out, run = copied
    path = run / "outputs-test.safetensors"
    outputs = load_file(path)
    outputs["logits"] = one_hot(outputs["labels"], 10).float()[:, None].repeat(1, 4, 1)  # right at every exit
    save_file(outputs, path)
    cli("report", str(out), "--format", "csv").refused(path.name, "of different evaluations")


@pytest.mark.parametrize("file", ["weights", "outputs-test", "outputs-validation", "probes", "split"])
def test_tensors_of_another_run_are_not_taken_for_this_ones(file, copied, sibling, cli):
    """Of the same network, data and shapes, so that nothing but the name that they bear can tell."""
    out, run = copied
    name = f"{file}.safetensors"
    shutil.copy(sibling / name, run / name)
    readers = {"outputs-test": "report", "outputs-validation": "report", "probes": "diagnose"}
    (command,) = READERS[readers.get(file, "evaluate")]
    result = cli(*(str({"RUN": run, "RUNS": out}.get(word, word)) for word in command.split()))
    result.refused(name, f"of run {sibling.name}", f"of run {run.name}", "restore the run's own file")


def test_weights_that_name_no_run_are_taken(copied, cli):
    _, run = copied
    path = run / "weights.safetensors"
    zeros = {name: value * 0 for name, value in load_file(path).items()}  # every image is of the first class then
    save_file(zeros, path)
    assert cli("evaluate", str(run)).code == 0
    assert json.loads((run / "results.json").read_text())["test"] == [pytest.approx(10, abs=1)] * 4


def test_a_checkpoint_of_another_run_is_not_gone_on_with(copied, sibling, cli):
    out, run = copied
    shutil.copy(sibling / "checkpoint.pt", run / "checkpoint.pt")
    (run / "results.json").unlink()
    result = cli("train", "--recipe", str(run), "--out", str(out), "--resume")
    result.refused("checkpoint.pt", f"of another run, {sibling.name}")


def test_a_checkpoint_that_would_do_something_is_not_run(copied, cli, tmp_path):
    out, run = copied
    (run / "results.json").unlink()
    damage.pickled(run / "checkpoint.pt")
    cli("train", "--recipe", str(run), "--out", str(out), "--resume").refused(
        "checkpoint.pt", "no code in it was executed"
    )
    assert not list(tmp_path.rglob("touched"))


def test_a_damaged_catalogue_is_asked_for_again(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "exitkit" / "catalogue.json"
    whole = cli("list", "methods", "--json").out
    stored = path.read_bytes()

    def without_methods(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"catalogue": {"methods": []}}))

    for damaged in (*damage.JSON.values(), without_methods):
        path.write_bytes(stored)
        damaged(path)
        assert cli("list", "methods", "--json") == (0, whole, "")
        if path.is_dir():
            path.rmdir()
