"""Precision: the choice of `auto`, and the memory layout that comes with 16 bits on a CPU."""

import pytest
import torch

from exitkit.engine.engine import Engine
from exitkit.engine.fused import compiled
from exitkit.engine.precision import choose_precision
from exitkit.networks.build import build_network
from exitkit.runs.job import Job, resolve
from exitkit.runs.recipe import Recipe
from exitkit.training.environment import environment

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True, "avx512_bf16": False}, "bf16"),
        ({"bf16": True, "architecture": "aarch64"}, "bf16"),
        ({"avx512_f": True, "avx512_bf16": False}, "fp32"),
    ],
)
def test_auto_is_bf16_where_the_processor_has_its_instructions(monkeypatch, units, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert choose_precision("auto", CPU) == expected
    assert resolve(Recipe.make(precision="auto", device="cpu")).precision == expected


def test_a_named_precision_is_kept(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert choose_precision("fp32", CPU) == "fp32"
    assert resolve(Recipe.make(device="cpu")).precision == "fp32"


def test_the_identity_holds_the_chosen_precision(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    auto, bf16 = (resolve(Recipe.make(precision=name, device="cpu")) for name in ("auto", "bf16"))
    assert auto.id == bf16.id
    assert auto.id != resolve(Recipe.make(device="cpu")).id


@pytest.mark.parametrize(
    ("precision", "layout", "expected"),
    [
        ("fp32", "auto", "contiguous"),
        ("bf16", "auto", "channels-last"),
        ("bf16", "contiguous", "contiguous"),
        ("fp32", "channels-last", "channels-last"),
    ],
)
def test_a_run_records_the_layout_that_it_trains_in(precision, layout, expected):
    recipe = resolve(Recipe.make(precision=precision, layout=layout, device="cpu"))
    facts = environment(Job.make(recipe), Engine(CPU, recipe.precision, layout=recipe.layout))
    assert facts["layout"] == expected
    assert facts["fused_batchnorm"] == (expected == "channels-last" and compiled(torch.float32) is not None)


def _layout(network, precision):
    """Return whether the network, placed by an engine, and its images have the channels-last layout."""
    engine = Engine(CPU, precision)
    engine.place(network)
    weight = next(p for p in network.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1)
    images = engine.placement.images(torch.zeros(2, 3, 8, 8))
    last = weight.is_contiguous(memory_format=torch.channels_last)
    assert images.is_contiguous(memory_format=torch.channels_last) == last
    return last


@pytest.mark.parametrize(
    ("backbone", "precision", "expected"),
    [
        ("msdnet-tiny", "bf16", True),
        ("sdn-tiny", "bf16", True),
        ("ranet-tiny", "bf16", True),
        ("msdnet-tiny", "fp32", False),
    ],
)
def test_sixteen_bits_on_a_cpu_use_the_faster_layout(backbone, precision, expected):
    network = build_network(backbone, num_classes=4, input_shape=(3, 32, 32))
    assert _layout(network, precision) == expected


def test_the_layout_changes_no_number_beyond_rounding():
    torch.manual_seed(0)
    network = build_network("msdnet-tiny", num_classes=4, input_shape=(3, 16, 16)).double()
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    before = [logits.detach() for logits in network(images).logits]
    network.to(memory_format=torch.channels_last)
    after = network(images.contiguous(memory_format=torch.channels_last)).logits
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)
