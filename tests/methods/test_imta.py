"""IMTA: the paths, the distillation and the two phases, against what the paper says and by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import exitkit
from exitkit.errors import UserError
from exitkit.training.phase import BegunPhase

from toy import batches, chain, sgd


def second_phase(network, **settings):
    """The network after a step of the first phase, and a run of the second one, as training sets both up."""
    torch.manual_seed(3)
    first, second = exitkit.build_strategy("imta", **settings).phases(10, network.num_exits)
    begin = exitkit.Run.local(network, first.strategy, sgd(network))
    begin.strategy.train_epoch(begin, batches(2))
    names = {name for name, _ in network.named_parameters()}
    modules = {name for name, _ in network.named_modules()}
    second.strategy.adapt(network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in names)
    trained = [p for p in network.parameters() if p.requires_grad]
    run = exitkit.Run.local(network, second.strategy, torch.optim.SGD(trained, 0.1, 0.9))
    BegunPhase(second, run, {name for name, _ in network.named_modules()} - modules).train_mode()
    return run


def test_the_phases_are_the_papers_and_each_row_of_its_ablation_is_a_pair_of_values():
    network, classifiers = exitkit.build_strategy("imta").phases(300, 5)
    assert (network.epochs, classifiers.epochs) == (300, 180)
    assert (classifiers.train, classifiers.batchnorm) == ("new", "frozen")
    slots = {
        ("joint", "none"): {"phases"},
        ("ge", "none"): {"phases", "gradient tap"},
        ("joint", "isc"): {"phases", "logit link"},
        ("joint", "ofa"): {"phases", "logit link", "objective"},
        ("ge", "isc+ofa"): {"phases", "gradient tap", "logit link", "objective"},
    }
    for (first, second), claimed in slots.items():
        strategy = exitkit.build_strategy("imta", first=first, second=second)
        assert strategy.claims() == claimed
        phases = strategy.phases(300, 5)
        assert len(phases) == 1 + (second != "none")
        assert phases[0].strategy.claims() == ({"gradient tap"} if first == "ge" else set())


def test_the_learned_path_is_the_papers_arithmetic():
    network, (x, _) = chain(), batches(1)[0]
    exitkit.build_strategy("isc").adapt(network)
    link = network.link
    outputs = network(x)
    p = outputs.embeddings
    expected = F.linear(p[0], link.answers[0].weight, link.answers[0].bias)
    assert torch.allclose(outputs.logits[0], expected)
    for k in (1, 2):
        linear, norm = link.paths[k - 1][0], link.paths[k - 1][1]
        hidden = F.linear(expected, linear.weight, linear.bias)
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + norm.eps).sqrt()
        both = torch.cat([p[k], (hidden * norm.weight + norm.bias).clamp(min=0)], 1)
        expected = both @ link.answers[k].weight.t() + link.answers[k].bias
        assert torch.allclose(outputs.logits[k], expected, rtol=1e-12)
    assert [layer.in_features for layer in link.answers] == [5, 10, 10]


def test_the_identity_path_adds_the_logits_of_the_exit_before():
    network, (x, _) = chain(), batches(1)[0]
    exitkit.build_strategy("isc", path="identity").adapt(network)
    outputs = network(x)
    own = [layer(e) for layer, e in zip(network.link.answers, outputs.embeddings, strict=True)]
    for k in range(3):
        assert torch.allclose(outputs.logits[k], sum(own[: k + 1]), rtol=1e-12)


@pytest.mark.parametrize("path", ["learned", "identity"])
def test_gradients_pass_the_path_only_in_the_released_variant(path):
    for variant, passes in (("paper", False), ("released", True)):
        network, (x, y) = chain(), batches(1)[0]
        exitkit.build_strategy("isc", variant=variant, path=path).adapt(network)
        loss = F.cross_entropy(network(x).logits[2], y)
        before = torch.autograd.grad(loss, network.link.answers[1].weight, allow_unused=True)[0]
        assert (before is not None) == passes


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_ofa_is_the_weighted_sum_of_both_losses(variant):
    network, batch = chain(), batches(1)[0]
    strategy = exitkit.build_strategy("ofa", variant=variant, gamma=0.3, temperature=3.0)
    run = exitkit.Run.local(network, strategy, sgd(network))
    losses = run.losses(batch)
    x, _ = batch
    logits = network(x).logits
    for k in range(3):
        own = F.cross_entropy(logits[k], batch[1], reduction="none")
        if k == 2:
            assert torch.equal(losses[k], own)
            continue
        p, q = (logits[2] / 3).softmax(1), (logits[k] / 3).softmax(1)
        divergence = (p * (p / q).log()).sum(1)
        divergence = divergence / 4 if variant == "released" else divergence
        assert torch.allclose(losses[k], 0.7 * own + 0.3 * 9 * divergence, rtol=1e-12)
        elements = F.kl_div((logits[k] / 3).log_softmax(1), p, reduction="none")
        library = elements.mean() if variant == "released" else elements.sum() / len(x)
        assert torch.allclose(losses[k].mean(), 0.7 * own.mean() + 2.7 * library, rtol=1e-12)
    # No gradient reaches the teacher: the last head's comes from its own loss alone.
    last = network.heads[2].classify.weight
    whole, own = (
        torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (sum(losses).mean(), losses[2].mean())
    )
    assert torch.allclose(whole, own, rtol=1e-12)


@pytest.mark.parametrize(("variant", "moves"), [("paper", False), ("released", True)])
def test_the_second_phase_moves_new_parts_alone_and_learns_from_the_old_last_classifier(variant, moves):
    network = chain(batchnorm=True)
    run = second_phase(network, variant=variant, first="joint", gamma=0.5)
    old = {name: value.clone() for name, value in network.state_dict().items()}
    x, y = batches(1, seed=5)[0]
    outputs = network(x)
    losses = run.strategy.exit_losses(run, outputs, (x, y))
    scale = 4 if variant == "released" else 1
    teacher = network.heads[2].classify(outputs.embeddings[2])
    wanted = 0.5 * F.cross_entropy(outputs.logits[0], y) + 0.5 / scale * F.kl_div(
        outputs.logits[0].log_softmax(1), teacher.softmax(1), reduction="batchmean"
    )
    assert torch.allclose(losses[0].mean(), wanted, rtol=1e-12)
    network.load_state_dict(old)
    run.strategy.train_epoch(run, batches(2))
    for name, value in network.state_dict().items():
        statistic = any(word in name for word in ("running", "num_batches"))
        changed = not torch.equal(value, old[name])
        if name.startswith("link."):
            # A bias before batch norm has no effect, and so no gradient.
            assert changed or name.endswith(".0.bias"), name
        else:
            assert changed == (statistic and moves), name


def test_frozen_batch_norm_is_the_trunks_and_not_the_paths():
    run = second_phase(chain(batchnorm=True), first="joint")
    modes = {name: m.training for name, m in run.network.named_modules() if isinstance(m, _BatchNorm)}
    assert {name.startswith("link.") == training for name, training in modes.items()} == {True}


def test_new_classifiers_alone_are_the_row_of_distillation():
    run = second_phase(chain(), first="joint", second="ofa")
    assert len(run.network.link.paths) == 0
    assert [layer.in_features for layer in run.network.link.answers] == [5, 5, 5]
    again = second_phase(chain(), first="joint", second="isc")
    assert type(again.strategy).__name__ == "InlineCollaboration"


def test_its_cost_is_that_of_the_released_network():
    network = exitkit.build_network("msdnet-cifar-lg5", num_classes=100)
    exitkit.build_strategy("isc").adapt(network)
    assert [row.pruned for row in exitkit.cost(network)] == [5917184, 12670976, 24553984, 40246272, 58190336]


def test_refusals():
    for settings in ({"gamma": 1.5}, {"temperature": 0.0}, {"ratio": 0.0}):
        with pytest.raises(UserError, match=next(iter(settings))):
            exitkit.build_strategy("imta", **settings)
    for methods, slot in (("boostnet+isc", "logit link"), ("imta+boostnet", "logit link"), ("kd+ofa", "objective")):
        with pytest.raises(UserError, match=slot):
            exitkit.build_strategy(methods)
    with pytest.raises(UserError, match="no released"):
        exitkit.build_strategy("imta", variant="released").phases(2, 3)[0].strategy.adapt(chain())


def test_isc_works_where_the_last_embedding_is_a_map():
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    network = exitkit.attach_exits(nn.Sequential(*layers), at=["1"], input_shape=(1, 8, 8))
    exitkit.build_strategy("isc").adapt(network)
    assert [tuple(logits.shape) for logits in network(torch.randn(5, 1, 8, 8)).logits] == [(5, 3), (5, 3)]
