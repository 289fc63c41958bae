"""How long each exit takes to answer: measured, kept with the run, and put on the report's axes."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import exitkit
from exitkit import ExitPolicy, ExitRule
from exitkit.benchmarks.commands import bench
from exitkit.benchmarks.timing import arrivals, stopwatch
from exitkit.benchmarks.timing.energy import energy_meter
from exitkit.inference import engines
from exitkit.runs.folder import RunFolder

from toy import FEW


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs that are finished."""
    out = tmp_path_factory.mktemp("bench")
    recipe = {"backbone": "msdnet-tiny", "epochs": 1, "device": "cpu", **FEW}
    for seed in (0, 1):
        exitkit.train(recipe | {"seed": seed}, out)
    return out


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    """A copy of both, in a folder of its own; nothing else is there, and the screen is wide."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copytree(trained, "runs")
    return sorted(Path("runs").iterdir())


@pytest.fixture
def cli(cli, runs):
    return cli


def files():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


class Clock:
    """A clock that goes on by a quarter of a second whenever it is read."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.25
        return self.now


def test_what_was_measured_is_kept_with_the_facts_and_printed(cli, runs, monkeypatch):
    points = ("--budget", "60K", "--budget", "100K")
    before, threads = files(), torch.get_num_threads()
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=Clock()))
    code, printed, errors = cli("bench", runs[0], "--batch-size", "2", "--repeats", "3", "--device", "cpu", *points)
    assert code == 0, errors
    facts = json.loads((runs[0] / "latency.json").read_text())
    # Two images at once: an exit each quarter of a second, and a quarter for whatever is run whole.
    assert facts["milliseconds"] == [125.0, 250.0, 375.0, 500.0]
    assert [point["name"] for point in facts["points"]] == ["budget 60K", "budget 100K"]
    for point in facts["points"]:
        assert point["p50"] == point["static"]["p50"] == 125.0 and point["images_per_second"] == 8.0
    known = {"batch_size": 2, "repeats": 3, "threads": 1, "device": "cpu", "gpu": None, "torch": torch.__version__}
    assert known.items() <= facts.items() and facts["mode"] == "latency" and facts["boundary"] == "model"
    assert files().keys() - before.keys() == {runs[0] / "latency.json"}
    assert all(files()[path] == content for path, content in before.items())
    assert torch.get_num_threads() == threads
    assert "milliseconds per image, batch size 2, model" in printed
    assert re.findall(r"│ (exit \d) ", printed)[:4] == ["exit 1", "exit 2", "exit 3", "exit 4"]


