"""What is exported answers as the network does, really skips, and is not left behind where it does not."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import exitkit
from exitkit import ExitRule
from exitkit.cli.export import export as command
from exitkit.errors import UserError
from exitkit.inference.adaptive import AdaptiveInference
from exitkit.inference.export import export as exporting
from exitkit.inference.export import programs
from exitkit.inference.export.programs import pieces, without_taps
from exitkit.inference.export.runner import Runner, exit_scores, open_runner
from exitkit.networks.cascade import Head, MultiExitNetwork

from toy import FEW

ABOUT = {"mean": [0.5], "std": [0.25], "class_names": ["a", "b", "c"]}
HALF = ExitRule("confidence", (0.4, -math.inf))


def small():
    """Two exits whose stages hand on more than one tensor, with BoostNet's carried logits."""
    torch.manual_seed(0)
    convolutions = [nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()), nn.Conv2d(4, 4, 3, 2)]
    heads = [Head(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(4, 3)) for _ in range(2)]
    network = MultiExitNetwork(convolutions, heads, (1, 6, 6), 3)
    exitkit.build_strategy("boostnet").adapt(network)
    return network.eval()


def images(count=12):
    return torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def middling(network, score):
    with torch.inference_mode():
        logits = network(images()).logits[0].double().numpy()
    if score == "patience":
        return ExitRule(score, (2.0, -math.inf))
    values = np.sort(exit_scores(logits, score))
    return ExitRule(score, (float(values[5] + values[6]) / 2, -math.inf))


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_an_export_answers_and_skips_as_the_network_does(form, tmp_path):
    network = small()
    rule = middling(network, "margin")
    policy = exporting.export(network, rule, tmp_path / "out", images(), ABOUT, form)
    ending = exporting.ENDINGS[form]
    names = {"policy.json", "run.py", "serve.py", "examples.npy", "manifest.json"}
    names |= {f"all-exits{ending}", f"stage-1{ending}", f"stage-2{ending}"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert ABOUT.items() <= policy.items() and policy == json.loads((tmp_path / "out" / "policy.json").read_text())
    assert ExitRule.from_json((tmp_path / "out" / "policy.json").read_text()) == rule
    runner = Runner(tmp_path / "out")
    for count in (1, 12):  # whatever the batch
        logits, exits = runner(images(count).numpy())
        expected = AdaptiveInference(network, rule)(images(count))
        np.testing.assert_array_equal(exits, expected.exits)
        np.testing.assert_allclose(logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert set(exits) == {0, 1}
    runner.programs[1] = None  # who leaves at the first exit never comes to the second
    runner.policy["thresholds"][0] = "-inf"
    assert not runner(images().numpy())[1].any()
    np.testing.assert_allclose(runner.normalised(np.full((1, 1, 6, 6), 255, np.uint8)), 2.0)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    out = tmp_path_factory.mktemp("deployed") / "out"
    exporting.export(small(), HALF, out, images(), ABOUT, "onnx")
    return out


def test_run_py_answers_bytes_and_floats_of_any_width(deployed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 1, 6, 6), np.uint8)
    np.save("bytes.npy", pixels)
    np.save("floats.npy", (pixels / 255 - 0.5) / 0.25)
    assert np.load("floats.npy").dtype == np.float64
    told = [
        subprocess.run([sys.executable, deployed / "run.py", name], capture_output=True, text=True, check=True).stdout
        for name in ("bytes.npy", "floats.npy")
    ]
    assert told[0] == told[1] and [line.split()[0] for line in told[0].splitlines()] == ["0", "1", "2"]
    assert all(
        line.split()[1] in "abc" and line.split()[2:] in (["exit", "1"], ["exit", "2"]) for line in told[0].splitlines()
    )


MISTAKES = {
    "no such file": (None, "can't be read: No such file or directory"),
    "no array": (b"text", "is not an array; expected a file written by numpy.save"),
    "empty": (b"", "is not an array"),
    "half an archive": (b"PK\x03\x04 and no more", "is not an array"),
    "no channels": (np.zeros((2, 6, 6), np.uint8), "has the shape [2, 6, 6]; expected [N, 1, 6, 6]"),
    "channels last": (np.zeros((2, 6, 6, 1), np.uint8), "has the shape [2, 6, 6, 1]; expected [N, 1, 6, 6]"),
    "one image": (np.zeros((1, 6, 6), np.uint8), "expected [N, 1, 6, 6]"),
    "no image": (np.zeros((0, 1, 6, 6), np.uint8), "N at least 1"),
    "a number": (np.array(3.0), "has the shape []"),
    "integers": (np.zeros((2, 1, 6, 6), np.int64), "has the dtype int64; expected uint8, or normalised floats"),
    "not finite": (np.full((2, 1, 6, 6), np.nan), "not finite"),
    "objects": (np.array([None] * 2), "is not an array"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_with_run_py_is_one_line(mistake, deployed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content, says = MISTAKES[mistake]
    if isinstance(content, bytes):
        Path("images.npy").write_bytes(content)
    elif content is not None:
        np.save("images.npy", content, allow_pickle=True)
    assert exporting.runner.main(["images.npy"], deployed) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("run.py: images.npy ") and says in line and not printed.out


def test_run_py_writes_names_that_the_code_page_does_not_have(deployed, tmp_path):
    copy = shutil.copytree(deployed, tmp_path / "copy")
    policy = json.loads((copy / "policy.json").read_text())
    policy["class_names"] = ["名前\x1b[31m"] * 3
    (copy / "policy.json").write_text(json.dumps(policy))
    np.save(tmp_path / "images.npy", images().numpy())
    command = [sys.executable, copy / "run.py", tmp_path / "images.npy"]
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert not done.stderr and len(done.stdout.splitlines()) == 12
    assert all(line.split()[1] == rb"\u540d\u524d\x1b[31m" for line in done.stdout.splitlines())


def test_run_py_says_how_it_is_used_and_what_it_lacks(deployed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exporting.runner.main([], deployed) == 2
    assert capsys.readouterr().err == "run.py: expected IMAGES, --check or --serve (see --help)\n"
    assert exporting.runner.main(["--help"], Path("nowhere")) == 0
    assert "uint8" in (told := capsys.readouterr().out) and "numpy.save" in told
    np.save("images.npy", images().numpy())
    assert exporting.runner.main(["images.npy"], tmp_path) == 2
    assert "policy.json: No such file or directory; run.py works in its own folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert exporting.runner.main(["images.npy"], deployed) == 2
    assert "pip install onnxruntime" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["policy.json cut", "stage-1.onnx cut", "stage-2.onnx gone"])
def test_run_py_says_that_an_export_is_damaged(damage, deployed, tmp_path, capsys):
    copy = shutil.copytree(deployed, tmp_path / "copy")
    name, how = damage.split()
    content = (copy / name).read_bytes()
    (copy / name).unlink() if how == "gone" else (copy / name).write_bytes(content[: len(content) // 2])
    np.save(tmp_path / "images.npy", images().numpy())
    assert exporting.runner.main([str(tmp_path / "images.npy")], copy) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"run.py: {copy} has no complete export (") and line.endswith("export the run again")


@pytest.mark.parametrize("score", ["confidence", "margin", "entropy"])
def test_the_runner_scores_as_the_library_does(score):
    from exitkit.inference import scores

    logits = 4 * np.random.default_rng(0).standard_normal((30, 5))
    expected = scores.exit_scores(logits, score)[0]
    np.testing.assert_allclose(exit_scores(logits, score), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backbone", ["msdnet-tiny", "ranet-tiny", "sdn-tiny"])
@pytest.mark.parametrize("method", ["boostnet", "isc"])
def test_pieces_in_a_row_are_the_network_whatever_its_state(backbone, method):
    network = exitkit.build_network(backbone, num_classes=5, input_shape=(1, 16, 16)).eval()
    exitkit.build_strategy(method).adapt(network)
    network.eval()
    x = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        expected, given, before = network(x).logits, [x], ("images",)
        for index, piece in enumerate(pieces(without_taps(network), x)):
            assert piece.names[0] == before and len(given) == len(before) and before
            logits, *given = piece.module(*given)
            assert torch.equal(logits, expected[index])
            before = piece.names[1][1:]
    assert not given


def test_what_does_not_answer_as_the_network_is_not_left_behind(tmp_path, monkeypatch):
    load = exporting.runner.load
    monkeypatch.setattr(exporting.runner, "load", lambda path, *options: lambda x: [part + 1 for part in load(path)(x)])
    with pytest.raises(UserError, match="nothing was exported"):
        exporting.export(small(), HALF, tmp_path / "out", images(), ABOUT, "torch-export")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_one_image_to_check_with_is_enough(form, tmp_path):
    exporting.export(small(), HALF, tmp_path / "out", images(1), ABOUT, form)
    logits, exits = exporting.runner.Runner(tmp_path / "out")(images(5).numpy())
    assert logits.shape == (5, 3) and exits.shape == (5,)


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, monkeypatch):
    def refused(match, rule=HALF, out="out", form="onnx"):
        before = list(tmp_path.iterdir())
        with pytest.raises(UserError, match=match):
            exporting.export(small(), rule, tmp_path / out, images(), ABOUT, form)
        assert list(tmp_path.iterdir()) == before

    refused("expected onnx or torch-export", form="tflite")
    refused("for 1 exit; expected 2", rule=ExitRule("margin", (-math.inf,)))
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    refused(r"pip install 'exitkit\[onnx\]'")
    (tmp_path / "taken").mkdir()
    refused("exists already", out="taken")


def test_a_run_is_exported_by_the_command_line_with_thresholds_from_validation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = {"backbone": "msdnet-tiny", "epochs": 1, "device": "cpu", **FEW}
    run = exitkit.train(recipe, "runs")
    written = {}

    def write(network, rule, out, images, about, form):
        written.update(rule=rule, out=out, count=len(images), about=about, form=form)
        return {"programs": ["stage-1.pt2"]}

    monkeypatch.setattr(exporting, "export", write)
    done = CliRunner().invoke(command, [str(run.path), "--budget", "100K", "--score", "margin"])
    assert done.exit_code == 0, done.output
    assert written["rule"] == ExitRule.from_run(run, budget="100K", score="margin")
    outputs = {name: torch.from_numpy(value) for name, value in run.outputs("validation").items()}
    costs = [exit.macs for exit in exitkit.cost(exitkit.build_network("msdnet-tiny"))]
    wish = {"budget": "100K", "score": "margin"}
    assert ExitRule.from_outputs(outputs["logits"], outputs["labels"], costs, **wish) == written["rule"]
    assert written["out"] == Path(f"{run.path.name}-onnx") and written["count"] == 64
    assert written["about"]["mean"] == [0.3046] and len(written["about"]["class_names"]) == 10
    assert written["about"]["costs"] == run.costs() and written["about"]["target"] == "budget 100K"
    done = CliRunner().invoke(command, [str(run.path), "--budget", "60%", "--at-most", "--out", "bound"])
    assert done.exit_code == 0, done.output
    assert written["about"]["target"] == "budget 60% at-most" and "point: budget 60% at-most\n" in done.output


def in_floats(path, images):
    """The outputs of a quantised program as its nodes define them: dequantised, then computed in floats."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options)
    return session.run(None, {session.get_inputs()[0].name: images})


def largest_weight(path):
    tensors = [tensor for tensor in onnx.load(path).graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    return max(np.abs(onnx.numpy_helper.to_array(tensor).astype(int)).max() for tensor in tensors if tensor.dims)


def test_a_quantised_run_has_a_rule_of_its_own_and_is_compared_with_fp32(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    run = exitkit.train({"backbone": "sdn-tiny", "epochs": 2, "device": "cpu", **FEW}, "runs")
    code, printed, errors = cli("export", run.path, "--int8", "--out", "deployed", "--budget", "70%")
    assert code == 0, errors
    policy = json.loads(Path("deployed/policy.json").read_text())
    assert policy["precision"] == "int8" and policy["thresholds"] != list(
        ExitRule.from_run(run, budget="70%").thresholds
    )
    runner = Runner(Path("deployed"))
    (batch,) = exitkit.load_data(run).batches("validation", [torch.arange(40)], augment=False, seed=0)
    exits = runner(batch.images.numpy())[1]
    macs = np.array([row["macs"] for row in run.costs()])
    assert macs[exits].mean() == pytest.approx(0.7 * macs[-1], rel=0.1)  # the budget, met on the quantised outputs
    outputs = runner.programs[0]([batch.images.numpy()])
    expected = run.outputs("validation")["logits"][:, 0]
    assert 0 < np.abs(outputs[0] - expected).max() < 0.1 * np.abs(expected).max()
    # The integer kernels of this processor compute what the program says.
    for found, exact in zip(outputs, in_floats(Path("deployed/stage-1.onnx"), batch.images.numpy()), strict=True):
        assert np.abs(found - exact).max() < 0.005 * np.abs(exact).max()
    # Processors without VNNI add two products of an activation, at most 255, and a weight in 16 bits.
    assert 0 < 2 * 255 * largest_weight(Path("deployed/stage-1.onnx")) < 2**15
    rows = [line for line in printed.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows[:1]] == ["exit 1: accuracy"] and max(map(len, rows)) <= 80
    assert "milliseconds per image" in printed and "multiply-adds per image" in printed
    cli("export", run.path, "--int8", "--out", "deployed").refused("deployed exists already")
    cli("export", run.path, "--int8", "--format", "torch-export").refused("expected --format onnx, not torch-export")
    milliseconds = ("--int8", "--latency", "2ms", "--out", "timed")
    cli("export", run.path, *milliseconds).refused("latency 2ms is in milliseconds of fp32; expected multiply-adds")


@pytest.mark.parametrize("name", ["/stage.onnx", "../stage.onnx", "a/stage.onnx", "C:stage.onnx", "..", "", 3, None])
def test_a_runner_loads_programs_of_its_own_folder_only(name, tmp_path):
    (tmp_path / "policy.json").write_text(json.dumps({"programs": [name]}))
    with pytest.raises(
        RuntimeError, match=r"programs of policy\.json has .*expected the name of a file in this folder"
    ):
        open_runner(tmp_path)


def test_a_runner_follows_no_link_out_of_its_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "stage.onnx").symlink_to(tmp_path / "stage.onnx")
    (tmp_path / "folder" / "policy.json").write_text(json.dumps({"programs": ["stage.onnx"]}))
    with pytest.raises(RuntimeError, match="a link out of this folder"):
        open_runner(tmp_path / "folder")
