"""Runs in a loop of one's own: what they leave as it is, and what is said of mistakes."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import exitkit
from exitkit.errors import NonFiniteError, Note, UserError

from toy import batches, chain, sgd


def local(network=None, method="joint", optimizer=None, **options):
    network = chain() if network is None else network
    return exitkit.Run.local(network, method, optimizer or sgd(network), **options)


def test_a_local_run_leaves_the_callers_random_state_as_it_is():
    network = chain()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for method in ("joint", "metagf", "l2w"):
        local(network, method)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_method_adds_depends_on_the_seed_of_the_run_alone():
    added = []
    for outside, seed in ((1, 0), (2, 0), (1, 3)):
        network = chain()
        torch.manual_seed(outside)
        local(network, "isc", seed=seed)
        added.append({name: tensor for name, tensor in network.state_dict().items() if name.startswith("link")})
    assert added[0] and all(torch.equal(tensor, added[1][name]) for name, tensor in added[0].items())
    assert not all(torch.equal(tensor, added[2][name]) for name, tensor in added[0].items())


def test_training_and_loading_leave_the_callers_process_as_it_was(tmp_path):
    from toy import FEW

    torch.manual_seed(7)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    run = exitkit.train({"method": "isc", "epochs": 1, "threads": threads + 1, **FEW}, tmp_path)
    exitkit.load_network(run)
    exitkit.evaluate(run)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


# --- the optimiser


def without_heads(network):
    return torch.optim.SGD(network.stages.parameters(), 0.1)


def of_a_copy(network):
    return sgd(copy.deepcopy(network))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (without_heads, r"lacks 6 of the network's parameters, such as heads\.0\.classify\.weight; expected SGD\(netw"),
        (of_a_copy, r"has 12 parameters that are not the network's; expected SGD\(network\.parameters\(\), \.\.\.\)"),
        (lambda network: torch.optim.LBFGS(network.parameters()), "LBFGS computes losses several times in a step"),
        (lambda network: torch.optim.SparseAdam(network.parameters()), "SparseAdam is for sparse gradients"),
        (lambda network: network.parameters(), "optimizer is a generator; expected one of torch.optim"),
    ],
)
def test_an_optimiser_of_other_parameters_is_refused(make, words):
    network = chain()
    with pytest.raises(UserError, match=words):
        exitkit.Run.local(network, "joint", make(network))


def test_frozen_parameters_may_be_left_out_of_the_optimiser():
    network = chain()
    network.stages.requires_grad_(False)
    run = local(network, optimizer=torch.optim.SGD(network.heads.parameters(), 0.1))
    before = copy.deepcopy(network.state_dict())
    run.train_epoch(batches())
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if name.startswith("heads.")}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((nn.Linear(2, 2), "joint"), "network is a Linear; expected a MultiExitNetwork"),
        ((chain().requires_grad_(False), "joint"), "all parameters of the network are frozen"),
        ((chain(), 3), "strategy is 3; expected the name of a method"),
        ((chain(), "joint", {"precision": "half"}), "unknown precision 'half'"),
        ((chain(), "joint", {"layout": "nhwc"}), "unknown layout 'nhwc'"),
        ((chain(), "joint", {"epochs": 1.5}), "epochs is 1.5"),
        ((chain(), "joint", {"epochs": True}), "epochs is True"),
    ],
)
def test_other_arguments_are_checked(arguments, words):
    network, method, *options = arguments
    with pytest.raises(UserError, match=words):
        exitkit.Run.local(network, method, sgd(network), **(options[0] if options else {}))


# --- a method that trains a part of the network


@pytest.mark.parametrize("method", ["heads", "heads+ofa"])
@pytest.mark.parametrize("parameters", [nn.Module.parameters, lambda network: network.heads.parameters()])
def test_heads_hold_the_trunk_fixed_as_in_exitkit_train(method, parameters):
    network = chain(batchnorm=True)
    network.stages[0].append(nn.Dropout(0.5))
    run = local(network, method, torch.optim.SGD(parameters(network), 0.1, momentum=0.9, weight_decay=0.1))
    before = copy.deepcopy(network.state_dict())
    run.train_epoch(batches())
    run.train_step(batches()[0])
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and moved <= {name for name in before if name.startswith("heads.")}
    assert {name for name, _ in network.named_parameters() if name.startswith("heads.")} <= moved
    modes = {name.split(".")[0]: module.training for name, module in network.named_modules() if name}
    assert modes["heads"] and not network.stages[0][-1].training and network.training


def test_heads_of_a_network_whose_heads_are_frozen_are_refused():
    network = chain()
    network.heads.requires_grad_(False)
    with pytest.raises(UserError, match="phase heads of method heads has no parameter to train"):
        local(network, "heads")


# --- the mode


def test_an_epoch_trains_in_training_mode_and_a_step_asks_for_it():
    network = chain(batchnorm=True).eval()
    run = local(network)
    with pytest.raises(UserError, match=r"evaluation mode; call network\.train\(\)"):
        run.train_step(batches()[0])
    before = copy.deepcopy(network.state_dict())
    run.train_epoch(batches())
    assert network.training
    assert all(not torch.equal(v, before[k]) for k, v in network.state_dict().items() if k.endswith("running_mean"))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("how", ["step", "epoch"])
def test_batch_norm_of_a_frozen_part_keeps_its_statistics(how, affine):
    network = chain(batchnorm=True)
    if not affine:
        for stage in network.stages:
            stage[2] = nn.BatchNorm1d(5, affine=False).double()
    network.stages[0].requires_grad_(False)
    run = local(network)
    before = copy.deepcopy(network.state_dict())
    run.train_step(batches()[0]) if how == "step" else run.train_epoch(batches())
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"stages.1.2.running_mean", "stages.2.2.running_var"} <= moved
    assert not any(name.startswith("stages.0.") for name in moved)
    assert network.stages[1][2].training and not network.stages[0][2].training


def test_a_module_that_the_caller_put_into_evaluation_mode_stays_there():
    network = chain(batchnorm=True)
    network.stages[1].eval()
    before = network.stages[1][2].running_mean.clone()
    local(network).train_epoch(batches())
    assert torch.equal(network.stages[1][2].running_mean, before)


# --- batches

IMAGES, LABELS = batches(1)[0]


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((IMAGES, LABELS.int()), r"labels are torch\.int32; expected torch\.int64 \(labels\.long\(\)\)"),
        ((IMAGES, LABELS.float()), r"labels are torch\.float32"),
        ((IMAGES, LABELS[:, None]), r"labels have the shape \[6, 1\]; expected \[B\].*labels\.squeeze\(1\)"),
        ((IMAGES, nn.functional.one_hot(LABELS, 4)), r"labels have the shape \[6, 4\].*labels\.argmax\(1\)"),
        ((IMAGES, LABELS.numpy()), "labels are a ndarray; expected a tensor"),
        ((IMAGES, LABELS + 1), "labels are 1 to 4; expected classes 0 to 3"),
        ((IMAGES, torch.full((6,), -100)), "labels are -100 to -100; expected classes 0 to 3"),
        ((IMAGES[:5], LABELS), "a batch has 5 images and 6 labels"),
        ((IMAGES[:0], LABELS[:0]), "a batch has 0 images and 0 labels; expected as many of both, at least one"),
        ((IMAGES.float(), LABELS), r"images are torch\.float32; expected torch\.float64, as the network"),
        (((IMAGES * 255).to(torch.uint8), LABELS), r"images are torch\.uint8.*images\.float\(\) / 255"),
        ((IMAGES.numpy(), LABELS), r"images are a ndarray; expected a tensor \[B, 1, 2, 2\] of torch\.float64"),
        ((IMAGES[0], LABELS[:1]), r"images have the shape \[1, 2, 2\]; expected \[B, 1, 2, 2\] \(of a single image"),
        ((IMAGES[:, 0], LABELS), r"images have the shape \[6, 2, 2\]; expected \[B, 1, 2, 2\]$"),
        ((IMAGES / 0, LABELS), "images have values that are NaN or infinite"),
        (IMAGES, r"a batch is a Tensor; expected a pair \(images, labels\)"),
        ((IMAGES,), r"a batch is a tuple of 1; expected a pair"),
        ({"images": IMAGES, "labels": LABELS}, "a batch is a dict; expected a pair"),
    ],
)
def test_a_wrong_batch_is_said_in_one_line_and_changes_nothing(batch, words):
    for method in ("joint", "l2w"):
        network = chain()
        run = local(network, method)
        before = copy.deepcopy(network.state_dict())
        for call in (lambda run=run: run.train_step(batch), lambda run=run: run.train_epoch([batch])):
            with pytest.raises(UserError, match=words) as caught:
                call()
            assert "\n" not in str(caught.value)
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_images_that_are_not_finite_do_not_reach_the_running_statistics():
    network = exitkit.build_network("msdnet-tiny")
    run = exitkit.Run.local(network, "joint", torch.optim.SGD(network.parameters(), lr=0.1))
    images, labels = torch.rand(4, 1, 16, 16), torch.arange(4)
    before = copy.deepcopy(network.state_dict())
    for call in (lambda: run.train_step((images / 0, labels)), lambda: run.train_epoch([(images / 0, labels)])):
        with pytest.raises(UserError, match="images have values that are NaN or infinite"):
            call()
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    run.train_step((images, labels))


@pytest.mark.parametrize("batch", [IMAGES, None, (IMAGES,)])
def test_losses_of_a_wrong_batch_are_one_line(batch):
    with pytest.raises(UserError, match=r"a batch is a .*; expected a pair \(images, labels\)"):
        local(chain(), "joint").losses(batch)


@pytest.mark.parametrize("seed", [-1, "first", True, 1.5])
def test_a_wrong_seed_is_one_line(seed):
    network = chain()
    with pytest.raises(UserError, match=f"seed is {seed!r}; expected a whole number of at least 0"):
        exitkit.Run.local(network, "joint", torch.optim.SGD(network.parameters(), lr=0.1), seed=seed)


@pytest.mark.parametrize("method", ["joint", "metagf"])
def test_an_epoch_reads_lists_loaders_and_generators_alike(method):
    images, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    ends = []
    for given in (
        batches(),
        tuple(batches()),
        (batch for batch in batches()),
        iter(batches()),
        DataLoader(TensorDataset(images, labels), batch_size=6),
    ):
        network = chain()
        local(network, method).train_epoch(given)
        ends.append(network.state_dict())
    assert all(torch.equal(end[name], tensor) for end in ends[1:] for name, tensor in ends[0].items())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (IMAGES, "batches are a Tensor; expected a list of pairs"),
        (3, "batches are a int; expected a list or a DataLoader of pairs"),
        ([], "no batches"),
        (iter(()), "no batches"),
        (TensorDataset(IMAGES, LABELS), r"images have the shape \[1, 2, 2\].*of a single image"),
    ],
)
def test_what_is_no_list_of_batches_is_refused(given, words):
    with pytest.raises(UserError, match=words):
        local().train_epoch(given)


def test_a_batch_of_one_image_is_too_small_for_batch_norm():
    with pytest.raises(UserError, match=r"a batch of one image; expected more \(drop_last=True\)"):
        local(chain(batchnorm=True)).train_step((IMAGES[:1], LABELS[:1]))
    local().train_step((IMAGES[:1], LABELS[:1]))


def test_weights_that_are_not_finite_are_named():
    network = chain()
    with torch.no_grad():
        network.stages[1][1].weight[0] = np.nan
    with pytest.raises(NonFiniteError, match=r"stages\.1\.1\.weight of the network is not finite; try a lower"):
        local(network).train_step((IMAGES, LABELS))


# --- what a custom loop can't do, and what differs from step to step


def test_a_method_of_whole_epochs_makes_no_single_step():
    nested = exitkit.build_strategy("kd+imta", first="ge+metagf", second="none").phases(1, 3)[0].strategy
    for method, label in (("metagf", "metagf"), ("ge+metagf", "ge+metagf"), (nested, "Composition")):
        run = local(method=method)
        with pytest.raises(UserError, match=rf"^{re.escape(label)} trains whole epochs; use run\.train_epoch"):
            run.train_step(batches()[0])


@pytest.mark.parametrize("method", ["imta", "separate", "mixed", "ge+separate"])
def test_phases_with_strategies_of_their_own_are_named_in_a_note(method):
    with pytest.warns(Note, match=rf"^{re.escape(method)} has phases with strategies of their own \("):
        local(method=method)


def test_a_method_whose_only_phase_has_another_strategy_trains_by_it():
    strategy = exitkit.build_strategy("imta", second="none")
    network = chain()
    local(network, strategy)
    assert [type(tap).__name__ for tap in network.taps] == ["EquilibriumTap"]


def test_each_single_step_has_its_own_random_numbers_and_the_schedule_stays():
    drawn = []

    class Draws(exitkit.TrainingStrategy):
        slots = frozenset({"update"})

        def train_step(self, run, batch):
            with run.seeded("numbers"):
                drawn.append(torch.rand(3))

    for _ in range(2):
        run = local(method=Draws(), epochs=3)
        for batch in batches()[:2]:
            run.train_step(batch)
        assert run.position.fraction == 0 and run.position.batch == 2
    first, second, *again = drawn
    assert not torch.equal(first, second)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])


def test_a_missing_teacher_is_named():
    run = local(method=exitkit.build_strategy("kd", teacher="joint"))
    with pytest.raises(UserError, match=r"no teacher '.*'; set run\.teachers = "):
        run.train_step(batches()[0])
