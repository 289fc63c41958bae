"""BoostNet against its closed form and hand-derived gradients."""

import pytest
import torch
import torch.nn.functional as F

import exitkit
from exitkit.errors import UserError

from toy import batches, chain, sgd


def adapted(exits=4, **settings):
    network = chain(exits)
    exitkit.build_strategy("boostnet", **settings).adapt(network)
    return network


@pytest.mark.parametrize("temperature", [0.2, 0.5, 1.0])
def test_outputs_are_the_weakened_sum_in_training_and_evaluation(temperature):
    network, (x, _) = adapted(temperature=temperature), batches(1)[0]
    outputs = network(x)
    for n, logits in enumerate(outputs.logits):
        closed = sum(temperature ** (n - m) * outputs.raw[m] for m in range(n + 1))
        assert torch.allclose(logits, closed, rtol=1e-14, atol=1e-14)
    network.eval()
    assert all(torch.equal(a, b) for a, b in zip(outputs.logits, network(x).logits, strict=True))


def test_exit_n_moves_its_own_logits_only_and_by_softmax_minus_label():
    network, (x, y) = adapted(), batches(1)[0]
    outputs = network(x)
    for n, logits in enumerate(outputs.logits):
        loss = F.cross_entropy(logits, y, reduction="sum")
        gradients = torch.autograd.grad(loss, outputs.raw, retain_graph=True, allow_unused=True)
        for m, gradient in enumerate(gradients):
            if m == n:
                expected = logits.softmax(1) - F.one_hot(y, 4)
                assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-14)
            else:
                assert gradient is None


def test_without_stop_gradient_earlier_logits_get_the_weakened_gradient():
    network, (x, y) = adapted(stop_gradient=False, temperature=0.5), batches(1)[0]
    outputs = network(x)
    loss = F.cross_entropy(outputs.logits[3], y, reduction="sum")
    own = outputs.logits[3].softmax(1) - F.one_hot(y, 4)
    gradients = torch.autograd.grad(loss, outputs.raw)
    for m, gradient in enumerate(gradients):
        assert torch.allclose(gradient, 0.5 ** (3 - m) * own, rtol=1e-12, atol=1e-15)


def step(method, **settings):
    network = chain(4)
    run = exitkit.Run.local(network, exitkit.build_strategy(method, **settings), sgd(network))
    for batch in batches():
        run.strategy.train_step(run, batch)
    return network.state_dict()


def equal(a, b):
    return all(torch.allclose(a[name], b[name], rtol=1e-12, atol=1e-14) for name in a)


def test_temperature_zero_is_gradient_equilibrium_and_without_rescaling_joint_training():
    assert equal(step("boostnet", temperature=0.0), step("ge"))
    assert equal(step("boostnet", temperature=0.0, rescale=False), step("joint"))
    assert not equal(step("boostnet"), step("ge"))


def test_a_temperature_an_exit_follows_equation_8_and_the_released_training_is_shifted():
    temperatures = (0.9, 0.1, 0.4, 0.7)
    x = batches(1)[0][0]
    paper = adapted(temperature=temperatures)(x)
    recursion = paper.raw[0]
    for n in range(1, 4):
        recursion = paper.raw[n] + temperatures[n] * recursion
    assert torch.allclose(paper.logits[3], recursion, rtol=1e-14, atol=1e-14)

    released = exitkit.build_network("msdnet-tiny").double()
    exitkit.build_strategy("boostnet", temperature=temperatures, variant="released").adapt(released)
    images = torch.randn(3, 1, 16, 16).double()
    training = released(images)
    assert torch.allclose(training.logits[1], training.raw[1] + 0.9 * training.raw[0], atol=1e-14)
    inference = released.eval()(images)
    assert torch.allclose(inference.logits[1], inference.raw[1] + 0.1 * inference.raw[0], atol=1e-14)


def test_the_released_variant_does_not_rescale_ranet():
    network = exitkit.build_network("ranet-tiny")
    with pytest.raises(UserError, match="does not rescale gradients on ranet networks; expected rescale=false, or var"):
        exitkit.build_strategy("boostnet", variant="released").adapt(network)
    exitkit.build_strategy("boostnet", variant="released", rescale=False).adapt(network)


def test_wrong_temperatures_are_refused():
    with pytest.raises(UserError, match="expected one, or 4"):
        adapted(temperature=(0.1, 0.2))
    with pytest.raises(UserError, match="at least 0"):
        exitkit.build_strategy("boostnet", temperature=-1)
    with pytest.raises(UserError, match="temperature is 'warm'; expected"):
        exitkit.build_strategy("boostnet", temperature="warm")
