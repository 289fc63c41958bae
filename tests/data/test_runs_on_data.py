"""A folder of images from the command line to results, and loader workers on any system."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import exitkit
from exitkit import Recipe
from exitkit.cli import main
from exitkit.data.digits import Digits
from exitkit.data.folder import ImageFolder
from exitkit.data.split import Split
from exitkit.errors import Note, UserError
from exitkit.runs.folder import RunFolder

NETWORK = ("blocks=2", "base=1", "step=1", "channels=4", "growth=4", "growth_factors=1,1", "bottleneck_factors=1,1")
NOTE = "does not fit this torch"
SETTINGS = (*NETWORK, "head=pool", "image_size=16")


@pytest.fixture
def pictures(tmp_path):
    """Three classes of 20 images of 24 x 24, told apart by their colour; half are JPEG and half PNG."""
    random = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(20):
            pixels = random.integers(0, 80, (24, 24, 3))
            pixels[:, :, channel] += 150
            suffix = ("jpg", "png")[number % 2]
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "pictures" / name / f"{number}.{suffix}")
    return tmp_path / "pictures"


def command(pictures, *more, settings=()):
    given = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    folder = ("--dataset", "folder", "--data-dir", str(pictures), "--backbone", "msdnet", "--device", "cpu")
    return ["train", *folder, "--batch-size", "8", "--out", str(pictures.parent / "runs"), *given, *more]


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(("workers", "validation"), [("0", "eval"), ("2", "train")])
def test_a_folder_is_trained_and_evaluated_by_one_command(pictures, capsys, workers, validation):
    settings = (f"workers={workers}", f"val_transform={validation}")
    assert run(*command(pictures, "--epochs", "6", settings=settings)) == 0
    (folder,) = (pictures.parent / "runs").iterdir()
    found = results(folder)
    assert len(found["test"]) == len(found["validation"]) == 2
    assert found["test"][-1] > 80
    split = Split.load(folder / "split.safetensors")
    assert [len(part) for part in (split.train, split.validation, split.test)] == [44, 4, 12]
    (folder / "results.json").unlink()
    capsys.readouterr()
    assert run("evaluate", folder) == 0
    assert results(folder) == found
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_a_damaged_image_of_any_part_is_named_before_anything_is_written(pictures, capsys, part):
    data = ImageFolder(image_size=16, validation=3).load(pictures)
    bad = Path(data.paths(part)[0])
    bad.write_bytes(bad.read_bytes()[:300])
    arguments = command(pictures, "--epochs", "1", settings=("workers=2", "validation=3"))
    assert run(*arguments) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if NOTE not in line]
    assert error.startswith(f"exitkit: image {bad} can't be read: ")
    assert not (pictures.parent / "runs").exists()


def test_an_image_that_is_damaged_while_training_stops_it_and_mending_it_goes_on(pictures, capsys, monkeypatch):
    bad = Path(ImageFolder(image_size=16, validation=3).load(pictures).paths("train")[0])
    whole = bad.read_bytes()
    monkeypatch.setattr("exitkit.data.lazy.LazyData.check", lambda data: bad.write_bytes(whole[:300]) and "")
    arguments = command(pictures, "--epochs", "1", settings=("workers=2", "validation=3"))
    assert run(*arguments) == 2
    monkeypatch.undo()
    assert f"exitkit: image {bad} can't be read: " in capsys.readouterr().err
    bad.write_bytes(whole)
    assert run(*arguments, "--resume") == 0
    assert "60 images checked in" in capsys.readouterr().err


def test_a_file_that_is_no_image_is_named_before_anything_is_written(pictures, capsys):
    bad = pictures / "green" / "99.png"
    bad.write_text("no image")
    assert run(*command(pictures, "--epochs", "1", settings=("workers=0",))) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"exitkit: image {bad} can't be read: ")
    assert not (pictures.parent / "runs").exists()


def test_other_images_are_not_taken_for_those_of_a_finished_run(pictures, capsys):
    arguments = command(pictures, "--epochs", "1", settings=("workers=0",))
    assert run(*arguments) == 0
    (folder,) = (pictures.parent / "runs").iterdir()
    before = (folder / "results.json").read_bytes()
    moved = pictures.rename(pictures.parent / "moved")
    elsewhere = [str(moved) if word == str(pictures) else word for word in arguments]
    assert run(*elsewhere) == 0  # the same ones, wherever they are
    assert run("evaluate", folder) == 2 and "--data-dir" in capsys.readouterr().err
    assert run("evaluate", folder, "--data-dir", moved) == 0
    assert run("bench", folder, "--repeats", "1", "--data-dir", moved) == 0
    assert run("diagnose", folder, "--data-dir", moved) == 0
    assert (folder / "results.json").read_bytes() == before
    tested = ImageFolder(image_size=16, workers=0).load(moved).paths("test")
    for path in tested:  # other images of the same names and formats
        Image.new("RGB", (24, 24), "purple").save(path)
    capsys.readouterr()
    assert run(*elsewhere) == 2
    compare = ["compare", "--methods", "joint", "--seeds", "1", *elsewhere[1:]]
    assert run(*compare) == 2
    for line in [line for line in capsys.readouterr().err.splitlines() if NOTE not in line]:
        assert line.endswith(f"is finished, on other images than those in {moved} now; choose another --out")
    for verb in ("evaluate", "bench", "diagnose"):
        assert run(verb, folder, "--data-dir", moved) == 2
        assert f"was evaluated on other images than those in {moved} now" in capsys.readouterr().err
    assert (folder / "results.json").read_bytes() == before


def test_images_are_those_of_a_run_whatever_part_of_them_another_run_takes(pictures):
    """Runs that validate on `val` and runs that hold images out list other files in one folder."""
    (pictures / "train").mkdir()
    for name in ("red", "green", "blue"):
        (pictures / name).rename(pictures / "train" / name)
    for part in ("val", "test"):
        shutil.copytree(pictures / "train", pictures / part)
    arguments = command(pictures, "--epochs", "1", settings=("workers=0",))[1:]
    sweep = ["--sweep", "dataset.validation=none,5", "--launcher", "here"]
    compare = ["compare", "--methods", "joint", "--seeds", "1", *sweep, *arguments]
    assert run(*compare) == 0
    assert run(*compare) == 0


def test_a_comparison_diagnoses_runs_whose_images_have_moved(pictures, capsys):
    (pictures.parent / "mine.toml").write_text('methods = ["joint"]\nseeds = 1\nfigures = ["diagnose"]\n')
    arguments = command(pictures, "--epochs", "1", settings=("workers=0",))[1:]
    compare = ["compare", "--recipe", pictures.parent / "mine.toml", "--launcher", "here", *arguments]
    assert run(*compare) == 0
    moved = pictures.rename(pictures.parent / "moved")
    shutil.rmtree(pictures.parent / "runs" / "report")
    capsys.readouterr()
    assert run(*[moved if word == str(pictures) else word for word in compare]) == 0
    assert "not diagnosed" not in capsys.readouterr().err
    assert list((pictures.parent / "runs" / "report").glob("ranks-joint-*.png"))


def test_a_run_that_goes_on_with_other_images_says_so(pictures, monkeypatch):
    recipe = {"dataset": "folder", "data_dir": str(pictures), "backbone": "msdnet-tiny", "epochs": 2, "batch_size": 16}
    recipe["dataset_settings"] = {"image_size": 16, "workers": 0}

    def cut(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("exitkit.training.loop._end_epoch", cut)
    with pytest.raises(KeyboardInterrupt):
        exitkit.train(recipe, pictures.parent / "runs")
    monkeypatch.undo()
    (pictures / "red" / "0.jpg").write_bytes((pictures / "red" / "2.jpg").read_bytes())
    with pytest.warns(Note, match="was begun, on other images than those in"):
        run_folder = exitkit.train(recipe, pictures.parent / "runs")
    assert exitkit.train(recipe, pictures.parent / "runs").path == run_folder.path  # these are its images now


def test_a_comparison_reads_images_in_processes_of_its_worker_processes(pictures):
    """They are forked while the worker's thread waits for its next order."""
    words = command(pictures, "--epochs", "1", settings=("workers=2",))[1:]
    compare = [sys.executable, "-m", "exitkit", "compare", "--methods", "ge", "--seeds", "1", "--jobs", "1", *words]
    done = subprocess.run(compare, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert len(list((pictures.parent / "runs").glob("*/results.json"))) == 2


def test_an_interrupt_ends_training_and_its_workers_and_says_how_to_go_on(pictures):
    arguments = command(pictures, "--epochs", "10000", settings=("workers=2",))
    process = subprocess.Popen(
        [sys.executable, "-m", "exitkit", *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    runs, patience = pictures.parent / "runs", time.monotonic() + 120
    while not list(runs.glob("*/checkpoint.pt")) and time.monotonic() < patience:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to the workers too
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    lines = [line for line in errors.splitlines() if NOTE not in line and line.startswith("exitkit: ")]
    assert len(lines) == 1, errors
    assert lines[0].endswith("--resume")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def batches(data, seed=3):
    positions = list(torch.arange(len(data.split.train)).split(20))
    return list(data.batches("train", positions, augment=True, seed=seed))


@pytest.fixture
def afresh():
    """Start processes as on macOS and Windows, where nothing is inherited and all is pickled."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_workers_that_start_afresh_see_the_same_images_and_name_the_same_fault(pictures, afresh):
    alone = ImageFolder(image_size=16, workers=0).load(pictures)
    data = ImageFolder(image_size=16, workers=1).load(pictures)
    expected = batches(alone)
    spoilt = data.train_source.paths[int(data.split.train[25])]  # in the second batch
    Path(spoilt).write_bytes(Path(spoilt).read_bytes()[:300])
    positions = list(torch.arange(len(data.split.train)).split(20))
    stream = data.batches("train", positions, augment=True, seed=3)
    first = next(stream)
    assert torch.equal(first.images, expected[0].images)
    assert torch.equal(first.labels, expected[0].labels)
    with pytest.raises(UserError) as caught:
        next(stream)
    assert str(caught.value).startswith(f"image {spoilt} can't be read: ")
    assert not multiprocessing.active_children()  # though the error, with all its frames, is still held


@pytest.mark.parametrize("dataset", [Digits(), ImageFolder(image_size=16, workers=0)], ids=["digits", "folder"])
def test_data_sets_and_what_they_load_can_be_pickled(dataset, pictures):
    data = dataset.load(pictures)
    again = pickle.loads(pickle.dumps(data))
    for one, other in zip(batches(data), batches(again), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    assert pickle.loads(pickle.dumps(dataset)) == dataset


def test_readers_are_as_many_as_there_are_cores_and_not_part_of_what_a_run_is(pictures, monkeypatch):
    here = Recipe(dataset="folder", data_dir=str(pictures)).resolve().id
    for cores, expected in ((1, 1), (3, 3), (64, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert ImageFolder(image_size=16).load(pictures).workers == expected
        assert Recipe(dataset="folder", data_dir=str(pictures)).resolve().id == here
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert ImageFolder(image_size=16).load(pictures).workers == 1
    assert ImageFolder(image_size=16, workers=7).load(pictures).workers == 7


def test_a_folder_that_can_not_be_read_is_not_passed_over(pictures, monkeypatch):
    (pictures / "red" / "more").mkdir()
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "more":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match="red/more can't be read: Permission denied"):
        ImageFolder().load(pictures)


def test_links_to_folders_are_followed(pictures, tmp_path):
    plain = ImageFolder(image_size=16).load(pictures)
    (pictures / "red").rename(tmp_path / "elsewhere")
    (pictures / "red").mkdir()
    (pictures / "red" / "linked").symlink_to(tmp_path / "elsewhere")
    linked = ImageFolder(image_size=16).load(pictures)
    assert torch.equal(plain.train_labels, linked.train_labels)


def test_a_trained_network_is_evaluated_without_files_that_are_gone_or_damaged(pictures, capsys):
    assert run(*command(pictures, "--epochs", "1", settings=("workers=0",))) == 0
    (folder,) = (pictures.parent / "runs").iterdir()
    whole = RunFolder(folder).outputs("test")
    tested = [Path(path) for path in exitkit.load_data(folder).paths("test")]
    tested[0].unlink()
    tested[1].write_bytes(tested[1].read_bytes()[:300])
    tested[2].write_bytes(bytes(tested[2].stat().st_size))  # of the same size: found when it is read
    Path(exitkit.load_data(folder).paths("train")[0]).unlink()  # evaluation does not need it
    capsys.readouterr()
    assert run("evaluate", folder, "--json") == 0
    printed = capsys.readouterr()
    assert "is evaluated without 3 test images: image " in printed.err
    messages = json.loads(printed.out)["left_out"]["test"]
    for path, reason, message in zip(tested, ["does not exist", *["can't be read: "] * 2], messages, strict=False):
        assert message.startswith(f"image {path} {reason}")
    kept = RunFolder(folder).outputs("test")
    assert kept["indices"].tolist() == whole["indices"][3:].tolist()
    np.testing.assert_allclose(kept["logits"], whole["logits"][3:], rtol=1e-4, atol=1e-5)
    for verb in ("bench", "diagnose"):
        assert run(verb, folder, *(("--repeats", "1") if verb == "bench" else ())) == 0
    assert run("show", folder) == 0 and "evaluated without 3 test images" in capsys.readouterr().out


def test_a_run_that_has_begun_says_which_files_were_added_or_removed(pictures, monkeypatch):
    recipe = {"dataset": "folder", "data_dir": str(pictures), "backbone": "msdnet-tiny", "epochs": 2, "batch_size": 16}
    recipe["dataset_settings"] = {"image_size": 16, "workers": 0}
    monkeypatch.setattr("exitkit.training.loop._end_epoch", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exitkit.train(recipe, pictures.parent / "runs")
    monkeypatch.undo()
    (pictures / "red" / "0.jpg").rename(pictures / "red" / "new.jpg")
    with (
        pytest.warns(Note),
        pytest.raises(UserError, match=r"other files: 1 gone \(red/0.jpg\), 1 new \(red/new.jpg\)"),
    ):
        exitkit.train(recipe, pictures.parent / "runs")


def test_nothing_of_pillows_warnings_reaches_the_command_line(pictures, capfd):
    """A palette image with a transparent colour, and one that is larger than Pillow's first limit."""
    image = Image.open(pictures / "red" / "1.png").convert("P")
    image.save(pictures / "red" / "1.png", transparency=bytes(range(256)))
    Image.new("1", (10000, 9500)).save(pictures / "red" / "3.png")
    assert run(*command(pictures, "--epochs", "1", settings=("workers=0",))) == 0
    assert "Warning" not in capfd.readouterr().err
