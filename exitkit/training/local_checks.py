"""Checks of what a custom loop gives to a local run: its network, optimiser and batches."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from exitkit.errors import NonFiniteError, UserError
from exitkit.escaping import counted
from exitkit.networks.cascade import Features, MultiExitNetwork
from exitkit.networks.inputs import check_cascade, check_images, reference_tensor
from exitkit.networks.ownership import frozen
from exitkit.strategy.base import Phase
from exitkit.strategy.run import Run
from exitkit.training.phase import hold_fixed, trains

Pair = tuple[Tensor, Tensor]


def check_network(network: Any) -> None:
    """Check that a network has exits, and parameters to train.

    Raises:
        UserError: it does not.
    """
    check_cascade(network)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError("all parameters of the network are frozen; expected one to train")


def check_optimizer(optimizer: object, network: MultiExitNetwork, phase: Phase) -> None:
    """Check that an optimiser has the parameters of a network that a phase trains, and none of other networks.

    Raises:
        UserError: it does not, or no method can use it.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"optimizer is a {type(optimizer).__name__}; expected one of torch.optim")
    kind = type(optimizer).__name__
    step = inspect.signature(type(optimizer).step).parameters.get("closure")
    if step is not None and step.default is inspect.Parameter.empty:
        raise UserError(f"{kind} computes losses several times in a step; expected an optimiser such as SGD or AdamW")
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise UserError(f"{kind} is for sparse gradients; expected an optimiser such as SGD or AdamW")
    named = dict(network.named_parameters())
    known = {id(parameter) for parameter in named.values()}
    given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if len(given - known):
        raise UserError(
            f"the optimiser has {counted(len(given - known), 'parameter')} that are not the network's; expected "
            f"{kind}(network.parameters(), ...), made after the network was changed or copied"
        )
    trained = {name for name, p in named.items() if p.requires_grad and trains(phase, name, new=False)}
    missing = [name for name, parameter in named.items() if name in trained and id(parameter) not in given]
    if missing:
        raise UserError(
            f"the optimiser lacks {len(missing)} of the network's parameters, such as {missing[0]}; expected "
            f"{kind}(network.parameters(), ...), or requires_grad=False for those that are not to be trained"
        )


def set_mode(network: MultiExitNetwork, phase: Phase, added: Collection[str]) -> None:
    """Put stages and heads that a phase does not train, and the batch norm of frozen parts, into evaluation mode.

    Raises:
        UserError: the network is in evaluation mode.
    """
    if not network.training:
        raise UserError("the network is in evaluation mode; call network.train() before run.train_step")
    hold_fixed(network, phase, added, frozen(network))


def check_batch(batch: Any, network: MultiExitNetwork) -> Pair:
    """Return the images [B, *input_shape], or their features, and the labels [B] of a batch.

    Raises:
        UserError: it is no such pair; type, shape, device or a label is wrong; a value is not finite; or it is empty.
    """
    check_pair(batch)
    images, labels = batch
    reference = reference_tensor(network)
    if not isinstance(images, Features):
        check_images(images, network.input_shape, reference)
    _check_labels(labels, network.num_classes, reference.device)
    count = len(images.tensors[0] if isinstance(images, Features) else images)
    if len(labels) != count or not count:
        raise UserError(
            f"a batch has {counted(count, 'image')} and {counted(len(labels), 'label')}; "
            "expected as many of both, at least one"
        )
    # Before the step: the running statistics of batch norm would take the values in.
    if not all(tensor.isfinite().all() for tensor in pytree.tree_leaves(images)):
        raise UserError("images have values that are NaN or infinite; expected finite numbers")
    return images, labels


def check_pair(batch: Any) -> None:
    """Check that a batch is a pair.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise UserError(f"a batch is a {type(batch).__name__}{size}; expected a pair (images, labels)")


def _check_labels(labels: Any, classes: int, device: torch.device) -> None:
    if not isinstance(labels, Tensor):
        raise UserError(f"labels are a {type(labels).__name__}; expected a tensor [B] of class numbers (int64)")
    if labels.dim() != 1:
        remedies = {1: "labels.squeeze(1)", classes: "labels.argmax(1)"}
        remedy = remedies.get(labels.shape[1]) if labels.dim() == 2 else None
        hint = f" ({remedy})" if remedy else ""
        raise UserError(f"labels have the shape {list(labels.shape)}; expected [B], the number of each class{hint}")
    if labels.dtype != torch.int64:
        raise UserError(f"labels are {labels.dtype}; expected torch.int64 (labels.long())")
    if labels.device != device:
        raise UserError(f"labels are on {labels.device}; expected {device}, as the network")
    if len(labels):
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= classes:
            raise UserError(f"labels are {low} to {high}; expected classes 0 to {classes - 1}")


def as_sequence(batches: Any) -> Sequence[Any]:
    """Return batches that can be counted and read several times; those of an iterator are read into a list first.

    Raises:
        UserError: they can't be iterated.
    """
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise UserError(f"batches are a {type(batches).__name__}; expected a list or a DataLoader of pairs")
    if isinstance(batches, Tensor | dict | str):
        raise UserError(f"batches are a {type(batches).__name__}; expected a list of pairs (images, labels)")
    try:
        len(batches)
    except TypeError:
        return list(batches)
    sized: Sequence[Any] = batches
    return sized


@contextmanager
def errors_explained(run: Run) -> Iterator[None]:
    """Explain errors of a step that its batch or the network's values have caused.

    Raises:
        UserError: the batch is too small for batch norm.
        NonFiniteError: a loss is not finite.
    """
    try:
        yield
    except NonFiniteError as error:
        state = run.network.state_dict()
        fault = next((name for name, value in state.items() if not value.isfinite().all()), None)
        where = f"; {fault} of the network is not finite" if fault else ""
        raise NonFiniteError(f"{str(error).partition(';')[0]}{where}; try a lower learning rate") from error
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError("batch norm can't normalise a batch of one image; expected more (drop_last=True)") from error
