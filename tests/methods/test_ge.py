"""Gradient Equilibrium against equation 5, exit by exit and stage by stage."""

import pytest
import torch

import exitkit
from exitkit.errors import UserError

from toy import batches, chain, exit_gradients


@pytest.mark.parametrize("exits", [1, 2, 5])
def test_every_exit_reaches_stage_k_with_the_factor_of_equation_5(exits):
    x, y = batches(1)[0]
    network = chain(exits)
    plain = exit_gradients(network, x, y)
    exitkit.build_strategy("ge").adapt(network)
    scaled = exit_gradients(network, x, y)
    for index in range(exits):
        for name, gradient in plain[index].items():
            if gradient is None:
                assert scaled[index][name] is None
                continue
            stage = int(name.split(".")[1])
            factor = 1 / (exits - stage) if name.startswith("stages") else 1.0
            assert torch.allclose(scaled[index][name], factor * gradient, rtol=1e-12, atol=1e-16), name


def msdnet():
    return exitkit.build_network("msdnet-tiny").double()


def test_the_default_scope_holds_equation_5_for_every_parameter_of_msdnet():
    network, (x, y) = msdnet(), (torch.randn(4, 1, 16, 16).double(), torch.tensor([0, 3, 5, 9]))
    plain = exit_gradients(network, x, y)
    exitkit.build_strategy("ge").adapt(network)
    scaled = exit_gradients(network, x, y)
    for index in range(4):
        for name, gradient in plain[index].items():
            if gradient is not None:
                factor = 1 / (4 - int(name.split(".")[1])) if name.startswith("stages") else 1.0
                assert torch.allclose(scaled[index][name], factor * gradient, rtol=1e-10, atol=1e-15), name


def test_the_released_scope_leaves_the_finer_scales_alone():
    network, (x, y) = msdnet(), (torch.randn(4, 1, 16, 16).double(), torch.tensor([0, 3, 5, 9]))
    plain = exit_gradients(network, x, y)
    exitkit.build_strategy("ge", variant="released").adapt(network)
    scaled = exit_gradients(network, x, y)
    first = [name for name in plain[0] if name.startswith("stages.0") and plain[0][name] is not None]
    # Exit 1 sees the coarsest tensor alone, so that all of stage 1 is scaled by 1/4 for it; the last exit also
    # reaches stage 1 through finer scales, which carry the whole gradient, and so gets more than 1/4 somewhere.
    for name in first:
        assert torch.allclose(scaled[0][name], plain[0][name] / 4, rtol=1e-10, atol=1e-15)
    ratios = [float(scaled[3][name].norm() / plain[3][name].norm()) for name in first]
    assert max(ratios) > 0.3


def test_forward_is_unchanged_and_adapting_twice_adds_one_tap():
    network, (x, _) = chain(), batches(1)[0]
    before = network(x).logits
    strategy = exitkit.build_strategy("ge")
    strategy.adapt(network)
    strategy.adapt(network)
    assert len(network.taps) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, network(x).logits, strict=True))


def test_variants_and_scopes_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match=r"no released Gradient Equilibrium.*custom"):
        exitkit.build_strategy("ge", variant="released").adapt(chain())
    with pytest.raises(UserError, match="coarsest is for MSDNet only"):
        exitkit.build_strategy("ge", ge_scope="coarsest").adapt(chain())
    for method in ("ge", "boostnet"):
        with pytest.raises(UserError, match="ge_scope is all, and the released code for sdn-vgg"):
            network = exitkit.build_network("sdn-vgg16")
            exitkit.build_strategy(method, variant="released", ge_scope="all").adapt(network)
    with pytest.raises(UserError, match="contradicts"):
        network = msdnet()
        exitkit.build_strategy("ge").adapt(network)
        exitkit.build_strategy("ge", ge_scope="coarsest").adapt(network)
