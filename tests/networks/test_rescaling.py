"""Rescaling in every mode of differentiation, and who owns which parameter."""

import pytest
import torch

from exitkit.networks import unreached
from exitkit.networks.cascade import Head, MultiExitNetwork
from exitkit.networks.ownership import owners
from exitkit.networks.rescaling import rescale

from toy import chain


def function(x):
    return (rescale(x * x, 0.3) * torch.sin(x)).sum()


def test_forward_is_the_identity_and_backward_scales():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = rescale(x, 0.25)
    assert torch.equal(y, x)
    weights = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    assert torch.equal(gradient, 0.25 * weights)


def test_double_backward_scales_once_for_each_rescaling_on_the_path():
    x = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(rescale(x, 0.5) ** 3, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    # d/dx of 0.5 * 3 R(x)^2: the chain through R scales once more.
    assert first.item() == pytest.approx(0.5 * 3 * 0.7**2, abs=1e-15)
    assert second.item() == pytest.approx(0.5 * 0.5 * 6 * 0.7, abs=1e-15)


def test_forward_mode_scales_the_tangent_as_backward_scales_the_gradient():
    x = torch.randn(5, dtype=torch.float64)
    direction = torch.randn(5, dtype=torch.float64)
    _, tangent = torch.func.jvp(function, (x,), (direction,))
    gradient = torch.func.grad(function)(x)
    assert tangent.item() == pytest.approx((gradient @ direction).item(), abs=1e-14)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        assert torch.autograd.forward_ad.unpack_dual(function(dual)).tangent.item() == tangent.item()


def test_vmap_equals_a_loop():
    x = torch.randn(4, 5, dtype=torch.float64)
    together = torch.func.vmap(torch.func.grad(function))(x)
    assert torch.allclose(together, torch.stack([torch.func.grad(function)(row) for row in x]), atol=1e-15)


def test_forward_mode_over_backward_and_under_vmap():
    x = torch.randn(4, 5, dtype=torch.float64)
    direction = torch.randn(5, dtype=torch.float64)

    def tangent(row):
        return torch.func.jvp(function, (row,), (direction,))[1]

    assert torch.allclose(torch.func.vmap(tangent)(x), torch.stack([tangent(row) for row in x]), atol=1e-14)
    # Hessian-vector product: the gradient's own tangent meets the rescaling once more.
    _, product = torch.func.jvp(torch.func.grad(function), (x[0],), (direction,))
    hessian = torch.func.jacrev(torch.func.grad(function))(x[0])
    assert torch.allclose(product, hessian @ direction, atol=1e-13)


def test_owners_of_a_chain_are_the_exits_from_that_stage_on():
    owned = owners(chain(exits=3))
    assert owned["stages.0.1.weight"] == (0, 1, 2)
    assert owned["stages.1.1.bias"] == (1, 2)
    assert owned["stages.2.1.weight"] == (2,)
    assert owned["heads.1.classify.weight"] == (1,)


def test_owners_finds_parameters_that_no_exit_reads_and_leaves_no_trace():
    network = chain(exits=2, batchnorm=True)
    network.stages[1].register_parameter("idle", torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)))
    network.stages[0][2].eval()  # a frozen batch norm stays frozen
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert owners(network)["stages.1.idle"] == ()
    assert unreached(network) == ["stages.1.idle"]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training and not network.stages[0][2].training
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_cascade_needs_one_head_a_stage():
    with pytest.raises(ValueError, match="2 stages and 1 heads; expected one head per stage"):
        MultiExitNetwork([torch.nn.Identity()] * 2, [Head(torch.nn.Identity(), torch.nn.Identity())], (1, 2, 2), 2)
