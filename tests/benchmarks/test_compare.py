"""The comparison as one command: its tables, its files, killed and started again."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

import exitkit
from exitkit.benchmarks.campaign.display import CampaignDisplay
from exitkit.benchmarks.campaign.launchers import Event
from exitkit.files import load_tensors

from toy import FEW_OPTIONS

COMMAND = [sys.executable, "-m", "exitkit", "compare", "--methods", "metagf,boostnet", "--epochs", "2", "--jobs", "2"]
COMMAND += FEW_OPTIONS
CLOCKED = ("training", "report")  # the documents hold the table of training times, too


def compare(out, *more):
    return subprocess.run([*COMMAND, "--out", str(out), *more], capture_output=True, text=True, check=False)


def report(out):
    """The report's files, but for what is measured with a clock."""
    return {path.name: path.read_bytes() for path in (out / "report").iterdir() if path.stem not in CLOCKED}


def status(pid):
    """A process's state and its parent's number, from the kernel; None where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1])


def workers_of(process):
    """The processes that a campaign started."""
    everyone = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in everyone if (status(pid) or ("", 0))[1] == process.pid]


def alive(pid):
    return (status(pid) or ("Z", 0))[0] != "Z"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    done = compare(out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_the_tables_are_printed_and_the_last_line_says_where_they_are(finished):
    out, done = finished
    for title in ("Anytime accuracy (%)", "Budgeted-batch accuracy (%)"):
        assert title in done.stdout
    assert done.stdout.strip().endswith(f"tables and figures: {out / 'report'}")
    assert "6/6" in done.stderr


def test_the_files_are_those_of_the_issue(finished):
    out, _ = finished
    anytime, budgeted = (pd.read_csv(out / "report" / f"{name}.csv") for name in ("anytime", "budgeted"))
    columns = ["method", "backbone", "dataset", "exit", "papers", "macs", "accuracy_mean", "accuracy_sd", "n"]
    assert list(anytime) == columns
    columns = ["method", "backbone", "dataset", "budget", "cost_mean", "accuracy_mean", "accuracy_sd", "n"]
    assert list(budgeted) == columns
    assert list(dict.fromkeys(anytime.method)) == ["joint", "metagf", "boostnet"]
    assert (anytime.groupby("method").exit.apply(list).map(tuple) == (1, 2, 3, 4)).all()
    assert (anytime.n == 2).all() and (anytime.dataset == "digits").all()
    for name in ("anytime", "budgeted"):
        for kind in ("csv", "md", "tex", "png", "pdf"):
            assert (out / "report" / f"{name}.{kind}").stat().st_size > 100
    runs = [path for path in out.iterdir() if path.is_dir() and path.name != "report"]
    assert len(runs) == 6 and all((run / "results.json").exists() for run in runs)


def test_the_table_is_what_the_runs_say(finished):
    out, _ = finished
    runs = exitkit.load_runs(out)
    anytime = pd.read_csv(out / "report" / "anytime.csv").set_index(["method", "exit"])
    groups = runs.groupby(["method", "exit"]).accuracy
    assert anytime.accuracy_mean.to_dict() == pytest.approx(groups.mean().to_dict())
    assert anytime.accuracy_sd.to_dict() == pytest.approx(groups.std(ddof=1).to_dict())
    assert anytime.macs.to_dict() == runs.groupby(["method", "exit"]).macs.first().to_dict()


def test_all_methods_share_split_start_and_order(finished):
    out, _ = finished
    splits = [load_tensors(path) for path in out.glob("*/split.safetensors")]
    assert len(splits) == 6
    assert all(torch.equal(split[part], value) for split in splits for part, value in splits[0].items())


def test_a_copied_folder_gives_the_same_bytes_elsewhere(finished, cli, tmp_path, monkeypatch):
    out, _ = finished
    shutil.copytree(out, tmp_path / "deep" / "copy", ignore=shutil.ignore_patterns("report"))
    monkeypatch.chdir(tmp_path / "deep")
    done = cli("report", "copy", "--format", "csv,html")
    assert done.code == 0, done.errors
    copied = tmp_path / "deep" / "copy" / "report"
    assert len(list(copied.glob("*.csv"))) > 10
    for path in copied.iterdir():
        assert path.read_bytes() == (out / "report" / path.name).read_bytes(), path.name


def test_killed_it_leaves_no_worker_and_goes_on_to_the_same_bytes(finished, cli, tmp_path):
    whole, _ = finished
    process = subprocess.Popen([*COMMAND, "--out", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/results.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = workers_of(process)
    assert len(workers) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))
    finished_before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/results.json")}
    assert 1 <= len(finished_before) < 6

    again = cli(*COMMAND[3:], "--jobs", "1", "--out", tmp_path)
    assert again.code == 0, again.errors
    assert f"already finished: {len(finished_before)} of 6 runs" in again.errors
    assert all(path.stat().st_mtime_ns == before for path, before in finished_before.items())
    assert report(tmp_path) == report(whole)


def test_interrupted_it_ends_its_workers_and_says_how_to_go_on(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "--out", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = workers_of(process)
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - asked < 15
    assert errors.strip().splitlines()[-1] == "exitkit: stopped; run the same command again to resume"
    assert workers and not any(map(alive, workers))


def test_two_on_one_folder_end_well_or_say_why_not(tmp_path):
    command = [*COMMAND, "--methods", "ge", "--seeds", "1", "--epochs", "1", "--jobs", "1", "--out", str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [process.communicate(timeout=120) for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes
    for code, (_, errors) in zip(codes, ends, strict=True):
        assert code == 0 or errors.strip().splitlines()[-1].endswith("choose another --out"), errors
        assert "Traceback" not in errors
    assert len(exitkit.load_runs(tmp_path).run.unique()) == 2
    assert set(pd.read_csv(tmp_path / "report" / "anytime.csv").method) == {"joint", "ge"}
    assert not list(tmp_path.rglob("*.part"))


def test_a_method_that_diverges_leaves_the_others_table(cli, tmp_path):
    # Branches that overflow stop Meta-GF alone.
    done = cli(*COMMAND[3:], "--jobs", "1", "--set", "auxiliary_weight=1e30", "--seeds", "1", "--out", tmp_path)
    assert done.code == 2
    assert "Traceback" not in done.errors
    last = done.errors.strip().splitlines()[-1]
    assert last.startswith("exitkit: failed: metagf-") and "not finite" in last
    anytime = pd.read_csv(tmp_path / "report" / "anytime.csv")
    assert list(dict.fromkeys(anytime.method)) == ["joint", "boostnet"]


def test_a_summary_is_reported_and_goes_on_as_the_runs_themselves(finished, cli):
    out, _ = finished
    made = cli("report", out, "--out", "first", "--format", "csv,md", "--summary", "summary")
    assert made.code == 0, made.errors
    assert not [path for path in Path("summary").rglob("*") if path.suffix in (".safetensors", ".pt")]
    again = cli("report", "summary", "--out", "second", "--format", "csv,md")
    assert again.code == 0, again.errors
    for path in Path("first").iterdir():
        assert path.read_bytes() == (Path("second") / path.name).read_bytes(), path.name
    names = {path.name for path in Path("summary").iterdir()}
    continued = cli(*COMMAND[3:], "--out", "summary")
    assert continued.code == 0, continued.errors
    assert {path.name for path in Path("summary").iterdir()} == {*names, "report"}
    assert not list(Path("summary").glob("*/weights.safetensors"))


def test_claims_are_tested_with_the_report_options_of_the_study(finished, cli):
    shutil.copytree(finished[0], "long-tail")  # a claim about this study measures its runs of joint
    (plan,) = Path("long-tail").glob("comparison-*.json")
    content = json.loads(plan.read_text())
    content["report"]["budgets"] = ["0.06M", "0.12M"]
    plan.write_text(json.dumps(content))
    summary = Path("summaries", "long-tail")
    made = cli("report", "long-tail", "--format", "csv", "--summary", summary)
    assert made.code == 0, made.errors
    assert "a summary made with budgets" in cli("report", summary, "--budgets", "0.06M,0.13M").errors
    tested = cli("claims", summary)
    assert tested.code == 0, tested.errors
    shutil.copytree(summary, Path("elsewhere", "long-tail"))
    shutil.copytree(summary, "long-tial")
    cli("claims", summary, "elsewhere/long-tail").refused("two folders are called long-tail")
    cli("claims", "long-tial").refused("unknown study 'long-tial'; did you mean long-tail?")


def test_a_summary_does_not_name_the_folder_of_the_images(finished, cli):
    shutil.copytree(finished[0], "study")
    (plan,) = Path("study").glob("comparison-*.json")
    for path in (plan, *Path("study").glob("*/recipe.json")):
        path.write_text(path.read_text().replace('"data_dir": null', '"data_dir": "images of mine"'))
        assert "images of mine" in path.read_text()
    made = cli("report", "study", "--format", "csv", "--summary", "summary")
    assert made.code == 0, made.errors
    texts = [path.read_text() for path in Path("summary").rglob("*.json")]
    assert len(texts) > 6 and not any("images of mine" in text for text in texts)


def test_a_run_that_stores_features_has_no_accuracy_to_show():
    recipe = exitkit.Recipe.make(method="heads").resolve()
    with CampaignDisplay([recipe], 1) as display:
        display(Event(0, "begun", {}))
        for accuracies in ([], [0.25, 0.5]):
            display(
                Event(0, "progress", {"fraction": 0.5, "epoch": 0, "epochs": 2, "rate": 1.0, "accuracies": accuracies})
            )
    (task,) = (task for task in display._bars.tasks if task.description == "heads seed 0")
    assert task.fields["note"] == "epoch 0/2  1 steps/s  last exit 50.0 %"
