"""Files in the authors' layout load onto our networks: what they compute there, they compute here."""

import argparse
import re

import numpy as np
import pytest
import released
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

import exitkit
from exitkit import plugins
from exitkit.cli.import_weights import import_weights
from exitkit.errors import UserError
from exitkit.networks.families import sdn
from exitkit.networks.families.msdnet import MSDNet
from exitkit.networks.families.ranet import RANet
from exitkit.networks.released.layouts import LAYOUTS
from exitkit.networks.released.weights import check_finite, load_released_weights, own_tensors, read_released_file

MSDNET = {"blocks": 3, "base": 2, "step": 1, "channels": 4, "growth": 2}
RANET = {"scales": (1, 2), "blocks": 2, "block_step": 1, "step": 2, "channels": 4, "growth": 4}
RANET |= {"growth_factors": (2, 1), "bottleneck_factors": (2, 1)}
LARGE = {"stem": "large", "head": "conv"}


def scrambled(network):
    """Random running statistics and affine parameters, too, so that no two tensors are alike."""
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 0.9) if tensor.ndim == 1 else tensor.normal_(0, 0.3)
            else:
                tensor.fill_(7)
    return network.double().eval()


def our_msdnet(classes=5):
    return MSDNet(**MSDNET).build((3, 32, 32), classes).double().eval()


CASES = {
    "msdnet": (released.MSDNet, MSDNet(**MSDNET), 32),
    "msdnet, ImageNet": (lambda: released.MSDNet(large=True), MSDNet(**MSDNET, **LARGE), 112),
    "msdnet, plain units": (lambda: released.MSDNet(bottleneck=False), MSDNet(**MSDNET, bottleneck=False), 32),
    "ranet": (released.RANet, RANet(**RANET), 16),
    "ranet, ImageNet": (lambda: released.RANet(large=True), RANet(**RANET, **LARGE), 64),
    "sdn-vgg": (
        released.sdn_vgg,
        sdn.VGG(channels=(4, 4, 6, 6, 8), pools=(1, 2, 3), hidden=(7, 6), exits=(0, 2, 3)),
        16,
    ),
    "sdn-resnet": (released.sdn_resnet, sdn.ResNet(blocks=(2, 1, 1), channels=4, exits=(0, 2)), 32),
    "sdn-wrn": (released.sdn_wrn, sdn.WideResNet(blocks=(1, 1, 1), widen=1, exits=(0, 1)), 32),
    "sdn-mobilenet": (released.sdn_mobilenet, sdn.MobileNet(channels=(8, 16, 16), halving=(1, 2), exits=(0, 1)), 8),
}


@pytest.mark.parametrize("name", CASES)
def test_released_weights_give_the_released_answers(name):
    theirs, ours, size = CASES[name]
    theirs, ours = scrambled(theirs()), ours.build((3, size, size), 5).double().eval()
    fit = load_released_weights(ours, theirs.state_dict())
    assert fit == (len(theirs.state_dict()), [])
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        for mine, published in zip(ours(x).logits, theirs(x), strict=True):
            torch.testing.assert_close(mine, published, rtol=1e-10, atol=1e-10)
    assert all(int(value) == 7 for key, value in ours.state_dict().items() if key.endswith("num_batches_tracked"))


@pytest.mark.parametrize("preset", sorted(plugins.names("backbone")))
def test_no_two_tensors_of_a_preset_have_one_name_there(preset):
    if preset.partition("-")[0] not in {"msdnet", "ranet", "sdn"}:
        pytest.skip("no paper's network")
    with torch.device("meta"):
        network = exitkit.build_network(preset)
    names = LAYOUTS[network.family].names(network)
    assert len(set(names.values())) == len(names)
    assert not any(re.match(r"stages|heads", name) for name in names.values())


