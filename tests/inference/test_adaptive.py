"""Early exit for real gives what deciding afterwards gives, for every backbone, method and rule."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import exitkit
from exitkit import ExitRule
from exitkit.errors import Note, UserError
from exitkit.inference.rule import _score_on_device
from exitkit.inference.scores import SCORES, scores
from exitkit.inference.thresholds import leave_at

NETWORKS = ("msdnet-tiny", "ranet-tiny", "sdn-tiny")
METHODS = ("joint", "boostnet", "isc")


def made(backbone, method="joint", classes=5):
    """A network in float64, where no batch's size can move a decision, with outputs that differ between exits."""
    torch.manual_seed(0)
    network = exitkit.build_network(backbone, num_classes=classes, input_shape=(1, 16, 16)).double()
    exitkit.build_strategy(method).adapt(network)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
        for _ in range(3):  # running statistics of images like these
            network.train()(images(32, seed=9))
    return network.eval()


def images(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 16, 16, generator=generator, dtype=torch.float64)


def afterwards(network, x, rule):
    """Run all exits, then decide: logits and exits as the papers' evaluation has them."""
    with torch.inference_mode():
        logits = torch.stack(network(x).logits, 1)
    sure = scores(logits.numpy(), rule.score, rule.temperatures)
    exits = torch.from_numpy(leave_at(sure, [rule.thresholds])[0])
    return logits[torch.arange(len(x)), exits], exits


def middling(network, score, calibrated=False):
    """A rule under which some images leave at every exit."""
    with torch.inference_mode():
        logits = torch.stack(network(images(64, seed=2)).logits, 1).numpy()
    heat = tuple(np.linspace(0.7, 1.6, logits.shape[1])) if calibrated else None
    limits = np.quantile(scores(logits, score, heat), 0.6, axis=0)
    return ExitRule(score, (*limits[:-1], -math.inf), heat)


def same(answers, expected):
    logits, exits = expected
    assert torch.equal(answers.exits, exits)
    torch.testing.assert_close(answers.logits, logits, rtol=1e-9, atol=1e-9)
    assert torch.equal(answers.classes, logits.argmax(1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", NETWORKS)
def test_answers_are_those_of_deciding_afterwards(backbone, method):
    network, x = made(backbone, method), images(50)
    for score in SCORES:
        rule = middling(network, score)
        expected = afterwards(network, x, rule)
        assert score == "patience" or len(expected[1].unique()) > 1
        same(exitkit.AdaptiveInference(network, rule)(x), expected)
        same(exitkit.AdaptiveInference(network, rule, buckets=(8, 16, 64))(x), expected)


@pytest.mark.parametrize("size", [1, 7, 16, 1000])
def test_a_stream_answers_the_same_in_the_same_order(size):
    network = made("ranet-tiny", "boostnet")
    rule = middling(network, "margin", calibrated=True)
    batches = [images(count, seed=count) for count in (9, 0, 4, 16, 1, 12)]
    streamed = list(exitkit.AdaptiveInference(network, rule).stream(batches, size))
    assert len(streamed) == len(batches)
    for answers, x in zip(streamed, batches, strict=True):
        same(answers, afterwards(network, x, rule))


def test_a_stream_gives_what_is_whole_before_it_asks_for_more():
    network = made("sdn-tiny")
    everybody = ExitRule("confidence", (0.0, math.inf, math.inf, -math.inf))
    asked = []

    def batches():
        for number in range(3):
            asked.append(number)
            yield images(4, seed=number)

    for number, answers in enumerate(exitkit.AdaptiveInference(network, everybody).stream(batches(), 4)):
        assert asked[-1] == number and not answers.exits.any()


def test_deep_stages_of_a_stream_see_full_batches(monkeypatch):
    network = made("msdnet-tiny")
    rule = middling(network, "confidence")
    seen = {index: [] for index in range(network.num_exits)}
    step = network.step

    def watched(index, state, carry=None):
        found = step(index, state, carry)
        seen[index].append(len(found[0].logits))
        return found

    monkeypatch.setattr(network, "step", watched)
    list(exitkit.AdaptiveInference(network, rule).stream([images(20, seed=s) for s in range(6)], 20))
    assert all(size == 20 for sizes in seen.values() for size in sizes[:-1])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.one_of(st.floats(0, 1), st.just(math.inf), st.just(-math.inf)), min_size=3, max_size=3),
    st.sampled_from(SCORES),
    st.integers(0, 9),
)
def test_any_thresholds_any_rule_any_batch(limits, score, count):
    network, x = made("sdn-tiny", "boostnet"), images(count)
    rule = ExitRule(score, (*limits, -math.inf))
    if count:
        same(exitkit.AdaptiveInference(network, rule)(x), afterwards(network, x, rule))
    else:
        assert len(exitkit.AdaptiveInference(network, rule)(x).exits) == 0


