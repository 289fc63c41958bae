"""Derivatives and replaced parameters of networks with unusual parts."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from exitkit.errors import UserError
from exitkit.strategy.functional import call, tangents


def test_an_operation_without_a_forward_mode_derivative_is_named():
    layer = weight_norm(nn.Linear(3, 2)).double()
    point = dict(layer.named_parameters())
    ones = {name: torch.ones_like(tensor) for name, tensor in point.items()}
    with pytest.raises(UserError, match=r"no forward-mode derivative of _weight_norm\w*, which the method needs"):
        tangents(lambda values: [call(layer, values, torch.ones(1, 3, dtype=torch.float64))], point, ones)


def test_parameters_of_scripted_modules_are_replaced():
    network = nn.Sequential(nn.Linear(3, 4), torch.jit.script(nn.Linear(4, 2))).double()
    images = torch.randn(5, 3, dtype=torch.float64)
    before = network(images)
    bias = {"0.bias": torch.zeros(4, dtype=torch.float64)}
    expected = network[1](images @ network[0].weight.T)
    torch.testing.assert_close(call(network, bias, images), expected)
    torch.testing.assert_close(network(images), before)
