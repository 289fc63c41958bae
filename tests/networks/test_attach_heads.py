"""Heads by name, against plain formulas; for tokens, for maps, and with the channels in any place."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import exitkit
from exitkit.errors import UserError
from exitkit.networks.attach.heads import HeadChoice
from exitkit.networks.attach.torchvision import TorchvisionModel
from exitkit.networks.families.sdn import internal_classifier

TOKENS, MAPS = (9, 12), (6, 8, 10)


def head(form, shape, axis, width=None):
    return HeadChoice(form, width).make(shape, 5, axis, "blocks.1").double().eval()


def features(shape):
    return torch.randn(3, *shape, dtype=torch.float64)


def test_linear_is_the_mean_over_all_positions():
    for shape, axis, over in ((TOKENS, 2, (1,)), (MAPS, 1, (2, 3)), ((8, 10, 6), 3, (1, 2)), ((7,), 1, ())):
        made, x = head("linear", shape, axis), features(shape)
        torch.testing.assert_close(made.embed(x), x.mean(over) if over else x)
        assert torch.equal(made(x), made.classify(made.embed(x))) and made(x).shape == (3, 5)


@pytest.mark.parametrize(("shape", "axis"), [(TOKENS, 2), ((12, 9), 1), (MAPS, 1), ((8, 10, 6), 3)])
def test_norm_is_the_mean_of_normalised_positions(shape, axis):
    made, x = head("norm", shape, axis), features(shape)
    channels = shape[axis - 1]
    norm = next(part for part in made.embed if isinstance(part, nn.LayerNorm))
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2), norm.bias.uniform_(-1, 1)
    rows = x.movedim(axis, -1).reshape(3, -1, channels)
    scaled = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    torch.testing.assert_close(made.embed(x), (scaled * norm.weight + norm.bias).mean(1))


def test_class_token_reads_the_first_token_only():
    made, x = head("class-token", TOKENS, 2), features(TOKENS)
    torch.testing.assert_close(made.embed(x), F.layer_norm(x[:, 0], (12,)))
    other = x.clone()
    other[:, 1:] = 0
    assert torch.equal(made(x), made(other))


@pytest.mark.parametrize("form", ["sdn", "msdnet"])
def test_heads_of_papers_read_maps_with_the_channels_in_any_place(form):
    torch.manual_seed(0)
    first = head(form, MAPS, 1, 16 if form == "msdnet" else None)
    torch.manual_seed(0)
    last = head(form, (8, 10, 6), 3, 16 if form == "msdnet" else None)
    x = features(MAPS)
    assert torch.equal(first(x), last(x.movedim(1, -1))) and first(x).shape == (3, 5)
    if form == "sdn":
        torch.manual_seed(0)
        assert torch.equal(internal_classifier(MAPS, 5).double()(x), first(x))
    else:
        convolutions = [part for part in first.modules() if isinstance(part, nn.Conv2d)]
        assert [(c.in_channels, c.out_channels, c.stride) for c in convolutions] == [(6, 16, (2, 2)), (16, 16, (2, 2))]
        view, embedding = first.features_and_embedding(x)
        assert view.shape == (3, 16, 2, 3)
        torch.testing.assert_close(embedding, view.mean((2, 3)))


def test_auto_suits_the_features():
    assert any(isinstance(part, nn.LayerNorm) for part in head("auto", TOKENS, 2).modules())
    assert not any(isinstance(part, nn.LayerNorm) for part in head("auto", MAPS, 1).modules())


@pytest.mark.parametrize(
    ("form", "width", "shape", "complaint"),
    [
        ("meen", None, TOKENS, "unknown head 'meen'; did you mean .*norm|available"),
        ("linear", 8, TOKENS, "head_width is 8, but the head linear has no convolutions"),
        ("msdnet", 0, MAPS, "head_width is 0; expected at least 1"),
        ("sdn", None, TOKENS, r"the head sdn reads maps; .* have shape \(9, 12\), .* class-token"),
        ("class-token", None, MAPS, "the head class-token reads tokens; .* expected the head linear, norm, sdn"),
        ("auto", None, (2, 3, 4, 5), r"have shape \(2, 3, 4, 5\); give a head for them by head="),
    ],
)
def test_heads_that_do_not_fit_are_refused(form, width, shape, complaint):
    with pytest.raises(UserError, match=complaint):
        head(form, shape, 1, width)


def test_a_name_selects_the_heads_of_a_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)).eval()
    network = exitkit.attach_exits(model, at=["1"], input_shape=(3, 8, 8), head="sdn").eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(network(x).logits[-1], model(x)) and network(x).logits[0].shape == (2, 4)
    assert network.heads[0].classify.in_features == 8 * 6 * 6
    with pytest.raises(UserError, match="unknown head 'SDN'"):
        exitkit.attach_exits(model, at=["1"], input_shape=(3, 8, 8), head="SDN")
    named = TorchvisionModel("resnet18", exits=("layer1",), head="msdnet", head_width=4).build((3, 32, 32), 5)
    assert named.heads[0].classify.in_features == 4 and named.heads[1].classify.in_features == 512