def test_no_stage_runs_that_nobody_reaches(monkeypatch):
    network = made("msdnet-tiny")
    step, ran = network.step, []
    monkeypatch.setattr(network, "step", lambda index, *rest: ran.append(index) or step(index, *rest))
    first = ExitRule("confidence", (-math.inf, 0.5, 0.5, -math.inf))
    exitkit.AdaptiveInference(network, first)(images(5))
    assert ran == [0]


@pytest.mark.parametrize("score", ["confidence", "margin", "entropy"])
@pytest.mark.parametrize("classes", [1, 2, 7])
def test_the_scores_of_other_devices_are_those_of_the_cpu(score, classes):
    logits = 3 * torch.randn(40, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = scores(logits.numpy()[:, None], score)[:, 0]
    np.testing.assert_allclose(_score_on_device(logits, score).numpy(), expected, rtol=1e-12, atol=1e-14)


RULE = ExitRule("margin", (0.5, 0.5, 0.5, -math.inf))


@pytest.mark.parametrize("score", SCORES)
def test_a_rule_comes_back_from_json(score):
    heat = None if score == "patience" else (1.0, 2.5, 0.3)
    rule = ExitRule(score, (math.inf, 0.1 + 0.2, -math.inf), heat)
    assert ExitRule.from_json(rule.to_json()) == rule


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ExitRule("confidenc", (0.5, -math.inf)), "did you mean confidence"),
        (lambda: ExitRule("margin", (0.5, 0.5)), "-infinity for the last"),
        (lambda: ExitRule("margin", (math.nan, -math.inf)), "expected one number per exit"),
        (lambda: ExitRule("margin", (0.5, -math.inf), (1.0,)), "temperatures"),
        (lambda: ExitRule("patience", (2, -math.inf), (1.0, 1.0)), "temperatures do not change the score patience"),
        (lambda: ExitRule.from_json("[]"), "not an exit rule"),
        (lambda: ExitRule.from_json('{"score": "margin"}'), "not an exit rule"),
        (lambda: exitkit.AdaptiveInference(made("sdn-tiny"), ExitRule("margin", (-math.inf,))), "expected 4"),
        (
            lambda: exitkit.AdaptiveInference(
                made("sdn-tiny"), ExitRule("margin", (0.5, 0.5, 0.5, -math.inf)), buckets=(0,)
            ),
            "at least 1",
        ),
        (lambda: exitkit.AdaptiveInference(made("sdn-tiny"), "confidence"), "rule is a str; expected an ExitRule"),
        (lambda: exitkit.AdaptiveInference(made("sdn-tiny"), ExitRule), "rule is the class ExitRule; expected an"),
        (lambda: exitkit.AdaptiveInference(made("sdn-tiny"), RULE, buckets=8), "buckets are 8; expected a list"),
        (lambda: exitkit.AdaptiveInference(made("sdn-tiny"), RULE, buckets=[1.5]), "expected a list of sizes"),
        (lambda: exitkit.AdaptiveInference(made("sdn-tiny"), RULE, engine=None), "unknown engine None; available"),
        (lambda: exitkit.AdaptiveInference(torch.nn.Linear(2, 2), RULE), "attach_exits makes one"),
        (lambda: [*exitkit.AdaptiveInference(made("sdn-tiny"), RULE).stream([], 1.5)], "size is 1.5; expected a whole"),
    ],
)
def test_mistakes_are_one_line(make, told):
    with pytest.raises(UserError, match=told):
        make()


@pytest.mark.parametrize("count", [1, 12])
def test_under_autocast_answers_are_in_the_images_precision(count):
    network, x = made("msdnet-tiny").float(), images(count).float()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = torch.stack(network(x).logits, 1).float()
        limits = scores(outputs.detach().numpy(), "confidence").mean(0)
        adaptive = exitkit.AdaptiveInference(network, ExitRule("confidence", (*limits[:-1], -math.inf)))
        answers, (streamed,) = adaptive(x), adaptive.stream([x], 4)
    assert answers.logits.dtype == streamed.logits.dtype == torch.float32
    assert len(answers.exits.unique()) > 1 or count == 1


