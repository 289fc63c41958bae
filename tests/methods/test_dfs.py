"""Deep Feature Surgery: which exit trains which channels, against finite differences and other methods."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import exitkit
from exitkit.errors import UserError
from exitkit.methods.dfs import channel_axis
from exitkit.networks import Head, MultiExitNetwork
from exitkit.networks.attach.heads import HeadChoice

from toy import batches, chain, exit_gradients, sgd


def adapted(network, **settings):
    exitkit.build_strategy("dfs", **settings).adapt(network)
    return network


def run_of(name, network, **settings):
    return exitkit.Run.local(network, exitkit.build_strategy(name, **settings), sgd(network))


def equal(first, second):
    others = dict(second.state_dict())
    return all(torch.equal(value, others[name]) for name, value in first.state_dict().items())


def boundary_gradients(network, x, y):
    """The gradient [B, c] of exit j's mean loss at what stage k hands on: {(j, k)}."""
    outputs = []
    handles = [stage.register_forward_hook(lambda module, inputs, out: outputs.append(out)) for stage in network.stages]
    logits = network(x).logits
    for handle in handles:
        handle.remove()
    found = {}
    for j, z in enumerate(logits):
        rows = torch.autograd.grad(F.cross_entropy(z, y), outputs, retain_graph=True, allow_unused=True)
        found |= {(j, k): row for k, row in enumerate(rows)}
    return found


def frozen_difference(network, x, y, j, k, index, size=1e-5):
    """d L_j / d x_k[:, index] by central differences, while what the exits own behind stages k.. keeps its values."""

    def loss(shift):
        state = x
        with torch.no_grad():
            for at, stage in enumerate(network.stages[: j + 1]):
                state = stage(state)
                owned = baseline[at][:, 3:]
                if at == k:
                    state = state.clone()
                    state[:, index] += shift
                if k < at < j:
                    state = torch.cat([state[:, :3], owned], 1)
            return F.cross_entropy(network.heads[j](state), y)

    baseline, state = [], x
    with torch.no_grad():
        for stage in network.stages:
            state = stage(state)
            baseline.append(state)
    return (loss(size) - loss(-size)) / (2 * size)


@pytest.mark.parametrize("head", ["whole", "partition"])
def test_later_exits_train_the_shared_channels_alone_and_as_if_all_others_were_constants(head):
    network, (x, y) = chain(4, width=5), batches(1)[0]
    adapted(network, beta=0.6, head=head)  # 3 of 5 channels
    gradients = boundary_gradients(network, x, y)
    for (j, k), gradient in gradients.items():
        if j < k:
            assert gradient is None
        elif j > k:
            assert torch.equal(gradient[:, 3:], torch.zeros_like(gradient[:, 3:]))
            # A head of a later exit that reads its shared part without training it passes nothing to x_k from there.
            if head == "whole" or j == 3:
                for index in range(3):
                    expected = frozen_difference(network, x, y, j, k, index)
                    assert gradient[:, index].sum().item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-11)
        elif head == "partition" and k < 3:
            assert torch.equal(gradient[:, :3], torch.zeros_like(gradient[:, :3])) and gradient[:, 3:].all()
        else:
            assert gradient.all()


def test_under_partition_a_later_exit_trains_through_its_own_channels():
    # Exit 2 of 3 reads S_2 alone, whose gradient at P_1 is that of joint training with P_2 held fixed.
    network, (x, y) = chain(3, width=4), batches(1)[0]
    adapted(network)
    gradient = boundary_gradients(network, x, y)[1, 0]
    plain = chain(3, width=4)
    first = plain.stages[0](x).detach().requires_grad_()
    second = plain.stages[1](first)
    view = torch.cat([second[:, :2].detach(), second[:, 2:]], 1)
    F.cross_entropy(plain.heads[1](view), y).backward()
    assert torch.allclose(gradient[:, :2], first.grad[:, :2], rtol=1e-13, atol=0)
    assert not gradient[:, 2:].any()


@pytest.mark.parametrize("name", ["msdnet-tiny", "ranet-tiny", "sdn-tiny"])
@pytest.mark.parametrize("settings", [{}, {"head": "whole", "scope": "all"}])
def test_the_forward_pass_is_that_of_joint_training(name, settings):
    network, x = exitkit.build_network(name), torch.randn(3, 1, 16, 16)
    plain = copy.deepcopy(network)
    adapted(network, **settings)
    adapted(network, **settings)  # twice is once
    assert len(network.taps) == 1
    outputs = []
    for each in (network, plain):
        torch.manual_seed(0)  # of dropout
        outputs.append(each(x).logits)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert exitkit.cost(network) == exitkit.cost(plain)


