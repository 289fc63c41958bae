"""The comparison as one command: its tables, its files, killed and started again."""

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


def test_a_copied_folder_gives_the_same_bytes_elsewhere(finished, tmp_path):
    out, _ = finished
    shutil.copytree(out, tmp_path / "deep" / "copy", ignore=shutil.ignore_patterns("report"))
    command = [sys.executable, "-m", "exitkit", "report", "copy", "--format", "csv,html"]
    subprocess.run(command, cwd=tmp_path / "deep", capture_output=True, check=True)
    copied = tmp_path / "deep" / "copy" / "report"
    assert len(list(copied.glob("*.csv"))) > 10
    for path in copied.iterdir():
        assert path.read_bytes() == (out / "report" / path.name).read_bytes(), path.name


def test_killed_it_leaves_no_worker_and_goes_on_to_the_same_bytes(finished, tmp_path):
    whole, _ = finished
    process = subprocess.Popen([*COMMAND, "--out", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/results.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = workers_of(process)
    assert len(workers) == 2
    process.kill()
    process.wait()
    time.sleep(1)
    assert not any(map(alive, workers))
    finished_before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/results.json")}
    assert 1 <= len(finished_before) < 6

    again = compare(tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"{len(finished_before)} of 6 runs are already finished" in again.stderr
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
    command = [*COMMAND, "--methods", "ge", "--seeds", "1", "--epochs", "1", "--out", str(tmp_path)]
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


def test_a_method_that_diverges_leaves_the_others_table(tmp_path):
    # Branches that overflow stop Meta-GF alone.
    done = compare(tmp_path, "--set", "auxiliary_weight=1e30", "--seeds", "1")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("exitkit: failed: metagf-") and "not finite" in last
    anytime = pd.read_csv(tmp_path / "report" / "anytime.csv")
    assert list(dict.fromkeys(anytime.method)) == ["joint", "boostnet"]