def test_well_known_tensors_land_where_they_must():
    theirs, ours = scrambled(released.MSDNet()).state_dict(), our_msdnet()
    load_released_weights(ours, theirs)
    for mine, published in {
        ours.stages[0][0].scales[2][0].weight: "blocks.0.0.layers.2.net.0.weight",
        ours.stages[0][2].down[2][0][0].weight: "blocks.0.2.layers.2.conv_down.net.0.weight",
        ours.stages[1][0].same[0][1][1].running_var: "blocks.1.0.layers.0.conv_normal.net.4.running_var",
        ours.stages[1][1].scales[1][0].weight: "blocks.1.1.m.1.net.0.weight",
        ours.heads[2].embed[1][0].weight: "classifier.2.m.1.net.0.weight",
        ours.heads[2].classify.bias: "classifier.2.linear.bias",
    }.items():
        assert torch.equal(mine, theirs[published])


def prefixed(tensors, prefix):
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: {"epoch": 3, "state_dict": tensors, "optimizer": {"state": {0: torch.ones(2)}}},
        lambda tensors: {"state_dict": {"model": tensors, "other": 1}, "best": 71.5},
        lambda tensors: prefixed(tensors, "module."),
        lambda tensors: {"state_dict": {"model": prefixed(tensors, "module.module.")}},
    ],
)
def test_wrappings(wrap):
    theirs, ours = scrambled(released.MSDNet()).state_dict(), our_msdnet()
    assert load_released_weights(ours, wrap(theirs)) == (len(ours.state_dict()), [])
    assert torch.equal(ours.heads[0].classify.weight, theirs["classifier.0.linear.weight"])


def test_batch_counts_may_be_missing_and_what_has_no_place_is_named():
    theirs, ours = scrambled(released.MSDNet()).state_dict(), our_msdnet()
    old = {name: tensor for name, tensor in theirs.items() if not name.endswith("num_batches_tracked")}
    fit = load_released_weights(ours, prefixed(old | {"mixing.weight": torch.ones(3)}, "module."))
    assert fit == (len(old), ["module.mixing.weight"])
    assert ours.stages[0][0].scales[0][1].num_batches_tracked == 0


def refusal(ours, tensors, strategy=None):
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_released_weights(ours, tensors, strategy)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items()), "all or nothing"
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_that_does_not_fit_changes_nothing_and_says_what_was_expected():
    theirs, ours = scrambled(released.MSDNet()).state_dict(), our_msdnet()
    renamed = theirs | {"classifier.2.linear.weights": theirs["classifier.2.linear.weight"]}
    del renamed["classifier.2.linear.weight"]
    said = refusal(ours, renamed)
    assert f"1 of the network's {len(theirs)} tensors" in said
    assert "heads.2.classify.weight [5, 128] would be classifier.2.linear.weight in the file, which is missing" in said
    assert "(nearest: classifier.2.linear.weights [5, 128])" in said
    wider = refusal(our_msdnet(classes=7), prefixed(theirs, "module."))
    assert "6 of the network's" in wider and "and 3 more" in wider
    misfit = "heads.0.classify.weight [7, 128] is module.classifier.0.linear.weight in the file, of shape [5, 128]"
    assert misfit in wider
    parameters = [name for name in theirs if not name.endswith("num_batches_tracked")]
    assert refusal(ours, {"a.weight": torch.ones(1)}).startswith(f"{len(parameters)} of the network's {len(theirs)}")


def test_what_holds_no_tensors_is_refused():
    ours = our_msdnet()
    assert "a dict with epoch, state_dict" in refusal(ours, {"epoch": 3, "state_dict": {"model": {}}})
    assert "a MSDNet has no named tensors" in refusal(ours, released.MSDNet())
    custom = exitkit.MultiExitNetwork(ours.stages, ours.heads, (3, 32, 32), 5)
    assert "family 'custom'; expected one of msdnet, ranet, sdn" in refusal(custom, {"a": torch.ones(1)})


class SecondPhase(nn.Module):
    """IMTA's second phase as its authors lay it out: the frozen network, new classifiers, paths between them."""

    def __init__(self):
        super().__init__()
        self.net = released.MSDNet()
        self.classifier = nn.ModuleList([nn.Linear(128 * min(index + 1, 2), 5) for index in range(3)])
        self.isc_modules = nn.ModuleList(
            [nn.Sequential(nn.Linear(5, 128), nn.BatchNorm1d(128), nn.ReLU()) for _ in range(2)]
        )

    def forward(self, x):
        outputs = []
        for index, block in enumerate(self.net.blocks):
            x = block(x)
            feature = self.net.classifier[index].m(x[-1]).flatten(1)
            if index:
                feature = torch.cat([feature, self.isc_modules[index - 1](outputs[-1])], 1)
            outputs.append(self.classifier[index](feature))
        return outputs


