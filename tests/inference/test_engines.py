"""Engines execute the same stages: the answers of the network, but for the last digits, whatever the engine."""

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

import exitkit
from exitkit import AdaptiveInference, ExitPolicy, ExitRule
from exitkit.errors import Note, UserError
from exitkit.inference import engines
from exitkit.inference.engines import ENGINES, AutoEngine, FixedEngine, compare, fastest, prepare, run_all
from exitkit.inference.scores import scores
from exitkit.networks import Head, MultiExitNetwork


def small(dtype=torch.float32):
    """Two exits whose stages hand on more than one tensor, with BoostNet's carried logits."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    heads = [Head(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(4, 3)) for _ in range(2)]
    network = MultiExitNetwork([first, nn.Conv2d(4, 4, 3, 2)], heads, (1, 6, 6), 3)
    exitkit.build_strategy("boostnet").adapt(network)
    for _ in range(3):
        network(images(32))
    return network.to(dtype).eval()


def images(count, seed=1):
    return torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def first_scores(network, x):
    with torch.inference_mode():
        return scores(network(x).logits[0][:, None].numpy(), "confidence")[:, 0]


def halved(network, x):
    """A rule under which half of the images leave at the first exit, at a threshold far from every score."""
    low, high = np.sort(first_scores(network, x))[len(x) // 2 - 1 :][:2]
    return ExitRule("confidence", (float(low + high) / 2, -math.inf))


@pytest.fixture(scope="module")
def prepared():
    network = small()
    return network, {name: prepare(network, name) for name in ENGINES}


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_gives_the_networks_answers_for_batches_single_images_and_streams(name, prepared):
    network, made = prepared
    x = images(24)
    rule = halved(network, x)
    plain, adaptive = AdaptiveInference(network, rule), AdaptiveInference(network, rule, engine=made[name])
    expected, answers = plain(x), adaptive(x)
    assert set(expected.exits.tolist()) == {0, 1} and torch.equal(answers.exits, expected.exits)
    torch.testing.assert_close(answers.logits, expected.logits, rtol=1e-5, atol=1e-6)
    for row in (0, 5):
        alone = adaptive(x[row : row + 1])
        assert alone.exits[0] == expected.exits[row]
        torch.testing.assert_close(alone.logits[0], expected.logits[row], rtol=1e-5, atol=1e-6)
    streamed = list(adaptive.stream(x.split(7), 8))
    assert torch.equal(torch.cat([part.exits for part in streamed]), expected.exits)
    assert len(adaptive(x[:0]).exits) == 0
    moved = compare(network, made[name], rule, x)
    assert moved.images == 24 and moved.moved == 0 and moved.difference < 1e-6
    assert name != "eager" or moved.difference == 0
    first, _ = adaptive(x), adaptive(images(24, seed=2))  # a later batch must not write into earlier answers
    assert torch.equal(first.logits, answers.logits)


def test_only_a_score_within_the_last_digits_of_its_threshold_is_moved_and_that_is_counted(prepared):
    network, made = prepared
    x = images(64)
    values = first_scores(network, x)
    moved = 0
    for limit in values:  # a threshold that is a score, so that the last digit decides
        rule = ExitRule("confidence", (float(limit), -math.inf))
        outputs = [torch.stack(run_all(made[name].select(x, 64), 2, x), 1) for name in ("eager", "folded")]
        exits, folded_exits = (ExitPolicy(rule).on_outputs(logits)[1] for logits in outputs)
        differs = (exits != folded_exits).numpy()
        assert (abs(values[differs] - limit) < 1e-5).all()
        assert compare(network, made["folded"], rule, x).moved == differs.sum()
        moved += differs.sum()
    assert moved > 0


def test_an_engine_that_computes_something_else_is_refused(prepared):
    network, made = prepared
    wrong = FixedEngine(
        "wrong", lambda *state: [1.001 * made["eager"].step(*state)[0], *made["eager"].step(*state)[1:]]
    )
    with pytest.raises(UserError, match=r"the engine wrong differs by 0\.001 of the largest logit"):
        compare(network, wrong, halved(network, images(8)), images(8))


@pytest.mark.parametrize("backbone", ["msdnet-tiny", "ranet-tiny", "sdn-tiny"])
@pytest.mark.parametrize("method", ["boostnet", "isc"])
def test_a_folded_network_of_any_family_drops_rows_in_its_own_layout(backbone, method):
    network = exitkit.build_network(backbone, num_classes=5, input_shape=(1, 16, 16))
    exitkit.build_strategy(method).adapt(network)
    network.double().eval()
    x = torch.randn(40, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.inference_mode():
        values = scores(torch.stack(network(x).logits, 1).numpy(), "confidence")
    rule = ExitRule("confidence", (*np.quantile(values, 0.613, axis=0)[:-1], -math.inf))
    expected, adaptive = AdaptiveInference(network, rule)(x), AdaptiveInference(network, rule, engine="folded")
    layouts = []
    step = adaptive.engine.step

    def watched(index, state, carry):
        parts = state if isinstance(state, list | tuple) else [state]
        layouts.extend(
            part.is_contiguous(memory_format=torch.channels_last) or part.is_contiguous()
            for part in parts
            if isinstance(part, torch.Tensor) and part.dim() == 4
        )
        return step(index, state, carry)

    adaptive.engine = FixedEngine("watched", watched)
    answers = adaptive(x)
    assert len(expected.exits.unique()) > 2 and torch.equal(answers.exits, expected.exits) and all(layouts)
    torch.testing.assert_close(answers.logits, expected.logits, rtol=1e-9, atol=1e-9)


def test_auto_takes_the_fastest_engine_of_each_batch_size_and_says_so(prepared, monkeypatch):
    network, made = prepared
    now, ran = [0.0], []

    def taking(name, single, many):
        def step(index, state, carry):
            ran.append(name)
            now[0] += single if len(state if index == 0 else state[0]) == 1 else many
            return made["onnx"].step(index, state, carry)

        return FixedEngine(name, step)

    monkeypatch.setattr(engines.time, "perf_counter", lambda: now[0])
    auto = AutoEngine([taking("slow", 1.0, 1.0), taking("alone", 0.01, 2.0), taking("crowd", 0.02, 0.5)], exits=2)
    adaptive = AdaptiveInference(network, halved(network, images(8)), engine=auto)
    adaptive(images(1))
    adaptive(images(5))
    assert {size: choice.engine for size, choice in auto.choices.items()} == {1: "alone", 8: "crowd"}
    assert auto.choices[8].seconds == pytest.approx({"slow": 2.0, "alone": 4.0, "crowd": 1.0})
    ran.clear()
    adaptive(images(1))
    adaptive(images(7))  # between 4 and 8: measured already
    list(adaptive.stream([images(3)], 6))
    assert set(ran[:1]) == {"alone"} and set(ran[-2:]) == {"crowd"} and "slow" not in ran


def test_a_real_choice_is_the_fastest_of_those_measured():
    network = small()
    choice = fastest({name: prepare(network, name).step for name in ("eager", "folded")}, images(4), 2)
    assert choice.seconds.keys() == {"eager", "folded"} and min(choice.seconds.values()) > 0
    assert choice.seconds[choice.engine] == min(choice.seconds.values())


def test_auto_goes_on_without_onnx_where_it_is_not_installed_and_says_where_it_fails(monkeypatch):
    monkeypatch.setattr(engines, "missing_packages", lambda: ["onnx"])
    assert [engine.name for engine in prepare(small()).engines] == ["eager", "folded"]
    monkeypatch.setattr(engines, "missing_packages", lambda: [])

    def fails(*_):
        raise UserError("torch can't export stage-1 as onnx: RuntimeError: complex")

    monkeypatch.setattr(engines, "write_program", fails)
    with pytest.warns(Note, match="the engine auto leaves out onnx: torch can't export stage-1"):
        assert [engine.name for engine in prepare(small()).engines] == ["eager", "folded"]


def test_mistakes_are_one_line(monkeypatch):
    network, rule = small(), ExitRule("margin", (0.5, -math.inf))
    with pytest.raises(UserError, match=r"unknown engine 'fold'; did you mean folded"):
        AdaptiveInference(network, rule, engine="fold")
    with pytest.raises(UserError, match="the engine onnx runs on CPUs; expected another engine for a network on meta"):
        prepare(small().to("meta"), "onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(engines, "missing_packages", lambda: ["onnxscript"])
    with pytest.raises(UserError, match=r"the engine onnx needs onnxscript: pip install 'exitkit\[onnx\]'"):
        prepare(network, "onnx")

    def fails(*_, **__):
        raise RuntimeError("no C++ compiler\nwas found")

    monkeypatch.setattr(engines.torch, "compile", lambda *_, **__: fails)
    with pytest.raises(UserError, match=r"torch can't compile the network: RuntimeError: no C\+\+ compiler was found"):
        prepare(network, "compiled")
