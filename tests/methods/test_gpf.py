"""Global past-future exits: the equations by hand, where gradients reach, the imitation loss, cost and deployment."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import exitkit
from exitkit import ExitRule
from exitkit.errors import UserError
from exitkit.inference.adaptive import AdaptiveInference
from exitkit.inference.export.export import export
from exitkit.inference.export.programs import pieces, without_taps
from exitkit.inference.export.runner import Runner
from exitkit.methods.gpf import imitation

from toy import batches, chain, sgd


def run_of(exits=3, name="gpf", **settings):
    network = chain(exits)
    torch.manual_seed(1)
    return exitkit.Run.local(network, exitkit.build_strategy(name, **{"width": 6} | settings), sgd(network))


def by_hand(link, embeddings):
    """States s_k, predictions t_kj, and outputs y_k, from the equations."""
    exits = len(embeddings)
    linear = lambda layer, x: x @ layer.weight.t() + layer.bias  # noqa: E731
    s = [linear(link.states[k], embeddings[k]).tanh() for k in range(exits)]
    t = {(k, j): linear(link.imitators[j - 1], s[k]).tanh() for k in range(exits) for j in range(k + 1, exits)}
    y = []
    for k in range(exits):
        read = [s[j].detach() if j < k else s[k] if j == k else t[k, j] for j in range(exits)]
        r = [linear(link.answers[j], read[j]) for j in range(exits)]
        q = [linear(link.evidence[j], read[j]) for j in range(k + 1)]
        gate = linear(link.gate, (sum(q) / (k + 1)).tanh()).sigmoid()
        y.append(2 * gate * sum(r[: k + 1]) + 2 * (1 - gate) * sum(r[k + 1 :]))
    return s, t, y


@pytest.mark.parametrize("exits", [1, 2, 4])
def test_outputs_carry_and_gradients_by_hand(exits):
    run = run_of(exits)
    x, y = batches()[0]
    outputs = run.forward(x)
    states, predicted, logits = by_hand(run.network.link, outputs.embeddings)
    for ours, expected in zip(outputs.logits, logits, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-12, atol=1e-14)
    for ours, expected in zip(outputs.carry[0], states, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-12)
    assert [len(ahead) for ahead in outputs.carry[1]] == list(range(exits - 1, -1, -1))
    for (k, j), expected in predicted.items():
        assert torch.allclose(outputs.carry[1][k][j - k - 1], expected, rtol=1e-12)
    parameters = run.parameters
    for ours, expected in zip(outputs.logits, logits, strict=True):
        a, b = (
            torch.autograd.grad(F.cross_entropy(z, y), parameters, retain_graph=True, allow_unused=True)
            for z in (ours, expected)
        )
        for one, other in zip(a, b, strict=True):
            one, other = (torch.zeros(1) if g is None else g for g in (one, other))
            assert torch.allclose(one.double(), other.double(), rtol=1e-10, atol=1e-13)


def test_the_gate_weighs_past_against_future():
    run = run_of()
    x = batches()[0][0]
    gate = run.network.link.gate
    outputs = {}
    for side in (1e4, -1e4):
        with torch.no_grad():
            gate.weight.zero_()
            gate.bias.fill_(side)
        outputs[side] = run.forward(x).logits
    imitator = run.network.link.imitators[0]
    for side, reads in ((1e4, False), (-1e4, True)):
        gradient = torch.autograd.grad(outputs[side][0].sum(), imitator.weight, retain_graph=True)[0]
        assert bool(gradient.abs().sum() > 0) == reads
    assert torch.equal(outputs[-1e4][2], torch.zeros_like(outputs[-1e4][2]))  # the last exit has no future


def test_with_one_exit_an_open_gate_is_a_linear_layer_on_its_state():
    run = run_of(1)
    x = batches()[0][0]
    link = run.network.link
    with torch.no_grad():
        link.gate.weight.zero_()
        link.gate.bias.zero_()  # the gate is 1/2, and 2 gate = 1
    outputs = run.forward(x)
    state = torch.tanh(F.linear(outputs.embeddings[0], link.states[0].weight, link.states[0].bias))
    assert torch.allclose(outputs.logits[0], F.linear(state, link.answers[0].weight, link.answers[0].bias), rtol=1e-13)
    run.train_step(batches()[0])
    assert all(value.isfinite().all() for value in run.network.state_dict().values())


def test_an_exits_loss_reaches_earlier_states_not_at_all():
    run = run_of(4)
    losses, outputs = run.losses_and_outputs(batches()[0])
    states = outputs.carry[0]
    for k, loss in enumerate(losses):
        for j, state in enumerate(states):
            gradient = torch.autograd.grad(loss.mean(), state, retain_graph=True, allow_unused=True)[0]
            # Not to later ones either: what the imitation compares with is held fixed.
            assert (gradient is not None) == (j == k), (k, j)


def test_the_loss_is_the_weighted_cross_entropies_and_the_mean_imitation():
    run = run_of(4)
    x, y = batches()[0]
    losses, outputs = run.losses_and_outputs((x, y))
    states, predicted, logits = by_hand(run.network.link, outputs.embeddings)
    expected = sum((k + 1) * F.cross_entropy(z, y) for k, z in enumerate(logits)) / 10
    rows = []
    for k in range(3):
        angles = [
            (predicted[k, j] * states[j]).sum(1) / (predicted[k, j].norm(dim=1) * states[j].norm(dim=1))
            for j in range(k + 1, 4)
        ]
        rows.append(sum((1 - angle).mean() for angle in angles) / len(angles))
    expected = expected + sum(rows) / 3
    loss = sum(weight * loss.mean() for weight, loss in zip(run.weights(), losses, strict=True))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_imitation_is_zero_where_the_directions_agree_and_only_there():
    states = [torch.randn(5, 6, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(2)]
    assert torch.allclose(imitation([3 * s for s in states], states), torch.zeros(5, dtype=torch.float64), atol=1e-15)
    assert torch.allclose(imitation([-s for s in states], states), torch.full((5,), 2.0, dtype=torch.float64))
    assert imitation([states[0], states[1].flip(0)], states).max() > 0.1


def test_the_gradient_of_the_whole_loss_is_that_of_finite_differences():
    run = run_of()
    batch = batches()[0]

    def loss():
        return sum(w * part.mean() for w, part in zip(run.weights(), run.losses(batch), strict=True))

    parameter = run.network.link.imitators[1].weight
    gradient = torch.autograd.grad(loss(), parameter)[0]
    for row, column in ((0, 0), (2, 3), (5, 1)):
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter[row, column] += step
                ends.append(loss().item())
                parameter[row, column] -= step
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(gradient[row, column].item(), rel=1e-6, abs=1e-10)


def test_the_cost_of_an_exit_counts_its_state_its_predictions_and_its_classifiers():
    network = chain(4)
    plain = [row.macs for row in exitkit.cost(network)]
    exitkit.build_strategy("gpf", width=6).adapt(network)
    exits, width, classes = 4, 6, 4
    added = 0
    for k, (before, row) in enumerate(zip(plain, exitkit.cost(network), strict=True)):
        added += 5 * width + (exits - 1 - k) * width**2 + (exits + k + 1) * width * classes + classes**2
        assert row.macs - before == added


@pytest.mark.parametrize("backbone", ["msdnet-tiny", "sdn-tiny"])
def test_stage_programs_carry_states_and_predictions(backbone):
    network = exitkit.build_network(backbone, num_classes=5, input_shape=(1, 16, 16))
    exitkit.build_strategy("gpf", width=8).adapt(network)
    network.eval()
    x = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        expected, given = network(x).logits, [x]
        for index, piece in enumerate(pieces(without_taps(network), x)):
            assert len(given) == len(piece.names[0])
            logits, *given = piece.module(*given)
            assert torch.equal(logits, expected[index])
    assert not given


def test_an_export_answers_and_skips_as_the_network_does(tmp_path):
    network = exitkit.build_network("sdn-tiny", num_classes=5, input_shape=(1, 16, 16))
    exitkit.build_strategy("gpf", width=8).adapt(network)
    network.eval()
    x = torch.randn(12, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        confidence = network(x).logits[0].softmax(1).max(1).values
    later = network.num_exits - 1
    rule = ExitRule("confidence", (confidence.median().item() + 1e-6, *[2.0] * (later - 1), -math.inf))
    about = {"mean": [0.5], "std": [0.25], "class_names": list("abcde")}
    export(network, rule, tmp_path / "out", x, about, "torch-export")
    logits, exits = Runner(tmp_path / "out")(x.numpy())
    expected = AdaptiveInference(network, rule)(x)
    assert set(exits.tolist()) == {0, later} and (exits == expected.exits.numpy()).all()
    assert torch.allclose(torch.from_numpy(logits), expected.logits, rtol=1e-4, atol=1e-5)


def test_rows_of_the_carry_may_be_dropped_as_samples_leave():
    network = run_of(3).network.eval()
    x = batches(1, size=8)[0][0]
    whole = network(x).logits
    state, carry, rows = x, None, torch.arange(8)
    for index in range(3):
        output, state, carry = network.step(index, state, carry)
        assert torch.allclose(output.logits, whole[index][rows], rtol=1e-12)
        keep = torch.arange(len(rows)) % 2 == 0
        state, carry = (torch.utils._pytree.tree_map(lambda t: t[keep], tree) for tree in (state, carry))  # noqa: B023
        rows = rows[keep]


@pytest.mark.parametrize("name", ["gpf", "gpf+ge", "gpf+l2w", "gpf+metagf", "gpf+pcgrad"])
def test_it_composes_with_taps_and_updates_and_goes_on_to_the_same_bits(name):
    run = run_of(name=name)
    run.train_epoch(batches(2, size=8))
    state = copy.deepcopy(run.state_dict())
    again = run_of(name=name)
    again.load_state_dict(state)
    for each in (run, again):
        each.position.epochs, each.position.epoch = 2, 1
        each.train_epoch(batches(2, size=8, seed=3))
    for key, value in run.network.state_dict().items():
        assert value.isfinite().all() and torch.equal(value, again.network.state_dict()[key])


def test_refusals():
    with pytest.raises(UserError, match="width is 0"):
        exitkit.build_strategy("gpf", width=0)
    for method in ("gpf+kd", "gpf+adaloss", "gpf+isc"):
        with pytest.raises(UserError, match="both claim the slot"):
            exitkit.build_strategy(method)
