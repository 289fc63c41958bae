"""Block-dependent losses against blocks run again on detached inputs, and against joint training."""

import copy

import pytest
import torch
import torch.nn.functional as F

import exitkit
from exitkit.errors import UserError

from toy import batches, chain, exit_gradients, sgd


def run_of(name, network, **settings):
    return exitkit.Run.local(network, exitkit.build_strategy(name, **settings), sgd(network))


def gradients_of(network, batch, name="bdl", **settings):
    """What a step hands to the optimiser: {name: gradient or None}."""
    run = run_of(name, network, **settings)
    run.train_step(batch)
    return {key: None if p.grad is None else p.grad.clone() for key, p in network.named_parameters()}


def rerun_gradients(network, x, y, starts):
    """Exit k's loss on stages starts[k]..k run again on a detached input: the gradients, summed over the exits."""
    for parameter in network.parameters():
        parameter.grad = None
    for k, start in enumerate(starts):
        state = x
        with torch.no_grad():
            for stage in network.stages[:start]:
                state = stage(state)
        for stage in network.stages[start : k + 1]:
            state = stage(state)
        F.cross_entropy(network.heads[k](state), y).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters()}


@pytest.mark.parametrize(
    ("settings", "starts"),
    [
        ({"window": 3, "final": False}, (0, 0, 0, 1, 2, 3, 4)),  # the released setting of CIFAR
        ({"window": 3}, (0, 0, 0, 1, 2, 3, 0)),
        ({"window": 1, "final": False}, (0, 1, 2, 3, 4, 5, 6)),
        ({"window": 2}, (0, 0, 1, 2, 3, 4, 0)),
        ({"groups": (3, 4), "final": False}, (0, 0, 0, 3, 3, 3, 3)),
        ({"groups": (1, 2, 4)}, (0, 1, 1, 3, 3, 3, 0)),
    ],
)
def test_each_exit_trains_what_a_block_run_again_on_a_detached_input_would(settings, starts):
    batch = batches(1)[0]
    expected = rerun_gradients(chain(7), *batch, starts)
    found = gradients_of(chain(7), batch, **settings)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-12, atol=1e-16), name


def test_the_gradients_of_msdnets_scales_are_those_of_the_exits_that_may_train_them():
    x, y = torch.randn(4, 1, 16, 16).double(), torch.tensor([0, 3, 5, 9])
    network = exitkit.build_network("msdnet-tiny").double()
    rows = exit_gradients(network, x, y)
    found = gradients_of(network, (x, y), window=2, final=False)
    for name, gradient in found.items():
        part, number = name.split(".")[0], int(name.split(".")[1])
        exits = [number] if part == "heads" else range(number, min(number + 2, 4))
        terms = [rows[k][name] for k in exits if rows[k][name] is not None]
        assert (gradient is None) == (not terms), name
        assert gradient is None or torch.allclose(gradient, sum(terms), rtol=1e-10, atol=1e-15), name


@pytest.mark.parametrize("settings", [{"window": 4}, {"window": 9, "final": False}, {"groups": (4,)}])
def test_with_a_window_of_all_exits_it_is_joint_training(settings):
    batch = batches(1)[0]
    joint = gradients_of(chain(4), batch, "joint")
    for name, gradient in gradients_of(chain(4), batch, **settings).items():
        assert torch.allclose(gradient, joint[name], rtol=1e-12, atol=1e-16), name


@pytest.mark.parametrize("exits", [1, 2])
def test_few_exits(exits):
    batch = batches(1)[0]
    joint = gradients_of(chain(exits), batch, "joint")
    local = gradients_of(chain(exits), batch, window=1, final=False)
    same = {name for name, gradient in local.items() if torch.allclose(gradient, joint[name], rtol=1e-12)}
    assert same == {name for name in joint if exits == 1 or not name.startswith("stages.0")}


def test_exit_weights_count_and_an_exit_of_weight_zero_trains_nothing():
    batch = batches(1)[0]
    rows = exit_gradients(chain(3), *batch)
    found = gradients_of(chain(3), batch, "bdl+joint", window=2, final=False, weights=(0.0, 2.0, 0.5))
    assert all(found[f"heads.0.classify.{each}"] is None for each in ("weight", "bias"))
    for name, factors in {"stages.0.1.weight": (0, 2, 0), "stages.1.1.weight": (0, 2, 0.5)}.items():
        expected = sum(a * row[name] for a, row in zip(factors, rows, strict=True) if a)
        assert torch.allclose(found[name], expected, rtol=1e-12)


def test_a_backward_pass_covers_the_stages_of_its_window_alone():
    visited = []
    network = chain(4)

    def watch(index):
        def hook(module, inputs, output):
            output.register_hook(lambda gradient: visited.append(index))

        return hook

    for index, stage in enumerate(network.stages):
        stage.register_forward_hook(watch(index))
    gradients_of(network, batches(1)[0], window=2, final=False)
    # What stage i hands on has a gradient for the exits i and i + 1, and for no later one.
    assert [visited.count(index) for index in range(4)] == [2, 2, 2, 1]


def test_released_self_distillation_is_the_composition_with_kd_and_exit_weights():
    # Early exits: CE + kappa KL, without T^2; kd: (1 - w) CE + w T^2 KL, so w = kappa / (kappa + T^2).
    kappa, temperature = 0.3, 1.5
    weight = kappa / (kappa + temperature**2)
    x, y = batches(1)[0]
    settings = {"kd.weight": weight, "temperature": temperature, "weights": (1 / (1 - weight),) * 2 + (1.0,)}
    found = gradients_of(chain(3), (x, y), "bdl+kd+joint", window=3, **settings)
    network = chain(3)
    logits = network(x).logits
    teacher = (logits[-1].detach() / temperature).softmax(1)
    loss = F.cross_entropy(logits[-1], y)
    for early in logits[:-1]:
        divergence = F.kl_div((early / temperature).log_softmax(1), teacher, reduction="batchmean")
        loss = loss + F.cross_entropy(early, y) + kappa * divergence
    loss.backward()
    for name, parameter in network.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-10, atol=1e-15), name


def test_the_parameters_of_a_link_are_trained_by_every_exit_that_reads_them():
    batch = batches(1)[0]
    torch.manual_seed(0)
    network = chain(3, batchnorm=True)
    exitkit.build_strategy("isc").adapt(network)
    links = [name for name, _ in network.named_parameters() if name.startswith("link.")]
    plain = copy.deepcopy(network)
    joint, local = gradients_of(plain, batch, "joint"), gradients_of(network, batch, window=1, final=False)
    assert links
    for name in links:
        assert torch.allclose(local[name], joint[name], rtol=1e-10, atol=1e-15), name


def test_it_composes_with_a_tap_and_resumes_to_the_same_bits():
    run = run_of("ge+bdl", chain(3, batchnorm=True))
    run.strategy.train_epoch(run, batches(2))
    again = run_of("ge+bdl", chain(3, batchnorm=True, seed=5))
    again.load_state_dict(copy.deepcopy(run.state_dict()))
    for each in (run, again):
        each.strategy.train_epoch(each, batches(2, seed=3))
    ends = [each.network.state_dict() for each in (run, again)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_impossible_values_are_refused():
    for settings in ({"window": 0}, {"groups": ()}, {"groups": (2, 0)}):
        with pytest.raises(UserError, match=next(iter(settings))):
            exitkit.build_strategy("bdl", **settings)
    with pytest.raises(UserError, match=r"groups is \(2, 2\); expected a sum of 3"):
        exitkit.build_strategy("bdl", groups=(2, 2)).adapt(chain(3))
