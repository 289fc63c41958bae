"""Fused batch normalisation: its values, gradients and statistics, and where PyTorch's kernels are used instead."""

import copy

import pytest
import torch
from torch import nn

import exitkit
from exitkit.engine import fused
from exitkit.engine.engine import Engine
from exitkit.engine.fused import FusedBatchNorm, compiled, fuse_batchnorm

LAST = torch.channels_last
BFLOAT16 = 2**-8  # relative rounding error of bfloat16

needs_compiler = pytest.mark.skipif(compiled(torch.float32) is None, reason="there is no C compiler")


def pair(channels, relu, **options):
    """Return (PyTorch's, fused) batch norm with the same random parameters, in training mode."""
    plain = nn.Sequential(nn.BatchNorm2d(channels, **options), *([nn.ReLU()] if relu else []))
    if plain[0].affine:
        nn.init.uniform_(plain[0].weight, 0.5, 1.5)
        nn.init.normal_(plain[0].bias)
    replaced = copy.deepcopy(plain)
    fuse_batchnorm(replaced)
    assert isinstance(replaced[0], FusedBatchNorm) and replaced[0].relu == relu
    return plain, replaced


def images(shape, dtype=torch.float32, spread=1.0, seed=0):
    torch.manual_seed(seed)
    return (3 + spread * torch.randn(shape)).to(dtype).contiguous(memory_format=LAST)


