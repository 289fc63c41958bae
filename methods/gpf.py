"""Global past-future exits: each exit reads the states of all exits up to it, and predictions of the later ones.

Paper: Liao et al., A Global Past-Future Early Exit Method for Accelerating Inference of Pre-trained Language Models,
NAACL 2021, https://aclanthology.org/2021.naacl-main.162

With exits k = 0..K-1, e_k [B, d_k] the feature of head k, and sg a stopped gradient,

    s_k = tanh(A_k e_k)  [B, D]                        the state of exit k
    t_kj = tanh(I_j s_k)  for j > k                    its prediction of the later state s_j
    S_j = sg s_j for j < k,  s_k for j = k,  t_kj for j > k
    r_j = U_j S_j,  q_j = V_j S_j  [B, C]
    gate = sigmoid(G tanh(mean_{j<=k} q_j))  [B, C]
    y_k = 2 gate * sum_{j<=k} r_j + 2 (1 - gate) * sum_{j>k} r_j

A_k, I_j, U_j, V_j and G are linear layers with a bias; the heads' own classifiers are not used. The loss is

    sum_k a_k CE(y_k) + mean_{k<K-1} mean_{j>k} (1 - cos(t_kj, sg s_j)),   a_k = (k + 1) / sum_j (j + 1)

The paper trains language models; it gives no D (`width`) for networks of images.

What differs from the published code (https://github.com/lancopku/Early-Exit): it applies dropout to S, and early in
training it stops the gradients of the first layers at random. Here there is no dropout, no other gradients are stopped
than above, and weights have PyTorch's initialisation of linear layers. The port for images
(https://github.com/kamadforge/early-exit-benchmark) has ReLU in place of each tanh, initial weights of standard
deviation 1 / sqrt(D), and no factor 2 before the two sums. The network's own last head remains outside of it, and
counts in the mean of the losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from exitkit.methods.joint import fixed_weights
from exitkit.networks import Carry, LogitLink, MultiExitNetwork, Outputs
from exitkit.strategy import (
    EXIT_WEIGHTS,
    LOGIT_LINK,
    OBJECTIVE,
    Batch,
    Run,
    TrainingStrategy,
    UserError,
    at_least_float32,
    setting,
)


class PastFutureLink(LogitLink):
    """Computes y_k from the states of the exits up to k and the predicted states of the later ones.

    The carry is (s_0, ..., s_k) and the predictions of each exit, ((t_01, ..., t_0,K-1), ..., (t_k,k+1, ...)).

    Args:
        widths: d_k, the width of each exit's feature.
        width: D, the width of a state.
        classes: C.
    """

    def __init__(self, widths: Sequence[int], width: int, classes: int) -> None:
        super().__init__()
        self.config = (tuple(widths), width, classes)
        self.states = nn.ModuleList(nn.Linear(inputs, width) for inputs in widths)
        self.imitators = nn.ModuleList(nn.Linear(width, width) for _ in widths[1:])
        self.answers = nn.ModuleList(nn.Linear(width, classes) for _ in widths)
        self.evidence = nn.ModuleList(nn.Linear(width, classes) for _ in widths)
        self.gate = nn.Linear(classes, classes)

    def forward(self, index: int, raw: Tensor, embedding: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """Return y_k [B, C], and the states and predictions so far."""
        earlier, predictions = ((), ()) if carry is None else carry
        state = torch.tanh(self.states[index](embedding.flatten(1)))
        predicted = tuple(torch.tanh(imitator(state)) for imitator in self.imitators[index:])
        states = [*(before.detach() for before in earlier), state]
        evidence = torch.stack([layer(s) for layer, s in zip(self.evidence, states, strict=False)]).mean(0)
        share = torch.sigmoid(self.gate(torch.tanh(evidence)))
        terms = [layer(s) for layer, s in zip(self.answers, [*states, *predicted], strict=True)]
        logits = 2 * share * torch.stack(terms[: index + 1]).sum(0)
        if predicted:
            logits = logits + 2 * (1 - share) * torch.stack(terms[index + 1 :]).sum(0)
        return logits, ((*earlier, state), (*predictions, predicted))


@dataclass(eq=False)
class PastFuture(TrainingStrategy):
    """Global past-future exits: classification from all states so far and from predicted later states.

    Liao et al., NAACL 2021, https://aclanthology.org/2021.naacl-main.162

    y_k [B, C] = 2 g * sum_{j<=k} U_j s_j + 2 (1 - g) * sum_{j>k} U_j t_kj, for states s_j and predicted states t_kj
    [B, D] and a gate g [B, C]; trained by weighted cross-entropies and by 1 - cos(t_kj, s_j).

    Example:
        >>> network = exitkit.build_network("msdnet-tiny")
        >>> exitkit.build_strategy("gpf", width=32).adapt(network)
        >>> type(network.link).__name__
        'PastFutureLink'
    """

    slots: ClassVar[frozenset[str]] = frozenset({LOGIT_LINK, OBJECTIVE, EXIT_WEIGHTS})
    paper: ClassVar[str] = (
        "Liao et al., A Global Past-Future Early Exit Method for Accelerating Inference of Pre-trained Language "
        "Models, NAACL 2021"
    )

    width: int = setting(128, "D, the width of a state")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1:
            raise UserError(f"width is {self.width}; expected at least 1")

    def adapt(self, network: MultiExitNetwork) -> None:
        """Set the link, with the states, their predictions and the classifiers."""
        link = PastFutureLink(network.embedding_widths(), self.width, network.num_classes)
        network.set_link(link.to(next(network.parameters())))

    def exit_weights(self, run: Run) -> Sequence[float]:
        """Return a_k."""
        return fixed_weights("linear", run.network)

    def exit_losses(self, run: Run, outputs: Outputs, batch: Batch) -> list[Tensor]:
        """Return CE(y_k) [B] plus the imitation loss divided by a_k, so that the weighted sum is the method's loss."""
        losses = super().exit_losses(run, outputs, batch)
        states, predictions = outputs.carry
        return [
            loss + imitation(ahead, states[index + 1 :]) / (weight * (len(losses) - 1)) if ahead else loss
            for index, (loss, ahead, weight) in enumerate(zip(losses, predictions, self.exit_weights(run), strict=True))
        ]


def imitation(predictions: Sequence[Tensor], states: Sequence[Tensor]) -> Tensor:
    """Return the mean over the later states of 1 - cos(prediction, state) [B]; no gradient reaches the states."""
    pairs = zip(predictions, states, strict=True)
    cosines = [cosine_similarity(at_least_float32(t), at_least_float32(s.detach()), dim=1) for t, s in pairs]
    return 1 - torch.stack(cosines).mean(0)