def test_its_limits_are_joint_training_and_block_dependent_losses():
    def trained(method, **settings):
        run = run_of(method, chain(4, batchnorm=True), **settings)
        run.train_epoch(batches(3))
        return run.network

    assert equal(trained("dfs", head="whole", beta=1.0), trained("joint"))
    assert equal(trained("dfs", head="whole", beta=0.0), trained("bdl", window=1, final=False))
    assert equal(trained("dfs", head="partition", beta=0.0), trained("bdl", window=1, final=False))
    # Heads that train nothing but themselves leave the stages to the last exit.
    network = adapted(chain(3), beta=1.0)
    for index, gradients in enumerate(exit_gradients(network, *batches(1)[0])):
        reached = {name.split(".")[0] for name, gradient in gradients.items() if gradient is not None}
        assert reached == ({"heads"} if index < 2 else {"stages", "heads"})


@pytest.mark.parametrize("exits", [1, 2])
def test_the_last_boundary_is_not_partitioned(exits):
    network, plain, batch = adapted(chain(exits)), chain(exits), batches(1)[0]
    last = f"heads.{exits - 1}.classify.weight", f"stages.{exits - 1}.1.weight"
    for name in last:
        pair = [exit_gradients(each, *batch)[-1][name] for each in (network, plain)]
        assert torch.equal(*pair)
    if exits == 1:
        assert all(torch.equal(*pair) for pair in zip(network(batch[0]).logits, plain(batch[0]).logits, strict=True))


def test_it_commutes_with_gradient_equilibrium():
    ends = []
    for name in ("dfs+ge", "ge+dfs"):
        run = run_of(name, chain(4))
        run.train_epoch(batches(3))
        ends.append(run.network)
    assert equal(*ends)
    x, y = batches(1)[0]
    network = adapted(chain(3, width=4), head="whole")
    alone = exit_gradients(network, x, y)
    exitkit.build_strategy("ge").adapt(network)
    both = exit_gradients(network, x, y)
    for index in range(3):
        for name, gradient in alone[index].items():
            if gradient is not None and name.startswith("stages"):
                factor = 1 / (3 - int(name.split(".")[1]))
                assert torch.allclose(both[index][name], factor * gradient, rtol=1e-12, atol=1e-16), name


def test_the_released_code_leaves_msdnets_heads_whole_and_its_finer_scales_alone():
    x, y = torch.randn(4, 1, 16, 16).double(), torch.tensor([0, 3, 5, 9])
    network = exitkit.build_network("msdnet-tiny").double()
    plain = exit_gradients(network, x, y)
    adapted(network, variant="released")
    released = exit_gradients(network, x, y)
    for name, gradient in plain[0].items():  # exit 1 trains all that it reads
        assert (gradient is None) == (released[0][name] is None)
        assert gradient is None or torch.equal(gradient, released[0][name])
    state = network.stages[0](x)
    changed = network.taps[0].onward(network, 0, state)
    assert all(a is b for a, b in zip(state[:-1], changed[:-1], strict=True)) and len(state) > 1
    half = state[-1].shape[1] // 2
    (gradient,) = torch.autograd.grad(changed[-1].sum(), state[-1])
    assert gradient[:, :half].eq(1).all() and not gradient[:, half:].any()
    with pytest.raises(UserError, match=r"no released Deep Feature Surgery code .* custom networks"):
        adapted(chain(), variant="released")


@pytest.mark.parametrize("scope", ["coarsest", "all"])
def test_on_a_resnet_later_exits_train_the_shared_channels_alone(scope):
    x, y = torch.randn(2, 3, 32, 32).double(), torch.tensor([0, 3])
    network = exitkit.build_network("sdn-resnet56").double().eval()
    plain = network(x).logits
    adapted(network, scope=scope)
    sums = []
    handle = network.stages[0].register_forward_hook(lambda module, inputs, out: sums.append(out[1]))
    logits = network(x).logits
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(plain, logits, strict=True))
    half = sums[0].shape[1] // 2
    of_head, of_later = (
        torch.autograd.grad(F.cross_entropy(logits[k], y), sums[0], retain_graph=True, allow_unused=True)[0]
        for k in (0, -1)
    )
    assert of_later[:, :half].any() and of_head[:, half:].any()
    assert not of_head[:, :half].any()
    assert not of_later[:, half:].any()