def test_a_methods_own_tensors_go_by_its_strategys_names():
    theirs, ours = scrambled(SecondPhase()).double().eval(), our_msdnet()
    strategy = exitkit.build_strategy("imta", variant="released").phases(1, 3)[1].strategy
    strategy.adapt(ours)
    state = theirs.state_dict()
    assert load_released_weights(ours, prefixed(state, "module."), strategy) == (len(state), [])
    assert torch.equal(ours.heads[1].classify.weight, state["net.classifier.1.linear.weight"])
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for mine, published in zip(ours.eval()(x).logits, theirs(x), strict=True):
        assert torch.allclose(mine, published, rtol=1e-10)
    assert "nearest: net.blocks.0.0.layers.0.net.0.weight" in refusal(ours, state)


def test_no_pickle_is_ever_run(tmp_path):
    tensors = released.MSDNet().state_dict()
    for content, refused in (
        ({"state_dict": tensors, "args": argparse.Namespace(lr=0.1)}, "argparse.Namespace"),
        ({"state_dict": tensors, "best": np.float64(3.0)}, "numpy._?core.multiarray.scalar"),
        (released.MSDNet(), "released.MSDNet"),
    ):
        torch.save(content, tmp_path / "model.pth.tar")
        with pytest.raises(
            UserError, match=rf"contains objects other than tensors \({refused}\), which are not loaded; .*save"
        ):
            read_released_file(tmp_path / "model.pth.tar")


def test_files_that_are_none(tmp_path):
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "text.safetensors").write_text("nor this")
    torch.save(released.MSDNet().state_dict(), tmp_path / "half.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "half.pth").read_bytes()[:5000])
    torch.save([1, 2], tmp_path / "list.pth")
    for name, complaint in {
        "gone.pth": "is missing",
        "gone.safetensors": "is missing; expected a file of released weights",
        "": "is a folder",
        "text.pth": "damaged",
        "text.safetensors": "damaged",
        "half.pth": "damaged",
        "list.pth": "contains a list; expected a state dict",
    }.items():
        with pytest.raises(UserError, match=complaint) as error:
            read_released_file(tmp_path / name)
        assert "\n" not in str(error.value)


def imported(*arguments):
    return CliRunner().invoke(import_weights, [str(argument) for argument in arguments], catch_exceptions=True)


def tiny_file(path, classes=5):
    """Write a file of a small network; return its tensors and the options that make ours like it."""
    tensors = scrambled(released.MSDNet(classes)).float().state_dict()
    torch.save({"epoch": 1, "state_dict": prefixed(tensors, "module.") | {"extra": torch.ones(2)}}, path)
    sets = [f"--set={field}={value}" for field, value in MSDNET.items()]
    return tensors, ["--backbone", "msdnet", *sets]


def test_the_command_writes_our_names_for_the_classes_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    tensors, options = tiny_file(tmp_path / "sub" / "best.pth.tar")
    result = imported("sub/best.pth.tar", *options)
    assert result.exit_code == 0, result.exception
    assert result.output.splitlines() == [
        f"loaded {len(tensors)} tensors into msdnet (5 classes), written to best.safetensors",
        "left out 1 tensor of best.pth.tar: extra",
    ]
    ours = MSDNet(**MSDNET).build((3, 32, 32), 5)
    ours.load_state_dict(load_file(tmp_path / "best.safetensors"))
    assert torch.equal(ours.heads[2].classify.weight, tensors["classifier.2.linear.weight"])
    save_file(tensors, tmp_path / "again.safetensors")
    again = imported("again.safetensors", *options, "--out", "other.safetensors", "--num-classes", 5)
    assert again.exit_code == 0 and "left out" not in again.output
    assert (tmp_path / "other.safetensors").read_bytes() == (tmp_path / "best.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--num-classes", "7"], "the file has 5 classes, but --num-classes is 7"),
        (["--set", "bottleneck=false"], "tensors can't be filled"),
        (["--out", "there"], "there exists already; choose another file with --out"),
        (["--out", "no/such/folder"], "can't be written"),
        (["--method", "boostnest"], "did you mean boostnet"),
    ],
)
def test_the_command_refuses_in_one_line_and_writes_nothing(tmp_path, monkeypatch, more, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    _, options = tiny_file(tmp_path / "best.pth")
    result = imported("best.pth", *options, *more)
    assert isinstance(result.exception, UserError) and complaint in str(result.exception)
    assert {path.name for path in tmp_path.iterdir()} == {"best.pth", "there"}


def test_a_method_without_tensors_of_its_own_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, options = tiny_file(tmp_path / "best.pth")
    assert imported("best.pth", *options, "--out", "plain").exit_code == 0
    assert imported("best.pth", *options, "--method", "boostnet", "--out", "boosted").exit_code == 0
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "boosted").read_bytes()