def test_engines_are_measured_side_by_side_and_the_tables_fit_80_columns(cli, runs, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, printed, errors = cli(
        "bench",
        runs[0],
        "--engine",
        "folded",
        "--engine",
        "eager",
        "--repeats",
        "1",
        "--device",
        "cpu",
        "--budget",
        "60K",
    )
    assert code == 0, errors
    facts = json.loads((runs[0] / "latency.json").read_text())
    assert list(facts["engines"]) == ["folded", "eager"] and facts["exits"] == facts["engines"]["folded"]["exits"]
    assert RunFolder(runs[0]).latency() == facts["engines"]["folded"]["milliseconds"]
    for values in facts["engines"].values():
        (point,) = values["points"]
        static = point["static"]
        assert static["mean"] == min(form["mean"] for form in static["forms"])  # the faster form counts
        assert [form["name"].split()[0] for form in static["forms"]] == ["cut", "stages"]
        assert point["images"] == 256 and point["moved"] < 3 and point["difference"] < 1e-5
    assert facts["engines"]["eager"]["points"][0]["difference"] == 0
    assert max(map(len, printed.splitlines())) <= 80 and "…" not in printed
    assert "mean milliseconds per image on each engine" in printed and "folded: 0 of 256 exits differ" in printed


def test_throughput_refills_the_batches_of_deep_stages_with_the_same_predictions(trained):
    run = RunFolder(sorted(trained.iterdir())[0])
    network = exitkit.load_network(run).eval()
    images = torch.randn(12, *network.input_shape)
    point = stopwatch.Point("q", exitkit.ExitPolicy(exitkit.ExitRule.from_run(run, share=1.0)), 2)
    subject = stopwatch.Subject(network, None, None, [point])
    seen = []
    step = subject.prepared.step

    def watched(index, state, carry):
        logits, *after = step(index, state, carry)
        seen.append((index, len(logits)))
        return logits, *after

    subject.prepared = engines.FixedEngine("watched", watched)
    with torch.inference_mode():
        ways = subject.ways(4)
        queued = ways["q"](images)
        deep = [count for index, count in seen if index]
        assert all(count == 4 for index, count in seen if not index) and max(deep) == 4
        apart = torch.cat([ways["q"](batch) for batch in images.split(4)])
        torch.testing.assert_close(queued, apart, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ways["cut at exit 2"](images), ways["stages up to exit 2"](images))


def test_the_queue_serves_in_order_and_its_mean_wait_is_that_of_the_theory():
    found = arrivals.latencies(np.array([2.0, 2.0, 1.0, 1.0]), np.array([1.0, 1.0, 10.0, 0.5]))
    assert found.tolist() == [2.0, 3.0, 1.0, 1.5]  # arrivals at 1, 2, 12, 12.5; starts at 1, 3, 12, 13
    generator = np.random.default_rng(0)
    service, load = generator.choice([1.0, 5.0], 400_000), 0.6
    waits = arrivals.latencies(service, generator.exponential(3 / load, 400_000)) - service
    expected = (load / 3) * (1 + 25) / 2 / (2 * (1 - load))  # Pollaczek and Khinchine
    assert waits.mean() == pytest.approx(expected, rel=0.03)


def test_latency_grows_with_the_load_and_early_exit_is_served_at_the_same_arrivals():
    rows = arrivals.under_load({"all": [0.004] * 8, "early": [0.001, 0.003] * 4}, [0.004] * 8)
    assert [row["load"] for row in rows] == list(arrivals.LOADS) and rows[1]["images_per_second"] == 125
    for way in ("all", "early"):
        tails = [row["ways"][way]["p99"] for row in rows]
        assert tails == sorted(tails) and tails[0] >= rows[0]["ways"][way]["p50"]
    assert all(row["ways"]["early"]["mean"] < row["ways"]["all"]["mean"] for row in rows)


def test_a_stream_is_measured_image_by_image_and_its_tables_fit_80_columns(cli, runs, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    options = ("--mode", "stream", "--repeats", "4", "--device", "cpu", "--budget", "60K")
    code, printed, errors = cli("bench", runs[0], *options)
    assert code == 0, errors
    facts = json.loads((runs[0] / "latency.json").read_text())
    static = f"static, exit {facts['points'][0]['static']['exit']}"
    assert [list(row["ways"]) for row in facts["stream"]] == [["all exits", "budget 60K", static]] * 6
    assert max(map(len, printed.splitlines())) <= 80 and "…" not in printed and "p99 of latency" in printed


def test_a_summary_is_of_one_image():
    found = stopwatch.summary([0.2, 0.4, 1.2], batch_size=4)
    percentiles = {"p50": 100.0, "p95": 280.0, "p99": 296.0}
    assert found == pytest.approx(percentiles | {"mean": 150.0, "images_per_second": 12 / 1.8})


def test_rounds_take_turns_on_the_same_images_and_warm_up_does_not_count(monkeypatch):
    asked = []
    for name in "ab":
        subject = SimpleNamespace(
            ways=lambda size, name=name: {name: None}, engine=SimpleNamespace(device=torch.device("cpu"))
        )
        asked.append(subject)
    seen = []
    monkeypatch.setattr(stopwatch, "_round", lambda subject, ways, number, *rest: seen.append((number, *ways)))
    stopwatch.time_all(asked, batch_size=1, repeats=2, boundary="model")
    assert [number for number, _ in seen] == [number for number in range(-3, 2) for _ in range(2)]
    assert [name for number, name in seen if number >= 0] == ["b", "a", "a", "b"]


def test_a_measurement_is_one_positive_number_an_exit_and_all_is_there_as_json(cli, runs):
    options = ("--repeats", "2", "--mode", "throughput", "--batch-size", "100", "--boundary", "end-to-end")
    code, printed, errors = cli("bench", *runs, *options, "--device", "cpu", "--json")
    assert code == 0, errors
    found = json.loads(printed)
    for run in runs:
        facts = found[run.name]
        assert RunFolder(run).latency() == facts["milliseconds"] and min(facts["milliseconds"]) > 0
        assert len(facts["points"]) == len(bench.SHARES) and facts["batch_size"] == 100
        results = RunFolder(run).results()["validation"]
        for point in facts["points"]:
            assert 1 <= point["static"]["exit"] <= len(results) and point["p50"] <= point["p95"] <= point["p99"]
            assert len(point["rule"]["thresholds"]) == 4


@pytest.mark.parametrize(("readings", "used"), [((5, 9), 4e-6), ((98, 3), 5e-6)])
def test_energy_is_read_from_the_counters_of_linux_which_begin_anew(tmp_path, readings, used):
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    platform = tmp_path / "intel-rapl:1"
    platform.mkdir()
    for domain, name in ((package, "package-0"), (platform, "psys")):  # psys contains the package
        (domain / "name").write_text(f"{name}\n")
        (domain / "max_energy_range_uj").write_text("100")
        (domain / "energy_uj").write_text("1")
    (package / "energy_uj").write_text(str(readings[0]))
    read = energy_meter("cpu", tmp_path)
    (package / "energy_uj").write_text(str(readings[1]))
    assert read() == pytest.approx(used)
    assert energy_meter("cuda", tmp_path) is None
    assert energy_meter("cpu", tmp_path / "nowhere") is None


def test_latencies_that_were_measured_in_two_ways_are_not_compared(cli, runs, tmp_path):
    for run, size in zip(runs, (1, 256), strict=False):
        facts = {"milliseconds": [1, 2, 3, 4], "batch_size": size, "mode": "latency", "engines": {"eager": {}}}
        (run / "latency.json").write_text(json.dumps(facts))
    code, _, errors = cli("report", runs[0].parent, "--out", tmp_path / "report", "--cost", "latency")
    assert code == 2 and "were measured with batch_size=1 and batch_size=256; measure them together" in errors


@pytest.mark.parametrize("policy", [None, "mean"])
def test_targets_of_several_units_are_each_those_of_the_rule(policy, cli, runs):
    (runs[0] / "latency.json").write_text('{"milliseconds": [1, 2, 3, 4]}')
    wishes = {
        "budget 60% at-most": {"budget": "60%", "at_most": True},
        "latency 3ms at-most": {"latency": "3ms", "at_most": True},
    }
    expected = {}
    for name, wish in wishes.items():
        rule = ExitPolicy.from_run(runs[0], policy, **wish) if policy else ExitRule.from_run(runs[0], **wish)
        made = rule if policy else ExitPolicy(rule)
        expected[f"{policy}, {name}" if policy else name] = json.loads(made.to_json())
    options = ("--budget", "60%", "--latency", "3ms", "--at-most", "--repeats", "1", "--device", "cpu", "--json")
    code, printed, errors = cli("bench", runs[0], *options, *(("--policy", policy) if policy else ()))
    assert code == 0, errors
    points = json.loads(printed)[runs[0].name]["points"]
    assert {point["name"]: point["rule"] for point in points} == expected


def test_a_policy_is_measured_at_its_own_points(cli, runs):
    options = ("--policy", "mean+agreement", "--repeats", "1", "--device", "cpu", "--json")
    code, printed, errors = cli("bench", runs[0], *options, "--budget", "100K")
    assert code == 0, errors
    (point,) = json.loads(printed)[runs[0].name]["points"]
    assert point["name"] == "mean+agreement, budget 100K" and 1 <= point["static"]["exit"] <= 4
    expected = ExitPolicy.from_run(runs[0], "mean+agreement", budget="100K")
    assert point["rule"] == json.loads(expected.to_json()) and point["rule"]["combination"]["name"] == "mean"
    code, printed, errors = cli("bench", runs[0], *options)
    assert code == 0, errors
    assert json.loads(printed)[runs[0].name]["points"][0]["name"] == "mean+agreement, no loss of accuracy"


def test_it_may_be_measured_again(cli, runs):
    (runs[0] / "latency.json").write_text('{"milliseconds": [0, 0, 0, 0]}')
    assert cli("bench", runs[0], "--repeats", "1", "--device", "cpu")[0] == 0
    assert min(RunFolder(runs[0]).latency()) > 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--repeats 0", "--repeats is 0; expected at least 1"),
        ("--batch-size 0", "--batch-size is 0; expected at least 1"),
        ("--threads -1", "--threads is -1; expected at least 1"),
        ("--engine fold", "unknown engine 'fold'; did you mean folded"),
        ("--mode stream --batch-size 2", "--batch-size is 2; expected 1 with --mode stream"),
        ("--mode fast", "unknown mode 'fast'; available: latency, stream, throughput"),
        ("--boundary all", "unknown boundary 'all'"),
        ("--budget 1", "budget 1 is below the first exit's cost"),
        ("--policy mies", "unknown combination, score or rule 'mies'; did you mean mie"),
        ("--policy mie --budget 1", "budget 1 is below the first exit's cost"),
        ("--repeats many", "'many' is not a valid integer"),
        ("--device gpu", "device is 'gpu'; expected auto, cpu, cuda"),
    ],
)
def test_a_bad_option_is_one_line_and_nothing_is_written(options, says, cli, runs):
    before = files()
    cli("bench", runs[0], *options.split()).refused(says)
    assert files() == before