def results(module, x, slope):
    """Return the output, and the gradients of the input and of the parameters."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], slope)]


def apart(value, truth):
    return float((value.double() - truth.double()).norm() / truth.double().norm())


@needs_compiler
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", [(8, 6, 16, 16), (5, 7, 3, 5), (4, 24, 4, 4), (3, 130, 9, 7), (4, 333, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_float64(shape, dtype, relu):
    plain, replaced = pair(shape[1], relu)
    x, slope = images(shape, dtype), images(shape, dtype, seed=1)
    truths = results(copy.deepcopy(plain).double(), x.double(), slope.double())
    for value, truth in zip(results(replaced, x, slope), truths, strict=True):
        assert apart(value, truth) < (BFLOAT16 if value.dtype == torch.bfloat16 else 1e-5)
    reference = copy.deepcopy(plain).double()
    reference(x.double())
    assert apart(replaced[0].running_mean, reference[0].running_mean) < 1e-6
    assert apart(replaced[0].running_var, reference[0].running_var) < 1e-6
    assert replaced[0].num_batches_tracked == 1


@needs_compiler
@pytest.mark.parametrize("options", [{"affine": False}, {"momentum": None}, {"track_running_stats": False}])
def test_options_of_batchnorm(options):
    plain, replaced = pair(6, relu=True, **options)
    x, slope = images((4, 6, 5, 5)), images((4, 6, 5, 5), seed=1)
    for _ in range(2):
        for value, expected in zip(results(replaced, x, slope), results(plain, x, slope), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    for value, expected in zip(replaced.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value, expected)


@needs_compiler
def test_the_variance_is_exact_for_a_mean_far_from_zero():
    _, replaced = pair(6, relu=False)
    x = images((8, 6, 16, 16), spread=1e-2) + 100
    reference = x.double().var((0, 2, 3))
    replaced[0].momentum = 1.0
    replaced(x.contiguous(memory_format=LAST))
    assert apart(replaced[0].running_var, reference) < 1e-6


@needs_compiler
def test_the_gradient_of_a_slice_is_accepted():
    plain, replaced = pair(6, relu=True)
    x, slope = images((4, 6, 8, 8)), images((4, 30, 8, 8), seed=1)[:, 10:16]
    for value, expected in zip(results(replaced, x, slope), results(plain, x, slope), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_values_that_are_not_finite_stay_so():
    _, replaced = pair(6, relu=True)
    x = images((4, 6, 8, 8))
    x[1, 2, 3, 4] = torch.nan
    channels = replaced(x).isnan().all(0).flatten(1).all(1)
    assert channels.tolist() == [False, False, True, False, False, False]


@needs_compiler
def test_second_derivatives_are_those_of_pytorch():
    plain, replaced = pair(6, relu=True)
    x, slope = images((4, 6, 5, 5)), images((4, 6, 5, 5), seed=1)

    def second(module):
        at = x.clone(memory_format=torch.preserve_format).requires_grad_()
        (first,) = torch.autograd.grad(module(at), at, slope, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [at, *module.parameters()][:2])

    for value, expected in zip(second(replaced), second(plain), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", ["evaluation", "contiguous", "float64", "vmap", "forward mode", "no gradient layout"])
def test_all_else_is_computed_by_pytorch(case):
    plain, replaced = pair(6, relu=True)
    x = images((4, 6, 5, 5))
    if case == "evaluation":
        plain.eval(), replaced.eval()
    elif case == "contiguous":
        x = x.contiguous()
    elif case == "float64":
        x, plain, replaced = x.double(), plain.double(), replaced.double()
    elif case == "vmap":
        for module in (plain, replaced):
            module[0].track_running_stats = False
        stacked = torch.stack([x, 2 * x])
        torch.testing.assert_close(torch.vmap(replaced)(stacked), torch.vmap(plain)(stacked), rtol=0, atol=0)
        return
    elif case == "forward mode":
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            parts = [torch.autograd.forward_ad.unpack_dual(module(dual)) for module in (replaced, plain)]
        for value, expected in zip(*parts, strict=True):
            torch.testing.assert_close(value, expected, rtol=0, atol=0)
        return
    else:
        x = x.half()
        plain, replaced = plain.half(), replaced.half()
    torch.testing.assert_close(replaced(x), plain(x), rtol=0, atol=0)


def test_hooks_read_and_change_what_they_did():
    plain, seen = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU()), []
    plain[0].register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    plain[3].register_forward_pre_hook(lambda module, inputs: (inputs[0] - 1,))
    fused = copy.deepcopy(plain)
    fuse_batchnorm(fused)
    x = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fused(x), plain(x))
    torch.testing.assert_close(*seen)
    assert (seen[0] < 0).any()


def test_names_parameters_and_buffers_are_kept():
    network = exitkit.build_network("msdnet-tiny")
    before = dict(network.named_parameters())
    kinds = [type(module) for module in network.modules()]
    state = list(network.state_dict())
    fuse_batchnorm(network)
    assert list(network.state_dict()) == state
    assert all(parameter is before[name] for name, parameter in network.named_parameters())
    assert sum(isinstance(module, FusedBatchNorm) for module in network.modules()) == kinds.count(nn.BatchNorm2d)
    assert not any(isinstance(module, nn.ReLU) for module in network.modules())
    fuse_batchnorm(network)  # again, as every phase does
    assert list(network.state_dict()) == state


@needs_compiler
@pytest.mark.parametrize("backbone", ["msdnet-tiny", "ranet-tiny", "sdn-tiny", "sdn-resnet56"])
def test_twenty_steps_have_the_losses_of_the_plain_path(backbone):
    losses = {}
    for layout in ("contiguous", "channels-last"):
        torch.manual_seed(0)
        size = {"blocks": (1, 1, 1), "exits": (0, 1)} if backbone == "sdn-resnet56" else {}
        network = exitkit.build_network(backbone, num_classes=10, input_shape=(1, 16, 16), **size)
        optimizer = torch.optim.SGD(network.parameters(), 1e-3)
        run = exitkit.Run.local(network, "joint", optimizer, layout=layout)
        network.train()
        torch.manual_seed(1)
        rows = []
        for _ in range(20):
            run.train_step((torch.randn(32, 1, 16, 16), torch.randint(10, (32,))))
            rows.append(run.meter.averages()[0])
        losses[layout] = torch.tensor(rows)
        found = any(isinstance(module, FusedBatchNorm) for module in network.modules())
        assert found == (layout == "channels-last")
    torch.testing.assert_close(losses["channels-last"], losses["contiguous"], rtol=1e-5, atol=0)


def test_without_a_compiler_networks_do_not_change(monkeypatch):
    monkeypatch.setattr(fused.shutil, "which", lambda name: None)
    compiled.cache_clear()
    engine, network = Engine(torch.device("cpu"), "bf16"), exitkit.build_network("msdnet-tiny")
    engine.place(network)
    assert compiled(torch.bfloat16) is None
    assert not engine.fuses_batchnorm
    assert not any(isinstance(module, FusedBatchNorm) for module in network.modules())
    compiled.cache_clear()
