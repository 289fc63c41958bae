"""MSDNet's structure."""

import pytest
import torch

import exitkit
from exitkit.errors import UserError
from exitkit.networks import unreached


def test_the_tiny_preset_has_the_size_that_it_says():
    network = exitkit.build_network("msdnet-tiny")
    assert sum(parameter.numel() for parameter in network.parameters()) == 4330
    assert network.input_shape == (1, 16, 16) and network.num_classes == 10 and network.num_exits == 4


@pytest.mark.parametrize(
    ("name", "widths", "alive"),
    [
        ("msdnet-cifar-k7", [160, 208, 140, 188, 236, 152, 200], [3, 3, 2, 2, 2, 1, 1]),
        ("msdnet-cifar-lg5", [88, 136, 104, 200, 208], [3, 3, 2, 2, 1]),
        ("msdnet-cifar-k7-g16", [320, 448, 320, 448, 576, 384, 512], [3, 3, 2, 2, 2, 1, 1]),
    ],
)
def test_the_widths_that_heads_read_and_the_scales_alive(name, widths, alive):
    network = exitkit.build_network(name).eval()
    state = torch.zeros(1, *network.input_shape)
    with torch.no_grad():
        for index, (width, scales) in enumerate(zip(widths, alive, strict=True)):
            _, state, _ = network.step(index, state)
            assert network.view(state).shape[1] == width and len(state) == scales


def test_pruning_min_drops_scales_at_the_end_only():
    network = exitkit.build_network("msdnet-cifar-k7", prune="min").eval()
    state, lengths = torch.zeros(1, 3, 32, 32), []
    with torch.no_grad():
        for index in range(7):
            _, state, _ = network.step(index, state)
            lengths.append(len(state))
    assert lengths == [3, 3, 3, 3, 3, 3, 1]


def test_gradients_reach_all_parameters_but_the_fine_scales_behind_which_no_exit_lies():
    network = exitkit.build_network("msdnet-tiny")
    idle = unreached(network)
    assert idle and all(name.startswith("stages.3") for name in idle)
    sum(logits.sum() for logits in network(torch.randn(4, 1, 16, 16)).logits).backward()
    assert {name for name, parameter in network.named_parameters() if parameter.grad is None} == set(idle)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 17, 23)])
