"""One rank of tests/engine/test_ranks.py: every method trains in float64 on its share of every batch.

python ranks.py OUT, alone or under torchrun; saves {(method, mode): what came out} as OUT/RANK.pt.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import exitkit
from exitkit.benchmarks.speed.plain import DoubleBackward
from exitkit.engine import Engine, Ranks
from exitkit.plugins import registered
from exitkit.strategy import LocalBatch, Run

from toy import batches, chain, sgd

torch.set_num_threads(1)
world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
if world > 1:
    dist.init_process_group("gloo")


class Shares:
    """This rank's share of every batch; the last batch does not divide evenly."""

    def __init__(self, run):
        self.run = run

    def __iter__(self):
        whole = [*batches(1, size=8), *batches(1, size=5, seed=9)]
        for images, labels in whole:
            shares = torch.arange(len(labels)).tensor_split(world)
            mine = shares[rank]
            start = sum(map(len, shares[:rank]))
            self.run.batch = LocalBatch.make(images[mine], labels[mine], start, len(labels), world)
            yield self.run.batch


def strategy_of(method, settings):
    return DoubleBackward(**settings) if method == "double" else exitkit.build_strategy(method, **settings)


def trained(method, mode, settings):
    network = chain(3, batchnorm=True)
    engine = Engine(torch.device("cpu"), ranks=Ranks(rank, world))
    state = {}
    for number, phase in enumerate(strategy_of(method, settings).phases(2, 3)):
        torch.manual_seed(number)  # what an adaptation draws has to be the same on all ranks
        before = set(dict(network.named_parameters()))
        phase.strategy.adapt(network)
        engine.place(network)
        for name, parameter in network.named_parameters():
            names = {"all": ("",), "new": tuple(set(dict(network.named_parameters())) - before) or ("!",)}
            held = mode == "frozen" and name.startswith("stages.0.")
            parameter.requires_grad_(not held and name.startswith(names.get(phase.train, phase.train)))
        if mode != "train":
            for module in (network if mode == "eval" else network.stages[0]).modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()
        run = Run(network, phase.strategy, sgd(network), engine)
        run.position.epochs = 2
        torch.manual_seed(number)
        phase.strategy.prepare(run)
        for epoch in range(2):
            run.position.epoch = epoch
            phase.strategy.train_epoch(run, Shares(run))
        for name, side in run.auxiliaries.items():
            state |= {f"{name}.{key}": tensor for key, tensor in side.module.state_dict().items()}
    return state | {f"network.{name}": tensor for name, tensor in network.state_dict().items()}


cases = [(method, {}) for method in registered("method")]
cases += [("l2w", {"normalise": "samples", "meta_lr": 0.1}), ("double", {"normalise": "all"})]
cases += [("l2w", {"weights": "allocated"}), ("imta", {"variant": "released", "first": "joint"})]
cases += [("byot", {"variant": "released"}), ("beed", {"mode": "eed"})]
cases += [("kd", {"teachers": "later", "form": "cross-entropy"})]
cases += [("boostnet+l2w", {}), ("pcgrad+ofa", {}), ("metagf", {"branches": "side-by-side"})]
cases += [("adaloss", {"period": 1}), ("cgt", {"gate": "soft", "sharpness": 10.0})]
results = {
    (method, mode, str(settings)): trained(method, mode, settings)
    for method, settings in cases
    for mode in ("train", "eval", *["frozen"] * (not settings))
}
engine = Engine(torch.device("cpu"), ranks=Ranks(rank, world))
ragged = [torch.arange(length, dtype=torch.float64)[:, None] + 10 * length for length in (1, 2)]
results["gathered"] = {"": engine.ranks.gather(ragged[rank]) if world > 1 else torch.cat(ragged)}
torch.save(results, Path(sys.argv[1]) / f"{rank}.pt")
