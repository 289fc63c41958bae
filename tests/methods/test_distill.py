"""Distillation from the last, the next and all later exits, by hand and against PyTorch's own divergence."""

import pytest
import torch
import torch.nn.functional as F

import exitkit
from exitkit.errors import UserError
from exitkit.methods.distillation import distillation_losses, soft_cross_entropies

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
    refused = [{"weight": 1.5}, {"temperature": 0.0}, {"weight": -0.1}, {"weight": -0.1, "form": "cross-entropy"}]
    for settings in (*refused, {"teachers": "later", "teacher": "joint"}):
        with pytest.raises(UserError, match=next(iter(settings))):
            exitkit.build_strategy("kd", **settings)
    with pytest.raises(UserError, match=r"last \| next \| later"):
        exitkit.build_strategy("kd", teachers="first")


TEACHERS = {
    "last": lambda k, exits: [exits - 1],
    "next": lambda k, exits: [k + 1],
    "later": lambda k, e: range(k + 1, e),
}


def entropy_of(teacher, student):
    return -(teacher.softmax(1) * student.log_softmax(1)).sum(1)


@pytest.mark.parametrize("which", TEACHERS)
@pytest.mark.parametrize("form", ["divergence", "cross-entropy"])
def test_every_exits_loss_by_its_teachers(which, form):
    run = run_of(network=chain(4), weight=0.3, temperature=2.0, teachers=which, form=form)
    images, labels = batches()[0]
    logits = run.forward(images).logits
    pairs = {"last": 3, "next": 3, "later": 6}[which]
    for k, loss in enumerate(run.losses((images, labels))):
        expected = F.cross_entropy(logits[k], labels, reduction="none")
        if k < 3:
            soft = [4 * entropy_of(logits[j] / 2, logits[k] / 2) for j in TEACHERS[which](k, 4)]
            if form == "divergence":
                own = [4 * entropy_of(logits[j] / 2, logits[j] / 2) for j in TEACHERS[which](k, 4)]
                expected = 0.7 * expected + 0.3 * (sum(soft) - sum(own)) / len(soft)
            else:
                expected = expected + 0.3 * 4 / pairs * sum(soft)
        assert torch.allclose(loss, expected, rtol=1e-11), k


@pytest.mark.parametrize("which", TEACHERS)
def test_the_released_form_with_joints_weights_is_the_mean_over_exits_and_the_mean_over_pairs(which):
    settings = {"kd.weight": 0.7, "temperature": 1.0, "teachers": which, "form": "cross-entropy"}
    run = run_of("joint+kd", weights=(1 / 3,) * 3, **settings)
    images, labels = batches()[0]
    total = sum(w * loss.mean() for w, loss in zip(run.weights(), run.losses((images, labels)), strict=True))
    z = run.forward(images).logits
    soft = [F.cross_entropy(z[k], z[j].softmax(1)) for k in range(2) for j in TEACHERS[which](k, 3)]
    expected = torch.stack([F.cross_entropy(logits, labels) for logits in z]).mean() + 0.7 * torch.stack(soft).mean()
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_default_fields_are_the_method_as_it_was_bit_for_bit():
    run = run_of(weight=0.3)
    images, labels = batches()[0]
    logits = run.forward(images).logits
    losses = run.losses((images, labels))
    for k in range(2):
        label_loss = F.cross_entropy(logits[k], labels, reduction="none")
        expected = (1 - 0.3) * label_loss + 0.3 * distillation_losses(logits[k], logits[-1], 2.0)
        assert torch.equal(losses[k], expected)
    assert torch.equal(losses[2], F.cross_entropy(logits[2], labels, reduction="none"))


@pytest.mark.parametrize("form", ["divergence", "cross-entropy"])
def test_with_two_exits_all_teachers_are_the_last_and_with_one_it_is_joint_training(form):
    ends = []
    for which in TEACHERS:
        run = run_of(network=chain(2), teachers=which, form=form)
        run.train_step(batches()[0])
        ends.append(run.network.state_dict())
    for name, value in ends[0].items():
        assert all(torch.equal(value, other[name]) for other in ends[1:])
    joint, alone = run_of("joint", chain(1)), run_of("kd", chain(1), teachers="later", form=form)
    for run in (joint, alone):
        run.train_step(batches()[0])
    assert all(
        torch.equal(value, alone.network.state_dict()[name]) for name, value in joint.network.state_dict().items()
    )


@pytest.mark.parametrize("which", TEACHERS)
@pytest.mark.parametrize("form", ["divergence", "cross-entropy"])
def test_no_teacher_gets_a_gradient_from_its_pupils(which, form):
    run = run_of(network=chain(4), weight=0.9, teachers=which, form=form)
    outputs = run.forward(batches()[0][0])
    for k, loss in enumerate(run.objective(outputs, batches()[0])):
        reached = torch.autograd.grad(loss.sum(), outputs.logits, retain_graph=True, allow_unused=True)
        assert [j for j, gradient in enumerate(reached) if gradient is not None] == [k]


def test_the_later_exits_teach_as_one_exit_with_their_mean_probabilities_would():
    # H is linear in its first argument: exit k's sum is (K - 1 - k) H(mean_j p_j, z_k).
    run = run_of(network=chain(4), weight=0.5, temperature=1.0, teachers="later", form="cross-entropy")
    images, labels = batches()[0]
    z = run.forward(images).logits
    for k, loss in enumerate(run.losses((images, labels))[:3]):
        mean = torch.stack([z[j].softmax(1) for j in range(k + 1, 4)]).mean(0)
        soft = (3 - k) * F.cross_entropy(z[k], mean, reduction="none")
        assert torch.allclose(loss, F.cross_entropy(z[k], labels, reduction="none") + 0.5 * 4 / 6 * soft, rtol=1e-11)


def test_both_forms_have_the_divergences_gradient():
    student = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    soft = 2.5**2 * soft_cross_entropies(student, teacher, 2.5)
    entropy = entropy_of(teacher / 2.5, teacher / 2.5)
    assert torch.allclose(soft - 2.5**2 * entropy, distillation_losses(student, teacher, 2.5), rtol=1e-10)
    soft.sum().backward()
    expected = 2.5 * ((student / 2.5).softmax(1) - (teacher / 2.5).softmax(1))
    assert torch.allclose(student.grad, expected, rtol=1e-10) and teacher.grad is None


def test_the_cross_entropy_with_another_runs_exit_counts_every_exit_once():
    network, other = chain(3), chain(2, seed=5)
    run = run_of(network=network, teacher="joint", form="cross-entropy", weight=0.4, temperature=3.0)
    run.teachers = {"joint": other}
    images, labels = batches()[0]
    z, taught = network(images).logits, other(images).logits[-1]
    for k, loss in enumerate(run.losses((images, labels))):
        expected = F.cross_entropy(z[k], labels, reduction="none") + 0.4 * 9 * entropy_of(taught / 3, z[k] / 3)
        assert torch.allclose(loss, expected, rtol=1e-11)
