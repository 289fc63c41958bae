"""A compiled network trains as the plain one does, whatever the method asks of it."""

import pytest
import torch
from torch import nn

import exitkit
from exitkit.networks.compilation import compile_parts

METHODS = {
    "joint": {},
    "ge": {"variant": "released"},  # reaches into the stages of SDN
    "boostnet": {},
    "pcgrad": {},  # several backwards through one graph
    "l2w": {},  # forward mode
    "l2w (double)": {"gradient": "double"},
    "metagf": {},  # replaced parameters
}


def weights_after(method, settings, *, compiled):
    """The weights of a small SDN after two steps (or an epoch of two batches), in float64."""
    torch.manual_seed(0)
    network = exitkit.build_network("sdn-tiny", num_classes=10, input_shape=(1, 16, 16)).double().train()
    strategy = exitkit.build_strategy(method.partition(" ")[0], **settings)
    run = exitkit.Run.local(network, strategy, torch.optim.SGD(network.parameters(), 0.05, 0.9))
    if compiled:
        compile_parts(network)
    generator = torch.Generator().manual_seed(1)
    batch = (
        torch.randn(16, 1, 16, 16, generator=generator, dtype=torch.float64),
        torch.randint(10, (16,), generator=generator),
    )
    strategy.train_epoch(run, [batch, batch])
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


@pytest.fixture
def compiled_parts(monkeypatch):
    """Compile without the code generator, which would take a minute; counts what was compiled."""
    seen, original = [], nn.Module.compile

    def compile_quickly(module):
        seen.append(module)
        original(module, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_quickly)
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_compiled_training_gives_the_same_weights(method, compiled_parts):
    torch.compiler.reset()
    plain = weights_after(method, METHODS[method], compiled=False)
    assert not compiled_parts
    torch.testing.assert_close(weights_after(method, METHODS[method], compiled=True), plain, rtol=1e-9, atol=1e-11)
    assert compiled_parts


def test_names_and_weights_are_those_of_the_plain_network(compiled_parts):
    network = exitkit.build_network("msdnet-tiny", num_classes=10, input_shape=(1, 16, 16))
    names = list(network.state_dict())
    compile_parts(network)
    assert list(network.state_dict()) == names
    assert len(compiled_parts) == 3 * network.num_exits