def attached():
    """A network of no published family."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AvgPool2d(4))
    model = nn.Sequential(*model, nn.Flatten(), nn.Linear(4, 5))
    return exitkit.attach_exits(model, at=["2"], input_shape=(3, 8, 8))


@pytest.mark.parametrize("make", [our_msdnet, attached])
@pytest.mark.parametrize(
    "named",
    [
        lambda name: name,
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("stages.0.", "stages.0._orig_mod."),  # a part was compiled
    ],
)
def test_files_with_exitkits_own_names_are_read_without_the_prefixes_of_wrappers(make, named, tmp_path):
    source, network = scrambled(make()), make()
    torch.save({named(name): tensor for name, tensor in source.state_dict().items()}, tmp_path / "sd.pth")
    content = read_released_file(tmp_path / "sd.pth")
    assert load_released_weights(network, content) == (len(source.state_dict()), [])
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in network.state_dict().items())
    again = make()
    again.load_state_dict(own_tensors(again, content))
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_the_form_of_a_file_counts_and_not_its_name(tmp_path):
    tensors = {"a.weight": torch.ones(2)}
    save_file(tensors, tmp_path / "one.pth")
    torch.save(tensors, tmp_path / "two.safetensors")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("one.pth", "two.safetensors", "old.pth"):
        assert torch.equal(read_released_file(tmp_path / name)["a.weight"], tensors["a.weight"])


def test_the_advice_for_a_whole_network_is_to_save_its_state_dict(tmp_path):
    torch.save(attached(), tmp_path / "whole.pth")
    with pytest.raises(UserError, match=r"torch\.load\('whole\.pth', weights_only=False\)\.state_dict\(\), 'weights"):
        read_released_file(tmp_path / "whole.pth")
    torch.save({"state_dict": attached().state_dict(), "net": attached()}, tmp_path / "both.pth")
    with pytest.raises(UserError, match=r"weights_only=False\)\['state_dict'\], 'weights"):
        read_released_file(tmp_path / "both.pth")


def test_weights_that_are_not_finite_are_named():
    network = attached()
    network.register_buffer("mask", torch.full((2,), -torch.inf))
    check_finite(network, "x.pth")
    with torch.no_grad():
        network.stages[1].get_parameter("3.bias")[1] = torch.inf
    with pytest.raises(UserError, match=r"the weights of x\.pth are not finite \(stages\.1\.3\.bias\); expected"):
        check_finite(network, "x.pth")
    network.stages[0].get_buffer("1.running_mean")[0] = torch.nan
    with pytest.raises(UserError, match=r"\(stages\.1\.3\.bias and 1 more tensor\)"):
        check_finite(network, "x.pth")


def test_the_command_reads_exitkits_own_names_and_refuses_what_is_not_finite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = our_msdnet().state_dict()
    torch.save(prefixed(state, "_orig_mod."), "own.pth")
    options = ["--backbone", "msdnet", *(f"--set={field}={value}" for field, value in MSDNET.items())]
    result = imported("own.pth", *options)
    assert result.exit_code == 0, result.exception
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_file("own.safetensors").items())
    state["heads.1.classify.bias"][0] = torch.nan
    torch.save(state, "nan.pth")
    result = imported("nan.pth", *options)
    assert str(result.exception).startswith("the weights of nan.pth are not finite (heads.1.classify.bias)")
    assert not (tmp_path / "nan.safetensors").exists()
