"""Runs that build on other runs: starting weights, the second phase alone, teachers."""

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import exitkit
from exitkit import Recipe
from exitkit.cli import cli
from exitkit.errors import UserError
from exitkit.files import load_tensors
from exitkit.runs.folder import RunFolder

from toy import FEW, FEW_OPTIONS, batches, chain, sgd

SHORT = {"epochs": 2, "lr": 0.05, **FEW}


def weights(run):
    return load_tensors(run.path / "weights.safetensors")


@pytest.fixture(scope="module")
def ge(tmp_path_factory):
    return exitkit.train({"method": "ge", **SHORT}, tmp_path_factory.mktemp("ge"))


def test_imta_from_a_finished_first_phase_is_imta(ge, tmp_path):
    whole = exitkit.train({"method": "imta", **SHORT}, tmp_path)
    second = exitkit.train({"method": "imta", "init_from": str(ge.path), **SHORT}, tmp_path)
    assert whole.path != second.path
    expected, found = weights(whole), weights(second)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    metrics = (second.path / "metrics.csv").read_text().splitlines()
    assert len(metrics) == 2 and metrics[1].startswith("classifiers,1,")
    assert second.recipe.init_weights == Recipe.make(init_from=str(ge.path)).resolve().init_weights


@pytest.mark.parametrize(
    ("method", "settings", "phases"),
    [
        ("separate", {"order": "classifier"}, ["heads"]),
        ("separate", {"order": "branch"}, ["branch 1", "branch 2", "branch 3", "branch 4"]),
        ("mixed", {}, ["all"]),
    ],
)
def test_weights_replace_a_first_phase_that_trains_all_stages(ge, tmp_path, method, settings, phases):
    given = {**SHORT, "epochs": 4}
    run = exitkit.train({"method": method, "method_settings": settings, "init_from": str(ge.path), **given}, tmp_path)
    rows = (run.path / "metrics.csv").read_text().splitlines()[1:]
    assert list(dict.fromkeys(row.split(",")[0] for row in rows)) == phases


def test_a_method_of_one_phase_begins_at_the_weights(ge, tmp_path):
    run = exitkit.train({"method": "boostnet", "init_from": str(ge.path), **SHORT, "lr": 1e-12}, tmp_path)
    start, end = weights(ge), weights(run)
    for name, value in start.items():
        if "running" not in name and "num_batches" not in name:
            assert torch.allclose(end[name], value, atol=1e-6), name
    again = exitkit.train(
        {"method": "boostnet", "init_from": str(ge.path / "weights.safetensors"), **SHORT, "lr": 1e-12}, tmp_path
    )
    assert again.path == run.path  # the same weights, wherever they lie


def test_a_run_goes_on_where_its_start_is_gone(ge, tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(ge.path, source)
    recipe = {"method": "joint", "init_from": str(source), **SHORT}
    whole = exitkit.train(recipe, tmp_path / "whole")
    resolved = Recipe.make(**recipe).resolve()
    from exitkit.training import loop as training

    real, calls = training._end_epoch, []

    def once(*arguments):
        real(*arguments)
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("power cut")

    monkeypatch.setattr(training, "_end_epoch", once)
    with pytest.raises(RuntimeError, match="power cut"):
        exitkit.train(resolved, tmp_path / "cut")
    shutil.rmtree(source)
    run = exitkit.train(resolved, tmp_path / "cut")
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(whole).items())