def test_runs_that_are_unfinished_or_missing_are_told_before_any_is_measured(cli, runs):
    (runs[1] / "results.json").unlink()
    before = files()
    cli("bench", *runs).refused(f"run {runs[1]} is not finished; resume it with: exitkit train", "--resume")
    cli("bench", runs[0], "runs/nowhere").refused("runs/nowhere does not exist")
    cli("bench", f"{runs[0]}0").refused(f"did you mean {runs[0]}?")
    cli("bench", "runs").refused(f"holds no run (no recipe.json); it contains 2 runs, such as {runs[0]}")
    cli("bench").refused("RUN...")
    assert files() == before


def test_what_a_star_finds_beside_runs_is_left_out_but_nothing_else_is(cli, runs, monkeypatch):
    for name in ("report", "failures", "slurm"):
        Path("runs", name).mkdir()
    Path("runs/comparison.json").write_text("{}")
    measured = []
    monkeypatch.setattr(bench, "_measure", lambda folders, *_: measured.extend(folders) or {})
    ended = cli("bench", *sorted(Path("runs").iterdir()))
    assert ended.code == 0 and not ended.errors and [folder.path for folder in measured] == runs
    Path("runs/mine").mkdir()
    assert cli("bench", *sorted(Path("runs").iterdir())).errors == "skipped runs/mine: not a run folder\n"
    cli("bench", *runs, "runs/reports", "runs/report").refused("runs/reports does not exist")
    cli("bench", "runs/report").refused("runs/report holds no run")
    cli("bench", "runs/report", "runs/comparison.json").refused("runs/report holds no run")
    cli("bench", "runs/comparison.json").refused("runs/comparison.json is a file")


