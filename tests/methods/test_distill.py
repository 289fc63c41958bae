"""Distillation from the last exit, by hand and against PyTorch's own divergence."""

import pytest
import torch
import torch.nn.functional as F

import exitkit
from exitkit.errors import UserError
from exitkit.methods.distillation import distillation_losses

from toy import batches, chain, sgd


def run_of(name="kd", network=None, **settings):
    network = network or chain(3)
    return exitkit.Run.local(network, exitkit.build_strategy(name, **settings), sgd(network))


def test_the_divergence_by_hand_and_by_pytorch():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    for temperature in (0.5, 1.0, 3.0):
        p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
        by_hand = temperature**2 * (p * (p / q).log()).sum(1)
        losses = distillation_losses(student, teacher, temperature)
        assert torch.allclose(losses, by_hand, rtol=1e-12)
        whole = temperature**2 * F.kl_div(q.log(), p, reduction="batchmean")
        assert losses.mean().item() == pytest.approx(whole.item(), rel=1e-12)
    assert torch.allclose(distillation_losses(student, student, 2.0), torch.zeros(5, dtype=torch.float64), atol=1e-15)


def test_the_gradient_of_the_divergence():
    # T^2 d KL / d z = T (q - p).
    student = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    distillation_losses(student, teacher, 2.5).sum().backward()
    expected = 2.5 * ((student / 2.5).softmax(1) - (teacher / 2.5).softmax(1))
    assert torch.allclose(student.grad, expected, rtol=1e-10) and teacher.grad is None


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_every_exits_loss(weight):
    run = run_of(weight=weight, temperature=2.0)
    images, labels = batches()[0]
    logits = run.forward(images).logits
    losses = run.losses((images, labels))
    p = (logits[-1] / 2).softmax(1)
    for k, loss in enumerate(losses):
        expected = F.cross_entropy(logits[k], labels, reduction="none")
        if k < 2:
            divergence = 4 * (p * (p.log() - (logits[k] / 2).log_softmax(1))).sum(1)
            expected = (1 - weight) * expected + weight * divergence
        assert torch.allclose(loss, expected, rtol=1e-11)


def test_the_teacher_feels_nothing_of_what_it_teaches():
    run = run_of(weight=1.0)
    rows = run.exit_gradients(run.losses(batches()[0]))
    names = [name for name, _ in run.network.named_parameters()]
    for k in (0, 1):
        for name, gradient in zip(names, rows[k], strict=True):
            reached = name.startswith(f"heads.{k}.") or (name.startswith("stages.") and int(name.split(".")[1]) <= k)
            assert (gradient is not None) == reached, name


def test_without_weight_it_is_joint_training_and_it_composes():
    joint, distilled = run_of("joint"), run_of("kd", weight=0.0)
    for run in (joint, distilled):
        run.strategy.train_step(run, batches()[0])
    for name, value in joint.network.state_dict().items():
        assert torch.allclose(distilled.network.state_dict()[name], value, rtol=1e-13, atol=1e-16)
    run = run_of("metagf+kd", weight=0.5)
    run.strategy.train_epoch(run, batches())
    assert all(value.isfinite().all() for value in run.network.state_dict().values())


def test_impossible_values_are_refused():
    for settings in ({"weight": 1.5}, {"temperature": 0.0}, {"weight": -0.1}):
        with pytest.raises(UserError, match=next(iter(settings))):
            exitkit.build_strategy("kd", **settings)
