"""A full disk, folders that can't be written, clocks that jump, what was left by the dead."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import exitkit
from exitkit.files import drafted, make_folder, written_whole

SMALL = ["--epochs", "1", "--batch-size", "32", "--set", "per_class=4", "--set", "validation=40"]
RECIPE = {"epochs": 1, "batch_size": 32, "dataset_settings": {"per_class": 4, "validation": 40}}
TRAIN = [sys.executable, "-m", "exitkit", "train", *SMALL]
# Files beyond this size can't be written: a disk that is full at this moment, for those who may not mount one.
LIMITED = """
import resource, signal, sys
sys.dont_write_bytecode = True  # Python would keep a file that was cut off
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
from exitkit.cli import main
main(sys.argv[1:])
"""


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, **options)


def refused(done, *says):
    assert done.returncode == 2, done.stderr
    *described, error = done.stderr.strip().splitlines()
    assert all(line.endswith("images per class") or line.endswith("test images") for line in described), done.stderr
    for words in says:
        assert words in error, done.stderr


def bits(out):
    (folder,) = (path for path in out.iterdir() if (path / "recipe.json").exists())
    names = ("weights.safetensors", "outputs-test.safetensors", "metrics.csv", "results.json")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture
def tmpfs(tmp_path):
    """A disk of 150 kB: room for a run's folder, and for no checkpoint beside what is there."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or run(mount, "-t", "tmpfs", "-o", "size=150k", "tmpfs", str(place)).returncode:
        pytest.skip("no tmpfs can be mounted here (it takes root)")
    yield place
    run("umount", str(place))


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_space(tmpfs, tmp_path):
    out = tmpfs / "runs"
    refused(run(*TRAIN, "--out", str(out)), "can't be written: the disk is full")
    assert not list(out.rglob("*.part"))
    assert run("mount", "-o", "remount,size=4m", str(tmpfs)).returncode == 0
    again = run(*TRAIN, "--out", str(out), "--resume")
    assert again.returncode == 0, again.stderr
    exitkit.train(RECIPE, tmp_path / "reference")
    assert bits(out) == bits(tmp_path / "reference")


def test_a_write_that_the_system_cuts_off_is_one_line(tmp_path):
    done = run(sys.executable, "-c", LIMITED, "train", *SMALL, "--out", str(tmp_path))
    refused(done, "checkpoint.pt can't be written")
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("checkpoint.pt"))


def test_an_evaluation_or_export_that_is_cut_off_leaves_the_run_as_it_was_and_no_folder(tmp_path):
    folder = exitkit.train(RECIPE, tmp_path / "runs").path
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    limited = LIMITED.replace("100_000", "20_000")
    for words in (["evaluate", folder], ["export", folder, "--format", "torch-export", "--out", tmp_path / "deployed"]):
        done = run(sys.executable, "-c", limited, *map(str, words))
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "can't be written" in done.stderr.strip().splitlines()[-1]  # after the progress, on a slow machine
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
        assert not list(tmp_path.rglob("*.part")) and not (tmp_path / "deployed").exists()


def as_somebody():
    """Return what goes before a command so that modes of files count: nothing, but for root."""
    if os.geteuid():
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root passes over the modes of files, and there is no setpriv to become somebody else")
    return ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@pytest.fixture
def somebody(tmp_path):
    """What goes before a command so that the modes of files in `tmp_path` count."""
    prefix = as_somebody()
    if prefix and run(*prefix, sys.executable, "-c", "import exitkit.cli, torch", cwd="/").returncode:
        pytest.skip("nobody else may read this Python's packages")
    for parent in [tmp_path, *tmp_path.parents][:4]:  # with the folders of this worker, these tests and this user
        if parent.stat().st_uid == os.geteuid():
            parent.chmod(parent.stat().st_mode | 0o111)
    return prefix


NOWHERE = os.environ | {"HOME": "/nonexistent"}


def test_a_folder_that_may_not_be_written_is_one_line(somebody, tmp_path):
    out = tmp_path / "out"
    out.mkdir(mode=0o555)
    done = run(*somebody, *TRAIN, "--out", str(out), cwd="/", env=NOWHERE)
    refused(done, "can't be written: no permission; choose another --out")
    assert not list(out.iterdir())


def test_images_that_may_only_be_read_are_enough(somebody, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    noise = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (data / name).mkdir(parents=True)
        for number in range(12):
            Image.fromarray(noise.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(data / name / f"{number}.png")
    out.mkdir()
    out.chmod(0o777)
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    for path in (data, *before):
        path.chmod(0o555 if path.is_dir() else 0o444)
    fields = ["--set", "image_size=16", "--set", "validation=4", "--set", "workers=0", "--backbone", "msdnet-tiny"]
    words = ["train", "--dataset", "folder", "--data-dir", str(data), *fields, "--epochs", "1", "--batch-size", "8"]
    try:
        done = run(*somebody, sys.executable, "-m", "exitkit", *words, "--out", str(out), cwd="/", env=NOWHERE)
    finally:
        for path in (data, *before):
            path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before
    assert list(out.glob("*/results.json"))


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    exitkit.train(RECIPE, tmp_path / "reference")
    hours = iter(range(10**9, 0, -3600))
    for name in ("time", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: float(next(hours)))
    exitkit.train(RECIPE, tmp_path / "jumping")
    monkeypatch.undo()
    assert bits(tmp_path / "jumping") == bits(tmp_path / "reference")
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0))
    done = exitkit.train(RECIPE, tmp_path / "jumping")
    assert done.finished and Path(done.path / "results.json").stat().st_mtime == 0  # left alone


@pytest.mark.parametrize("kind", [drafted, written_whole])
def test_what_another_process_removes_before_it_is_locked_is_made_again(kind, tmp_path, monkeypatch):
    lock, removed = fcntl.flock, []

    def late(descriptor, operation):
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].rmdir() if removed[0].is_dir() else removed[0].unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with kind(tmp_path / "run") as temporary:
        assert temporary.exists() and temporary not in removed
    assert len(removed) == 1


def test_what_killed_processes_were_writing_is_cleared_away_and_what_others_write_stays(tmp_path):
    """A file and a folder being written here and now, and two whose process was killed."""
    script = """
import os, signal, sys
from pathlib import Path
from exitkit.files import drafted, written_whole
place = Path(sys.argv[1])
with written_whole(place / "report.html") as file, drafted(place / "deployed") as folder:
    file.write_text("half")
    (folder / "policy.json").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    died = subprocess.run([sys.executable, "-c", script, tmp_path], check=False)
    assert died.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 2
    (tmp_path / ".film.part").write_text("half of something that is not ours")
    with written_whole(tmp_path / "a.csv") as file, drafted(tmp_path / "run") as folder:
        make_folder(tmp_path)
        assert set(tmp_path.iterdir()) == {file, folder, tmp_path / ".film.part"}
        file.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a.csv", ".film.part"}
    assert (tmp_path / "a.csv").read_text() == "whole"
