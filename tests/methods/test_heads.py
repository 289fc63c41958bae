"""Heads alone on a fixed trunk: what moves and what does not, what composes, and the temperatures at the end."""

import warnings

import numpy as np
import pytest
import torch

import exitkit
from exitkit.errors import Note, UserError
from exitkit.files import load_tensors
from exitkit.inference.calibration import HIGHEST, exit_calibration, fit_temperatures
from exitkit.training.phase import BegunPhase

from toy import FEW, batches, chain, sgd

RECIPE = {**FEW, "method": "heads", "epochs": 2}


def train(out, **given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        return exitkit.train(RECIPE | given, out)


def weights(run):
    return load_tensors(run.path / "weights.safetensors")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A network with batch norm in trunk and heads, trained for an epoch."""
    return exitkit.train({**FEW, "epochs": 1}, tmp_path_factory.mktemp("pretrained"))


@pytest.mark.parametrize("settings", [{}, {"views": None}, {"cache": False}])
def test_heads_and_their_batch_norm_change_and_the_trunk_does_not(pretrained, tmp_path, settings):
    run = train(tmp_path, init_from=str(pretrained.path), method_settings=settings)
    before, after = weights(pretrained), weights(run)
    assert set(after) - set(before) == {f"heads.{index}.temperature" for index in range(4)}
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"heads"}
    still = [name for name in before if name.startswith("heads.") and torch.equal(before[name], after[name])]
    assert not still  # running statistics of the heads' own batch norm move, too


def test_the_last_head_can_be_kept(pretrained, tmp_path):
    run = train(tmp_path, init_from=str(pretrained.path), method_settings={"last": False})
    before, after = weights(pretrained), weights(run)
    moved = {name[:8] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"heads.0.", "heads.1.", "heads.2."}


def test_dropout_of_the_trunk_is_off():
    network = chain(batchnorm=True)
    network.stages[0].append(torch.nn.Dropout(0.5))
    strategy = exitkit.build_strategy("heads")
    run = exitkit.Run.local(network, strategy, sgd(network))
    BegunPhase(strategy.phases(1, 3)[0], run, set()).train_mode()
    assert not any(module.training for module in network.stages.modules())
    assert all(module.training for module in network.heads.modules())
    network.double()
    assert torch.equal(network(batches()[0][0]).logits[0], network(batches()[0][0]).logits[0])


def test_the_temperatures_are_those_of_the_validation_outputs(pretrained, tmp_path):
    run = train(tmp_path, init_from=str(pretrained.path), epochs=20)
    plain = train(tmp_path, init_from=str(pretrained.path), epochs=20, method_settings={"calibrate": False})
    outputs, raw = run.outputs("validation"), plain.outputs("validation")
    expected = fit_temperatures(raw["logits"], raw["labels"])
    found = np.array([weights(run)[f"heads.{index}.temperature"] for index in range(4)])
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    np.testing.assert_allclose(outputs["logits"] * found[None, :, None], raw["logits"], rtol=1e-3, atol=1e-3)
    inside = found < HIGHEST * 0.99
    assert inside.any()
    np.testing.assert_allclose(fit_temperatures(outputs["logits"], outputs["labels"])[inside], 1, rtol=1e-2)
    assert run.results()["test"] == plain.results()["test"]
    assert np.isfinite(exit_calibration(outputs["logits"], outputs["labels"])).all()


def test_a_calibrated_run_is_further_trained_without_its_temperatures(pretrained, tmp_path):
    run = train(tmp_path, init_from=str(pretrained.path))
    tuned = train(tmp_path, method="joint", epochs=1, init_from=str(run.path))
    assert not [name for name in weights(tuned) if name.endswith("temperature")]
    again = train(tmp_path, init_from=str(run.path))
    assert weights(again)["heads.0.temperature"] != 1


@pytest.mark.parametrize("method", ["heads+ofa", "heads+kd", "heads+isc", "heads+ztw", "ztw+heads", "heads+boostnet"])
def test_it_composes_and_the_trunk_stays(pretrained, tmp_path, method):
    run = train(tmp_path, method=method, init_from=str(pretrained.path))
    before, after = weights(pretrained), weights(run)
    assert list(run.metrics().phase) == ["heads"] * 2
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    linked = any(name.startswith("link.") for name in after)  # new classifiers, on heads that only pool
    assert linked == (method in ("heads+isc", "heads+ztw", "ztw+heads"))
    assert moved <= {"heads"} and (moved or linked)


def test_a_teacher_sees_the_images(tmp_path):
    run = train(tmp_path, method="heads+kd", method_settings={"kd.teacher": "joint"}, epochs=1)
    assert run.finished


def test_two_methods_of_phases_are_refused_and_a_method_of_one_is_a_phase():
    with pytest.raises(UserError, match="heads and imta can't be composed: both claim the slot 'phases'"):
        exitkit.build_strategy("heads+imta")
    with pytest.raises(UserError, match="ztw and separate can't be composed: both claim the slot 'exit weights'"):
        exitkit.build_strategy("ztw+separate")
    with pytest.raises(UserError, match="views is -1; expected at least 0, or none"):
        exitkit.build_strategy("heads", views=-1)


def test_the_last_head_is_kept_unless_a_link_replaces_it():
    for method, link in (("heads+ztw", "link."), ("heads", "heads.")):
        network = chain()
        exitkit.Run.local(network, exitkit.build_strategy(method, last=False), sgd(network))
        trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        assert any(name.startswith(link) for name in trained)
        assert not any(name.startswith("heads.2.") for name in trained)
    network = chain()
    with pytest.raises(UserError, match="last=false keeps the last head"):
        exitkit.Run.local(network, exitkit.build_strategy("heads+isc", last=False), sgd(network))


def test_the_batch_norm_and_the_dropout_of_a_last_head_that_is_kept_do_not_train():
    network = chain(batchnorm=True)
    for head in network.heads:
        head.embed = torch.nn.Sequential(torch.nn.BatchNorm1d(5), torch.nn.Dropout(0.5))
    network.double()
    strategy = exitkit.build_strategy("heads", last=False)
    run = exitkit.Run.local(network, strategy, sgd(network))
    BegunPhase(strategy.phases(1, 3)[0], run, set()).train_mode()
    assert [head.embed.training for head in network.heads] == [True, True, False]
    assert not any(module.training for module in network.heads[-1].modules())


def test_a_trunk_of_random_weights_is_noted(pretrained, tmp_path):
    with pytest.warns(Note, match="heads does not train the trunk of msdnet-tiny, whose weights are random"):
        exitkit.train(RECIPE | {"epochs": 1}, tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exitkit.train(RECIPE | {"epochs": 1, "init_from": str(pretrained.path)}, tmp_path)
    assert not [each for each in caught if "whose weights are random" in str(each.message)]


def test_it_exports_and_exits_early_with_its_temperatures(pretrained, tmp_path):
    run = train(tmp_path, init_from=str(pretrained.path))
    data, network = exitkit.load_data(run), exitkit.load_network(run)
    (batch,) = data.batches("test", [torch.arange(20)], augment=False, seed=0)
    rule = exitkit.ExitRule.from_run(run, share=1.0)
    answers = exitkit.AdaptiveInference(network, rule)(batch.images)
    logits = torch.from_numpy(run.outputs("test")["logits"][:20])
    chosen = logits[torch.arange(20), answers.exits]
    torch.testing.assert_close(answers.logits, chosen, rtol=1e-4, atol=1e-4)
