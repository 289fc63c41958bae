"""Reference implementations of methods with the computations of the published code, for comparison.

The loops are eager, in fp32 and in the contiguous layout. They share only the network's modules with exitkit: neither
its loop nor its engine nor its methods, except for the allocation of images to exits. `LOOPS` names them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exitkit.benchmarks.speed.work import Step, Work
from exitkit.methods.allocation import allocate
from exitkit.methods.l2w import LearnedWeights, weighted_losses
from exitkit.networks import MultiExitNetwork, batchnorm_parameters, map_tensors, owners
from exitkit.strategy import Batch, LocalBatch, Run


class _Rescale(torch.autograd.Function):
    """x -> x, with the gradient multiplied by `factor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def exit_logits(network: MultiExitNetwork, images: Tensor, rescaled: bool = False) -> list[Tensor]:
    """Return the logits of all exits, optionally with the gradients rescaled by Gradient Equilibrium."""
    state, outputs, exits = images, [], network.num_exits
    for index, (stage, head) in enumerate(zip(network.stages, network.heads, strict=True)):
        state = stage(state)
        view = network.view(state)
        remaining = exits - index
        outputs.append(head(_Rescale.apply(view, 1 / remaining) if rescaled else view))
        if rescaled and remaining > 1:
            factor = (remaining - 1) / remaining
            state = map_tensors(lambda tensor, factor=factor: _Rescale.apply(tensor, factor), state)
    return outputs


Objective = Callable[[MultiExitNetwork, Tensor, Tensor], Tensor]
"""(network, images, labels) -> loss."""


def joint_loss(network: MultiExitNetwork, images: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the exits' losses."""
    return sum_of([F.cross_entropy(logits, labels) for logits in exit_logits(network, images)])


def equilibrium_loss(network: MultiExitNetwork, images: Tensor, labels: Tensor) -> Tensor:
    """Return the same sum, with rescaled gradients."""
    return sum_of([F.cross_entropy(logits, labels) for logits in exit_logits(network, images, rescaled=True)])


def boosted_loss(network: MultiExitNetwork, images: Tensor, labels: Tensor) -> Tensor:
    """Return BoostNet's loss, with temperature 0.5."""
    losses, total = [], None
    for logits in exit_logits(network, images, rescaled=True):
        total = logits if total is None else logits + 0.5 * total.detach()
        losses.append(F.cross_entropy(total, labels))
    return sum_of(losses)


def distilled_loss(network: MultiExitNetwork, images: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of one-for-all distillation, with weight 0.1 and temperature 1."""
    *early, last = exit_logits(network, images)
    teacher = last.detach().softmax(1)
    losses = [
        0.9 * F.cross_entropy(logits, labels) + 0.1 * F.kl_div(logits.log_softmax(1), teacher, reduction="batchmean")
        for logits in early
    ]
    return sum_of([*losses, F.cross_entropy(last, labels)])


def sum_of(losses: Sequence[Tensor]) -> Tensor:
    """Return the sum of losses, added one by one as the published code does."""
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total


def one_backward(objective: Objective) -> Callable[[Work], Step]:
    """Return a loop of steps with one forward and one backward pass."""

    def loop(work: Work) -> Step:
        network, (images, labels) = work.build(), work.data()
        optimizer = work.optimizer(network)

        def step() -> None:
            loss = objective(network, images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    return loop


def pcgrad(work: Work) -> Step:
    """Return a step of PCGrad: one backward pass per exit, and a mean over the exits that read a parameter."""
    network, (images, labels) = work.build(), work.data()
    optimizer, parameters = work.optimizer(network), list(network.parameters())

    def gradients() -> tuple[list[Tensor], list[Tensor]]:
        """Return each exit's flat gradient [D], and whether it reads each parameter [P]."""
        flat, reads = [], []
        for logits in exit_logits(network, images):
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward(retain_graph=True)
            flat.append(torch.cat([(p.new_zeros(p.shape) if p.grad is None else p.grad).flatten() for p in parameters]))
            reads.append(torch.tensor([p.grad is not None for p in parameters]))
        return flat, reads

    def step() -> None:
        flat, reads = gradients()
        total = torch.zeros_like(flat[0])
        for index, gradient in enumerate(flat):
            projected = gradient.clone()
            for other in torch.randperm(len(flat)).tolist():
                dot = projected @ flat[other]
                if other != index and dot < 0:
                    projected -= dot / (flat[other] @ flat[other]) * flat[other]
            total += projected
        pieces = total.split([p.numel() for p in parameters])
        for parameter, piece, readers in zip(parameters, pieces, torch.stack(reads).sum(0), strict=True):
            parameter.grad = piece.view_as(parameter) / readers if readers else None
        optimizer.step()

    return step


def weights_network(exits: int) -> nn.Sequential:
    """Return the network that predicts the weights in L2W-DEN."""
    return nn.Sequential(nn.Linear(exits, 500), nn.ReLU(), nn.Linear(500, exits), nn.Tanh())


def l2w(work: Work) -> Step:
    """Return a step of L2W-DEN, whose meta-gradient is a double backward pass through a copy of the network."""
    network, (images, labels) = work.build(), work.data()
    optimizer, predictor = work.optimizer(network), weights_network(network.num_exits)
    adam = torch.optim.Adam(predictor.parameters(), 1e-4, weight_decay=1e-4)
    halves = (images[::2], labels[::2]), (images[1::2], labels[1::2])

    def losses_of(logits: Sequence[Tensor], targets: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(z, targets, reduction="none") for z in logits], 1)

    def weights_of(losses: Tensor) -> Tensor:
        predicted: Tensor = predictor(losses.detach())
        return 1 + 0.8 * (predicted - predicted.mean(1, keepdim=True))

    def meta_step(training: tuple[Tensor, Tensor], meta: tuple[Tensor, Tensor]) -> None:
        pseudo = copy.deepcopy(network)
        parameters = dict(pseudo.named_parameters())
        losses = losses_of(pseudo(training[0]).logits, training[1])
        loss = (weights_of(losses) * losses).mean(0).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
        stepped = {}
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            if gradient is not None:
                buffer = optimizer.state.get(network.get_parameter(name), {}).get("momentum_buffer", 0.0)
                stepped[name] = parameter - work.lr * (0.9 * buffer + gradient + 1e-4 * parameter)
        logits = torch.func.functional_call(pseudo, stepped, (meta[0],)).logits
        confidence = torch.stack([z.detach().softmax(1).amax(1) for z in logits], 1)
        meta_loss = (allocate(confidence, 0.75) * losses_of(logits, meta[1])).mean(0).sum()
        slopes = torch.autograd.grad(meta_loss, list(predictor.parameters()))
        for parameter, slope in zip(predictor.parameters(), slopes, strict=True):
            parameter.grad = slope
        adam.step()

    def step() -> None:
        for training, meta in (halves, halves[::-1]):
            meta_step(training, meta)
            losses = losses_of(network(training[0]).logits, training[1])
            with torch.no_grad():
                weights = weights_of(losses)
            optimizer.zero_grad()
            (weights * losses).mean(0).sum().backward()
            optimizer.step()

    return step


def metagf(work: Work, batches: int = 2) -> Step:
    """Return an epoch of Meta-GF: a branch per exit, and a fusion pass with a copy of the network per batch."""
    network, (images, labels) = work.build(), work.data()
    optimizer, exits = work.optimizer(network), range(network.num_exits)
    owned_by, equal = owners(network), batchnorm_parameters(network)
    learned = [name for name, by in owned_by.items() if len(by) > 1 and name not in equal]
    eta = {name: torch.ones(len(owned_by[name]), requires_grad=True) for name in learned}
    adam = torch.optim.Adam(eta.values(), lr=0.1)

    def branch(exit: int) -> dict[str, Tensor]:
        for _ in range(batches):
            losses = [F.cross_entropy(logits, labels) for logits in exit_logits(network, images)]
            loss = sum_of([loss if index == exit else 0.1 * loss for index, loss in enumerate(losses)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}

    def fuse(ends: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        fused = {}
        for name, by in owned_by.items():
            if name in eta:
                weights = eta[name].softmax(0)
                fused[name] = sum_of([weights[place] * ends[exit][name] for place, exit in enumerate(by)])
            else:
                fused[name] = torch.stack([ends[exit][name] for exit in by or exits]).mean(0)
        return fused

    def epoch() -> None:
        start, ends = copy.deepcopy(network.state_dict()), []
        for exit in exits:
            ends.append(branch(exit))
            network.load_state_dict(start)
            optimizer.state.clear()
        for _ in range(batches):
            fused, copied = fuse(ends), copy.deepcopy(network)
            copied.load_state_dict({name: tensor.detach() for name, tensor in fused.items()}, strict=False)
            joint_loss(copied, images, labels).backward()
            adam.zero_grad()
            gradients = {name: copied.get_parameter(name).grad for name in learned}
            torch.autograd.backward([fused[name] for name in learned], [gradients[name] for name in learned])
            adam.step()
            network.load_state_dict(dict(copied.named_buffers()), strict=False)
        with torch.no_grad():
            network.load_state_dict(fuse(ends), strict=False)

    return epoch


LOOPS: dict[str, Callable[[Work], Step]] = {
    "joint": one_backward(joint_loss),
    "ge": one_backward(equilibrium_loss),
    "boostnet": one_backward(boosted_loss),
    "ofa": one_backward(distilled_loss),
    "pcgrad": pcgrad,
    "l2w": l2w,
    "metagf": metagf,
}
"""Methods -> their loops: a step each, and an epoch of two batches for `metagf`."""


class DoubleBackward(LearnedWeights):
    """L2W-DEN with the meta-gradient by double backward through the pseudo step."""

    def _meta_gradient(self, run: Run, training: Batch, meta: Batch, number: int) -> tuple[Tensor, Tensor]:
        assert isinstance(training, LocalBatch)
        with run.seeded(f"half {number}", alike=False):
            outputs = run.functional({}, training[0], batchnorm="kept")
        losses = run.objective(outputs, training)
        predicted = self._predicted(run, losses, outputs)
        weights = self._normalised(run, predicted.detach(), training).requires_grad_()
        share = training.rank_weight
        loss = weighted_losses(run, losses, weights)
        loss = loss.nan_to_num() if share == 0 else loss * share
        gradients = torch.autograd.grad(loss, run.parameters, create_graph=True, allow_unused=True)
        copies = [None if gradient is None else gradient.detach().clone() for gradient in gradients]
        run._engine.ranks.average(copies)
        pseudo = run.pseudo_step(copies)
        slope = self._meta_slope(run, meta, pseudo.parameters, number)
        direction = {name: pseudo.slopes[name] * value for name, value in slope.items()}
        reached = zip(pseudo.parameters, (g for g in gradients if g is not None), strict=True)
        pairs = [(gradient, direction[name]) for name, gradient in reached if name in direction]
        changes, along = zip(*pairs, strict=True)
        rates = torch.autograd.grad(changes, weights, along, retain_graph=True)[0]
        mean = weights.mean(0).sum()
        mean = mean.nan_to_num() if share == 0 else mean * share
        return predicted, rates / torch.autograd.grad(mean, weights)[0]  # for one image
