"""timm's networks by name: weights, heads, stages, stochastic depth, and runs that start from a file of weights."""

import sys

import pytest
import torch
from safetensors.torch import save_file

import exitkit
from exitkit import plugins
from exitkit.errors import UserError
from exitkit.networks.attach.libraries import library as import_library
from exitkit.networks.attach.timm import TimmModel

SHAPE = (3, 32, 32)


@pytest.fixture(scope="module")
def library():
    return import_library("timm")


def saved(library, path, classes=7, name="test_resnet", form="plain", **arguments):
    """A network of timm, and a file of its weights."""
    torch.manual_seed(1)
    model = library.create_model(name, num_classes=classes, **arguments).eval()
    tensors = model.state_dict()
    if form == "safetensors":
        save_file(tensors, path)
    else:
        wrapped = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in tensors.items()}}
        torch.save(wrapped if form == "checkpoint" else tensors, path)
    return model


@pytest.mark.parametrize(
    ("form", "file"), [("plain", "w.pth"), ("checkpoint", "w.pt"), ("safetensors", "w.safetensors")]
)
def test_a_file_of_weights_is_the_network_that_saved_it(library, tmp_path, form, file):
    model = saved(library, tmp_path / file, form=form)
    network = TimmModel("test_resnet", weights=str(tmp_path / file)).build(SHAPE, 7).eval()
    x = torch.randn(3, *SHAPE)
    with torch.no_grad():
        assert torch.equal(network(x).logits[-1], model(x))
    assert network.family == "timm" and network.num_exits == 4


def test_other_classes_and_channels_keep_the_rest(library, tmp_path):
    model = saved(library, tmp_path / "w.pth")
    backbone = TimmModel("test_resnet", weights=str(tmp_path / "w.pth"), exits=("layer2",))
    ours = {key.split(".", 2)[-1]: value for key, value in backbone.build(SHAPE, 4).state_dict().items()}
    theirs = model.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items() if not key.startswith("fc."))
    assert ours["classify.weight"].shape == (4, theirs["fc.weight"].shape[1])
    grey = {key.split(".", 2)[-1]: value for key, value in backbone.build((1, 32, 32), 4).state_dict().items()}
    torch.testing.assert_close(grey["conv1.0.weight"], theirs["conv1.0.weight"].sum(1, keepdim=True))


def test_published_weights_come_through_timm(library, tmp_path, monkeypatch):
    """Nothing is downloaded here: the function of timm that downloads returns the tensors."""
    model = saved(library, tmp_path / "w.pth", classes=1000)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(model.state_dict()))
    network = TimmModel("test_resnet", pretrained=True).build(SHAPE, 1000).eval()
    x = torch.randn(2, *SHAPE)
    with torch.no_grad():
        assert torch.equal(network(x).logits[-1], model(x))
    few = TimmModel("test_resnet", pretrained=True).build(SHAPE, 4)
    assert torch.equal(few.stages[0].get_submodule("conv1.0").weight, model.conv1[0].weight)


def test_rates_of_dropout_are_timms_unless_they_are_given(library, monkeypatch):
    given = []
    create = library.create_model
    monkeypatch.setattr(library, "create_model", lambda name, **rest: (given.append(rest), create(name, **rest))[1])
    TimmModel("test_resnet").build(SHAPE, 4)
    TimmModel("test_resnet", dropout=0.0, drop_path=0.0).build(SHAPE, 4)
    rates = [{key: rest[key] for key in ("drop_rate", "drop_path_rate") if key in rest} for rest in given]
    assert rates == [{}, {"drop_rate": 0.0, "drop_path_rate": 0.0}]


def test_the_images_are_prepared_as_for_the_weights():
    described = TimmModel("test_resnet", pretrained=True).preprocessing()
    assert described.size == 160 and described.mean == described.std == (0.5, 0.5, 0.5)
    assert (described.crop, described.interpolation) == (0.95, "bilinear")
    assert TimmModel("resnet18.a1_in1k", weights="w.pth").preprocessing().interpolation == "bicubic"
    assert TimmModel("test_resnet").preprocessing() is None