def test_what_can_not_be_started_from_is_refused_in_one_line(ge, tmp_path):
    for bad, reason in (
        (str(tmp_path / "nowhere"), "expected the folder of a finished run"),
        (str(tmp_path), "holds no run"),
    ):
        with pytest.raises(UserError, match=reason):
            exitkit.train({"init_from": bad, **SHORT}, tmp_path / "out")
    with pytest.raises(UserError, match="is of another network"):
        exitkit.train({"init_from": str(ge.path), "backbone": "sdn-tiny", **SHORT}, tmp_path / "out")
    with pytest.raises(UserError, match=r"was trained on \d+ of the 300 validation images of this run"):
        exitkit.train({"init_from": str(ge.path), **SHORT, "dataset_settings": {"validation": 300}}, tmp_path / "out")
    with pytest.raises(UserError, match="have changed since"):
        exitkit.train({"init_from": str(ge.path), "init_weights": "0" * 16, **SHORT}, tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_file_of_torch_save_is_the_same_start_and_values_that_are_not_finite_are_named(ge, tmp_path):
    recipe = {"method": "joint", **SHORT, "epochs": 1}
    state = weights(ge)
    torch.save({f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}, tmp_path / "sd.pth")
    runs = [
        exitkit.train({"init_from": str(start), **recipe}, tmp_path / name)
        for name, start in (("a", ge.path / "weights.safetensors"), ("b", tmp_path / "sd.pth"))
    ]
    assert all(torch.equal(tensor, weights(runs[0])[name]) for name, tensor in weights(runs[1]).items())
    state["heads.0.classify.weight"][0, 0] = torch.inf
    torch.save(state, tmp_path / "inf.pth")
    with pytest.raises(UserError, match=r"init_from \(.*inf\.pth\) are not finite \(heads\.0\.classify\.w"):
        exitkit.train({"init_from": str(tmp_path / "inf.pth"), **recipe}, tmp_path / "c")
    assert not (tmp_path / "c").exists() or not list((tmp_path / "c").iterdir())


def test_a_teacher_by_method_is_trained_first_and_one_by_folder_is_taken(tmp_path):
    by_method = exitkit.train({"method": "kd", "method_settings": {"teacher": "ge"}, **SHORT}, tmp_path)
    (teacher,) = [path for path in tmp_path.iterdir() if path.name.startswith("ge-")]
    assert RunFolder(teacher).finished
    by_folder = exitkit.train({"method": "kd", "method_settings": {"teacher": str(teacher)}, **SHORT}, tmp_path)
    alone = exitkit.train({"method": "kd", **SHORT}, tmp_path)
    assert all(torch.equal(value, weights(by_folder)[name]) for name, value in weights(by_method).items())
    assert not all(torch.equal(value, weights(alone)[name]) for name, value in weights(by_method).items())


def test_a_teacher_teaches_all_exits_by_its_last_one():
    network, teacher, (x, y) = chain(), chain(seed=5), batches(1)[0]
    strategy = exitkit.build_strategy("kd", teacher="joint", weight=0.25, temperature=3.0)
    run = exitkit.Run.local(network, strategy, sgd(network))
    run.teachers["joint"] = teacher.eval()
    losses = run.losses((x, y))
    p = (teacher(x).logits[-1] / 3).softmax(1)
    for logits, loss in zip(network(x).logits, losses, strict=True):
        own = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        divergence = (p * (p.log() - (logits / 3).log_softmax(1))).sum(1)
        assert torch.allclose(loss, 0.75 * own + 0.25 * 9 * divergence, rtol=1e-12)


def test_teachers_that_are_none_are_refused(tmp_path):
    def refused(teacher):
        recipe = {"method": "kd", "method_settings": {"teacher": teacher}, **SHORT}
        with pytest.raises(UserError) as refusal:
            exitkit.train(recipe, tmp_path)
        assert not list(tmp_path.iterdir())
        return str(refusal.value)

    assert "did you mean boostnet" in refused("bostnet")
    assert "does not exist" in refused("runs/gone")


def test_compare_trains_a_teacher_first_and_leaves_it_out_of_the_table(tmp_path):
    out = tmp_path / "runs"
    arguments = ["compare", "--methods", "kd", "--set", "kd.teacher=ge", "--seeds", "1", "--epochs", "1"]
    done = CliRunner().invoke(cli, [*arguments, *FEW_OPTIONS, "--out", str(out)])
    assert done.exit_code == 0, done.output
    methods = {json.loads(path.read_text())["method"] for path in out.glob("*/recipe.json")}
    assert methods == {"joint", "kd", "ge"}
    table = (out / "report" / "anytime.csv").read_text()
    assert "kd," in table and "ge," not in table


def images_in(folder, seed, size=20):
    """Four images of each of two classes, for training, and two for the test."""
    generator = np.random.default_rng(seed)
    for part, count in (("train", 8), ("test", 2)):
        for name in "ab":
            place = folder / part / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (size, size, 3), np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


def on(folder, size=16, validation=4, **values):
    settings = {"image_size": size, "validation": validation, "workers": 0}
    recipe = {"dataset": "folder", "data_dir": str(folder), "dataset_settings": settings, "backbone": "msdnet-tiny"}
    return {**recipe, "epochs": 1, "batch_size": 8, "lr": 0.05, **values}


def test_a_teacher_for_images_of_another_size_is_refused_and_one_of_other_images_is_taken(tmp_path):
    ours, others = images_in(tmp_path / "ours", 0), images_in(tmp_path / "others", 1)
    large, alike = (exitkit.train(on(others, size), tmp_path / "runs") for size in (32, 16))
    with pytest.raises(UserError, match="reads images of 3x32x32; expected those of this run, 3x16x16"):
        exitkit.train(on(ours, method="kd", method_settings={"teacher": str(large.path)}), tmp_path / "out")
    for change in ({"method": "kd", "method_settings": {"teacher": str(alike.path)}}, {"init_from": str(alike.path)}):
        assert exitkit.train(on(ours, **change), tmp_path / "out").finished
    # The same folder, with one image more: the images that it was trained on have their names.
    Image.new("RGB", (20, 20)).save(others / "train" / "a" / "9.png")
    for start in (alike.path, alike.path / "weights.safetensors"):
        with pytest.raises(UserError, match=r"was trained on \d+ of the 12 validation images of this run"):
            exitkit.train(on(others, validation=12, batch_size=4, init_from=str(start)), tmp_path / "out")
