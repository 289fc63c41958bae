"""A disk that is full, a folder that is gone and a reader that has ended, for every command that writes or prints."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

import exitkit
from exitkit import files
from exitkit.errors import UserError
from exitkit.files import acquire, disk_error

RECIPE = {
    "epochs": 1,
    "batch_size": 32,
    "probe_every": 1,
    "backbone": "sdn-tiny",
    "dataset_settings": {"per_class": 4, "validation": 40},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run with probes."""
    return exitkit.train(RECIPE, tmp_path_factory.mktemp("trained")).path


@contextmanager
def full_disk(room):
    """No file can grow beyond `room` bytes, as on a disk that is full at this moment."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # Python would keep a file that was cut off
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        sys.dont_write_bytecode = bytecode


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("room", [200, pytest.param(0, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "words",
    [
        "evaluate runs/RUN",
        "export runs/RUN --out deployed",
        "export runs/RUN --format onnx --out deployed",
        "bench runs/RUN --repeats 1",
        "diagnose runs/RUN --out diagnosed",
        "policies runs/RUN --out chosen",
        "report runs --out report",
        "report runs --out report --summary few",
        "reproducibility runs",
        "claims families",
        "recipes copy imta-table2 mine.toml",
        "train --resume --out runs --recipe runs/RUN/recipe.json --tensorboard",
    ],
)
def test_a_full_disk_is_one_line_and_nothing_is_left_half_written(cli, trained, tmp_path, words, room):
    shutil.copytree(trained, tmp_path / ("families" if "families" in words else "runs") / trained.name)
    if words.startswith("train"):
        (tmp_path / "runs" / trained.name / "results.json").unlink()
        (tmp_path / "runs" / trained.name / "checkpoint.pt").unlink()
    before = tree(tmp_path)
    with full_disk(room):
        result = cli(*words.replace("RUN", trained.name).split())
    errors = [line for line in result.errors.splitlines() if line.startswith("exitkit: ")]
    assert result.code == 2 and "Traceback" not in result.errors, (result.out, result.errors)
    assert "can't be written" in errors[-1], result.errors
    after = tree(tmp_path)
    assert {path: after[path] for path in before} == before
    left = {path.name: len(content) for path, content in after.items() if path not in before}
    assert not [name for name in left if name.endswith(".part")]
    assert all(size < room or not room for size in left.values()), left  # whole files that had room


@pytest.mark.parametrize("words", ["diagnose runs/RUN", "policies runs/RUN", "evaluate runs/RUN"])
def test_a_folder_that_vanishes_before_it_is_written_is_one_line(cli, trained, tmp_path, monkeypatch, words):
    shutil.copytree(trained, tmp_path / "runs" / trained.name)
    real = files.beside

    def vanished(path):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        return real(path)

    monkeypatch.setattr(files, "beside", vanished)
    result = cli(*words.replace("RUN", trained.name).split())
    assert result.code == 2 and "Traceback" not in result.errors, result.errors
    assert "can't be written: No such file or directory" in result.errors.splitlines()[-1]


@pytest.mark.parametrize("words", [["list", "methods", "--json"], ["--help"]])
def test_output_that_nobody_reads_or_that_has_no_room_ends_without_a_traceback(words, tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "exitkit", *words]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path)
    os.close(write)
    assert done.returncode == 1 and not done.stderr
    if Path("/dev/full").exists():
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr == "exitkit: a file can't be written: no space left on device\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)), "No locks available; expected a file system with locks"),
        (NotImplementedError("FileSystem does not appear to support flock"), "does not appear to support flock"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
    ],
)
def test_a_lock_that_the_file_system_refuses_is_one_line(error, words, trained, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.raises(UserError, match=f"can't be locked: .*{words}"):
        acquire(__import__("filelock").FileLock(tmp_path / "x.lock"))
    copy = shutil.copytree(trained, tmp_path / "run")
    (copy / "results.json").unlink()
    with pytest.raises(UserError, match="can't be locked"):
        exitkit.evaluate(copy)


def test_what_a_full_disk_says_is_true_of_every_command_and_of_systems_without_quotas(monkeypatch, tmp_path):
    assert "run the same command again (train: with --resume)" in str(disk_error(tmp_path, OSError(errno.ENOSPC, "")))
    assert "the disk quota is used up" in str(disk_error(tmp_path, OSError(errno.EDQUOT, "")))
    monkeypatch.delattr(errno, "EDQUOT")
    assert "can't be written: odd" in str(disk_error(tmp_path, OSError(12345, "odd")))
