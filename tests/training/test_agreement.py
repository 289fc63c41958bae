"""Ranks compare what they train before anything else: a difference is one line on each, and nothing is begun."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import exitkit
from exitkit.engine.ranks import rank_device
from exitkit.errors import UserError
from exitkit.training.checkpoint import Checkpoints

from toy import FEW

HERE = Path(__file__).parent


def ranks(worlds, *command):
    """Start a process per world size in `worlds`, as torchrun would; return (exit code, output, errors) of each."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(place.getsockname()[1])}
    started = []
    for rank, world in enumerate(worlds):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                env=os.environ | address | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ends = [process.communicate(timeout=240) for process in started]
    return [(process.returncode, *end) for process, end in zip(started, ends, strict=True)]


def begun(recipe, out, longer=0.0):
    """Train one epoch of a run, which takes some seconds longer, and stop."""
    save = Checkpoints.save

    def stop(self, run, history, **options):
        history.timing[-1]["seconds"] += longer
        save(self, run, history, **options)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", stop)
        exitkit.train(recipe, out)


def images(folder, seed):
    noise = np.random.default_rng(seed)
    for name in ("ant", "bee"):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            Image.fromarray(noise.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(folder / name / f"{number}.png")
    return str(folder)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}


def test_two_ranks_that_differ_begin_nothing_and_each_names_the_difference(tmp_path):
    out, other = str(tmp_path / "runs"), str(tmp_path / "other")
    ge, boostnet = ({"method": name, "epochs": 2, **FEW} for name in ("ge", "boostnet"))
    for recipe in (ge, boostnet):
        begun(recipe, out)
    begun(ge, other, longer=1.0)  # so that its checkpoint differs
    folder = {"dataset": "folder", "backbone": "msdnet-tiny", "epochs": 1, "batch_size": 8}
    folder |= {"dataset_settings": {"image_size": 16, "validation": 4, "workers": 0}}
    here, there = (folder | {"data_dir": images(tmp_path / name, seed)} for seed, name in enumerate(("here", "there")))
    new, nowhere = ge | {"seed": 5}, folder | {"data_dir": "nowhere"}
    scenarios = {
        'method is "boostnet" instead of "ge"': [(ge, out, True, ""), (boostnet, out, True, "")],
        "seed is 6 instead of 5": [(new, out, None, ""), (new | {"seed": 6}, out, None, "")],
        "lr is 0.2 instead of 0.1": [(new, out, None, ""), (new | {"lr": 0.2}, out, None, "")],
        "digest of the images is": [(here, out, None, ""), (there, out, None, "")],
        "digest of the method's code is edited instead of": [(new, out, None, ""), (new, out, None, "edited code")],
        "digest of the initial weights is": [(new, out, None, ""), (new, out, None, "other weights")],
        "run folder is absent instead of unfinished": [(ge, out, None, ""), (ge, str(tmp_path / "new"), None, "")],
        "resume it by --resume": [(ge, out, None, ""), (ge, out, False, "")],
        "digest of the images is absent instead of": [(here, out, None, ""), (nowhere, out, None, "")],
        "digest of the checkpoint is": [(ge, out, None, ""), (ge, other, None, "")],
    }
    before = files(tmp_path)
    (tmp_path / "scenarios.json").write_text(json.dumps(list(scenarios.values())))
    results = ranks((2, 2), HERE / "disagreeing.py", tmp_path / "scenarios.json")
    (tmp_path / "scenarios.json").unlink()
    assert files(tmp_path) == before
    for code, printed, errors in results:
        assert code == 0 and "Traceback" not in errors, errors
        for words, (end, message) in zip(scenarios, json.loads(printed), strict=True):
            assert end == "refused" and words in message.removeprefix("rank 1: "), (words, message)
            assert "\n" not in message


def test_an_error_of_one_rank_ends_all_with_its_line_and_two_that_agree_finish(tmp_path):
    recipe, out = {"method": "ge", "epochs": 1, **FEW}, str(tmp_path / "runs")
    scenarios = [[(recipe, out, None, "full disk"), (recipe, out, None, "")], [(recipe, out, True, "")] * 2]
    (tmp_path / "scenarios.json").write_text(json.dumps(scenarios))
    results = ranks((2, 2), HERE / "disagreeing.py", tmp_path / "scenarios.json")
    for rank, (code, printed, errors) in enumerate(results):
        assert code == 0 and "Traceback" not in errors, errors
        (end, message), finished = json.loads(printed)
        assert end == "refused" and "the disk is full" in message and message.startswith("rank 0: ") == (rank == 1)
        assert finished[0] == "finished"


@pytest.mark.parametrize("worlds", [(2, 3), (3, 2)])
def test_ranks_that_expect_different_numbers_of_ranks_are_refused(worlds, tmp_path):
    words = ["train", "--epochs", "1", "--out", tmp_path / "runs"]
    for code, printed, errors in ranks(worlds, "-m", "exitkit", *words):
        (line,) = [line for line in errors.splitlines() if line.startswith("exitkit: ")]
        assert code == 2 and not printed and "Traceback" not in errors
        expected = f"number of ranks is {worlds[1]} instead of {worlds[0]}"
        assert line.startswith("exitkit: rank 1 differs from rank 0: ") and expected in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "world", "gpus", "device"),
    [
        ("cuda:1", 1, 2, "cuda:1"),
        ("cuda", 2, 2, "cuda:1"),
        ("auto", 2, 2, "cuda:1"),
        ("auto", 2, 0, "cpu"),
        ("cpu", 2, 2, "cpu"),
    ],
)
def test_each_rank_has_a_gpu_of_its_own(name, world, gpus, device):
    assert rank_device(name, world, 1, gpus) == device


def test_ranks_that_would_share_a_gpu_are_refused(monkeypatch):
    with pytest.raises(UserError, match="--device cuda:1 puts 2 ranks on one GPU; expected --device cuda"):
        rank_device("cuda:1", 2, 1, 2)
    with pytest.raises(UserError, match="4 ranks need 4 GPUs on this machine, which has 2; start 2 ranks"):
        rank_device("auto", 4, 1, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert rank_device("cuda:1", 2, 0, 2) == "cuda:1"  # one rank on each of two machines