def test_exits_at_the_ends_of_the_networks_own_stages():
    network = TimmModel("test_resnet", exits=("features",)).build(SHAPE, 5)
    assert network.num_exits == 5
    (named, *_) = TimmModel("test_resnet", exits=("layer1", "layer3")).build(SHAPE, 5).stages
    assert "layer1.0.conv1.weight" in named.state_dict() and "layer2.0.conv1.weight" not in named.state_dict()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_family_by_name(channels):
    shape = (channels, 32, 32)
    network = exitkit.build_network("timm:test_efficientnet", input_shape=shape, num_classes=6, fractions=(0.4, 0.7))
    rows = [row.macs for row in exitkit.cost(network)]
    assert rows == sorted(set(rows)) and network.num_exits == 3
    assert [logits.shape for logits in network(torch.randn(2, *shape)).logits] == [(2, 6)] * 3


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"model": "resnet81"}, "unknown timm model 'resnet81'; did you mean resnet18"),
        ({"model": "resnet18.a9_in1k"}, "unknown weights of resnet18 'a9_in1k'; did you mean a"),
        ({"model": "resnet18", "pretrained": True, "weights": "w.pth"}, "pretrained and weights both give"),
        ({"model": "resnet18", "exits": ("layer1",), "fractions": (0.5,)}, "give one of them"),
        ({"model": "resnet18", "drop_path": 1.0}, "drop_path is 1.0; expected a rate"),
        ({"model": "resnet18", "head": "sdn", "head_width": 8}, "the head sdn has no convolutions"),
        ({"model": "test_resnet", "weights": "missing.pth"}, "weights is missing.pth, which is no file"),
        ({"model": "vgg11", "exits": ("layer1",)}, "unknown point of VGG 'layer1'"),
        (
            {"model": "test_resnet", "head": "class-token"},
            "the head class-token reads tokens; the features at .* linear",
        ),
    ],
)
def test_settings_that_make_no_network_are_refused(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        TimmModel(**settings).build(SHAPE, 5)


def test_files_that_are_no_weights_of_the_network_are_refused(library, tmp_path):
    saved(library, tmp_path / "other.pth", name="test_efficientnet")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"state_dict": {"a": 1}}, tmp_path / "number.pth")
    cases = {
        "other.pth": "the weights .*other.pth for test_resnet can't be loaded .*Missing key",
        "text.pth": "weights .*text.pth can't be read",
        "number.pth": "holds no tensors by name",
    }
    for file, complaint in cases.items():
        with pytest.raises(UserError, match=complaint):
            TimmModel("test_resnet", weights=str(tmp_path / file)).build(SHAPE, 5)


def test_without_timm_one_line_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name == "timm" or name.startswith("timm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"timm is not installed; pip install 'exitkit\[timm\]'"):
        TimmModel("resnet18").preprocessing()


def test_a_run_starts_from_a_file_and_ends_without_it(library, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved(library, tmp_path / "w.pth", in_chans=1)
    settings = {"weights": "w.pth", "exits": ["layer2"]}
    recipe = exitkit.Recipe.make(backbone="timm:test_resnet", backbone_settings=settings, epochs=1)
    resolved = exitkit.Recipe.resolve(recipe)
    assert resolved.ingredients.keys() == {"w.pth"}
    run = exitkit.train(recipe, out=tmp_path / "runs")
    saved(library, tmp_path / "w.pth", classes=8, in_chans=1)
    assert exitkit.Recipe.resolve(recipe).id != resolved.id, "other weights are another run"
    (tmp_path / "w.pth").unlink()
    network = exitkit.load_network(run)
    assert not network.training and network.num_exits == 2
    with pytest.raises(UserError, match=r"the weights w\.pth do not exist"):
        exitkit.Recipe.resolve(recipe)


QUICK = {"joint", "ge", "boostnet"}
METHODS = [pytest.param(name, marks=[pytest.mark.full] * (name not in QUICK)) for name in plugins.registered("method")]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_network_of_tokens(method, tmp_path):
    """Two epochs of the smallest run; a method that needs maps says so."""
    settings = {"fractions": (0.35, 0.65), "drop_path": 0.1}
    recipe = exitkit.Recipe.make(method=method, backbone="timm:test_vit", backbone_settings=settings)
    recipe = recipe.with_values(epochs=2, lr=0.001, dataset_settings={"per_class": 10})
    try:
        run = exitkit.train(recipe, out=tmp_path)
    except UserError as error:
        assert "maps" in str(error) or "teacher" in str(error), error
        return
    assert len(exitkit.load_network(run).heads) == 3
