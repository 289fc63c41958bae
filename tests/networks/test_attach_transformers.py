"""Networks of transformers from a folder: weights, classes, channels, preprocessing, runs that outlive the folder."""

import json
import shutil
import sys

import pytest
import torch

import exitkit
from exitkit.errors import UserError
from exitkit.networks.attach.libraries import library
from exitkit.networks.attach.transformers import TransformersModel

SHAPE = (3, 32, 32)
TOKENS = {
    "hidden_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(network, folder) of a tiny ViT that transformers has saved, with its image processor."""
    transformers = library("transformers")
    folder = tmp_path_factory.mktemp("saved") / "vit"
    config = transformers.ViTConfig(**TOKENS, num_labels=5)
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}, resample=3).save_pretrained(folder)
    return model, folder


def test_a_folder_is_the_network_that_saved_it(saved):
    model, folder = saved
    network = exitkit.build_network(f"transformers:{folder}", input_shape=SHAPE, num_classes=5).eval()
    x = torch.randn(3, *SHAPE)
    with torch.no_grad():
        assert torch.equal(network(x).logits[-1], model(x).logits)
    assert network.family == "transformers" and network.num_exits == 4
    # Tokens: layer normalisation, mean, linear layer.
    assert [type(part).__name__ for part in network.heads[0].embed] == ["LayerNorm", "Pooled"]
    assert "vit.layers.0.attention.q_proj.weight" in network.stages[0].state_dict()


def test_other_classes_replace_the_last_layer_only(saved):
    model, folder = saved
    network = TransformersModel(str(folder), exits=(1,)).build(SHAPE, 8)
    ours = {key.split(".", 2)[-1]: value for key, value in network.state_dict().items()}
    theirs = model.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items() if not key.startswith("classifier"))
    assert ours["classify.weight"].shape == (8, 16)


def test_images_of_one_channel_are_repeated(saved):
    model, folder = saved
    network = TransformersModel(str(folder), exits=(1,)).build((1, 32, 32), 5).eval()
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(x).logits[-1], model(x.repeat(1, 3, 1, 1)).logits)


def test_the_image_processor_says_how_images_are_prepared(saved):
    prepared = TransformersModel(str(saved[1])).preprocessing()
    assert prepared.size == 32 and prepared.mean == prepared.std == (0.5, 0.5, 0.5)
    assert (prepared.crop, prepared.interpolation) == (1.0, "bicubic")
    assert TransformersModel(str(saved[1]), pretrained=False).preprocessing() is None


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"size": 48, "resample": 2}, (48, 1.0, "bilinear")),
        (
            {"size": {"shortest_edge": 40}, "crop_size": 30, "do_center_crop": True, "resample": 3},
            (30, 0.75, "bicubic"),
        ),
        ({"size": {"shortest_edge": 24}, "crop_pct": 0.875, "resample": 0}, (24, 0.875, "nearest")),
    ],
)
def test_forms_of_image_processors(saved, tmp_path, processor, expected):
    shutil.copy(saved[1] / "config.json", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    prepared = TransformersModel(str(tmp_path)).preprocessing()
    assert (prepared.size, prepared.crop, prepared.interpolation) == expected
    assert prepared.mean == (0.485, 0.456, 0.406)


def test_random_weights_fit_images_of_any_size(saved):
    backbone = TransformersModel(str(saved[1]), pretrained=False, fractions=(0.5,))
    assert backbone.weights_files() == ()
    assert backbone.build((3, 64, 64), 4)(torch.randn(2, 3, 64, 64)).logits[0].shape == (2, 4)


@pytest.mark.parametrize(
    ("settings", "shape", "complaint"),
    [
        ({"exits": (9,)}, SHAPE, "expected ascending numbers of blocks, from 0 to 4"),
        ({"exits": (1,), "fractions": (0.5,)}, SHAPE, "give one of them"),
        ({"blocks": "vit.layer"}, SHAPE, "no list of at least two blocks at 'vit.layer'; .* vit.layers"),
        ({}, (2, 32, 32), "the images have 2 channels; expected 3"),
        ({}, (3, 64, 64), "position_embeddings has another shape; .* images are 32x32"),
    ],
)
def test_settings_that_make_no_network_are_refused(saved, settings, shape, complaint):
    with pytest.raises(UserError, match=complaint):
        TransformersModel(str(saved[1]), **settings).build(shape, 5)


@pytest.mark.parametrize("config", ["1,2,1", "[]", "{}", '{"model_type": 3}', "[" * 5000])
def test_a_configuration_that_is_none_is_refused(config):
    with pytest.raises(UserError, match="expected the configuration of a network of transformers, as JSON"):
        TransformersModel("folder", config=config)


@pytest.mark.parametrize(
    ("values", "field"),
    [([], "dictionary"), ({"size": "x"}, "size"), ({"crop_pct": "1"}, "crop_pct"), ({"image_mean": [1]}, "image_mean")],
)
def test_a_damaged_image_processor_is_one_line_with_its_field(saved, tmp_path, values, field):
    shutil.copy(saved[1] / "config.json", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=rf"preprocessor_config\.json .*{field}"):
        TransformersModel(str(tmp_path)).preprocessing()


def test_folders_without_a_network_are_refused(saved, tmp_path):
    with pytest.raises(UserError, match="no folder is given; expected transformers:FOLDER"):
        exitkit.build_network("transformers")
    with pytest.raises(UserError, match=r"missing has no config\.json"):
        exitkit.build_network("transformers:missing")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "num_hidden_layers": 2}')
    with pytest.raises(UserError, match="transformers can't make the network"):
        TransformersModel(str(tmp_path)).build(SHAPE, 5)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="names no model_type"):
        TransformersModel(str(tmp_path))
    shutil.copy(saved[1] / "config.json", tmp_path)
    with pytest.raises(UserError, match="transformers can't make the network"):
        TransformersModel(str(tmp_path)).build(SHAPE, 5)


def test_without_transformers_one_line_names_the_extra(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"transformers is not installed; pip install 'exitkit\[transformers\]'"):
        TransformersModel(str(saved[1])).build(SHAPE, 5)


def test_a_run_outlives_the_folder(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved[1], "vit")
    settings = {"exits": [1], "pretrained": False}
    recipe = exitkit.Recipe.make(backbone="transformers:vit", backbone_settings=settings, epochs=1, lr=0.01)
    run = exitkit.train(recipe, out=tmp_path / "runs")
    shutil.rmtree("vit")
    network = exitkit.load_network(run)
    assert network.num_exits == 2 and network.input_shape == (1, 16, 16)


def test_the_weights_of_the_folder_are_part_of_a_run(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved[1], "vit")
    recipe = exitkit.Recipe.make(backbone="transformers:vit")
    first = exitkit.Recipe.resolve(recipe)
    assert first.ingredients.keys() == {"vit"} and '"model_type": "vit"' in first.backbone_settings["config"]
    weights = tmp_path / "vit" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert exitkit.Recipe.resolve(recipe).id != first.id