def test_with_all_scales_partitioned_what_no_head_reads_is_trained_by_nobody():
    x, y = torch.randn(4, 1, 16, 16).double(), torch.tensor([0, 3, 5, 9])
    idle = {}
    for scope in ("coarsest", "all"):
        network = adapted(exitkit.build_network("msdnet-tiny").double(), head="whole", scope=scope)
        run = run_of("joint", network)
        run.backward(sum(loss.mean() for loss in run.losses((x, y))))
        idle[scope] = {name for name, p in network.named_parameters() if p.grad is not None and not p.grad.any()}
    assert idle["all"] - idle["coarsest"]
    assert all(name.startswith("stages") for name in idle["all"])


def test_forward_mode_agrees_with_backward():
    network, batch = chain(3, width=4), batches(1)[0]
    run = run_of("dfs", network)
    direction = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    rows = run.exit_gradients(run.losses(batch))
    tangents = run.loss_tangents(batch, direction)
    for row, tangent in zip(rows, tangents, strict=True):
        product = sum((g * v).sum() for g, v in zip(row, direction.values(), strict=True) if g is not None)
        assert torch.allclose(tangent.mean(), product, rtol=1e-12)


@pytest.mark.parametrize("head", ["whole", "partition"])
def test_without_referencing_the_other_part_is_zero_in_training_and_at_inference(head):
    network, (x, _) = adapted(chain(3, width=4), head=head, referencing=False), batches(1)[0]
    plain, state, expected = chain(3, width=4), x, []
    for index in range(3):
        view = state = plain.stages[index](state)
        if index < 2:
            view = view * torch.tensor([float(head == "whole")] * 2 + [1.0] * 2) if head == "partition" else view
            state = state * torch.tensor([1.0] * 2 + [0.0] * 2)
        expected.append(plain.heads[index](view))
    exitkit.build_strategy("dfs", head=head, referencing=False).adapt(network)  # twice is once
    assert len(network.stages[1]._forward_pre_hooks) == 1
    copied = copy.deepcopy(network)
    network.keep_features = True
    for each in (network, copied):
        for logits, truth in zip(each(x).logits, expected, strict=True):
            assert torch.allclose(logits, truth, rtol=1e-13)
        with torch.inference_mode():
            assert all(torch.equal(a.logits, b) for a, b in zip(each.iterate(x), each(x).logits, strict=True))


def test_without_referencing_features_before_pooling_are_of_the_zeroed_input_too():
    torch.manual_seed(0)
    stages = [nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1)]
    embeds = [nn.Sequential(nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()) for _ in stages]
    heads = [Head(embed, nn.Linear(3, 2), before_pooling=1) for embed in embeds]
    network = adapted(MultiExitNetwork(stages, heads, (1, 2, 2), 2), referencing=False)
    x = torch.randn(3, 1, 2, 2)
    plain = network(x)
    network.keep_features = True
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, network(x).logits, strict=True))


def test_channels_are_where_the_head_reads_them():
    network = chain(2)
    assert channel_axis(network, 0, torch.zeros(2, 3, 4, 5)) == 1
    assert channel_axis(network, 0, torch.zeros(2, 7, 3)) == 2
    assert channel_axis(network, 0, torch.zeros(2, 7)) == 1
    network.heads[0].embed.over = [1, 2]  # maps with the channels last
    assert channel_axis(network, 0, torch.zeros(2, 4, 5, 3)) == 3
    for form in ("linear", "norm", "sdn", "msdnet"):  # of maps [8, 8, 6], as those of Swin
        network.heads[0] = HeadChoice(form).make((8, 8, 6), 4, 3, "point")
        assert channel_axis(network, 0, torch.zeros(2, 8, 8, 6)) == 3
    # Half of five channels are two: Python rounds to even.
    x = torch.zeros(2, 5, requires_grad=True)
    adapted(network := chain(2))
    network.taps[0].onward(network, 0, x).sum().backward()
    assert x.grad[0].tolist() == [1, 1, 0, 0, 0]


def test_it_composes_and_resumes_to_the_same_bits():
    run = run_of("dfs+l2w", chain(3, batchnorm=True))
    run.train_epoch(batches(2, size=8))
    saved = copy.deepcopy(run.state_dict())
    again = run_of("dfs+l2w", chain(3, batchnorm=True, seed=5))
    again.load_state_dict(saved)
    for each in (run, again):
        each.strategy.train_epoch(each, batches(2, size=8, seed=3))
    assert equal(run.network, again.network)


def test_impossible_values_are_refused():
    for settings in ({"beta": -0.1}, {"beta": 1.5}, {"beta": float("nan")}, {"head": "half"}, {"scope": "finest"}):
        with pytest.raises(UserError, match=next(iter(settings))):
            exitkit.build_strategy("dfs", **settings)
    network = adapted(chain())
    with pytest.raises(UserError, match="contradicts"):
        adapted(network, beta=0.25)