def test_any_image_that_fits(shape):
    network = exitkit.build_network("msdnet-cifar-lg4", input_shape=shape, num_classes=7).eval()
    assert [logits.shape for logits in network(torch.zeros(2, *shape)).logits] == [(2, 7)] * 4


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"growth": 5, "growth_factors": (1, 1, 2)}, "odd"),
        ({"growth_factors": (1, 2)}, "expected one per scale"),
        ({"blocks": 0}, "blocks is 0; expected at least 1"),
        ({"reduction": 1.5}, "between 0 and 1"),
        ({"step_mode": "evn"}, "expected even . lin_grow"),
        ({"growth_factors": (1,) * 7, "bottleneck_factors": (1,) * 7}, "too small for 7 scales"),
        ({"depth": 3}, "unknown field of backbone msdnet 'depth'"),
    ],
)
def test_settings_that_make_no_network_are_refused(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        exitkit.build_network("msdnet", **settings)


def outline(name, **settings):
    """A network without storage: for shapes alone, at any size."""
    with torch.device("meta"):
        return exitkit.build_network(name, **settings).eval()


def coarsest_widths(network):
    state, widths = torch.empty(1, *network.input_shape, device="meta"), []
    for index in range(network.num_exits):
        _, state, _ = network.step(index, state)
        widths.append(network.view(state).shape[1])
    return widths


@pytest.mark.parametrize(
    ("step", "widths"),
    [
        (4, [384, 384, 352, 304, 560]),
        (5, [448, 448, 384, 704, 608]),
        (6, [512, 544, 496, 880, 792]),
        (7, [576, 640, 608, 528, 976]),
    ],
)
def test_imagenet_heads_read_the_widths_of_the_released_networks(step, widths):
    assert coarsest_widths(outline(f"msdnet-imagenet-s{step}")) == widths


def test_pruning_min_narrows_after_each_third_of_the_depth():
    # 6 layers: width unit 16+6+6 -> 14 behind layer 2, 14+6+6 -> 13 behind layer 4, 13+6+6; coarsest four times that.
    assert coarsest_widths(outline("msdnet", blocks=3, base=2, step=2, prune="min")) == [56, 52, 100]


@pytest.mark.parametrize(("bottleneck", "kernels"), [(True, {1, 3}), (False, {3})])
def test_bottlenecks_and_transitions_can_be_left_out(bottleneck, kernels):
    network = outline("msdnet-cifar-lg5", reduction=0, bottleneck=bottleneck)
    assert {m.kernel_size[0] for m in network.modules() if isinstance(m, torch.nn.Conv2d)} == kernels
    assert coarsest_widths(network) == [4 * (16 + 6 * layers) for layers in (1, 3, 6, 10, 15)]


def test_a_layer_joins_the_scale_then_the_finer_one_then_its_own():
    layer = exitkit.build_network("msdnet-tiny").eval().stages[0][1]
    x = [torch.randn(2, width, size, size) for width, size in ((2, 16), (2, 8), (4, 4))]
    finest, middle, coarsest = layer(x)
    assert torch.equal(finest, torch.cat([x[0], layer.same[0](x[0])], 1))
    assert torch.equal(middle, torch.cat([x[1], layer.down[1](x[0]), layer.same[1](x[1])], 1))
    assert torch.equal(coarsest, torch.cat([x[2], layer.down[2](x[1]), layer.same[2](x[2])], 1))


def test_heads_pool_as_the_released_ones_do_at_the_released_size():
    network = exitkit.build_network("msdnet-cifar-lg4").eval()
    view, embed = network.view(network.stages[0](torch.randn(2, 3, 32, 32))), network.heads[0].embed
    torch.testing.assert_close(embed(view), torch.nn.functional.avg_pool2d(embed[:2](view), 2).flatten(1))


def test_a_view_can_be_replaced():
    network = exitkit.build_network("msdnet-tiny")
    state = network.stages[0](torch.randn(2, 1, 16, 16))
    changed = network.with_view(state, torch.zeros_like(state[-1]))
    assert not network.view(changed).any() and network.view(state).any()
    assert all(a is b for a, b in zip(changed[:-1], state[:-1], strict=True))


@pytest.mark.parametrize(
    ("settings", "dead"),
    [
        ({}, {"stages.3.0.same.0"}),
        # Two layers, three scales: nothing reads the second layer's finer output, nor what only that reads.
        (
            {"blocks": 2},
            {"stages.0.1.same.0", "stages.1.0.same.0", "stages.1.0.down.0", "stages.1.1.scales.0"},
        ),
        ({"prune": "min"}, set()),
    ],
)
def test_exactly_the_last_fine_scale_units_are_read_by_no_exit(settings, dead):
    network = exitkit.build_network("msdnet-tiny", **settings)
    units = {name: ".".join(name.split(".")[:5]) for name, _ in network.named_parameters()}
    assert set(unreached(network)) == {name for name, unit in units.items() if unit in dead}
    assert dead <= set(units.values())


def test_both_modes_of_differentiation_agree():
    network = exitkit.build_network("msdnet-tiny").double().eval().requires_grad_(False)
    x = torch.randn(3, 1, 16, 16, dtype=torch.float64, requires_grad=True)
    direction, weights = torch.randn_like(x), torch.randn(3, 10, dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda x: network(x).logits[-1], (x.detach(),), (direction,))
    (gradient,) = torch.autograd.grad((network(x).logits[-1] * weights).sum(), x)
    torch.testing.assert_close((gradient * direction).sum(), (tangent * weights).sum())


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((2, 4, 4), {}),
        ((3, 9, 9), {"growth_factors": (1,), "bottleneck_factors": (1,), "growth": 3}),
        ((3, 20, 20), {"growth_factors": (1, 2, 4, 4, 4), "bottleneck_factors": (1, 2, 4, 4, 4)}),
        ((1, 33, 47), {"stem": "large", "head": "conv"}),
        ((1, 28, 28), {"stem": "strided", "head": "pool"}),
    ],
)
def test_any_number_of_scales(shape, settings):
    network = exitkit.build_network("msdnet", input_shape=shape, num_classes=7, blocks=3, base=1, step=1, **settings)
    assert [logits.shape for logits in network(torch.randn(2, *shape)).logits] == [(2, 7)] * 3
    assert exitkit.cost(network)[-1].params == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("family", ["msdnet", "ranet"])
def test_each_stem_reduces_the_image_by_its_stride(family):
    sizes = {}
    for stem in ("small", "strided", "large"):
        network = exitkit.build_network(family, input_shape=(3, 64, 64), num_classes=7, stem=stem)
        first = next(module for module in network.modules() if isinstance(module, torch.nn.Conv2d))
        widths = []
        first.register_forward_hook(lambda *call, widths=widths: widths.append(call[2].shape[-1]))
        network(torch.randn(2, 3, 64, 64))
        sizes[stem] = widths
    assert sizes == {"small": [64], "strided": [32], "large": [32]}  # the large stem's pooling halves it once more


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"input_shape": (3, 3, 32)}, "3x32 are too small for 3 scales; expected at least 4x4"),
        ({"stem": "large", "input_shape": (3, 15, 15)}, "expected at least 16x16"),
        ({"stem": "strided", "input_shape": (3, 7, 7)}, "expected at least 8x8"),
        ({"reduction": 0.01}, "keeps none of 58 channels"),
        ({"growth": 5, "growth_factors": (1, 3, 4)}, "such as growth 6"),
    ],
)
def test_images_too_small_and_widths_that_vanish_are_refused(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        exitkit.build_network("msdnet", **settings)


def test_initialisation_is_pytorchs_own_unless_he_is_asked_for():
    for init, variance in (("released", 1 / (3 * 9 * 128)), ("default", 1 / (3 * 9 * 128)), ("he", 2 / (9 * 128))):
        head = exitkit.build_network("msdnet-cifar-k7", init=init).heads[0]
        assert head.embed[1][0].weight.std().item() == pytest.approx(variance**0.5, rel=0.02)
        assert head.classify.bias.any().item() == (init != "he")
