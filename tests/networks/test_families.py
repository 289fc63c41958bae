"""What holds for every network that is registered: a new backbone is tested because it exists."""

import copy
import functools
import pickle
import time
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import exitkit
from exitkit import plugins
from exitkit.networks import unreached
from exitkit.networks.cascade import map_tensors
from exitkit.networks.families.base import home


def small(name):
    """Whether a preset runs within moments on one core."""
    return home(plugins.load("backbone", name))[0][1] <= 32


PRESETS = [name for name in plugins.names("backbone") if name != "transformers"]  # which needs a folder
SMALL = [name for name in PRESETS if small(name)]
TINY = [name for name in PRESETS if name.endswith("-tiny")]


def some(presets):
    """Each family's small sizes for every run; all of them for the full one."""
    chosen = {*TINY, "msdnet-cifar-k7", "ranet-cifar-1223", "sdn-resnet56"}
    return [pytest.param(name, marks=[pytest.mark.full] * (name not in chosen)) for name in presets]


def build(name, dtype=torch.float64):
    return exitkit.build_network(name).to(dtype).eval()


@functools.cache
def ghost(name):
    """A network without storage; as with a cost, nothing of it is to be changed."""
    with torch.device("meta"):
        return exitkit.build_network(name)


@functools.cache
def rows_of(name):
    return exitkit.cost(ghost(name))


def images(network, count=3):
    generator = torch.Generator().manual_seed(1)
    dtype = next(network.parameters()).dtype
    return torch.randn(count, *network.input_shape, generator=generator, dtype=torch.float64).to(dtype)


def near(got, expected, rtol):
    scale = expected.abs().max().clamp_min(1e-30)
    return ((got.double() - expected.double()).abs().max() / scale).item() < rtol


def without_row_1(tensor):
    return tensor[torch.tensor([0, 2])]


@pytest.mark.parametrize("name", SMALL)
def test_iterating_and_dropping_rows_give_what_forward_gives(name):
    network = build(name)
    x = images(network)
    with torch.no_grad():
        whole = network(x)
        for lazily, at_once in zip(network.iterate(x), whole.logits, strict=True):
            assert torch.equal(lazily.logits, at_once)
        state, carry, kept = x, None, torch.arange(3)
        for index in range(network.num_exits):
            output, state, carry = network.step(index, state, carry)
            assert near(output.logits, whole.logits[index][kept], 1e-10)
            if index == 1:
                kept = torch.tensor([0, 2])
                state, carry = map_tensors(without_row_1, state), map_tensors(without_row_1, carry)


@pytest.mark.parametrize("name", PRESETS)
def test_costs_grow_along_the_chain_and_cutting_never_adds(name):
    rows = rows_of(name)
    assert len(rows) == ghost(name).num_exits
    assert all(a.papers < b.papers and a.macs < b.macs and a.params < b.params for a, b in pairwise(rows))
    assert rows[0].pruned <= rows[0].macs and all(row.pruned < row.macs for row in rows[1:])


@pytest.mark.parametrize("name", PRESETS)
def test_building_without_storage_is_quick(name):
    ghost(name)  # what is imported on the way is not building
    began = time.process_time()
    with torch.device("meta"):
        exitkit.build_network(name)
    assert time.process_time() - began < 5  # well under a second where nothing else runs


@pytest.mark.parametrize("name", some(PRESETS))
def test_the_network_cut_at_an_exit_has_its_pruned_cost(name):
    rows = rows_of(name)
    for number in {1, len(rows) // 2, len(rows)}:
        (cut,) = exitkit.cost(exitkit.prune_to(ghost(name), number))
        assert cut.macs == cut.pruned == rows[number - 1].pruned


@pytest.mark.parametrize("name", some(SMALL))
def test_the_network_cut_at_an_exit_gives_its_answer(name):
    network = build(name)
    x, whole = images(network), network.state_dict()
    with torch.no_grad():
        expected = network(x).logits
        for number in (1, network.num_exits):
            cut = exitkit.prune_to(network, number)
            assert torch.equal(cut(x).logits[0], expected[number - 1])
            for key, value in cut.state_dict().items():
                original = whole[key.removeprefix("stages.0.")]
                assert torch.equal(value, original) and value.data_ptr() != original.data_ptr()


@pytest.mark.parametrize("name", some(SMALL))
def test_it_copies_saves_loads_and_pickles(name):
    network = build(name)
    twin = exitkit.build_network(name).double().eval()
    twin.load_state_dict(network.state_dict())
    x = images(network)
    with torch.no_grad():
        expected = network(x).logits[-1]
        for other in (twin, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert torch.equal(other(x).logits[-1], expected)
    backbone = plugins.configure("backbone", name, {})
    assert pickle.loads(pickle.dumps(backbone)) == backbone


@pytest.mark.parametrize("name", SMALL)
def test_other_layouts_and_number_formats(name):
    network = build(name)
    x = images(network)
    with torch.no_grad():
        expected = network(x).logits
        network.float()
        for got, want in zip(network(x.float()).logits, expected, strict=True):
            assert near(got, want, 1e-3)
        network.to(memory_format=torch.channels_last)
        for got, want in zip(network(x.float().to(memory_format=torch.channels_last)).logits, expected, strict=True):
            assert near(got, want, 1e-3)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = network(x.float()).logits
    assert all(logits.dtype == torch.bfloat16 and logits.isfinite().all() for logits in outputs)
    assert near(outputs[0], expected[0], 0.15)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_reach_what_some_exit_reads_and_the_network_names_the_rest(name):
    network = build(name)
    sum(logits.sum() for logits in network(images(network)).logits).backward()
    idle = {key for key, parameter in network.named_parameters() if parameter.grad is None}
    assert set(unreached(network)) == idle
    assert len(idle) < 0.25 * len(list(network.parameters()))


@pytest.mark.parametrize("name", some(SMALL))
def test_every_stage_is_exported_and_the_chain_of_exports_gives_the_same(name):
    network = build(name)
    state = x = images(network)
    with torch.no_grad():
        for stage in network.stages:
            state = torch.export.export(stage, (state,)).module()(state)
        assert near(network.heads[-1](network.view(state)), network(x).logits[-1], 1e-10)


@pytest.mark.parametrize("name", TINY)
def test_it_is_one_graph_for_the_compiler_with_taps_and_link_too(name):
    network = build(name)
    exitkit.build_strategy("boostnet").adapt(network)
    x = images(network)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    assert near(compiled(x).logits[-1], network(x).logits[-1], 1e-10)
    loss = sum(logits.square().sum() for logits in compiled(x).logits)
    gradients = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    loss = sum(logits.square().sum() for logits in network(x).logits)
    expected = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    for got, want in zip(gradients, expected, strict=True):
        assert (got is None or not got.any()) if want is None else near(got, want, 1e-8)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("channels", [1, 3])
def test_colours_classes_and_sizes_are_free(name, channels):
    for size in (16, 28, 33):
        network = exitkit.build_network(name, input_shape=(channels, size, size), num_classes=7)
        logits = network(images(network)).logits
        assert all(one.shape == (3, 7) for one in logits)


@pytest.mark.parametrize("name", TINY)
def test_the_counter_agrees_with_a_plain_run(name):
    network = ghost(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(network).eval()(torch.empty(1, *network.input_shape, device="meta"))
    assert counter.get_total_flops() // 2 == rows_of(name)[-1].macs
