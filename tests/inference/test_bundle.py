"""A bundle is complete: its runner reads images as training did, and it can be checked and moved to another machine."""

import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from torch import nn

from exitkit import ExitRule
from exitkit.data.base import TensorData
from exitkit.data.decoding import read_image
from exitkit.data.listing import SUFFIXES
from exitkit.data.preprocessing import Preprocessing
from exitkit.data.split import Split
from exitkit.inference.export import bundle, runner
from exitkit.inference.export.export import export
from exitkit.networks.cascade import Head, MultiExitNetwork

PREPROCESSING = Preprocessing(size=24, crop=0.75, interpolation="bicubic")


def network():
    """Two exits of a small network for colour images of 24x24, four classes."""
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Conv2d(3, 4, 5, 2), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 3, 2), nn.ReLU())]
    heads = [Head(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(4, 4)) for _ in range(2)]
    return MultiExitNetwork(stages, heads, (3, 24, 24), 4).eval()


def photograph(path, size=(90, 61), seed=0, **options):
    """Write an image of smooth colours, which JPEG compresses as it does photographs."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), np.uint8))
    coarse.resize(size, Image.Resampling.BICUBIC).save(path, **options)
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Files of many kinds: tall and wide, small, grey, transparent, with a palette, turned by EXIF."""
    folder = tmp_path_factory.mktemp("photographs")
    sizes = [(90, 61), (61, 90), (200, 64), (20, 33), (32, 32), (24, 24), (333, 250)]
    for number, size in enumerate(sizes):
        photograph(folder / f"{number}.jpg", size, number, quality=90)
    turned = Image.Exif()
    turned[0x0112] = 6
    photograph(folder / "turned.jpg", exif=turned)
    Image.open(folder / "0.jpg").convert("L").save(folder / "grey.jpg")
    Image.open(folder / "1.jpg").convert("P").save(folder / "palette.png")
    transparent = Image.open(folder / "2.jpg").convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    transparent.save(folder / "transparent.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def deployed(photographs, tmp_path_factory):
    """A bundle of the network, with a table of operating points."""
    how = {"colour": "RGB", "resize": 32, "interpolation": "bicubic", "crop": [24, 24]}
    facts = {"mean": list(PREPROCESSING.mean), "std": list(PREPROCESSING.std), "preprocessing": how}
    inputs = torch.stack([PREPROCESSING(read_image(str(path)), augment=False) for path in photographs])
    net = network()
    with torch.inference_mode():
        scores = net(inputs).logits[0].softmax(1).amax(1).sort().values.double()
    rule = ExitRule("confidence", (float(scores[5] + scores[4]) / 2, -math.inf))
    full = ExitRule("confidence", (math.inf, -math.inf))
    points = [
        {"name": name, "cost": cost, "shares": shares, "images": 11, "policy": json.loads(each.to_json())}
        for name, cost, shares, each in (("default", 1.5, [6 / 11, 5 / 11], rule), ("100%", 2.0, [0.0, 1.0], full))
    ]
    out = tmp_path_factory.mktemp("deployed") / "out"
    export(net, rule, out, inputs, facts | {"class_names": list("abcd"), "points": points}, "onnx")
    return out


@pytest.fixture
def copy(deployed, tmp_path):
    return shutil.copytree(deployed, tmp_path / "copy")


def sign(folder):
    """Bring the digests of a folder up to date."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def change(folder, **values):
    """Change entries of policy.json, as a stranger may, digests and all."""
    policy = json.loads((folder / "policy.json").read_text()) | values
    (folder / "policy.json").write_text(json.dumps(policy))
    sign(folder)


def test_files_are_preprocessed_as_in_evaluation(deployed, photographs):
    exported = runner.open_runner(deployed)
    for path in photographs:
        expected = PREPROCESSING(read_image(str(path)), augment=False).numpy()
        actual = exported.picture(path)[0]
        assert actual.dtype == np.float32 and actual.shape == (3, 24, 24)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6, err_msg=path.name)


def test_files_get_the_decisions_of_the_network_on_evaluation_images(deployed, photographs, capsys):
    exported, net = runner.open_runner(deployed), network()
    inputs = torch.stack([PREPROCESSING(read_image(str(path)), augment=False) for path in photographs])
    with torch.inference_mode():
        first, last = net(inputs).logits
    leaves = first.softmax(1).amax(1) >= exported.policy["thresholds"][0]
    expected = torch.where(leaves, first.argmax(1), last.argmax(1))
    assert 0 < leaves.sum() < len(leaves)
    assert runner.main([str(photographs[0].parent)], deployed) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{path} {'abcd'[predicted]} exit {1 if leaving else 2}"
        for path, predicted, leaving in zip(photographs, expected, leaves, strict=True)
    ]
    assert runner.main([str(photographs[0].parent), "--point", "100%"], deployed) == 0
    assert all(line.endswith("exit 2") for line in capsys.readouterr().out.splitlines())


def test_every_setting_of_the_preprocessing_is_in_the_bundle():
    """A new field of `Preprocessing` has to be told to the runner, too."""
    assert set(Preprocessing.__dataclass_fields__) == {"size", "mean", "std", "crop", "interpolation"}


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_one_size_are_read_from_files_as_they_are(channels, tmp_path):
    pixels = torch.randint(256, (2, channels, 10, 12), dtype=torch.uint8)
    labels, split = torch.zeros(2).long(), Split(*(torch.arange(2) for _ in range(3)))
    data = TensorData(["a"], (channels, 10, 12), labels, labels, split, pixels, pixels, (0.3,), (0.2,))
    how = bundle.preprocessing(data)
    bundle._write_picture(tmp_path / "image.png", pixels[0].numpy())
    assert bundle.preprocessing(replace(data, input_shape=(channels, 12, 12)))["resize"] == 12
    np.testing.assert_array_equal(
        runner.preprocessed(runner.read_picture(tmp_path / "image.png"), how), pixels[0].numpy()
    )
    for size in ((40, 20), (20, 40), (13, 9), (12, 10)):  # scaled so that it covers the crop
        scaled = runner.preprocessed(Image.new("RGB", size, "white"), how)
        assert scaled.shape == (channels, 10, 12) and (scaled == 255).all()


def test_an_image_that_resizing_makes_too_large_is_refused(deployed, tmp_path):
    Image.new("L", (400_000, 1)).save(tmp_path / "long.png")
    exported = runner.open_runner(deployed)
    says = r"has 12800000 x 32 pixels when resized \(from 400000 x 1\); expected at most 50000000"
    with pytest.raises(ValueError, match=says):
        exported.picture(tmp_path / "long.png", 50_000_000)


def test_files_that_training_reads_are_those_of_the_runner(deployed, tmp_path):
    assert runner.IMAGE_ENDINGS == SUFFIXES
    photograph(tmp_path / "a.ppm")
    photograph(tmp_path / "b.unknown", format="PNG")
    exported = runner.open_runner(deployed)
    (named,) = runner.inputs(exported, str(tmp_path / "b.unknown"))
    (inside,) = runner.inputs(exported, str(tmp_path))
    np.testing.assert_array_equal(named[1], inside[1])


def test_a_check_reads_the_example_picture(copy, capsys):
    policy = json.loads((copy / "policy.json").read_text())
    change(copy, preprocessing=policy["preprocessing"] | {"resize": 24})  # as of a data set of one size
    assert runner.main(["--check"], copy) == 0
    capsys.readouterr()
    photograph(copy / "example.png", (24, 24), 9)
    sign(copy)
    assert runner.main(["--check"], copy) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "example.png is read as another image than the first of examples.npy" in line


def test_a_check_passes_and_finds_each_damage(copy, capsys):
    def says(words, *options):
        assert runner.main(["--check", *options], copy) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("run.py: ") and words in line, line

    assert runner.main(["--check"], copy) == 0
    assert capsys.readouterr().out == "8 files and 8 example images are as exported\n"
    says("expected no --point", "--point", "default")
    whole = {path: path.read_bytes() for path in copy.iterdir()}
    for path in whole:
        if path.name == "manifest.json":
            continue
        path.write_bytes(path.read_bytes() + b" ")
        says(f"{path.name} is not the file that was exported")
        path.unlink()
        says("No such file or directory")
        path.write_bytes(whole[path])
    for content in (b"", b"[]", b"{}", b'{"files": [1]}', b'{"files": {"../x": "1"}}', b'{"files": {}}'):
        (copy / "manifest.json").write_bytes(content)
        says("manifest.json")
    (copy / "manifest.json").write_bytes(whole[copy / "manifest.json"])
    examples = json.loads(whole[copy / "policy.json"])["examples"]
    change(copy, examples=examples | {"classes": [3 - number for number in examples["classes"]]})
    says("example 0 is class")
    change(copy, examples={"classes": [1]})
    says("the examples are damaged")


STRANGE = {
    "no programs": {"programs": None},
    "no policy": {"thresholds": None},
    "too few thresholds": {"thresholds": []},
    "an unknown rule": {"rule": {"name": "mine"}},
    "an unknown combination": {"combination": {"name": "mine"}},
    "too few classes": {"class_names": ["a"]},
    "classes that are no names": {"class_names": [1, 2, 3, 4]},
    "a shape of words": {"input_shape": ["3", 24, 24]},
    "another shape": {"input_shape": [1, 24, 24]},
    "no mean": {"mean": []},
    "a text as mean": {"mean": "a"},
    "points that are no table": {"points": 3},
    "a point without a policy": {"points": [{"name": "x"}]},
    "a point of another network": {"points": [{"name": "x", "policy": {"score": "margin", "thresholds": []}}]},
    "stages in another order": {"programs": ["stage-2.onnx", "stage-1.onnx"]},
    "a missing stage": {"programs": ["stage-1.onnx", "stage-9.onnx"]},
    "text as a program": {"programs": ["policy.json", "policy.json"]},
}


@pytest.mark.parametrize("strange", STRANGE)
def test_a_strangers_bundle_is_refused_in_one_line(strange, copy, capsys):
    change(copy, **STRANGE[strange])
    assert runner.main([str(copy / "example.png")], copy) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("run.py: ") and "export the run again" in line and not printed.out, line


def test_a_preprocessing_of_strangers_is_refused_in_one_line(copy, capsys):
    for how in ([], "x", {"resize": 0}, {"resize": 8, "interpolation": "x", "crop": [1, 1], "colour": "RGB"}):
        change(copy, preprocessing=how)
        assert runner.main([str(copy / "example.png")], copy) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    change(copy, preprocessing=None)
    assert runner.main([str(copy / "example.png")], copy) == 2
    assert "expected an array" in capsys.readouterr().err


def test_options_that_do_not_fit_are_one_line(deployed, capsys):
    picture = str(deployed / "example.png")
    for options, words in (
        (["--point", "50%"], "the operating point 50% is unknown; expected one of default, 100%"),
        (["--providers", "MagicProvider"], "the provider MagicProvider is not installed; expected some of "),
        (["--threads", "0"], "0 is no whole number from 1 to 1024"),
        (["--thread", "1"], "unrecognized arguments"),
    ):
        assert runner.main([picture, *options], deployed) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("run.py: ") and words in line
    assert runner.main([picture, "--threads", "1", "--providers", "CPUExecutionProvider"], deployed) == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is not an image"),
        (b"\xff\xd8\xff\xe0 and no more", "can't be read: "),
        (b"cut", "can't be read"),
        (b"deep", "more than 8 bits"),
    ],
)
def test_files_that_are_no_images_are_one_line(content, words, deployed, photographs, tmp_path, capsys):
    path = tmp_path / "image.png"
    if content == b"cut":
        content = photographs[0].read_bytes()[:600]
    if content == b"deep":
        Image.fromarray(np.zeros((30, 30), np.uint16)).save(path)
    else:
        path.write_bytes(content)
    assert runner.main([str(path)], deployed) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"run.py: {path} ") and words in line
    (tmp_path / "empty").mkdir()
    assert runner.main([str(tmp_path / "empty")], deployed) == 2
    assert "has no image files" in capsys.readouterr().err


def test_without_pillow_arrays_work_and_files_say_what_is_missing(deployed, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert runner.main(["--check"], deployed) == 0
    assert runner.main([str(deployed / "examples.npy")], deployed) == 0
    assert len(capsys.readouterr().out.splitlines()) == 9
    assert runner.main([str(deployed / "example.png")], deployed) == 2
    assert capsys.readouterr().err == "run.py: image files need Pillow; pip install pillow\n"


def closure(*names):
    """The installed distributions that some distributions need, and they themselves."""
    found, waiting = {}, list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        needed = [Requirement(text) for text in found[name].requires or []]
        waiting += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found.values()


def test_a_bundle_works_in_a_fresh_environment_of_numpy_onnxruntime_and_pillow(deployed, photographs, tmp_path):
    place = tmp_path / "venv"
    try:
        venv.create(place, symlinks=os.name != "nt")
    except Exception as error:
        pytest.skip(f"no virtual environment can be made here: {error}")
    (packages,) = place.glob("lib/python*/site-packages") if os.name != "nt" else [place / "Lib" / "site-packages"]
    for distribution in closure("numpy", "onnxruntime", "pillow"):
        for top in {Path(str(file)).parts[0] for file in distribution.files or [] if ".." not in str(file)}:
            if not (packages / top).exists() and top not in ("bin", "__pycache__"):
                (packages / top).symlink_to(distribution.locate_file(top))
    python = place / ("Scripts" if os.name == "nt" else "bin") / "python"
    moved = shutil.copytree(deployed, tmp_path / "elsewhere")

    def answer(*words):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        done = subprocess.run(
            [python, *words], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    absent = "import importlib.util as u; print([n for n in ('torch', 'exitkit', 'scipy') if u.find_spec(n)])"
    assert answer("-c", absent) == "[]\n"
    assert answer(moved / "run.py", "--check") == "8 files and 8 example images are as exported\n"
    assert len(answer(moved / "run.py", *photographs[:3]).splitlines()) == 3


def test_a_reader_that_ends_early_and_ctrl_c_give_no_traceback(deployed, photographs, monkeypatch, capsys):
    command = f"{sys.executable} {deployed / 'run.py'} {photographs[0].parent} 2>&1 >&3 | cat"
    done = subprocess.run(
        ["bash", "-c", f"exec 3> >(true); sleep 1; {command}"], capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stdout and "Broken" not in done.stdout

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "predict", stop)
    assert runner.main([str(photographs[0])], deployed) == 130
    assert capsys.readouterr().err == "run.py: stopped\n"