def test_a_rule_of_outputs_meets_its_budget_on_them():
    torch.manual_seed(0)
    logits, labels = torch.randn(400, 3, 5).mul(3), torch.randint(5, (400,))
    costs = [10.0, 20.0, 40.0]
    for budget in (12.0, 25.0, 39.0):
        rule = exitkit.ExitRule.from_outputs(logits, labels, costs, budget=budget)
        left, memory = torch.full((400,), 2), None
        for index in (1, 0):
            left[rule.leaving(index, logits[:, index], memory)[0]] = index
        assert torch.tensor(costs)[left].mean().item() == pytest.approx(budget, rel=0.01)
    with pytest.warns(Note, match=r"budget 40\.0 is at least the last exit's cost \(40\); no image leaves early"):
        assert exitkit.ExitRule.from_outputs(logits, labels, costs, budget=40.0).thresholds[0] == math.inf
    level = exitkit.ExitRule.from_outputs(logits, labels, [10.0, 10.0, 40.0], budget=20.0)  # a clock may tell so
    assert level.thresholds[-1] == -math.inf
    same_as = exitkit.ExitRule.from_outputs(logits.double(), labels, costs, share=1.0)
    assert same_as == exitkit.ExitRule.from_outputs(logits, labels, costs, share=1.0)


OUTPUTS = (torch.zeros(4, 3, 5), torch.zeros(4, dtype=torch.int64), [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({0: torch.zeros(4, 5)}, r"logits have the shape \[4, 5\].*expected \[N, K, C\] and \[N\]"),
        ({1: torch.zeros(3, dtype=torch.int64)}, r"labels \[3\]"),
        ({0: torch.zeros(4, 0, 5), 2: []}, "none of them 0"),
        ({2: [1.0, 2.0]}, r"costs are \[1.0, 2.0\]; expected 3, one per exit"),
        ({2: 5.0}, "costs are 5.0; expected 3"),
        ({2: ["a", 1.0, 2.0]}, "costs are .*; expected one number per exit"),
        ({2: [1.0, 3.0, 2.0]}, "costs are .* that do not decrease"),
        ({2: [1.0, 2.0, math.nan]}, "costs are"),
    ],
)
def test_outputs_that_make_no_rule_are_refused(changed, told):
    with pytest.raises(UserError, match=told):
        exitkit.ExitRule.from_outputs(*(changed.get(n, value) for n, value in enumerate(OUTPUTS)))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (images(1)[0], r"images have the shape \[1, 16, 16\]; expected \[B, 1, 16, 16\] \(of a single image: image\[N"),
        (images(2).repeat(1, 3, 1, 1), r"images have the shape \[2, 3, 16, 16\]; expected \[B, 1, 16, 16\]$"),
        (images(2).float(), r"images are torch\.float32; expected torch\.float64, as the network$"),
        ((images(2) * 255).to(torch.uint8), r"images are torch\.uint8.*images\.float\(\) / 255, normalised as for"),
        (images(2).numpy(), r"images are a ndarray; expected a tensor \[B, 1, 16, 16\] of torch\.float64"),
    ],
)
def test_images_of_another_form_are_said_in_one_line(x, words):
    adaptive = exitkit.AdaptiveInference(made("sdn-tiny"), ExitRule("confidence", (0.5, 0.5, 0.5, -math.inf)))
    for call in (lambda: adaptive(x), lambda: list(adaptive.stream([x], 4))):
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_rules_of_outputs_take_tensors_and_arrays():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(60, 3, 4, generator=generator), torch.randint(4, (60,), generator=generator)
    given = [
        (logits, labels, [1.0, 2.0, 4.0]),
        (logits.numpy(), labels.numpy(), np.array([1.0, 2.0, 4.0])),
        (logits.double().requires_grad_(), labels.int(), (1, 2, 4)),
        (logits.tolist(), labels.tolist(), torch.tensor([1.0, 2.0, 4.0])),
    ]
    rules = [ExitRule.from_outputs(*each, budget=2.0) for each in given]
    assert rules[0].thresholds[0] < math.inf and rules == [rules[0]] * 4
    policies = [exitkit.ExitPolicy.from_outputs("mean+margin", *each, budget=2.0).to_json() for each in given[:2]]
    assert policies[0] == policies[1]


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (
            (torch.zeros(5, 4),) * 3,
            torch.zeros(5).long(),
            r"logits are a tuple of tensors; .*torch\.stack\(logits, 1\)",
        ),
        (torch.zeros(5, 3, 4), torch.full((5,), 4), r"labels 4\.\.4; expected classes 0\.\.3"),
        (
            torch.zeros(5, 3, 4),
            torch.zeros(5),
            "logits are float32, and labels float32; expected numbers, and integers",
        ),
        (np.full((5, 3, 4), "a"), np.zeros(5, int), "logits are <U1, and labels int64; expected numbers"),
        ([[1], [1, 2]], np.zeros(5, int), "logits are a list of unequal lengths"),
    ],
)
def test_outputs_of_another_form_are_said_in_one_line(logits, labels, words):
    with pytest.raises(UserError, match=words):
        ExitRule.from_outputs(logits, labels, [1.0, 2.0, 4.0], budget=2.0)
