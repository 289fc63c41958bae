"""What people import: the public names, one place a kind of plugin, and the old names that still work."""

import subprocess
import sys
import warnings

import pytest
import torch

import exitkit

from toy import FEW


def test_every_public_name_is_there_after_import_exitkit_alone():
    code = "import exitkit\nfor name in exitkit.__all__: getattr(exitkit, name)\n"
    code += "exitkit.Run.local, exitkit.ExitRule.from_run, exitkit.ExitRule.from_outputs, exitkit.Recipe.resolve"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning", "-c", code], check=True)


@pytest.mark.parametrize("name", ["data.from_datasets", "data.hold_out", "networks.preset", "networks.Head"])
def test_what_the_documents_write_out_is_there_after_import_exitkit_alone(name):
    subprocess.run([sys.executable, "-c", f"import exitkit\nexitkit.{name}"], check=True)


def test_import_exitkit_alone_loads_no_torch():
    code = "import sys, exitkit; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_gives_its_network_and_its_images(tmp_path):
    run = exitkit.train({"method": "boostnet", "epochs": 1, **FEW}, tmp_path)
    for given in (run, run.path, str(run.path)):
        network, data = exitkit.load_network(given), exitkit.load_data(given)
    (batch,) = data.batches("test", [torch.arange(20)], augment=False, seed=0)
    stored = torch.from_numpy(run.outputs("test")["logits"][:20])
    with torch.inference_mode():
        assert torch.allclose(torch.stack(network(batch.images).logits, 1), stored, atol=1e-5)


def test_a_script_runs_commands_in_its_own_process(capsys):
    exitkit.run_command("list", "datasets")
    assert "digits" in capsys.readouterr().out
    for words, message in (
        (("train", "--epochs", 0), "epochs"),
        (("trian",), "train"),
        (("train", "--epoch"), "--epochs"),
    ):
        with pytest.raises(exitkit.UserError, match=message) as caught:
            exitkit.run_command(*words)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: exitkit.cost(torch.nn.Linear(2, 2)), "network is a Linear; expected a MultiExitNetwork"),
        (lambda: exitkit.prune_to(torch.nn.Linear(2, 2), 1), "network is a Linear; expected a MultiExitNetwork"),
        (lambda: exitkit.build_network(None), "unknown backbone None"),
        (lambda: exitkit.build_network("msdnet-tiny", input_shape=(1, 16)), r"input_shape is \(1, 16\); expected"),
        (lambda: exitkit.build_network("msdnet-tiny", input_shape=16), "input_shape is 16; expected"),
        (lambda: exitkit.build_network("msdnet-tiny", num_classes="ten"), "num_classes is 'ten'; expected a whole"),
        (lambda: exitkit.attach_exits(torch.nn.Linear(2, 2), at=["0"], input_shape=16), "input_shape is 16; expected"),
        (lambda: exitkit.build_strategy(None), "unknown method None"),
        (lambda: exitkit.train("recipe.toml"), r"recipe is a str; .* \(of a file: Recipe.read\(FILE\)\)"),
        (lambda: exitkit.train({"epochs": 1}, out=None), "out is a NoneType; expected the path of a folder"),
        (lambda: exitkit.evaluate(["runs/a", "runs/b"]), "run is a list; expected the path of a folder"),
        (lambda: exitkit.load_network(None), "run is a NoneType; expected the path of a folder"),
        (lambda: exitkit.find_runs(5), "folder is a int; expected the path of a folder"),
    ],
)
def test_arguments_of_another_type_are_one_line(call, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(exitkit.UserError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value) and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("module", "name", "place"),
    [
        ("exitkit.backbones.base", "Backbone", "exitkit.networks"),
        ("exitkit.backbones.base", "preset", "exitkit.networks"),
        ("exitkit.backbones.base", "home", "exitkit.networks.families.base"),
        ("exitkit.network", "Head", "exitkit.networks"),
        ("exitkit.exit_outputs", "load_network", "exitkit"),
        ("exitkit.exit_outputs", "load_run_data", "exitkit.runs.job"),
        ("exitkit.exit_rules", "scores", "exitkit.inference.scores"),
        ("exitkit.evaluation", "budgeted", "exitkit.inference.thresholds"),
        ("exitkit.evaluation", "confidence", "exitkit.inference.scores"),
        ("exitkit.costs", "ExitCost", "exitkit.networks"),
        ("exitkit.catalogue", "entries", "exitkit.cli.catalogue"),
        ("exitkit.run", "Run", "exitkit"),
        ("exitkit.run", "Position", "exitkit.strategy"),
        ("exitkit.build", "build_strategy", "exitkit"),
        ("exitkit.gradients", "rescale", "exitkit.networks"),
        ("exitkit.recipe", "Recipe", "exitkit"),
    ],
)
def test_an_old_name_works_and_a_warning_names_the_new_one(module, name, place):
    from importlib import import_module

    with pytest.warns(DeprecationWarning, match=f"{module}.{name} is now {place}.{name}"):
        old = getattr(import_module(module), name)
    assert old is getattr(import_module(place), name)


def test_names_that_stayed_where_they_were_warn_of_nothing():
    with warnings.catch_warnings(action="error"):
        from exitkit.data.base import Data, DataSet, TensorData
        from exitkit.data.split import Split, hold_out
        from exitkit.plugins import load, registered
        from exitkit.runs import RunFolder, find_runs, load_runs
        from exitkit.strategy import TrainingStrategy
        from exitkit.training import train
    assert all((Data, DataSet, TensorData, Split, hold_out, load, registered, RunFolder, find_runs, load_runs))
    assert TrainingStrategy is exitkit.TrainingStrategy and train is exitkit.train


def test_an_unknown_old_name_is_an_attribute_error():
    with pytest.raises(ImportError):
        from exitkit.backbones.base import nothing  # noqa: F401


def test_run_losses_by_its_old_name_warns(tmp_path):
    network = exitkit.build_network("msdnet-tiny")
    run = exitkit.Run.local(network, "joint", torch.optim.SGD(network.parameters(), lr=0.1))
    batch = torch.randn(4, 1, 16, 16), torch.randint(10, (4,))
    with pytest.warns(DeprecationWarning, match=r"run.exit_losses is now run.losses"):
        assert len(run.exit_losses(batch)) == 4
    with pytest.warns(DeprecationWarning, match=r"run.exit_weights is now run.weights"):
        assert list(run.exit_weights()) == [1.0] * 4