def test_a_run_without_its_weights_is_refused_and_nothing_is_written(cli, runs):
    (runs[1] / "weights.safetensors").unlink()
    before = files()
    cli("bench", *runs, "--repeats", "1", "--device", "cpu").refused("weights.safetensors")
    assert files() == before


def test_a_report_without_the_measurement_says_how_to_get_it(cli, runs):
    (runs[0] / "latency.json").write_text('{"milliseconds": [1, 2, 3, 4]}')
    before = files()
    cli("report", "runs", "--budgets", "100K,2K").refused("budget 2K is below the lowest cost of a first exit")
    cli("report", "runs", "--cost", "latency").refused(f"measure it with: exitkit bench {runs[1]}")
    assert files() == before


def test_a_report_has_milliseconds_for_its_cost(cli, runs):
    # The third exit of the first run was measured below its second, which nobody can leave at.
    measured = [[1.0, 2.5, 2.0, 4.0], [3.0, 3.5, 4.0, 6.0]]
    for run, milliseconds in zip(runs, measured, strict=True):
        (run / "latency.json").write_text(json.dumps({"milliseconds": milliseconds}))
    code, printed, errors = cli("report", "runs", "--cost", "latency", "--format", "csv")
    assert code == 0, errors
    anytime = pd.read_csv("runs/report/anytime.csv")
    assert anytime.milliseconds.tolist() == pytest.approx([2.0, 3.0, 3.25, 5.0])
    accuracies = np.mean([RunFolder(run).results()["test"] for run in runs], axis=0)
    assert anytime.accuracy_mean.tolist() == pytest.approx(accuracies.tolist())
    budgeted = pd.read_csv("runs/report/budgeted.csv")
    assert budgeted.cost_mean.between(2.0, 5.0).all()
    assert "tables and figures: runs/report" in printed


def test_a_report_of_what_was_just_measured_has_its_milliseconds(cli, runs):
    shutil.rmtree(runs[1])  # on a busy machine the two may differ so much that they have no budget in common
    assert cli("bench", runs[0], "--repeats", "1", "--device", "cpu")[0] == 0
    assert cli("report", "runs", "--cost", "latency", "--format", "csv")[0] == 0
    measured = RunFolder(runs[0]).latency()
    assert pd.read_csv("runs/report/anytime.csv").milliseconds.tolist() == pytest.approx(measured)
    assert cli("report", "runs", "--format", "csv")[0] == 0
    assert "milliseconds" not in pd.read_csv("runs/report/anytime.csv")
